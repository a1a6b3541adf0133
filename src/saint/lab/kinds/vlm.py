"""Vision-language models: an image and a question in, an answer out."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any, ClassVar, Self

import numpy as np
import torch
from PIL import Image
from torch import nn

from ...errors import UnsupportedModelError
from ...extras import require
from ...plans import Plan
from ...presets import recipe
from ...session import pruned
from ...testing.vlm import CONTRACTS, check_vlm, hybrid_plan
from ...tokens import LayerTrace
from ...upstream import registry
from ...upstream.names import LAYERS
from ...upstream.specs import part
from ...vision.derive import with_tower
from ...vision.locate import locate_tower
from ...vlm.locate import find, locate
from ...vlm.prompts import visual_places, with_picture
from ...vlm.smaller import smaller_pictures
from ...work import Stack, read_decoder
from ..bench.generation import GenerationBench, bench_generation, timed_answer
from ..demo import small_llava
from ..images import data_uri
from ..loading.failures import explained
from ..loading.plans import Choice
from ..sources.items import Item, evenly
from ..sources.listing import Left
from ..sources.questions import default_prompt, read_questions
from .facts import steps_of
from .generating import CPU, Generating, built, check_weights, config_of, on_hub
from .modes import modes
from .subject import Answered, Bad, Checked, Given, Inputs, Wanted, dtype_and_place, shrunk_by
from .tiles import Tile, tiles

DEMO = f"demo:{small_llava.NAME}"
DESCRIBE = "Describe the image."  # what is asked where nobody asks


@dataclass(frozen=True)
class VLM(Generating):
    """A vision-language model with its processor; without one, where a model was handed over.

    Attributes:
        processor: see :meth:`prompted`.
        pixels: what pictures are shrunk to in its inputs, see :func:`saint.smaller_pictures`; None leaves them.
    """

    processor: Any = None
    pixels: int | float | None = None

    called: ClassVar[str] = "a vision-language model"
    gives: ClassVar[str] = "answers"
    checks: ClassVar[Sequence[str]] = tuple(CONTRACTS)
    refuses: ClassVar[Mapping[str, str]] = MappingProxyType(
        {
            "--size": "its processor chooses the size of pictures",
            "--labels": "give --questions with answers",
            "--why": "its tiles and its question are drawn without",
            "--prompts": "give --images, and --questions or --prompt",
        }
    )

    @classmethod
    def named(cls, spec: str) -> bool:
        """Tell whether ``spec`` names one that answers questions about images."""
        if spec == DEMO:
            return True
        if (config := config_of(spec)) is None:
            return False
        kind = next(iter(config.architectures or []), "")
        names = require("transformers.models.auto.modeling_auto", "vlm").MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
        classes = {one for value in names.values() for one in ([value] if isinstance(value, str) else value)}
        packages = {_package(model) for model in registry.families()}
        here = _package(f"{type(config).__module__}.{type(config).__qualname__}")
        return kind in classes or (here in packages and kind.endswith("ForConditionalGeneration"))

    @classmethod
    def _loaded(cls, spec: str, wanted: Wanted) -> Self:
        """Load it; without weights, config and processor are downloaded."""
        if wanted.size is not None:
            raise ValueError(f"size is for encoders: {cls.refuses['--size']}")
        if spec == DEMO:
            check_weights(wanted)
            demo = small_llava.load().to(wanted.dtype or torch.float32)
            return cls(demo, CPU, spec, spec, small_llava.LICENCE, small_llava.processor())
        name = on_hub(spec, f"a vision-language model is hf:NAME_OR_PATH or {DEMO}")
        transformers = require("transformers", "vlm")
        auto = transformers.AutoModelForImageTextToText
        with explained(spec):
            config = transformers.AutoConfig.from_pretrained(name)
            if type(config) not in auto._model_mapping:
                raise ValueError(f"{spec} is a {config.model_type} model, which does not answer questions about images")
            model = built(auto, name, config, wanted)
            processor = transformers.AutoProcessor.from_pretrained(name)
        if find(model) is None:
            known = ", ".join(family.title for family in registry.families().values())
            raise UnsupportedModelError(f"{spec} is a {type(model).__name__}, which cannot be pruned; known: {known}")
        if getattr(processor, "tokenizer", None) is not None:
            processor.tokenizer.padding_side = "left"
        return cls(model, CPU, spec, spec, None, processor)

    @classmethod
    def holds(cls, model: nn.Module) -> bool:
        """Tell whether ``model`` is one of a known family."""
        return find(model) is not None

    # -- what goes in -------------------------------------------------------------------------------------------------

    @classmethod
    def items(cls, given: Given, limit: int | None, left: Left) -> tuple[list[Item], Bad]:
        """List the questions, or the images with the prompt; see :meth:`Subject.items`."""
        if given.questions is not None and given.prompt is not None:
            raise ValueError("give --questions or --prompt, not both")
        if given.questions is not None and given.images is not None:
            asked, unreadable = read_questions(given.questions, given.images)
            some = [question.item(default_prompt(question)) for question in evenly(asked, limit)]
            return some, [(failure.where, failure.reason) for failure in unreadable]
        prompt = DESCRIBE if given.prompt is None else given.prompt
        return [replace(item, prompt=prompt) for item in cls.pictures(given, limit, left)], []

    def inputs(self, items: Sequence[Item], images: Sequence[Image.Image]) -> Inputs:
        """Make the keyword arguments of ``generate``: one image in front of each prompt."""
        return self.prompted([item.prompt or DESCRIBE for item in items], images)

    def prompted(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> Inputs:
        """Make the same of prompts and images.

        Raises:
            ValueError: the processor says neither how a chat looks nor what stands for an image; or pictures cannot be shrunk as
                ``pixels`` says.
        """
        processor, options = self.processor, {}
        texts = [with_picture(processor, prompt) for prompt in prompts]
        if self.pixels is not None:
            found = smaller_pictures(processor, images, self.pixels)
            images, options = found.images, found.options
        made = processor(
            text=texts, images=[[image] for image in images], return_tensors="pt", padding=len(texts) > 1, **options
        )
        return dtype_and_place(self.model, self.device, made)

    # -- what comes out -----------------------------------------------------------------------------------------------

    def answer(self, inputs: Inputs, length: int) -> Answered:
        """Return a greedy answer, with the times of its tokens."""
        made = timed_answer(self.model, inputs, length, self.device)
        return Answered(self.decode(made.tokens), None, made)

    def decode(self, tokens: Any) -> str:
        """Return new tokens as text."""
        return str(self.processor.decode(tokens, skip_special_tokens=True)).strip()

    @contextmanager
    def rows(self, max_new_tokens: int) -> Iterator[Callable[[Sequence[str], Sequence[Any]], list[dict[str, Any]]]]:
        """Yield what makes an answer about each image, greedily."""

        def made(questions: Sequence[str], images: Sequence[Any]) -> list[dict[str, Any]]:
            inputs = self.prompted(questions, images)
            with torch.inference_mode():
                tokens = self.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1)
            new = tokens[:, inputs["input_ids"].shape[1] :]
            rows: list[dict[str, Any]] = [{"answer": self.decode(one)} for one in new]
            if self.pixels is not None:
                whole = replace(self, pixels=None).prompted(questions, images)
                counts = [visual_places(self.model, given).sum(1).tolist() for given in (whole, inputs)]
                for row, count, left in zip(rows, *counts, strict=True):
                    row |= {"tokens": count, "kept": [{"stage": "processor", "layer": None, "tokens": left}]}
            return rows

        yield made

    # -- where tokens may leave ---------------------------------------------------------------------------------------

    def layers(self) -> dict[str, list[int]]:
        """Return those of the tower that reach the language model, and the language model's."""
        _, model, spec = locate(self.model, "language")
        spec, layers = with_tower(model, spec), {}
        if spec.no_vision is None:
            _, tower, tower_spec = locate_tower(model, spec)
            depth = len(part(tower, tower_spec.blocks))
            # None: features of several layers, which would hold different tokens
            used = spec.feature_layer(model, depth)
            if used is not None:
                layers["vision"] = list(range(min(depth, used)))
        decoder = model.get_submodule(spec.decoder)
        layers["language"] = list(range(len(list(LAYERS.get(decoder).children()))))
        return layers

    @property
    def plan(self) -> Plan:
        """The recipe of a demo model, else the hybrid mode, or the language mode where there is none."""
        if self.spec == DEMO:
            return recipe("small-llava/hybrid")
        own = modes(self.model)
        return own.get("hybrid", own["language"])

    def fitted(self, plan: Plan) -> tuple[Plan, Self]:
        """Leave smaller pictures to the processor where the tower is not understood; see :meth:`Subject.fitted`."""
        if plan.pixels is None or self.processor is None:
            return plan, self
        try:
            with pruned(self.model, Plan(vision=plan.vision[0])):
                return plan, self
        except UnsupportedModelError:
            return replace(plan, vision=plan.vision[1:]), replace(self, pixels=plan.pixels)

    @property
    def shrinks(self) -> dict[str, Any] | None:
        """Say what its processor shrinks pictures to."""
        return None if self.pixels is None else {"shrunk": "by the processor", "pixels": self.pixels}

    @property
    def plans(self) -> dict[str, Plan]:
        """A plan per mode."""
        return modes(self.model)

    @property
    def modes(self) -> dict[str, Plan]:
        """A plan per mode."""
        return self.plans

    @property
    def counted(self) -> str:
        """Path of the language model: the tower is left as it is."""
        path, _, spec = locate(self.model, "language")
        return ".".join(part for part in (path, spec.decoder) if part)

    # -- what people see ----------------------------------------------------------------------------------------------

    @property
    def grid(self) -> None:
        """None: each picture has its own."""
        return None

    def tiles(self, image: Image.Image, inputs: Mapping[str, Any]) -> list[Tile]:
        """Return what the tower is shown."""
        return tiles(self.model, self.processor, inputs)

    def total(self, inputs: Mapping[str, Any]) -> int:
        """Return the placeholders of the image in the prompt."""
        return int(visual_places(self.model, inputs).sum())

    def cost(self, inputs: Mapping[str, Any]) -> tuple[list[int], float | None]:
        """Return the visual tokens of each prompt, and the FLOPs of the language model's layers for all, unpruned and without
        padding; None: unknown.
        """
        _, model, spec = locate(self.model, "language")
        text: Any = model.get_submodule(spec.decoder)
        layers, exact = read_decoder(list(LAYERS.get(text).children()), text.config)
        lengths = inputs["attention_mask"].sum(1).double()
        work = float(Stack(layers).flops([lengths] * (len(layers) + 1)).sum()) if exact else None
        return visual_places(self.model, inputs).sum(1).tolist(), work

    def facts(
        self, image: Image.Image, inputs: Mapping[str, Any], trace: Sequence[LayerTrace], reasons: Sequence[Any],
        side: int = 320, limit: int = 30_000,
    ) -> dict[str, Any]:  # fmt: skip
        """Return the tiles, and what stayed of them at each stage."""
        seen = self.tiles(image, inputs)
        return {
            "visual_tokens": self.total(inputs),
            "tiles": [list(tile.grid) for tile in seen],
            "pictures": [data_uri(tile.picture, side, limit) for tile in seen],
            "layers": steps_of(trace, reasons),
        }

    def told(self, prompt: str | None) -> dict[str, Any]:
        """Return what was asked."""
        return {"prompt": prompt or DESCRIBE}

    # -- times --------------------------------------------------------------------------------------------------------

    def bench(
        self, plans: Mapping[str, Plan], photos: Sequence[Image.Image], *, prompt: str | None = None,
        new_tokens: int | None = None, repeats: int | None = None, warmup: int = 3, extras: bool = True,
        batch: int | None = None, tick: Callable[[], None] = lambda: None,
    ) -> GenerationBench:  # fmt: skip
        """Time answers; see :meth:`Subject.bench`."""
        asked = [photos[i % len(photos)] for i in range(batch or len(photos))]
        questions, fitted = [prompt or DESCRIBE] * len(asked), {name: self.fitted(plan) for name, plan in plans.items()}
        own = {name: one for name, (_, one) in fitted.items() if one is not self}
        result = bench_generation(
            self.model, {name: plan for name, (plan, _) in fitted.items()}, self.prompted(questions, asked),
            32 if new_tokens is None else new_tokens, repeats or 20, warmup,
            own={name: one.prompted(questions, asked) for name, one in own.items()}, tick=tick,
        )  # fmt: skip
        return replace(result, plans=dict(plans), conditions=result.conditions | shrunk_by(own))

    # -- files --------------------------------------------------------------------------------------------------------

    def exported(self, choice: Choice) -> Plan:
        """Return the plan that was given: the tower is what is exported, and a share of the work is of the whole model."""
        if choice.keep is not None:
            raise ValueError(
                f"the tower of {self.called} is what is exported, which has no plan of its own: give --plan"
            )
        return self.planned(choice)

    def seen(self, inputs: Inputs) -> Inputs:
        """Return what the tower takes."""
        return {"pixel_values": inputs["pixel_values"]}

    # -- proof --------------------------------------------------------------------------------------------------------

    def contracts(self, tick: Callable[[], None] = lambda: None) -> Checked:
        """Run them over all stages, and generation."""
        _, module, family = locate(self.model, "language")
        plan = hybrid_plan(self.model)
        about = f"{type(module).__name__} (transformers: {family.title})"
        return Checked(about, plan, check_vlm(self.model, partial(_samples, self), plan, tick=tick))


def _package(cls: str) -> str:
    """Return the package of a qualified class name: configs lie beside the models they are of."""
    return cls.rsplit(".", 2)[0]


def _samples(vlm: VLM, which: Sequence[int]) -> Inputs:
    """Make inputs of two pictures with questions of different length."""
    generator = np.random.default_rng(0)
    noise = [generator.integers(0, 256, (336, 336, 3), dtype=np.uint8) for _ in range(2)]
    noise[1][:168] = noise[1][:168] // 16 + 100  # half of it is calm
    questions = ("What is in the picture?", "Which of the two halves of the picture is calm, and which one is not?")
    return vlm.prompted([questions[i] for i in which], [Image.fromarray(noise[i]) for i in which])
