"""The masked oracle: the forward of unpruned length in which each dropped token is hidden, as a key, behind its drop point.

It shares no code with the pruning path: it knows the model's attention only through torch's own functions.
"""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import HookNeverFiredError
from ..language.locate import find as find_text
from ..plans import Plan
from ..session import pruned
from ..tokens import LayerTrace
from ..upstream.names import (
    EMBEDDINGS,
    GRID,
    IDS,
    IMAGE_FEATURES,
    IMAGE_TOKEN,
    LAYERS,
    MASK,
    PATCH,
    PICTURE_SIZES,
    POOLED,
    SEGMENTS,
    VIDEO_FEATURES,
    Parameters,
)
from ..upstream.specs import EncoderSpec, FamilySpec, part
from ..upstream.verify import merge_method
from ..vision.derive import with_tower
from ..vision.locate import locate, locate_tower
from ..vlm.locate import find as find_vlm
from .hiding import HideKeys, hide_in_pools, stand_in, unfused
from .outputs import Inputs, run
from .smaller import logn_of, show_smaller, softer


def masked_oracle(
    model: nn.Module, plan: Plan, inputs: Inputs, prompt: Inputs | None = None
) -> tuple[dict[str, Tensor], list[LayerTrace]]:
    """The unpruned-length forward in which the tokens that ``plan`` drops are hidden from every later attention.

    Args:
        model: an encoder or a language model, with images or without, not patched; left as it was.
        plan: decides, in a pruned forward run first, which tokens are dropped where.
        inputs: keyword inputs of the model.
        prompt: the inputs of the forward that decides, where ``inputs`` hold an answer behind the prompts: of a prompt methods
            may look at its text, of an answer at nothing.

    Returns:
        The outputs, by name as in :func:`run`, and the trace. Rows of dropped tokens hold what the token would have been, or
        in a language model something arbitrary; behind the last block of an encoder they are replaced by the mean of the
        survivors where an average pool may read them.

    Raises:
        HookNeverFiredError: an attention behind a drop point was not seen (not computed by torch's fused functions).
    """
    family, text = find_vlm(model), find_text(model)
    more = {} if family is None and text is None else {"use_cache": False}
    inputs, prompt = {**inputs, **more}, {**(inputs if prompt is None else prompt), **more}
    with pruned(model, plan) as session:
        run(model, prompt)
        trace = session.trace
    mode = HideKeys()
    with ExitStack() as stack:
        stack.enter_context(unfused())
        if text is not None:
            _hide_in_decoder(stack, mode, text[1], trace, [_inner(inputs)])
        elif family is None:
            _, encoder, spec = locate(model)
            show_smaller(stack, encoder, spec, plan, None)
            _HidingInEncoder(mode, encoder, spec, trace, None, logn_of(plan)).install(stack)
        else:
            _, vlm, facts = family
            hide_in_tower(stack, mode, vlm, facts, trace, plan)
            visual = visual_tokens(stack, vlm)
            drops = [entry for entry in trace if entry.stage != "vision"]
            _hide_in_decoder(stack, mode, vlm.get_submodule(facts.decoder), drops, visual)
        stack.enter_context(mode)
        return run(model, inputs), trace


def hide_in_tower(
    stack: ExitStack, mode: HideKeys, vlm: nn.Module, facts: FamilySpec, trace: list[LayerTrace], plan: Plan
) -> None:
    """Hides what the vision stage dropped, as keys in the tower; features of dropped tokens become rows of NaN.

    Args:
        stack: takes the removal of the hooks.
        mode: is entered by the caller.
        vlm: the module of the family's spec.
        facts: of the family.
        trace: of the pruned forward.
        plan: likewise.
    """
    drops = [entry for entry in trace if entry.stage == "vision"]
    if drops:
        facts = with_tower(vlm, facts)
        _, encoder, spec = locate_tower(vlm, facts)
        show_smaller(stack, encoder, spec, plan, facts.merge_size(vlm))
        _HidingInEncoder(mode, encoder, spec, drops, facts.merge_size(vlm), logn_of(plan)).install(stack)
        _mark_features(stack, vlm, facts, drops)


