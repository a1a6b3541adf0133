"""The tiny random models that the specs of families bring, and the masked oracle.

The oracle knows nothing of the pruning path: it runs the *full* sequence through an untouched copy of the model, without a
cache, and hides the dropped tokens as keys from every attention behind their drop point.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from saint.upstream.names import CACHE, Parameters, Role
from saint.upstream.registry import FAMILIES as SPECS
from saint.upstream.tiny import IMAGE, LAYERS, PAD, VIDEO, TinyVLM, prompts

__all__ = ["FAMILIES", "IMAGE", "LAYERS", "PAD", "VIDEO", "prompts"]  # names of the package that tests read here

torch.set_num_threads(1)  # tiny matrices: more threads only wait for each other

FAMILIES = {tiny.name: tiny for spec in SPECS for tiny in spec.tiny}


def one_at_a_time(make: Callable[[str], object]) -> Callable[[str], object]:
    """What ``make`` makes of a family's name, the last one kept: cases come family by family."""
    made: dict[str, object] = {}

    def get(name: str) -> object:
        if name not in made:
            made.clear()
            made[name] = make(name)
        return made[name]

    return get


# -- upstream's spellings -------------------------------------------------------------------------------------------------


def cache_of(output) -> object:
    """The cache in what a model returned."""
    return CACHE.get(output)


def cached(model: nn.Module, cache) -> dict:
    """The keyword argument that hands ``cache`` to ``model``."""
    return Parameters(type(model).forward).put({}, CACHE, cache)


def checkpoint(model: nn.Module) -> None:
    """Switch on gradient checkpointing, without re-entrance."""
    enable = Role("activation_checkpointing_enable", "gradient_checkpointing_enable").get(model)
    enable({"use_reentrant": False})


# -- the masked oracle ------------------------------------------------------------------------------------------------


def hide(stack, layers: nn.ModuleList, gone_before: Callable[[int], Tensor | None]) -> None:
    """Hide keys: ``gone_before(i)`` is bool [B, L'], the tokens that layer i must not attend to. Eager masks only."""

    def hook(index: int):
        def mask_keys(_module, args, kwargs):
            gone = gone_before(index)
            if gone is None:
                return None
            mask = args[1] if len(args) > 1 else kwargs.get("attention_mask")  # CLIP layers take it by position
            if mask is None:
                mask = torch.zeros(gone.shape[0], 1, 1, gone.shape[1])
            more = torch.nn.functional.pad(gone, (0, mask.shape[-1] - gone.shape[1]))
            low = torch.finfo(mask.dtype).min
            return args[:1], {**kwargs, "attention_mask": mask.masked_fill(more[:, None, None], low)}

        return mask_keys

    for index, layer in enumerate(layers):
        stack.callback(layer.register_forward_pre_hook(hook(index), with_kwargs=True).remove)


def hide_packed(stack, attentions: list[nn.Module], gone_before: Callable[[int], Tensor | None]) -> None:
    """Like :func:`hide` for a packed sequence, bool [N]: eager attention runs its segments one by one, without masks."""
    pieces: list[Tensor] = []

    class Mask(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is nn.functional.softmax and pieces:
                gone = pieces.pop(0)
                assert args[0].shape[-1] == len(gone)
                if not bool(gone.all()):  # an empty window has no query
                    args = (args[0].masked_fill(gone, -torch.inf), *args[1:])
            return func(*args, **(kwargs or {}))

    def hook(index: int):
        def cut(_module, _args, kwargs):
            assert not pieces
            gone = gone_before(index)
            if gone is not None:
                pieces.extend(gone.split(kwargs["cu_seqlens"].diff().tolist()))

        return cut

    for index, attention in enumerate(attentions):
        stack.callback(attention.register_forward_pre_hook(hook(index), with_kwargs=True).remove)
    stack.enter_context(Mask())


def members(family: TinyVLM, groups: int) -> Tensor:
    """Patches of each visual token of one image, int64 [G, M]: squares of the patch grid, row by row."""
    side, k = round(groups**0.5), family.merge_size
    return torch.tensor(
        [
            [(k * row + i) * k * side + k * column + j for i in range(k) for j in range(k)]
            for row in range(side)
            for column in range(side)
        ]
    )


def missing(kept: list[Tensor], places: Tensor) -> Tensor:
    """bool [B, L]: the candidates (``places`` marks them, in order) that are not among ``kept``."""
    gone = torch.zeros_like(places)
    for sample, (where, keep) in enumerate(zip(places, kept, strict=True)):
        index = where.nonzero().flatten()
        stay = torch.zeros(len(index), dtype=torch.bool)
        stay[keep] = True
        gone[sample, index[~stay]] = True
    return gone


def oracle_model(model: nn.Module) -> nn.Module:
    """An untouched copy that takes masks; make it before the plan is applied."""
    twin = copy.deepcopy(model)
    twin.set_attn_implementation("eager")
    return twin
