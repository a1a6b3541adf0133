"""Slow and literal: what pruned forwards, choices and full-length outputs are held against.

The masked oracle knows nothing of the pruning path: it runs the *full* sequence through an untouched copy of the model, without
a cache, and hides the dropped tokens as keys from every attention behind their drop point.
"""

import copy
import math
from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.vision_utils import get_vision_window_index

from saint.upstream.tiny import TinyVLM
from support.families import IMAGE


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


class Oracle:
    """The full-length forward with the tokens of a trace hidden."""

    def __init__(self, family, twin, trace, inputs):
        self.family, self.twin, self.inputs = family, twin, inputs
        self.entries = {stage: [e for e in trace if e.stage == stage] for stage in ("vision", "connector", "language")}
        self.places = inputs["input_ids"] == IMAGE

    def gone_before(self, layer):
        """Dropped in front of a layer of the language model, bool [B, L]."""
        gone = torch.zeros_like(self.places)
        for entry in self.entries["vision"]:
            gone |= self.unseen(entry)
        for entry in self.entries["connector"]:
            gone |= missing(entry.kept, self.places)
        for entry in self.entries["language"]:
            if entry.layer < layer:
                gone |= missing(entry.kept, self.places)
        return gone

    def unseen(self, entry):
        """Placeholders of features that the tower dropped."""
        flags = self.packed(entry) if self.family.name == "llava-next" else torch.cat(self.lost(entry))
        return torch.zeros_like(self.places).masked_scatter(self.places, flags)

    def lost(self, entry):
        """Visual tokens of each image that the tower dropped, a bool tensor per image."""
        totals = self.entries["vision"][0].tokens_in.tolist()
        ones = [torch.ones(1, n, dtype=torch.bool) for n in totals]
        return [missing([kept], all_of)[0] for kept, all_of in zip(entry.kept, ones, strict=True)]

    def packed(self, entry):
        """Where the features of the tiles end up: the model's own packing, applied to flags."""
        dropped = torch.stack(self.lost(entry)).float().unsqueeze(-1)
        sizes = self.inputs["image_sizes"]
        tiles = [3 if size.tolist() == [24, 48] else 5 for size in sizes]
        flags, _ = self.twin.model.pack_image_features(
            list(dropped.split(tiles)), sizes, vision_feature_select_strategy="default", image_newline=torch.zeros(1)
        )
        return torch.cat(flags).flatten().bool()

    def hide_in_tower(self, stack):
        for entry in self.entries["vision"]:
            layers = self.twin.get_submodule(self.family.tower)
            attentions = [layer.get_submodule(self.family.attention) for layer in layers]
            if "image_grid_thw" in self.inputs:
                inside = self.in_sequence(torch.cat(self.lost(entry)))
                hide_packed(stack, attentions, lambda i, e=entry, gone=inside: gone if i > e.layer else None)
                continue
            gone = torch.stack(self.lost(entry))
            inside = torch.zeros(len(gone), gone.shape[1] * self.family.merge_size**2, dtype=torch.bool)
            for row, lost in zip(inside, gone, strict=True):
                row[members(self.family, gone.shape[1])[lost].flatten()] = True
            inside = torch.nn.functional.pad(inside, (self.family.prefix, 0))
            hide(stack, attentions, lambda i, e=entry, gone=inside: gone if i > e.layer else None)

    def in_sequence(self, flags):
        """Flags of patches, from flags of groups, in the order in which a packed tower holds them."""
        if self.family.name == "qwen2.5-vl":
            tower = self.twin.model.visual
            order, _ = get_vision_window_index(
                self.inputs["image_grid_thw"], tower.spatial_merge_size, tower.window_size, tower.patch_size
            )
            flags = flags[order]
        return flags.repeat_interleave(self.family.merge_size**2)

    def add_embeddings(self, stack):
        """What the connector stage adds to embeddings that stay, a row at a time."""

        def add(_module, args, kwargs):
            before = kwargs["inputs_embeds"]
            x = before.clone()
            for entry in self.entries["connector"]:
                for sample, kept in enumerate(entry.kept):
                    where = self.places[sample].nonzero().flatten().tolist()
                    for own, weights in zip(kept.tolist(), entry.adds[sample], strict=True):
                        for weight, place in zip(weights.tolist(), where, strict=False):
                            x[sample, where[own]] += weight * before[sample, place]
            return args, {**kwargs, "inputs_embeds": x}

        if any(entry.adds is not None for entry in self.entries["connector"]):
            decoder = self.twin.get_submodule(self.family.decoder.rpartition(".")[0])
            stack.callback(decoder.register_forward_pre_hook(add, with_kwargs=True).remove)

    def __call__(self, **changes):
        with ExitStack() as stack, torch.no_grad():
            self.add_embeddings(stack)
            hide(stack, self.twin.get_submodule(self.family.decoder), self.gone_before)
            self.hide_in_tower(stack)
            return self.twin(**{**self.inputs, **changes}, use_cache=False)

    def continued(self, tokens):
        """Logits that must have chosen ``tokens`` [B, T], from one forward over prompt and tokens.

        By induction over the steps this is what recomputing everything at every step gives.
        """
        grown = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        if self.family.types:  # PaliGemma: 1 marks what is not part of the bidirectional prefix
            grown[self.family.types] = torch.full_like(tokens, 1 if self.family.name == "paligemma" else 0)
        grown = {name: torch.cat([self.inputs[name], more], 1) for name, more in grown.items()}
        length = self.inputs["input_ids"].shape[1]
        return self(**grown).logits[:, length - 1 : -1]


def relative_error(actual, expected):
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def nearest(kept: list[int], rows: int, columns: int) -> list[int]:
    """For each cell the place in ``kept`` of the closest survivor, by a literal search."""
    out = []
    for cell in range(rows * columns):
        distance = [math.hypot(cell // columns - k // columns, cell % columns - k % columns) for k in kept]
        out.append(min(range(len(kept)), key=lambda i: (round(distance[i], 9), i)))
    return out