class _HidingInEncoder:
    """Hides what a forward dropped, as keys, in an encoder.

    Args:
        mode: is entered by the caller.
        encoder: owns the blocks.
        spec: what is known of its class.
        trace: of the pruned forward.
        merge_size: side of the squares of patches that go together, or None.
        logn: see :class:`saint.Stage`.
    """

    def __init__(
        self,
        mode: HideKeys,
        encoder: nn.Module,
        spec: EncoderSpec,
        trace: list[LayerTrace],
        merge_size: int | None,
        logn: float,
    ) -> None:
        self.logn = logn
        self.mode, self.encoder, self.spec, self.trace, self.merge_size = mode, encoder, spec, trace, merge_size
        self.blocks = list(part(encoder, spec.blocks))
        self.prefix = spec.prefix(encoder)
        self.current: Tensor | None = None  # bool [B, P + N], tokens not dropped so far
        self.entries = [entry for entry in trace if entry.placement == "input"]
        self.by_layer = {entry.layer: entry for entry in trace if entry.placement != "input"}
        self.total: int | None = None
        self.order: Tensor | None = None  # of the groups of a packed sequence
        self.frames: list[tuple[int, int]] = []  # of a packed sequence: rows and columns of patches

    def install(self, stack: ExitStack) -> None:
        """From now on; ``stack`` undoes it."""
        for layer, block in enumerate(self.blocks):
            stack.callback(block.register_forward_pre_hook(self._enter(layer), with_kwargs=True).remove)
            stack.callback(block.register_forward_hook(self._leave(layer)).remove)
        final = part(self.encoder, self.spec.final) if self.spec.final else None
        if final is not None:
            stack.callback(final.register_forward_hook(self._pooled).remove)
        hide_in_pools(stack, self.mode, self.encoder, self.spec)
        if self.spec.packed:
            stack.callback(self.encoder.register_forward_pre_hook(self._see_grids, with_kwargs=True).remove)

    def _left_by(self, entry: LayerTrace, count: int) -> Tensor:
        """Tokens not dropped so far, bool [B, P + N]; packed: [1, N]."""
        if self.spec.packed:
            assert self.merge_size is not None
            left = torch.cat(_flags(entry, self.trace))
            if self.spec.raster:
                groups = iter(_flags(entry, self.trace))
                return torch.cat([_rastered(next(groups), *grid, self.merge_size) for grid in self.frames]).unsqueeze(0)
            left = left if self.order is None else left[self.order]
            return left.repeat_interleave(self.merge_size**2).unsqueeze(0)
        left = torch.zeros(len(entry.kept), count, dtype=torch.bool)
        left[:, : self.prefix] = True
        for sample, kept in enumerate(entry.kept):
            tokens = (
                kept.cpu() if self.merge_size is None else _square(kept.cpu(), count - self.prefix, self.merge_size)
            )
            left[sample, tokens + self.prefix] = True
        return left

    def _enter(self, layer: int) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            if layer == 0:
                self.current, self.total = None, x.shape[1]
                for entry in self.entries:
                    left = self._left_by(entry, x.shape[-2]).to(x.device)
                    self.current = self.current if bool(left.all()) else left
            self.mode.visible, self.mode.masked = self.current, 0
            if self.current is not None:
                total = self.prefix + self.trace[0].tokens_in.to(self.current.device)
                self.mode.softer = softer(self.current.sum(1), total, self.logn)
            if SEGMENTS.read(kwargs) is not None and self.current is not None:
                pieces = self.current.split(SEGMENTS.read(kwargs).diff().tolist(), 1)
                # a segment without survivors has no query whose result counts, and softmax needs a key
                self.mode.visible, self.mode.pieces = None, [p if bool(p.any()) else torch.ones_like(p) for p in pieces]

        return hook

    def _leave(self, layer: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
            if self.current is not None and (self.mode.masked == 0 or self.mode.pieces):
                raise HookNeverFiredError(
                    f"the attention of block {layer} does not go through torch's scaled_dot_product_attention; switch the "
                    'model to its fused attention (attn_implementation="sdpa", timm fused_attn) to test it'
                )
            y = output[0] if isinstance(output, tuple) else output
            self.mode.softer = None
            if layer in self.by_layer:
                left = self._left_by(self.by_layer[layer], y.shape[-2]).to(y.device)
                self.current = self.current if bool(left.all()) else left
            self.mode.visible = None if self.mode.pieces or y.ndim == 2 else self.current
            return self._pooled(_module, _args, output) if layer == len(self.blocks) - 1 else None

        return hook

    def _pooled(self, _module: nn.Module, _args: Any, output: Any) -> Any:
        y = output[0] if isinstance(output, tuple) else output
        if self.current is None or y.ndim != 3 or y.shape[1] != self.total:
            return None
        first = 0 if self.spec.pool_with_prefix(self.encoder) else self.prefix
        y = y.clone()
        for sample, seen in enumerate(self.current):
            mean = y[sample, first:][seen[first:]].mean(0)
            y[sample, ~seen] = mean
        return (y, *output[1:]) if isinstance(output, tuple) else y

    def _see_grids(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = Parameters(type(self.encoder).forward).named(args, kwargs)
        grid = GRID.read(given)
        if grid is None:
            patch = PATCH.get(self.encoder)
            grid = torch.tensor([[1, int(h) // patch, int(w) // patch] for h, w in PICTURE_SIZES.read(given)])
        self.frames = [(rows, columns) for frames, rows, columns in grid.tolist() for _ in range(frames)]
        if self.spec.order is None:
            return
        from transformers.vision_utils import get_vision_window_index

        facts: Any = self.encoder
        order = get_vision_window_index(grid, facts.spatial_merge_size, facts.window_size, facts.patch_size)[0]
        self.order = order.cpu()


def _flags(entry: LayerTrace, trace: list[LayerTrace]) -> list[Tensor]:
    """Candidates that are kept, a bool tensor [N] per image."""
    out = [torch.zeros(int(n), dtype=torch.bool) for n in trace[0].tokens_in]
    for flags, kept in zip(out, entry.kept, strict=True):
        flags[kept.cpu()] = True
    return out


def _rastered(groups: Tensor, rows: int, columns: int, side: int) -> Tensor:
    """Flags of patches that lie row by row, bool [N], from those of squares of ``side`` x ``side``."""
    grid = groups.view(rows // side, columns // side)
    return grid.repeat_interleave(side, 0).repeat_interleave(side, 1).flatten()


def _square(groups: Tensor, count: int, side: int) -> Tensor:
    """Patches, of ``count`` on a square grid, that lie in the given squares of ``side`` x ``side``."""
    edge = round(count**0.5)
    across = edge // side
    corner = groups // across * side * edge + groups % across * side
    inside = torch.arange(side)
    return (corner[:, None, None] + inside[:, None] * edge + inside).flatten()


def _mark_features(stack: ExitStack, vlm: nn.Module, facts: FamilySpec, trace: list[LayerTrace]) -> None:
    """Rows of NaN, for features that the encoder dropped, show where the model puts them."""

    def holes(output: Any) -> Any:
        """The same with rows of NaN, whatever holds them."""
        flags = iter(~torch.cat(_flags(trace[-1], trace)))

        def punched(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return [punched(one) for one in value]
            gone = torch.stack([next(flags) for _ in range(value[..., 0].numel())]).to(value.device)
            return value.masked_fill(gone.view(*value.shape[:-1], 1), torch.nan)

        field = POOLED.of(output)
        if field is None:
            return punched(output)
        setattr(output, field, punched(getattr(output, field)))
        return output

    def connected(_module: nn.Module, _args: Any, y: Tensor) -> Tensor:
        lost = ~torch.stack(_flags(trace[-1], trace)).to(y.device)
        lost = nn.functional.pad(lost, (y.shape[1] - lost.shape[1], 0))
        return y.masked_fill(lost.unsqueeze(-1), torch.nan)

    if facts.connector:
        stack.callback(vlm.get_submodule(facts.connector).register_forward_hook(connected).remove)
        return
    for method in filter(None, (role.of(vlm) for role in (IMAGE_FEATURES, VIDEO_FEATURES))):
        stand_in(stack, vlm, method, lambda original: lambda *args, **kwargs: holes(original(*args, **kwargs)))


def _inner(inputs: Inputs) -> Tensor:
    """All tokens of prompts without images but the first and last real ones, bool [B, L]."""
    real = torch.ones_like(inputs["input_ids"]) if MASK.read(inputs) is None else MASK.read(inputs)
    inner = torch.zeros_like(real, dtype=torch.bool)
    for row, found in zip(inner, real, strict=True):
        row[found.nonzero().flatten()[1:-1]] = True
    return inner


def visual_tokens(stack: ExitStack, vlm: nn.Module) -> list[Tensor]:
    """Fills during a forward: where images are, where videos are, bool [B, L]."""
    visual: list[Tensor] = []
    method, merges = merge_method(vlm)
    parameters = Parameters(getattr(type(vlm), method))

    def images(given: dict[str, Any]) -> Tensor:
        """From what a method that merges features itself is given."""
        ids, x = IDS.read(given), EMBEDDINGS.read(given)
        token = torch.tensor(IMAGE_TOKEN.get(vlm.config), device=x.device)
        if ids is not None:
            return ids == token
        embed: Any = vlm.get_input_embeddings()  # type: ignore[operator]
        return (x == embed(token)).all(-1)

    def listen(original: Callable[..., Any]) -> Callable[..., Any]:
        def merge(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            masks = images(parameters.named(args, kwargs)) if merges else result
            visual.extend(m[..., 0] if m.ndim == 3 else m for m in _as_tuple(masks) if m is not None)
            return result

        return merge

    stand_in(stack, vlm, method, listen)
    return visual


def changed(x: Tensor, visual: list[Tensor], trace: list[LayerTrace]) -> Tensor:
    """Embeddings with what the connector stage adds to those that stay, and 0 for what the tower dropped.

    Args:
        x: [B, L, C], NaN for what the tower dropped.
        visual: where candidates are, bool [B, L] each.
        trace: of a pruned forward.
    """
    x = x.masked_fill(torch.isnan(x).any(-1, keepdim=True), 0)
    for entry in trace:
        for sample, weights in enumerate(entry.adds or ()):
            where = torch.stack(visual).any(0)[sample].nonzero().flatten()
            rows = x[sample, where]
            for kept, own in zip(entry.kept[sample].tolist(), weights, strict=True):
                x[sample, where[kept]] += (own[: len(rows), None].to(rows) * rows).sum(0)
    return x


def _hide_in_decoder(
    stack: ExitStack, mode: HideKeys, decoder: nn.Module, trace: list[LayerTrace], visual: list[Tensor]
) -> None:
    """``visual``: where the candidates are, bool [B, L] each, known when the decoder starts.

    Where a layer reads the keys of an earlier one, those are hidden that were dropped in front of that one.
    """
    from ..language.layers import read_layers  # imports transformers

    layers = list(LAYERS.get(decoder).children())
    keeps, shown = read_layers(decoder.config, len(layers)), dict[int, Tensor | None]()
    parameters = Parameters(type(decoder).forward)
    seen: Tensor | None = None  # bool [B, L], tokens not dropped so far

    def drop(entry: LayerTrace) -> None:
        nonlocal seen
        places = torch.stack(visual).any(0)
        seen = torch.ones_like(places) if seen is None else seen.clone()
        for sample, kept in enumerate(entry.kept):
            where = places[sample].nonzero().flatten()
            gone = torch.ones(len(where), dtype=torch.bool, device=where.device)
            gone[kept] = False
            seen[sample, where[gone]] = False

    def begin(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        nonlocal seen
        given = parameters.named(args, kwargs)
        seen, x = None, EMBEDDINGS.read(given)
        if x is None:  # token ids: nothing was dropped in front
            return None
        lost = torch.isnan(x).any(-1)
        seen = ~lost if bool(lost.any()) else None
        for entry in trace:
            if entry.stage == "connector":
                drop(entry)
        return (), parameters.put(given, EMBEDDINGS, changed(x, visual, trace))

    def enter(layer: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any) -> None:
            shown[layer] = seen
            source = keeps[layer].shared
            mode.visible, mode.masked = seen if source is None else shown[source], 0

        return hook

    def leave(layer: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, _output: Any) -> None:
            if mode.visible is not None and mode.masked == 0:
                raise HookNeverFiredError(
                    f"the attention of layer {layer} of the language model does not go through torch's "
                    'scaled_dot_product_attention; load the model with attn_implementation="sdpa" to test it'
                )
            mode.visible = None
            for entry in trace:
                if entry.stage == "language" and entry.layer == layer:
                    drop(entry)

        return hook

    stack.callback(decoder.register_forward_pre_hook(begin, with_kwargs=True).remove)
    for layer, module in enumerate(layers):
        stack.callback(module.register_forward_pre_hook(enter(layer)).remove)
        stack.callback(module.register_forward_hook(leave(layer)).remove)


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)
