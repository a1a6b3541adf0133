"""Vision encoders: images in, embeddings out."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Self

import torch
from PIL import Image
from torch import Tensor, nn

from ... import testing
from ...methods.saint import Saint
from ...plans import Plan
from ...presets import recipe
from ...session import pruned
from ...tokens import LayerTrace
from ...upstream.specs import part
from ...vision.locate import locate
from ..bench.forward import ForwardBench, OverPictures, bench_forward, count_pictures, representative
from ..images import data_uri
from ..loading.models import check_source, find_source
from ..loading.source import Source
from ..sources.items import Item
from ..sources.listing import Left
from .agreement import agreement, answer
from .facts import layer_facts
from .features import Features
from .subject import COSINE, Answered, Bad, Checked, Given, Inputs, Subject, Wanted, dtype_and_place
from .tiles import Tile

ROUNDS, ROUNDS_OF_SEVERAL = 20, 5  # timed, of one forward and of several, which are that many more already
_NOT_ASKED = "it is asked nothing, as vision-language models are"


@dataclass(frozen=True)
class Encoder(Subject):
    """An encoder with its own preprocessing.

    Example:
        >>> Encoder.load("timm:test_vit", pretrained=False).image_size
        (160, 160)

    Attributes:
        usual: the plan that suits it; None where nothing is known.
        source: how its library prepares images; None of a model that was handed over.
    """

    usual: Plan | None = None
    source: Source | None = None

    called: ClassVar[str] = "an encoder"
    gives: ClassVar[str] = "embeddings"
    refuses: ClassVar[Mapping[str, str]] = MappingProxyType(
        {
            "--prompt": _NOT_ASKED,
            "--questions": _NOT_ASKED,
            "--prompts": "give --images",
            "--new-tokens": "it writes no answers",
        }
    )
    measure: ClassVar[str] = COSINE
    tuned_by: ClassVar[str] = COSINE
    slot: ClassVar[str] = "vision"
    counts: ClassVar[bool] = True
    checks: ClassVar[Sequence[str]] = tuple(testing.CONTRACTS)
    together: ClassVar[int] = 8

    @classmethod
    def named(cls, spec: str) -> bool:
        """Tell whether ``spec`` can be one: whatever is of no other kind."""
        return True

    @classmethod
    def known(cls, spec: str) -> None:
        """Ask the library; see :meth:`Subject.known`."""
        check_source(spec)

    @classmethod
    def _loaded(cls, spec: str, wanted: Wanted) -> Self:
        """Load it; of a model with several towers, the one that sees."""
        source = find_source(spec, wanted.pretrained, wanted.size)
        if wanted.dtype is not None:
            source.model.to(wanted.dtype)
        usual = source.plan or recipe("vit/published")
        return cls(source.model, torch.device("cpu"), spec, source.title or spec, source.licence, usual, source)

    @classmethod
    def holds(cls, model: nn.Module) -> bool:
        """Tell whether ``model`` can be one: whatever is of no other kind; what is none is refused by what needs one."""
        return True

    # -- what goes in -------------------------------------------------------------------------------------------------

    @classmethod
    def items(cls, given: Given, limit: int | None, left: Left) -> tuple[list[Item], Bad]:
        """List the images; see :meth:`Subject.items`."""
        return cls.pictures(given, limit, left), []

    def inputs(self, items: Sequence[Item], images: Sequence[Image.Image]) -> Inputs:
        """Make B images [B, 3, height, width], or what the model takes in their place."""
        return self.pixels(images)

    def pixels(self, images: Sequence[Image.Image]) -> Inputs:
        """Make the same of images alone."""
        if self._source.batch is not None:
            return {**dtype_and_place(self.model, self.device, self._source.batch(list(images))), **self._source.extra}
        return self.stacked([self.preprocess(image) for image in images])

    def preprocess(self, image: Image.Image) -> Tensor:
        """Return the image as the model takes it, [3, height, width], float32, on the CPU."""
        return self._source.pixels(image, self.image_size)

    def stacked(self, pixels: Sequence[Tensor]) -> Inputs:
        """Make the inputs of B images that :meth:`preprocess` has seen."""
        made = {self._source.argument: torch.stack(list(pixels))}
        return {**dtype_and_place(self.model, self.device, made), **self._source.extra}

    @property
    def one_size(self) -> bool:
        """Tell whether pictures are cut to one size; some models take their patches flattened, in any shape."""
        return self._source.batch is None

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels of what the model sees."""
        return self._source.image_size

    @property
    def _source(self) -> Source:
        if self.source is None:
            raise ValueError(f"nothing is known of how {self.title} takes images: load it by its name")
        return self.source

    # -- what comes out -----------------------------------------------------------------------------------------------

    def compared(self, output: Any, length: int = 1) -> Tensor:
        """Return embeddings [B, C], or maps [B, 1, H, W]."""
        return answer(output)[1].clone()

    def losses(self, base: Tensor, found: Tensor) -> list[float]:
        """Return 1 - cosine of vectors, 1 - correlation of maps."""
        return [1 - value for value in agreement(base, found).values]

    def answer(self, inputs: Inputs, length: int) -> Answered:
        """Return the model's output."""
        with torch.inference_mode():
            return Answered(None, self.model(**inputs))

    def prepared(self, image: Image.Image) -> Image.Image | Tensor:
        """Return the image preprocessed, [3, height, width], where all have one size."""
        return self.preprocess(image) if self.one_size else image

    @contextmanager
    def rows(self, max_new_tokens: int) -> Iterator[Callable[[Sequence[str], Sequence[Any]], list[dict[str, Any]]]]:
        """Yield what makes an embedding of each image: what goes into the classifier, or the model's answer."""
        features = Features(self.model)

        def made(_questions: Sequence[str], images: Sequence[Any]) -> list[dict[str, Any]]:
            found, _ = features(self.stacked(images) if self.one_size else self.pixels(images))  # [B, C]
            return [
                {"embedding": row.numpy()} if bool(finite) else {"error": "the embedding is not finite"}
                for row, finite in zip(found, torch.isfinite(found).all(1), strict=True)
            ]

        try:
            yield made
        finally:
            features.remove()

    # -- where tokens may leave ---------------------------------------------------------------------------------------

    def layers(self) -> dict[str, list[int]]:
        """Return the blocks."""
        _, encoder, spec = locate(self.model)
        return {"vision": list(range(len(part(encoder, spec.blocks))))}

    @property
    def plan(self) -> Plan | None:
        """The recipe that the loader knows."""
        return self.usual

    @property
    def counted(self) -> str:
        """Path of the encoder, without a head that is no part of it."""
        return locate(self.model)[0]

    # -- what people see ----------------------------------------------------------------------------------------------

    @property
    def grid(self) -> tuple[int, int] | None:
        """Rows and columns of patches; None where they arrive flattened, or lie on no grid."""
        _, encoder, found = locate(self.model)
        if found.patch is None or not self.one_size:
            return None
        stride: Any = encoder.get_submodule(found.patch).stride
        return self.image_size[0] // stride[0], self.image_size[1] // stride[1]

    def picture(self, image: Image.Image, scale: int = 2) -> Image.Image:
        """Return what the model sees of ``image``, to be drawn on: the same crop, ``scale`` times the resolution.

        Raises:
            ValueError: the model takes its patches flattened.
        """
        if not self.one_size:
            raise ValueError(f"{self.spec} takes its patches flattened, in any shape: there is no fixed crop to draw")
        height, width = self.image_size
        values = self._source.pixels(image, (height * scale, width * scale))
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in self._source.norm())
        array = ((values * std + mean) * 255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
        return Image.fromarray(array)

    def tiles(self, image: Image.Image, inputs: Mapping[str, Any]) -> list[Tile]:
        """Return the crop."""
        picture, grid = self.picture(image), self.grid
        if grid is None:
            raise ValueError(f"{self.spec} shows no patch grid, so there is nothing to draw on")
        return [Tile(picture, grid)]

    def total(self, inputs: Mapping[str, Any]) -> int:
        """Return the patches of the crop."""
        rows, columns = self.grid or (0, 0)
        return rows * columns

    def facts(
        self, image: Image.Image, inputs: Mapping[str, Any], trace: Sequence[LayerTrace], reasons: Sequence[Any],
        side: int = 320, limit: int = 30_000,
    ) -> dict[str, Any]:  # fmt: skip
        """Return the crop, where there is one, and what stayed of it."""
        seen = {"picture": data_uri(self.picture(image), side, limit)} if self.one_size else {}
        return {**seen, "layers": [layer_facts(t, 0, why[0]) for t, why in zip(trace, reasons, strict=True)]}

    def told(self, prompt: str | None) -> dict[str, Any]:
        """Return size and grid."""
        return {"image_size": self.image_size, "grid": self.grid}

    # -- times --------------------------------------------------------------------------------------------------------

    def bench(
        self, plans: Mapping[str, Plan], photos: Sequence[Image.Image], *, prompt: str | None = None,
        new_tokens: int | None = None, repeats: int | None = None, warmup: int = 3, extras: bool = True,
        batch: int | None = None, tick: Callable[[], None] = lambda: None,
    ) -> ForwardBench:  # fmt: skip
        """Time a forward; see :meth:`Subject.bench`. With ``batch`` what is left of each photograph alone is counted first."""
        (plan,) = plans.values()
        if batch is None:
            return bench_forward(
                self.model, plan, self.pixels(photos), repeats or ROUNDS, warmup, extras=extras, tick=tick
            )
        counts = count_pictures(self.model, plan, (self.pixels([photo]) for photo in photos), tick)
        if batch == 1:
            timed = representative(counts)
            forwards = [self.pixels([photos[i]]) for i in timed]
        else:
            timed = [i % len(photos) for i in range(batch)]
            forwards = [self.pixels([photos[i] for i in timed])]
        usual = ROUNDS if len(forwards) == 1 else ROUNDS_OF_SEVERAL
        over = OverPictures.of(counts, timed)
        return bench_forward(
            self.model, plan, forwards, repeats or usual, warmup, extras=extras, pictures=over, tick=tick
        )  # fmt: skip

    # -- proof --------------------------------------------------------------------------------------------------------

    def contracts(self, tick: Callable[[], None] = lambda: None) -> Checked:
        """Run them on the model, or on its encoder where a head needs the full grid."""
        path, encoder, spec = locate(self.model)
        about = f"{type(encoder).__name__} ({spec.library}: {spec.title})" + (f" at {path}" if path else "")
        target = self.model
        inputs = testing.example_inputs(target)
        try:
            with pruned(target, Saint(keep=0.75)):
                testing.run(target, inputs)
        except ValueError as error:  # a head that needs the full grid
            if target is encoder:
                raise
            about += f"\nchecking the encoder alone: {error}"
            target = encoder
            inputs = testing.example_inputs(target)
        plan = testing.example_plan(target, inputs)
        return Checked(about, plan, testing.check_model(target, plan, inputs, tick=tick))
