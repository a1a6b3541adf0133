"""Language models without images: a prompt in, the next token out."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, NoReturn, Self

import torch
from PIL import Image
from torch import nn

from ...errors import UnsupportedModelError
from ...extras import require
from ...language.locate import find
from ...plans import Plan
from ...tokens import LayerTrace
from ...upstream.decoders import TEXT
from ...upstream.names import LAYERS
from ..bench.generation import timed_answer
from ..demo import smollm2
from ..loading.failures import explained
from ..sources.items import Item, evenly
from ..sources.listing import Left, printable
from .generating import CPU, Generating, built, check_weights, config_of, on_hub
from .subject import Answered, Bad, Checked, Given, Inputs, Wanted
from .tiles import Tile

DEMO = f"demo:{smollm2.NAME}"
_NO_IMAGES = "give --prompts FILE"


@dataclass(frozen=True)
class Text(Generating):
    """A language model without images, with its tokenizer."""

    tokenizer: Any = None

    called: ClassVar[str] = "a language model without images"
    gives: ClassVar[str] = "next tokens"
    refuses: ClassVar[Mapping[str, str]] = MappingProxyType(
        {name: _NO_IMAGES for name in ("--images", "--questions", "--prompt", "--size")}
    )
    things: ClassVar[str] = "prompt(s)"
    sees: ClassVar[bool] = False
    candidates: ClassVar[str] = "prompt tokens"

    @classmethod
    def named(cls, spec: str) -> bool:
        """Tell whether ``spec`` names one, by its architecture."""
        if spec == DEMO:
            return True
        config = config_of(spec)
        return next(iter(getattr(config, "architectures", None) or []), "").endswith(("ForCausalLM", "LMHeadModel"))

    @classmethod
    def _loaded(cls, spec: str, wanted: Wanted) -> Self:
        """Load it; without weights, config and tokenizer are downloaded."""
        if spec == DEMO:
            check_weights(wanted)
            demo, tokenizer = smollm2.load(wanted.dtype or torch.float32)
            return cls(demo, CPU, spec, smollm2.TITLE, smollm2.LICENCE, tokenizer)
        name = on_hub(spec, f"a language model is hf:NAME_OR_PATH or {DEMO}")
        transformers = require("transformers", "vlm")
        with explained(spec):
            config = transformers.AutoConfig.from_pretrained(name)
            model = built(transformers.AutoModelForCausalLM, name, config, wanted)
            tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        if find(model) is None:
            raise UnsupportedModelError(
                f"{spec} is a {type(model).__name__}, whose layers are not known; known language models without images: "
                f"{', '.join(TEXT.values())}"
            )
        return cls(model, CPU, spec, spec, None, tokenizer)

    @classmethod
    def holds(cls, model: nn.Module) -> bool:
        """Tell whether ``model`` is one whose layers are known."""
        return find(model) is not None

    # -- what goes in -------------------------------------------------------------------------------------------------

    @classmethod
    def items(cls, given: Given, limit: int | None, left: Left) -> tuple[list[Item], Bad]:
        """Read the prompts: one per line; of a .jsonl file objects ``{"prompt": "..."}``. Blank lines are passed over."""
        if given.prompts is None:
            raise ValueError(f"{cls.called} needs --prompts FILE")
        good: list[Item] = []
        bad: Bad = []
        for number, raw in enumerate(given.prompts.read_bytes().splitlines(), 1):
            if not raw.strip():
                continue
            where = f"{printable(given.prompts.name)}, line {number}"
            try:
                prompt = raw.decode() if given.prompts.suffix != ".jsonl" else json.loads(raw)["prompt"]
                if not isinstance(prompt, str) or not prompt.strip():
                    raise ValueError(f'"prompt" must be a text, got {prompt!r}')
                good.append(Item(f"line {number}", where, lambda: None, prompt))
            except (ValueError, TypeError, KeyError) as error:
                told = isinstance(error, ValueError) and not isinstance(error, json.JSONDecodeError)
                bad.append((where, str(error) if told else 'a line is an object like {"prompt": "..."}'))
        if not good:
            first = "".join(f" ({where}: {reason})" for where, reason in bad[:1])
            raise ValueError(f"no prompt in {given.prompts}{first}")
        return evenly(good, limit), bad

    def inputs(self, items: Sequence[Item], images: Sequence[Any]) -> Inputs:
        """Make a batch of one."""
        (item,) = items
        return self.prompted(item.prompt)

    def prompted(self, prompt: str) -> Inputs:
        """Make the same of a prompt: the text as it is, without a chat template.

        Raises:
            ValueError: fewer than 4 tokens: the first and last stay, and one has nobody to be compared with.
        """
        made = self.tokenizer(prompt, return_tensors="pt")
        if (count := made["input_ids"].shape[1]) < 4:
            raise ValueError(f"a prompt needs at least 4 tokens, got {count}: the first and last stay")
        return {**{name: made[name].to(self.device) for name in ("input_ids", "attention_mask")}, "logits_to_keep": 1}

    def answer(self, inputs: Inputs, length: int) -> Answered:
        """Return what follows the prompt."""
        made = timed_answer(self.model, inputs, length, self.device)
        return Answered(self.tokenizer.decode(made.tokens, skip_special_tokens=True).strip(), None, made)

    # -- where tokens may leave ---------------------------------------------------------------------------------------

    def layers(self) -> dict[str, list[int]]:
        """Return all of them."""
        found = find(self.model)
        assert found is not None, "of load and around"
        return {"language": list(range(len(list(LAYERS.get(found[1]).children()))))}

    @property
    def plan(self) -> Plan | None:
        """None: what may leave of a text is not known beforehand."""
        return None

    @property
    def counted(self) -> str:
        """The whole model."""
        return ""

    # -- what people see ----------------------------------------------------------------------------------------------

    @property
    def grid(self) -> tuple[int, int] | None:
        """Refuse: there is no image."""
        self._unseen()

    def tiles(self, image: Image.Image, inputs: Mapping[str, Any]) -> list[Tile]:
        """Refuse: there is no image."""
        self._unseen()

    def total(self, inputs: Mapping[str, Any]) -> int:
        """Refuse: there is no image."""
        self._unseen()

    def facts(
        self, image: Image.Image, inputs: Mapping[str, Any], trace: Sequence[LayerTrace], reasons: Sequence[Any],
        side: int = 320, limit: int = 30_000,
    ) -> dict[str, Any]:  # fmt: skip
        """Refuse: there is no image."""
        self._unseen()

    def contracts(self, tick: Callable[[], None] = lambda: None) -> Checked:
        """Refuse: those of encoders and of vision-language models need images."""
        self._unseen()

    def _unseen(self) -> NoReturn:
        raise ValueError(f"{self.spec or self.title} is {self.called}: there is nothing to look at")
