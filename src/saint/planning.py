"""`saint.plan_for`: a plan for the model at hand that leaves a share of its work, computed from shapes, without pictures.

Which plan is what measurements say (docs/matching.md, docs/results.md): on encoders whose output is pooled, matching that weighs,
in front of the layers and at three quarters of their depth; under a dense head, merging at all layers; in vision-language models,
the full graph on projected features in front of the language model, or, where that cannot do, on patches in front of the tower.

Letters: N candidates, T tokens of text.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .errors import UnsupportedModelError
from .language.locate import find as find_text
from .methods.base import Method, check_number
from .methods.match import Match
from .methods.saint_full_graph import SaintFullGraph
from .models import ModelLike, module_of
from .plans import Plan, Stage
from .tokens import Candidates
from .upstream.names import (
    IDS,
    IMAGE_LENGTH,
    IMAGE_SIDE,
    LAYERS,
    MASK,
    PATCH,
    PINPOINTS,
    TIMM_PAIRS,
    VISION_CONFIG,
    WINDOW,
    WINDOWLESS,
)
from .upstream.pictures import merge_side
from .upstream.specs import EncoderSpec, FamilySpec, part
from .vision.checks import read_blocks, takes_dense_mask, takes_weights
from .vision.derive import with_tower
from .vision.inputs import own_size
from .vision.locate import locate, locate_tower
from .vision.readers import around, find_reader
from .vlm.locate import find as find_vlm
from .vlm.locate import refuse_unknown
from .work import Stack, bias_table, entering, read_block, read_decoder, read_pool

NEAR = 0.01  # what a plan found may miss the share by before others are tried
_FAR = 0.02  # what it may miss it by at all
_MOST, _PER_CHANNEL = 1024, 3  # patches that are thought of where a model takes any size: fewer of a narrow model
_TILES = 3  # pictures that are thought of where a model cuts one: the whole, and two halves
_FEW = 0.25  # share of the visual tokens below which the tower is asked to help: fewer cost answers (docs/results.md)
_WORDS = (12, 64)  # tokens of text that are thought of beside a picture: a sixteenth of its own, within these


@dataclass(frozen=True)
class Shape:
    """Numbers of tokens that a plan is made for.

    Attributes:
        patches: of one picture, in the encoder.
        visual: tokens of all pictures of a prompt that reach the language model; 0 of an encoder.
        text: T.
        pictures: of a prompt.
    """

    patches: int
    visual: int = 0
    text: int = 0
    pictures: int = 1


@dataclass(frozen=True)
class Work:
    """What the FLOPs of a model follow from, and where tokens can leave.

    Attributes:
        shape: of what goes in.
        tower: the encoder's layers; None where no token can leave in it, which then is no part of the work.
        used: of its layers those whose output is read.
        seam: tokens leave between attention and MLP of a layer where a plan leaves the placement open.
        decoder: the language model's; None of an encoder.
    """

    shape: Shape
    tower: Stack | None
    used: int
    seam: bool
    decoder: Stack | None

    def left(self, plan: Plan) -> float:
        """Share of the FLOPs that ``plan`` leaves, without those of choosing.

        Raises:
            ValueError: a budget that is no number or cannot be had, or a language stage.
        """
        if plan.language:
            raise ValueError("work by shape is known of what leaves in front of the language model")
        left, whole = (sum(part) for part in zip(*self.parts(plan).values(), strict=True))
        return left / whole

    def parts(self, plan: Plan) -> dict[str, tuple[float, float]]:
        """FLOPs that ``plan`` leaves, and all, of the "tower" and of the "language" model, where there are such."""
        made = dict[str, tuple[float, float]]()
        visual = self.shape.visual
        if self.tower is not None:
            n, depth = self.shape.patches // self.tower.group, len(self.tower.layers)
            layers = plan.resolve_layers("vision", depth, self.used)
            counts, mid = entering(plan.vision, layers, n, depth, self.seam)
            stages = list(zip(plan.vision, layers, strict=True))
            methods = {at: s.method for s, chosen in stages if s.placement != "input" for at in chosen}
            left = self.tower.flops(counts, mid, methods)
            front = next((s.method for s in plan.vision if s.placement == "input"), None)
            if front is not None:
                left += front.flops(n, counts[0], self.tower.channels)
            whole = self.tower.flops([n] * (depth + 1))
            made["tower"] = self.shape.pictures * left, self.shape.pictures * whole
            visual = visual * counts[-1] // n
        if self.decoder is not None:
            depth = len(self.decoder.layers)
            counts, _ = entering(plan.connector, [[0]] if plan.connector else [], visual, 1)
            language = self.decoder.flops([counts[-1]] * (depth + 1))
            made["language"] = language, self.decoder.flops([self.shape.visual] * (depth + 1))
        return made


def plan_for(model: ModelLike, keep: float = 0.5, inputs: Mapping[str, Any] | None = None) -> Plan:
    """A good plan for ``model`` that leaves the share ``keep`` of its work, with fixed budgets.

    Work is FLOPs (products of matrices): of an encoder at batch 1; of a vision-language model, of a prompt with one picture:
    the tower, where tokens can leave in it, and the language model without its head. No batch is padded;
    the plan compiles and exports.

    Args:
        model: what :func:`saint.apply` takes, without a plan; may be on the ``meta`` device, for shapes are all that is read.
        keep: the share, in (0, 1].
        inputs: keyword arguments of the model's forward, whose numbers of tokens are taken. None: a picture of the model's own
            size, or where it takes any, of three patches per channel and 1,024 at most; and a sixteenth as many tokens of text.

    Returns:
        The plan; empty for 1.0.

    Raises:
        ValueError: no such share, or one so small that no plan leaves it; the message says what can be had.
        UnsupportedModelError: a model that cannot be pruned, or has no visual tokens.

    Example:
        >>> import timm, saint
        >>> vit = timm.create_model("test_vit").eval()
        >>> stage = saint.plan_for(vit, keep=0.7).vision[0]
        >>> type(stage.method).__name__, 0 < stage.method.keep < 0.7
        ('Match', True)
    """
    module = module_of(model)
    check_number("keep", keep, 0, 1, "the share of the work that is left")
    if not keep > 0:
        raise ValueError("keep must be above 0: the share of the work that is left")
    if find_text(module) is not None:
        raise UnsupportedModelError(
            f"{type(module).__name__} is a language model without images, and what leaves of a prompt is text: no share of it is "
            "free. Where you want that, say which: saint.apply(model, saint.Plan(language=...))"
        )
    work, plans = _looked_at(module, inputs)
    return Plan() if keep == 1 else _nearest(work, plans, keep)


def work_of(model: ModelLike, inputs: Mapping[str, Any] | None = None) -> Work:
    """Read off a model what :func:`plan_for` does: how many tokens it is thought of with, and what its FLOPs follow from.

    Args:
        model: an encoder or a vision-language model; may be on the ``meta`` device.
        inputs: as there.

    Raises:
        UnsupportedModelError: as there.
    """
    return _looked_at(module_of(model), inputs)[0]


def _looked_at(module: nn.Module, inputs: Mapping[str, Any] | None) -> tuple[Work, Iterator[tuple["Family", float]]]:
    found = find_vlm(module)
    if found is None:
        refuse_unknown(module)
        return _encoder(module, inputs)
    return _vlm(module, found[1], found[2], inputs)


# -- the search -------------------------------------------------------------------------------------------------------

Family = Callable[[float], Plan]  # plans by the share of the tokens that stay in the end


def _nearest(work: Work, families: Iterator[tuple[Family, float]], keep: float) -> Plan:
    """The plan of the first family that comes near ``keep``, with its least share of tokens or more; else the nearest."""
    best: tuple[float, Plan] | None = None
    least = 1.0
    for family, fewest in families:
        for off, plan in _closest(work, family, keep, fewest):
            least = min(least, keep + off)
            if best is None or abs(off) < abs(best[0]):
                best = off, plan
        if best is not None and abs(best[0]) <= NEAR:
            return best[1]
    if best is None or abs(best[0]) > _FAR:
        raise ValueError(
            f"keep={keep:g}: no plan leaves so little of the work; the least for this model is {least:.3f}"
        )
    return best[1]


def _closest(work: Work, family: Family, keep: float, fewest: float) -> Iterator[tuple[float, Plan]]:
    """Yield how far the plans of a family are from ``keep`` that lie around it.

    Shares that a method cannot do count as too low.
    """
    low, high = fewest, 1.0
    for _ in range(24):
        share = (low + high) / 2
        try:
            plan = family(share)
            off = work.left(plan) - keep
        except ValueError:
            low = share
            continue
        yield off, plan
        low, high = (low, share) if off > 0 else (share, high)


# -- encoders ---------------------------------------------------------------------------------------------------------


def _encoder(model: nn.Module, inputs: Mapping[str, Any] | None) -> tuple[Work, Iterator[tuple[Family, float]]]:
    path, encoder, spec = locate(model)
    patches = _patches(encoder, spec) if inputs is None else _counted(model, inputs)[0]
    stack, seam = _tower(encoder, spec, patches)
    work = Work(Shape(patches), stack, len(stack.layers), seam, None)
    return work, _pruned_encoder(encoder, spec, len(stack.layers), _dense(model, path, spec))


def _pruned_encoder(encoder: nn.Module, spec: EncoderSpec, depth: int, dense: bool) -> Iterator[tuple[Family, float]]:
    blocks = read_blocks(encoder, spec, list(part(encoder, spec.blocks)), 0)
    weighs = all(b is not None and takes_weights(b, takes_dense_mask(encoder, b)) for b in blocks)
    output: Any = "similar" if dense else "survivors"

    def family(layers: list[int], method: Method) -> Family:
        return lambda share: Plan(vision=Stage(method.keeping(share), layers, output=output))

    def early(layers: list[int], method: Method) -> Family:
        """In front of the layers as many leave as one of them would let go."""

        def plan(share: float) -> Plan:
            first = max(0.5, share ** (1 / (len(layers) + 1)))
            front = Stage(method.keeping(first), placement="input", output=output)
            return Plan(vision=[front, Stage(method.keeping(min(1.0, share / first)), layers, output=output)])

        return plan

    fate: Any = "drop" if not weighs else "merge" if dense else "weigh"
    method = Match(fate=fate, beta=1.0 if fate == "merge" else 0.3)
    every = list(range(depth))
    quarters = list(dict.fromkeys(depth * i // 4 for i in (1, 2, 3)))
    if not dense:
        yield early(quarters, method), 0.02
    yield family(every, method), 0.02
    yield early(every, method), 0.02
    # few layers, each of which can let half of its tokens go
    yield lambda share: Plan(vision=Stage(SaintFullGraph(keep=share), placement="input", output=output)), 0.02


def _dense(model: nn.Module, path: str, spec: EncoderSpec) -> bool:
    """Tell whether what stands around the encoder at ``path`` may read its rows: a known reader, or a class of its own."""
    if "forward" in spec.dense_calls:
        return True
    reader = find_reader(model, path)
    if reader is not None and (reader.spec.dense or reader.spec.needs is not None):
        return True
    return any(not type(holder).__module__.startswith(_LIBRARIES) for _, holder in around(model, path))


_LIBRARIES = ("timm.", "transformers.", "open_clip.", "torch.", "peft.", "accelerate.")


def _tower(encoder: nn.Module, spec: EncoderSpec, patches: int, group: int = 1) -> tuple[Stack, bool]:
    """The layers of an encoder and whether tokens leave in their middle, of one picture of so many patches."""
    modules = list(part(encoder, spec.blocks))
    blocks = read_blocks(encoder, spec, modules, 0)
    config = getattr(encoder, "config", None)
    everywhere, side = WINDOWLESS.get(config), WINDOW.get(config)
    window = (side // PATCH.get(config)) ** 2 if everywhere is not None and side else None
    layers = tuple(
        read_block(block, None if everywhere is None or index in everywhere else window)[0]
        for index, block in enumerate(blocks)
        if block is not None
    )
    own = {id(one) for module in modules for one in module.modules()}
    fixed = 0.0
    for name, module in encoder.named_modules():
        # patches that arrive flattened pass a linear layer
        embeds = isinstance(module, nn.Conv2d | nn.Conv3d) or ("embed" in name and isinstance(module, nn.Linear))
        if embeds and id(module) not in own:
            fixed += 2 * patches * module.weight.numel()
        elif group > 1 and isinstance(module, nn.Linear) and id(module) not in own:  # joins groups of patches
            fixed += 2 * (patches // group) * module.weight.numel()
    tables = [bias_table(block) for block in blocks if block is not None] + [TIMM_PAIRS.get(encoder)]
    for table in {id(t): t for t in tables if isinstance(t, nn.Module)}.values():
        sides = (2 * math.isqrt(patches) - 1) ** 2  # differences of two places
        fixed += 2 * sides * sum(m.weight.numel() for m in table.modules() if isinstance(m, nn.Linear))
    pool = sum(read_pool(found) for path in spec.pools if (found := part(encoder, path)) is not None)
    seam = all(block is not None and block.spec.seam for block in blocks)
    return Stack(layers, spec.prefix(encoder), group, fixed, layers[0].width, pool), seam


def _patches(encoder: nn.Module, spec: EncoderSpec) -> int:
    """Patches of a picture of the encoder's own size; by its width where it has none."""
    if spec.packed:
        return min(_MOST, _PER_CHANNEL * _channels(encoder, spec))
    known = spec.candidates(encoder)
    if known is not None:
        return known
    config = getattr(encoder, "config", None)
    if (count := getattr(config, "num_patches", None)) is not None:
        return int(count)
    size, embedding = own_size(encoder), part(encoder, spec.patch) if spec.patch else None
    stride = getattr(embedding, "stride", None) or getattr(embedding, "patch_size", None)
    if size is None or stride is None:
        return min(_MOST, _PER_CHANNEL * _channels(encoder, spec))
    height, width = size
    most = max(height, width) if spec.usual is None else spec.usual
    height, width = min(height, most), min(width, most)
    return (height // stride[0]) * (width // stride[1])


def _channels(encoder: nn.Module, spec: EncoderSpec) -> int:
    blocks = read_blocks(encoder, spec, list(part(encoder, spec.blocks))[:1], 0)
    return read_block(blocks[0])[0].width if blocks[0] is not None else _MOST


# -- vision-language models -------------------------------------------------------------------------------------------


def _vlm(
    model: nn.Module, vlm: nn.Module, spec: FamilySpec, inputs: Mapping[str, Any] | None
) -> tuple[Work, Iterator[tuple[Family, float]]]:
    text = vlm.get_submodule(spec.decoder)
    layers, _ = read_decoder(list(LAYERS.get(text).children()), text.config)
    spec = with_tower(vlm, spec)
    group = (spec.merge_size(vlm) or 1) ** 2
    encoder = locate_tower(vlm, spec)[1:] if spec.sees_tower else None
    candidates = _by_config(vlm.config) if encoder is None else max(1, _patches(*encoder) // group)
    shape = _prompt(model, vlm, candidates, group, inputs)
    used, stack, seam = 0, None, False
    if encoder is not None and spec.no_vision is None:
        used = spec.feature_layer(vlm, len(part(encoder[0], encoder[1].blocks))) or 0
    if encoder is not None and used:
        stack, seam = _tower(*encoder, shape.patches, group)
    work = Work(shape, stack, used, seam, Stack(layers, shape.text))
    return work, _pruned_vlm(stack is not None)


def _by_config(config: Any) -> int:
    """Tokens that reach the language model of a picture, where the tower is not understood: what the configuration tells."""
    if (count := IMAGE_LENGTH.get(config)) is not None:
        return int(count)
    tower, group = VISION_CONFIG.get(config), (merge_side(config) or 1) ** 2
    size, patch = (role.get(tower) for role in (IMAGE_SIDE, PATCH))
    if isinstance(size, int) and isinstance(patch, int):
        return max(1, (size // patch) ** 2 // group)
    return max(1, min(_MOST, _PER_CHANNEL * (getattr(tower, "hidden_size", None) or _MOST)) // group)


def _prompt(model: nn.Module, vlm: nn.Module, candidates: int, group: int, inputs: Mapping[str, Any] | None) -> Shape:
    """Numbers of tokens of a prompt: those of ``inputs``, or of one picture of so many visual tokens with some text."""
    if inputs is not None:
        patches, visual, text, pictures = _counted(model, inputs)
        return Shape(patches * group, visual, text, pictures)
    pictures = 1 if PINPOINTS.get(vlm.config) is None else _TILES
    visual = candidates * pictures
    return Shape(candidates * group, visual, min(max(visual // 16, _WORDS[0]), _WORDS[1]), pictures)


def _pruned_vlm(tower: bool) -> Iterator[tuple[Family, float]]:
    """By the share of the visual tokens; ``front`` of it (a power) in front of the tower, the rest in front of the decoder."""

    def family(front: float) -> Family:
        def plan(share: float) -> Plan:
            patches = share**front
            vision = Stage(SaintFullGraph(keep=patches), placement="input") if front else None
            connector = SaintFullGraph(keep=min(1.0, share / patches)) if front < 1 else None
            return Plan(vision=vision, connector=connector)

        return plan

    # in front of the tower alone more tokens reach the decoder than from both; the last two come nearer where there are few
    fronts = (0.0, 1.0, 0.5, 0.25, 0.75) if tower else (0.0,)
    for fewest in (_FEW, 0.05, 0.01):
        for front in fronts:
            yield family(front), fewest


@dataclass(frozen=True)
class _Shown:
    """An observer that notes how many candidates there are, by stage."""

    lengths: dict[str, Sequence[int]]

    def candidates(self, stage: str, layer: int, candidates: Candidates) -> None:
        self.lengths.setdefault(stage, candidates.tokens.lengths)


def _counted(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[int, int, int, int]:
    """Candidates of a picture in the encoder, visual tokens, other tokens and pictures of a prompt, seen in a forward."""
    from .session import pruned

    shown = _Shown({})
    with pruned(model, Plan(), observers=[shown]), torch.inference_mode():
        model(**inputs)
    vision, prompt = shown.lengths.get("vision", ()), shown.lengths.get("language", ())
    patches = round(sum(vision) / len(vision)) if vision else 0
    if not prompt:
        return patches, 0, 0, 1
    mask = MASK.read(inputs)
    words = IDS.read(inputs) if mask is None else mask
    total = int(words.sum()) if mask is not None else words.numel()
    visual = sum(prompt) / len(prompt)
    return patches, round(visual), round(total / len(prompt) - visual), max(1, round(len(vision) / len(prompt)))
