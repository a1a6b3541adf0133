"""Small random twins of vision-language models, and prompts with images for them that need no processor and no pixels.

Features of images are given as computed earlier (``mm_encoder_outputs``), so that a twin shows what happens between the tower
and the answer, whatever its tower is.

Letters: B prompts, L positions of the longest prompt, K visual tokens of an image, C channels.
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModelError
from ..methods.saint_full_graph import SaintFullGraph
from ..plans import Plan, Stage
from ..upstream.names import (
    DEEPSTACK_FEATURES,
    DEEPSTACK_MAP,
    DEEPSTACK_OF,
    ENCODED,
    ENDS,
    IMAGE_GRID,
    IMAGE_TOKEN,
    KINDS_OF_TOKENS,
    MERGE_SIDE,
    STARTS,
    VISION_CONFIG,
    Parameters,
)
from ..upstream.pictures import pictures
from ..upstream.specs import FamilySpec
from ..vision.derive import with_tower
from ..vlm.locate import find
from .contracts import outcomes
from .shrink import configs, is_token, shrunken
from .vlm import Make, contracts_for, hybrid_plan

STAGES = ("connector", "language")  # that need no pictures
TOWER = Plan(vision=Stage(SaintFullGraph(keep=0.6), layers=[0, 1]))
FRONT = Plan(connector=SaintFullGraph(keep=0.6))
SMALL = 20_000_000  # parameters up to which a model is its own twin's shape
WIDE = 600_000_000  # parameters up to which a twin may be as wide as the model
_IMAGES = (8, 12), (8, 8)  # rows and columns of patches of the images of a prompt
_WORDS = (4, 5), (9, 3)  # words in front of and behind the image
_TOKENS, _UNUSED = 60, 61  # words are drawn from the first tokens; one behind them


def twin(model: nn.Module) -> tuple[nn.Module, "Prompts"]:
    """A small model of the same class and prompts for it: in eval mode, in float32, on the CPU.

    It has few and narrow layers; where such a one does not run, few layers as wide as they are. The random weights are the same
    for every call, and of a size at which every layer matters.

    Raises:
        UnsupportedModelError: none runs; the message says what came of each.
    """
    errors = []
    for shape in _SHAPES:
        try:
            small = grown(type(model), shape(model))
            return small, Prompts(small)
        except Exception as error:  # whatever a class says of a configuration that it cannot be built from
            errors.append(f"{type(error).__name__}: {error}")
    raise UnsupportedModelError(f"no twin of it runs ({'; '.join(dict.fromkeys(errors))})")


def _as_it_is(model: Any) -> Any:
    if sum(p.numel() for p in model.parameters()) > SMALL:
        raise UnsupportedModelError("it is large itself")
    return copy.deepcopy(model.config)


def _wide(model: Any) -> Any:
    config = shrunken(model.config, narrow=False)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in type(model)(copy.deepcopy(config)).parameters())
    if parameters > WIDE:
        raise UnsupportedModelError(f"with a few layers it still has {parameters:,} parameters")
    return config


_SHAPES: tuple[Callable[[Any], Any], ...] = (_as_it_is, lambda model: shrunken(model.config), _wide)


def grown(cls: Any, config: Any) -> nn.Module:
    """A ``cls`` of ``config`` with random weights that matter."""
    for name in ("quantization_config", "dtype"):
        if hasattr(config, name):
            setattr(config, name, None)
    token = IMAGE_TOKEN.of(config)
    if token is not None and getattr(config, token) is None:  # left to checkpoints
        setattr(config, token, _UNUSED)
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            model = cls._from_config(
                copy.deepcopy(config), attn_implementation="sdpa"
            )  # through which oracles hide keys
        except ValueError:  # a part of it has no such attention
            model = cls._from_config(config)
        model = model.float().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim >= 2 and parameter.is_floating_point():
                    fan = math.prod(parameter.shape[1:]) if parameter.ndim > 3 else max(parameter.shape[-2:])
                    parameter.normal_(0, 1.5 / math.sqrt(fan))
            table = model.get_input_embeddings().weight
            table.normal_(0, 1)
    if (generation := getattr(model, "generation_config", None)) is not None:
        generation.eos_token_id, generation.pad_token_id = None, 0
    return model


def try_stages(model: nn.Module, spec: FamilySpec) -> dict[str, str]:
    """Run contracts on a twin of ``model``: of each stage "", or why it is not possible.

    The vision stage is left out where no pictures can be made for the tower of the twin.

    Args:
        model: a vision-language model, also inside of others; only its class and configuration are used.
        spec: read off it.
    """
    try:
        small, make = twin(_generating(model))
    except UnsupportedModelError as error:
        return dict.fromkeys(STAGES, str(error))
    language = hybrid_plan(small).language
    plans = {"connector": FRONT, "language": Plan(connector=FRONT.connector, language=language)}
    verdict = {stage: _first_failure(small, plan, make) for stage, plan in plans.items()}
    return verdict | _try_tower(small)


def _try_tower(model: nn.Module) -> dict[str, str]:
    found = find(model)
    assert found is not None
    _, vlm, spec = found
    spec = with_tower(vlm, spec)
    if spec.no_vision is not None:
        return {"vision": spec.no_vision}
    try:
        inputs = pictured(model, vlm, spec)
    except UnsupportedModelError:
        return {}
    return {"vision": _first_failure(model, TOWER, lambda _: inputs)}


def pictured(model: Any, vlm: Any, spec: FamilySpec, seed: int = 0) -> dict[str, Any]:
    """A left-padded batch of two prompts with a random picture each: keyword inputs of ``model``.

    Args:
        model: a vision-language model.
        vlm: the module in it that ``spec`` is of.
        spec: with a tower.
        seed: of private generators.

    Raises:
        UnsupportedModelError: no form of pictures that is known goes through the model.
    """
    errors = [f"{type(vlm).__name__} takes pictures in no form that is known"]
    for given in pictures(vlm, vlm.get_submodule(spec.tower), seed):
        try:
            with torch.no_grad():
                features = vlm.get_image_features(**given.inputs, return_dict=True).pooler_output
                inputs = {**_prompted(model, features, seed), **given.inputs}
                model(**inputs)
        except Exception as error:  # whatever a class says of a form that it does not take
            errors.append(f"{type(error).__name__}: {error}")
        else:
            return inputs
    raise UnsupportedModelError("; ".join(errors))


def _prompted(model: Any, features: Any, seed: int) -> dict[str, Any]:
    """Two prompts with a placeholder for each row of their features."""
    config, image = model.config, IMAGE_TOKEN.get(model.config)
    generator = torch.Generator().manual_seed(seed)
    words = _words(config)
    rows = []
    for own, counts in zip(features, _WORDS, strict=True):
        before, behind = (words[torch.randint(len(words), (n,), generator=generator)].tolist() for n in counts)
        start, end = _around(config)
        rows.append([*before, *start, *[image] * own.reshape(-1, own.shape[-1]).shape[0], *end, *behind])
    return _padded(rows, image, Parameters(type(model).forward).names)


def _words(config: Any) -> Tensor:
    """Tokens that mean nothing to a model."""
    special = set(_specials(config))
    return torch.tensor([token for token in range(3, _TOKENS) if token not in special])


def _around(config: Any) -> list[list[int]]:
    """Return what stands in front of an image and behind it."""
    return [[] if token is None else [token] for token in (STARTS.get(config), ENDS.get(config))]


def _padded(rows: list[list[int]], image: int, names: Sequence[str]) -> dict[str, Any]:
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    kinds = [name for role in KINDS_OF_TOKENS if (name := role.among(names)) is not None]
    return {"input_ids": ids, "attention_mask": mask, **{name: (ids == image).long() for name in kinds}}


def _first_failure(model: nn.Module, plan: Plan, make: Make) -> str:
    for result in outcomes(contracts_for(plan), model, plan, make):
        if result.outcome == "failed":
            return f"{result.contract}: {result.detail}"
    return ""


def _generating(model: nn.Module) -> nn.Module:
    """The outermost model of transformers in ``model`` that generates; of a model without a head, one with it."""
    for module in model.modules():
        if hasattr(type(module), "_from_config"):
            given: Any = module
            if given.can_generate():
                return module
    raise UnsupportedModelError(
        f"{type(model).__name__} holds no model that generates: apply the plan to the one with a head"
    )


_FORMS: dict[str, Callable[[list[Tensor]], Any]] = {"list": list, "rows": torch.cat, "stack": torch.stack}


class Prompts:
    """Left-padded batches of prompts with an image each, whose features are given, as keyword inputs of a model.

    What a class takes as features is tried out: a list with those of each image, the rows of all, or images of one size in a
    stack; with a token behind each row of the grid, or without.

    Args:
        model: a vision-language model whose forward takes features that were computed earlier.

    Raises:
        UnsupportedModelError: it does not, or its forward runs on no form of them.
    """

    def __init__(self, model: nn.Module) -> None:
        parameters = Parameters(type(model).forward)
        if not parameters.has(ENCODED):
            raise UnsupportedModelError(f"the forward of {type(model).__name__} takes no {ENCODED}")
        given: Any = model
        self.model, self.config = given, given.config
        self.names = parameters.names
        self.image = IMAGE_TOKEN.get(self.config)
        if self.image is None:
            raise UnsupportedModelError(f"the configuration of {type(model).__name__} names no {IMAGE_TOKEN}")
        self.words = _words(self.config)
        self.deepstack = _deepstack(self.config)
        self.form, self.newline = "list", 0
        self._settle()

    def _settle(self) -> None:
        errors = []
        for self.newline, self.form in product((0, 1), _FORMS):
            try:
                with torch.no_grad():
                    self.model(**self([0, 1]))
            except Exception as error:  # whatever a class says of a form that it does not take
                errors.append(f"{type(error).__name__}: {error}")
            else:
                return
        raise UnsupportedModelError(
            f"the forward of {type(self.model).__name__} does not run on features that are given: "
            + "; ".join(dict.fromkeys(errors))
        )

    def __call__(self, samples: Sequence[int], seed: int = 0) -> dict[str, Any]:
        """The prompts with these numbers (0 and 1); each is the same alone and beside the other."""
        side = _merge_side(self.config)
        start, end = _around(self.config)
        width = self.model.get_input_embeddings().weight.shape[-1]
        tower = VISION_CONFIG.get(self.config)
        early = getattr(tower, "vision_output_dim", width)  # of features that a projection is still to see
        rows, grids = list[list[int]](), list[tuple[int, int, int]]()
        features: list[list[Tensor]] = [[] for _ in range(2 + len(self.deepstack))]
        for sample in samples:
            generator = torch.Generator().manual_seed(seed * 2 + sample)
            height, across = _IMAGES[0 if self.form == "stack" else sample]
            count = height // side * (across // side + self.newline)
            before, behind = (
                self.words[torch.randint(len(self.words), (n,), generator=generator)].tolist() for n in _WORDS[sample]
            )
            rows.append([*before, *start, *[self.image] * count, *end, *behind])
            grids.append((1, height, across))
            for which, own in enumerate(features):
                own.append(torch.randn(count, early if which == 1 else width, generator=generator))
        inputs = _padded(rows, self.image, self.names) | {str(ENCODED): {"image": self._output(*features)}}
        if (name := IMAGE_GRID.among(self.names)) is not None:
            inputs[name] = torch.tensor(grids)
        return inputs

    def _output(self, pooled: list[Tensor], last: list[Tensor], *deep: list[Tensor]) -> Any:
        """Make what the method that computes features returns."""
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        class Output(BaseModelOutputWithPooling):
            def __getattr__(self, name: str) -> None:  # what single families read besides, and can do without
                if name.startswith("__"):
                    raise AttributeError(name)

        output: Any = Output(
            pooler_output=_FORMS[self.form](pooled),
            last_hidden_state=torch.cat(last),
        )
        if deep:
            output[str(DEEPSTACK_FEATURES)] = [
                own if layer is None else (layer, own) for layer, own in zip(self.deepstack, deep, strict=True)
            ]
        return output


def _specials(config: Any) -> Iterator[int]:
    """Tokens that mean something to a model."""
    for one in configs(config):
        for name, value in vars(one).items():
            if is_token(name):
                yield from (v for v in (value if isinstance(value, (list, tuple)) else [value]) if type(v) is int)


def _deepstack(config: Any) -> list[int | None]:
    """For each set of features that enters later, the layer of the language model where its configuration says it."""
    if named := DEEPSTACK_MAP.get(config, None):
        return [layer for _, layer in named]
    return [None] * len(DEEPSTACK_OF.get(VISION_CONFIG.get(config), None) or ())


def _merge_side(config: Any) -> int:
    """Side of the squares of patches that become one token, where a grid of patches is given."""
    side = MERGE_SIDE.get(VISION_CONFIG.get(config), None) or MERGE_SIDE.get(config, None) or 2
    return side if isinstance(side, int) else side[0]
