"""The contracts every pruned model must keep, as functions to run on your own model.

The definition of correct is *masked-oracle equality*: a pruned forward equals the unpruned-length forward in which each
dropped token is hidden, as a key, from every attention behind its drop point. The oracle here shares no code with the
pruning path: it knows the model's attention only through torch's own functions. Methods that merge have an oracle of their
own: the full-length forward in which tokens that became one share their mean.

Letters: B batch, P protected tokens, N candidates, C channels.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..errors import AlreadyAppliedError, HookNeverFiredError, SaintError
from ..flops import count_flops, left_out
from ..methods.saint import Saint
from ..patch import override
from ..plan import Plan, Stage
from ..session import apply, pruned, remove, status
from ..tokens import LayerTrace
from ..upstream.names import EMBEDDINGS, GRID, POOLED, SEGMENTS, Parameters
from ..upstream.specs import BlockSpec, EncoderSpec, FamilySpec, part
from ..upstream.verify import merge_method
from ..vision.blocks import Block, units
from ..vision.locate import locate, locate_tower
from ..vlm.locate import find as find_vlm

Inputs = Mapping[str, Any]


@dataclass(frozen=True)
class Result:
    """Outcome of one contract: "passed", "failed" or "skipped" (with the reason in ``detail``)."""

    contract: str
    outcome: str
    detail: str


# -- running a model --------------------------------------------------------------------------------------------------


def run(model: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    """All floating-point tensors a forward returns, by name ("output" for a bare tensor)."""
    with torch.no_grad():
        return dict(tensors(model(**inputs)))


def tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Floating-point tensors in what a model returned, by path: "output", "logits", "image_outputs.pooler_output", ..."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield name or "output", value
    elif isinstance(value, Mapping):
        for key, item in value.items():  # nested: outputs of a tower, which are not the model's own of the same name
            yield from tensors(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, (tuple, list)):
        for index, item in enumerate(value):
            yield from tensors(item, f"{name or 'output'}[{index}]")


def example_inputs(model: nn.Module, batch: int = 3, seed: int = 0) -> dict[str, Tensor]:
    """Random pictures of very different redundancy for a supported encoder: noise, flat with noise, half and half, ...

    Args:
        model: holds one supported encoder.
        batch: B.
        seed: of a private generator.

    Returns:
        Keyword inputs of ``model.forward``.
    """
    _, encoder, row = locate(model)
    generator = torch.Generator().manual_seed(seed)
    parameter = next(p for p in encoder.parameters() if p.is_floating_point())
    config = getattr(encoder, "config", None)
    if row.patch is None:  # patches arrive flattened and padded (SigLIP 2 NaFlex)
        return _flattened_inputs(config, batch, generator, parameter)
    size = (
        getattr(config, "image_size", None)
        or getattr(encoder, "image_size", None)
        or getattr(getattr(encoder, "patch_embed", None), "img_size", None)
        or _grid_in_pixels(getattr(encoder, "embeds", None))
    )
    height, width = (size, size) if isinstance(size, int) else tuple(size or (224, 224))
    noise = torch.randn(batch, 3, height, width, generator=generator)
    calm = torch.randn(batch, 3, 1, 1, generator=generator) + 0.1 * noise
    images = noise.clone()
    for sample in range(batch):
        rows = height * (sample % 3) // 2  # none, half, all of the picture is calm
        images[sample, :, :rows] = calm[sample, :, :rows]
    name = getattr(model, "main_input_name", None) or "x"
    if not hasattr(model, "main_input_name") and config is not None:
        name = "pixel_values"
    return {name: images.to(parameter)}


def _grid_in_pixels(embeds: Any) -> tuple[int, int] | None:
    """Height and width that the position table of timm's NaFlex embeddings is made for."""
    grid = getattr(embeds, "pos_embed_grid_size", None)
    return None if grid is None else (grid[0] * embeds.patch_size[0], grid[1] * embeds.patch_size[1])


def _flattened_inputs(config: Any, batch: int, generator: torch.Generator, like: Tensor) -> dict[str, Tensor]:
    side = int(config.num_patches**0.5)
    shapes = torch.tensor([(side, side - sample % 3) for sample in range(batch)])
    count = side * side
    pixels = torch.randn(batch, count, config.num_channels * config.patch_size**2, generator=generator)
    for sample in range(batch):
        calm = count * (sample % 3) // 2
        pixels[sample, :calm] = pixels[sample, :1] + 0.1 * pixels[sample, :calm]
    mask = torch.arange(count) < shapes.prod(1, keepdim=True)
    return {
        "pixel_values": (pixels * mask.unsqueeze(-1)).to(like),
        "pixel_attention_mask": mask.long().to(like.device),
        "spatial_shapes": shapes.to(like.device),
    }


def example_plan(model: nn.Module, inputs: Inputs, **stage: Any) -> Plan:
    """A voting plan under which ``inputs`` really lose tokens, and samples lose different numbers of them.

    Random weights have no meaningful threshold; this searches for one.

    Raises:
        ValueError: no threshold drops anything.
    """
    fallback = None
    for threshold in (0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.3, 0.1, -0.1, -0.3, -0.5):
        method = Saint(threshold=threshold, neighbors=2, center=True, floor=0.05)
        plan = Plan(vision=Stage(method, **stage))
        with pruned(model, plan) as session, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run(model, inputs)
            trace = session.trace
        dropped = trace[-1].tokens_out < trace[0].tokens_in
        if dropped.any():
            fallback = fallback or plan
            if len(set(trace[-1].tokens_out.tolist())) > 1:
                return plan
    if fallback is None:
        raise ValueError("no threshold makes these inputs lose tokens")
    return fallback


# -- the masked oracle ------------------------------------------------------------------------------------------------


class _HideKeys(TorchFunctionMode):
    """Adds a key mask to every attention that torch computes while ``visible`` or ``pieces`` is set.

    A bool one hides keys, a float one is added to their logits.
    """

    def __init__(self) -> None:
        super().__init__()
        self.visible: Tensor | None = None  # [B, keys]
        self.pieces: list[Tensor] = []  # packed: bool [1, keys] of each segment, in the order of their attentions
        self.masked = 0

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        seen = self.pieces[0] if self.pieces else self.visible
        if seen is None:
            return func(*args, **kwargs)
        if func is nn.functional.scaled_dot_product_attention:
            names = ("query", "key", "value", "attn_mask")
            kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
            if kwargs["key"].shape[-2] == seen.shape[1]:
                self.masked += 1
                if self.pieces:
                    self.pieces.pop(0)
                hide = seen[:, None, None]
                given = kwargs.get("attn_mask")
                if kwargs.get("is_causal"):
                    given, kwargs["is_causal"] = (
                        torch.ones_like(hide, dtype=torch.bool).expand(-1, -1, seen.shape[1], -1).tril(),
                        False,
                    )
                if given is None:
                    kwargs["attn_mask"] = hide
                elif hide.is_floating_point():
                    zero = torch.zeros((), dtype=hide.dtype, device=hide.device)
                    kwargs["attn_mask"] = hide + (zero.masked_fill(~given, -torch.inf) if _bool(given) else given)
                elif given.dtype == torch.bool:
                    kwargs["attn_mask"] = given & hide
                else:
                    kwargs["attn_mask"] = given.masked_fill(~hide, -torch.inf)
            return func(**kwargs)
        if func is nn.functional.multi_head_attention_forward and args[1].shape[0] == seen.shape[1]:
            self.masked += 1
            kwargs["key_padding_mask"] = seen if seen.is_floating_point() else ~seen
            kwargs["attn_mask"] = None  # what the caller masks (padding) is never a survivor
        return func(*args, **kwargs)


def _bool(mask: Tensor) -> bool:
    return mask.dtype == torch.bool


def masked_oracle(model: nn.Module, plan: Plan, inputs: Inputs) -> tuple[dict[str, Tensor], list[LayerTrace]]:
    """The unpruned-length forward in which the tokens that ``plan`` drops are hidden from every later attention.

    Args:
        model: an encoder or a vision-language model, not patched; left as it was.
        plan: decides, in a pruned forward run first, who is dropped where.
        inputs: keyword inputs of the model.

    Returns:
        The outputs, by name as in :func:`run`, and the trace. Rows of dropped tokens hold what the token would have been, or
        in a language model something arbitrary; behind the last block of an encoder they are replaced by the mean of the
        survivors where an average pool may read them.

    Raises:
        HookNeverFiredError: an attention behind a drop point was not seen (not computed by torch's fused functions).
    """
    family = find_vlm(model)
    if family is not None:
        inputs = {**inputs, "use_cache": False}
    with pruned(model, plan) as session:
        run(model, inputs)
        trace = session.trace
    mode = _HideKeys()
    with ExitStack() as stack:
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)  # its fused kernel bypasses every interception
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast)
        if family is None:
            _, encoder, row = locate(model)
            _hide_in_encoder(stack, mode, encoder, row, trace, None)
        else:
            _, vlm, facts = family
            if plan.vision is not None:
                _, encoder, row = locate_tower(vlm.get_submodule(facts.tower))
                drops = [entry for entry in trace if entry.stage == "vision"]
                _hide_in_encoder(stack, mode, encoder, row, drops, facts.merge_size(vlm))
                _mark_features(stack, vlm, facts, row, drops)
            _hide_in_decoder(stack, mode, vlm, facts, [entry for entry in trace if entry.stage != "vision"])
        stack.enter_context(mode)
        return run(model, inputs), trace


def _hide_in_encoder(
    stack: ExitStack,
    mode: _HideKeys,
    encoder: nn.Module,
    row: EncoderSpec,
    trace: list[LayerTrace],
    merge_size: int | None,
) -> None:
    blocks = list(part(encoder, row.blocks))
    prefix = row.prefix(encoder)
    current: Tensor | None = None  # bool [B, P + N], who is still there
    by_layer = {entry.layer: entry for entry in trace}
    total: int | None = None
    order: Tensor | None = None  # of the groups of a packed sequence

    def mask_of(entry: LayerTrace, count: int) -> Tensor:
        if row.packed:
            assert merge_size is not None
            rows = torch.cat(_flags(entry, trace))
            rows = rows if order is None else rows[order]
            return rows.repeat_interleave(merge_size**2).unsqueeze(0)
        rows = torch.zeros(len(entry.kept), count, dtype=torch.bool)
        rows[:, :prefix] = True
        for sample, kept in enumerate(entry.kept):
            tokens = kept.cpu() if merge_size is None else _square(kept.cpu(), count - prefix, merge_size)
            rows[sample, tokens + prefix] = True
        return rows

    def enter(layer: int) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal current, total
            x = args[0] if args else next(iter(kwargs.values()))
            if layer == 0:
                current, total = None, x.shape[1]
            mode.visible, mode.masked = current, 0
            if row.packed and current is not None:
                pieces = current.split(SEGMENTS.read(kwargs).diff().tolist(), 1)
                # where everyone is gone nobody is left to look
                mode.visible, mode.pieces = None, [p if bool(p.any()) else torch.ones_like(p) for p in pieces]

        return hook

    def leave(layer: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
            nonlocal current
            if current is not None and (mode.masked == 0 or mode.pieces):
                raise HookNeverFiredError(
                    f"the attention of block {layer} does not go through torch's scaled_dot_product_attention; switch the "
                    'model to its fused attention (attn_implementation="sdpa", timm fused_attn) to test it'
                )
            y = output[0] if isinstance(output, tuple) else output
            if layer in by_layer:
                rows = mask_of(by_layer[layer], y.shape[-2]).to(y.device)
                current = current if bool(rows.all()) else rows
            mode.visible = None if row.packed else current
            return pooled(_module, _args, output) if layer == len(blocks) - 1 else None

        return hook

    def pooled(_module: nn.Module, _args: Any, output: Any) -> Any:
        y = output[0] if isinstance(output, tuple) else output
        if current is None or y.ndim != 3 or y.shape[1] != total:
            return None
        first = 0 if row.pool_with_prefix(encoder) else prefix
        y = y.clone()
        for sample, seen in enumerate(current):
            mean = y[sample, first:][seen[first:]].mean(0)
            y[sample, ~seen] = mean
        return (y, *output[1:]) if isinstance(output, tuple) else y

    def see_order(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal order
        from transformers.vision_utils import get_vision_window_index

        grid = GRID.read(Parameters(type(encoder).forward).named(args, kwargs))
        facts: Any = encoder
        order = get_vision_window_index(grid, facts.spatial_merge_size, facts.window_size, facts.patch_size)[0].cpu()

    for layer, block in enumerate(blocks):
        stack.callback(block.register_forward_pre_hook(enter(layer), with_kwargs=True).remove)
        stack.callback(block.register_forward_hook(leave(layer)).remove)
    final = part(encoder, row.final) if row.final else None
    if final is not None:
        stack.callback(final.register_forward_hook(pooled).remove)
    _hide_in_pools(stack, mode, encoder, row)
    if row.order is not None:
        stack.callback(encoder.register_forward_pre_hook(see_order, with_kwargs=True).remove)


def _hide_in_pools(stack: ExitStack, mode: _HideKeys, encoder: nn.Module, row: EncoderSpec) -> None:
    def trim(_module: nn.Module, args: tuple[Any, ...]) -> None:
        if mode.visible is not None:  # a pool may be shown the candidates alone, without the prefix
            mode.visible = mode.visible[:, -args[0].shape[1] :]

    for path in row.pools:
        if (pool := part(encoder, path)) is not None:
            stack.callback(pool.register_forward_pre_hook(trim).remove)


def _flags(entry: LayerTrace, trace: list[LayerTrace]) -> list[Tensor]:
    """Who is kept, a bool tensor per image over all its candidates."""
    out = [torch.zeros(int(n), dtype=torch.bool) for n in trace[0].tokens_in]
    for flags, kept in zip(out, entry.kept, strict=True):
        flags[kept.cpu()] = True
    return out


def _square(groups: Tensor, count: int, side: int) -> Tensor:
    """Patches, of ``count`` on a square grid, that lie in the given squares of ``side`` x ``side``."""
    edge = round(count**0.5)
    across = edge // side
    corner = groups // across * side * edge + groups % across * side
    inside = torch.arange(side)
    return (corner[:, None, None] + inside[:, None] * edge + inside).flatten()


def _mark_features(
    stack: ExitStack, vlm: nn.Module, facts: FamilySpec, row: EncoderSpec, trace: list[LayerTrace]
) -> None:
    """Rows of NaN, for features that the encoder dropped, show where the model puts them."""

    def connected(_module: nn.Module, _args: Any, y: Tensor) -> Tensor:
        lost = ~torch.stack(_flags(trace[-1], trace)).to(y.device)
        lost = nn.functional.pad(lost, (y.shape[1] - lost.shape[1], 0))
        return y.masked_fill(lost.unsqueeze(-1), torch.nan)

    def towered(_module: nn.Module, _args: Any, output: Any) -> None:
        field = POOLED.of(output)
        assert field is not None
        features = getattr(output, field)
        lost = ~torch.cat(_flags(trace[-1], trace)).to(features.device)
        setattr(output, field, features.masked_fill(lost.unsqueeze(-1), torch.nan))

    path, hook = (facts.tower, towered) if row.packed else (facts.connector, connected)
    stack.callback(vlm.get_submodule(path).register_forward_hook(hook).remove)


def _hide_in_decoder(
    stack: ExitStack, mode: _HideKeys, vlm: nn.Module, facts: FamilySpec, trace: list[LayerTrace]
) -> None:
    layers = list(vlm.get_submodule(facts.decoder).get_submodule("layers").children())
    parameters = Parameters(type(vlm.get_submodule(facts.decoder)).forward)
    visual: list[Tensor] = []  # bool [B, L] of images, of videos
    seen: Tensor | None = None  # bool [B, L], who is still there

    from ..vlm.model import placeholders  # imports transformers

    method, merges = merge_method(vlm)

    def listen(original: Callable[..., Any]) -> Callable[..., Any]:
        def merge(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            masks = placeholders(vlm, *args, **kwargs) if merges else result
            visual.extend(m[..., 0] if m.ndim == 3 else m for m in _as_tuple(masks) if m is not None)
            return result

        return merge

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
        x = EMBEDDINGS.read(given)
        lost = torch.isnan(x).any(-1)
        seen = ~lost if bool(lost.any()) else None
        for entry in trace:
            if entry.stage == "connector":
                drop(entry)
        return (), parameters.put(given, EMBEDDINGS, x.masked_fill(lost.unsqueeze(-1), 0))

    def enter(_module: nn.Module, _args: Any) -> None:
        mode.visible, mode.masked = seen, 0

    def leave(layer: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, _output: Any) -> None:
            if seen is not None and mode.masked == 0:
                raise HookNeverFiredError(
                    f"the attention of layer {layer} of the language model does not go through torch's "
                    'scaled_dot_product_attention; load the model with attn_implementation="sdpa" to test it'
                )
            mode.visible = None
            for entry in trace:
                if entry.stage == "language" and entry.layer == layer:
                    drop(entry)

        return hook

    override(stack, vlm, method, listen)
    stack.callback(vlm.get_submodule(facts.decoder).register_forward_pre_hook(begin, with_kwargs=True).remove)
    for layer, module in enumerate(layers):
        stack.callback(module.register_forward_pre_hook(enter).remove)
        stack.callback(module.register_forward_hook(leave(layer)).remove)


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def merged_oracle(model: nn.Module, plan: Plan, inputs: Inputs) -> tuple[dict[str, Tensor], list[LayerTrace]]:
    """The full-length forward in which all tokens that ``plan`` merges into one share their mean from the merge on.

    Copies of a token of size s are attended to s times as much as one, which is proportional attention with beta = 1; for
    another beta, (beta - 1) * log(s) is added to their logits. Copies take the rotary position of the survivor.

    Args:
        model: not patched; left as it was.
        plan: with a vision stage whose method merges; decides, in a pruned forward run first, what becomes one.
        inputs: keyword inputs of the model.

    Returns:
        As :func:`masked_oracle`.

    Raises:
        HookNeverFiredError: beta is not 1, or the encoder ends in an attention pool, and an attention was not seen.
    """
    stage = plan.stages["vision"]
    beta, survivors = stage.method.size_bias(), stage.output == "survivors"
    with pruned(model, plan) as session:
        run(model, inputs)
        trace, placement = session.trace, session.status.stages["vision"].placement
    _, encoder, row = locate(model)
    blocks = list(part(encoder, row.blocks))
    prefix, mode = row.prefix(encoder), _HideKeys()
    by_layer = {entry.layer: entry for entry in trace if entry.into is not None}
    groups: list[Tensor] | None = None  # for each original candidate the survivor it is part of

    def share(y: Tensor) -> Tensor:
        assert groups is not None
        y = y.clone()
        for sample, into in enumerate(groups):
            for survivor in into.unique().tolist():
                members = prefix + (into == survivor).nonzero().flatten()
                y[sample, members] = y[sample, members].mean(0)
        return y

    def logits(count: int, like: Tensor) -> Tensor | None:
        if groups is None or beta == 1:
            return None
        out = like.new_zeros(len(groups), count)
        for sample, into in enumerate(groups):
            out[sample, prefix : prefix + len(into)] = (beta - 1) * into.bincount()[into].to(like.dtype).log()
        return out

    def positions(table: Any) -> Any:
        if isinstance(table, tuple):
            return tuple(positions(t) for t in table)
        assert groups is not None
        if table.shape[-2] != len(groups[0]):
            return table
        rows = torch.stack([table[..., into, :] for into in groups])
        return rows.unsqueeze(1) if table.ndim == 2 else rows

    def pairs(bias: Tensor | None) -> Tensor | None:
        """A bias over all pairs of tokens, in which copies take rows and columns of the survivor."""
        if bias is None or groups is None:
            return bias
        rows = [torch.cat([torch.arange(prefix, device=into.device), prefix + into]) for into in groups]
        return torch.stack([bias.flatten(0, -3)[:, row][:, :, row] for row in rows])

    def wrap(layer: int, block: Block, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            nonlocal groups
            groups = None if layer == 0 else groups
            kwargs = block.named(args, kwargs)
            if groups is not None:
                kwargs |= {n: positions(kwargs[n]) for n in block.tables if kwargs.get(n) is not None}
            if block.spec.bias and block.mask in kwargs:
                kwargs[block.mask] = pairs(kwargs[block.mask])
            mode.visible, mode.masked = logits(x.shape[1], x), 0
            halves = layer in by_layer and placement == "mid"
            y = block.first(x, kwargs) if halves else original(x, **kwargs)
            if mode.visible is not None and mode.masked == 0:
                raise HookNeverFiredError(f"the attention of block {layer} does not go through torch's fused functions")
            mode.visible = None
            if layer in by_layer:
                groups = by_layer[layer].into
                y = share(y)
            y = block.second(y) if halves else y
            return pooled(None, None, y) if layer == len(blocks) - 1 else y

        return forward

    def pooled(_module: Any, _args: Any, y: Tensor) -> Tensor | None:
        """What pools see: the survivors alone, as in :func:`masked_oracle`."""
        if groups is None or not survivors or y.ndim != 3 or y.shape[1] < prefix + len(groups[0]):
            return y
        mode.visible = torch.zeros(y.shape[:2], dtype=torch.bool, device=y.device)
        mode.visible[:, :prefix] = True
        y, first = y.clone(), 0 if row.pool_with_prefix(encoder) else prefix
        for sample, into in enumerate(groups):
            mode.visible[sample, prefix + into.unique()] = True
            y[sample, ~mode.visible[sample]] = y[sample, first:][mode.visible[sample, first:]].mean(0)
        return y

    with ExitStack() as stack:
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast)
        for layer, module in enumerate(blocks):
            spec = Block(module, _block_spec(module, row), f"{row.blocks}.{layer}")
            override(stack, module, "forward", partial(wrap, layer, spec))
            if spec.bias is not None:
                holder, _, method = spec.bias.rpartition(".")
                override(stack, part(module, holder), method, lambda own: lambda *a, **k: pairs(own(*a, **k)))
        final = part(encoder, row.final) if row.final else None
        if final is not None:
            stack.callback(final.register_forward_hook(pooled).remove)
        _hide_in_pools(stack, mode, encoder, row)
        stack.enter_context(mode)
        return run(model, inputs), trace


def _survivor_rows(
    name: str, got: Tensor, want: Tensor, trace: list[LayerTrace], prefix: int, full: bool
) -> list[tuple[Tensor, Tensor]]:
    """Pairs to compare: whole tensors, or for a sequence of tokens the rows of each sample's survivors.

    Args:
        name: of the output, for the message.
        got: from the pruned forward.
        want: from the oracle.
        trace: of the pruned forward.
        prefix: P; an output may hold the candidates alone.
        full: the pruned forward hands on full-length maps.
    """
    entry = trace[-1]
    if want.ndim == 3 and want.shape[1] < prefix + int(trace[0].tokens_in.max()):
        prefix = 0
    tokens = want.ndim == 3 and want.shape[1] >= prefix + max(int(k.max()) + 1 if len(k) else 0 for k in entry.kept)
    tokens = (
        tokens and got.ndim == 3 and got.shape[1] == (want.shape[1] if full else prefix + int(entry.tokens_out.max()))
    )
    if not tokens:
        assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)} against {tuple(want.shape)}"
        return [(got, want)]
    pairs = []
    for sample, index in enumerate(entry.kept):
        rows = torch.cat([torch.arange(prefix, device=index.device), index + prefix])
        pairs.append((got[sample, rows] if full else got[sample, : len(rows)], want[sample, rows]))
    return pairs


# -- contracts --------------------------------------------------------------------------------------------------------


def snapshot(model: nn.Module) -> dict[str, tuple[Any, ...]]:
    """What undo must give back: type, attributes and hook counts of every module."""
    return {
        name: (
            type(module),
            tuple(vars(module)),
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
            module.training,
        )
        for name, module in model.named_modules()
    }


def check_identity(model: nn.Module, plan: Plan, inputs: Inputs) -> str:
    """Contract 1: a plan that drops nothing changes nothing (float32: 1e-6 of the output's size)."""
    stage = plan.stages["vision"]
    nothing = Plan(vision=Stage(Saint(threshold=1.0, neighbors=10**6), layers=stage.layers, placement=stage.placement))
    base = run(model, inputs)
    with pruned(model, nothing) as session:
        same = run(model, inputs)
        dropped = any(bool((t.tokens_in != t.tokens_out).any()) for t in session.trace)
    assert session.trace == [], "a removed session still holds a trace"
    assert not dropped, "a threshold no pair can reach dropped tokens"
    worst = 0.0
    for name, want in base.items():
        assert same[name].shape == want.shape, f"{name}: shape {tuple(same[name].shape)} against {tuple(want.shape)}"
        worst = max(worst, float((same[name] - want).abs().max() / want.abs().max().clamp_min(1)))
    assert worst <= _tolerance(base, 1e-6), f"outputs differ by {worst:.2e} though nothing was dropped"
    return "bitwise equal" if worst == 0 else f"largest difference {worst:.1e}"


def check_undo(model: nn.Module, plan: Plan, inputs: Inputs) -> str:
    """Contract 2: exact undo, also after an exception; applying twice is refused."""
    base, before = run(model, inputs), snapshot(model)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    session = apply(model, plan)
    run(model, inputs)
    assert status(model) is not None, "status() is None although a plan is applied"
    try:
        apply(model, plan)
    except AlreadyAppliedError:
        pass
    else:
        raise AssertionError("applying a second plan was not refused")
    session.remove()
    assert status(model) is None, "status() still reports a plan"
    _same_model(model, before, weights, base, inputs)
    try:
        with pruned(model, plan):
            raise KeyError("raised inside the context")
    except KeyError:
        pass
    _same_model(model, before, weights, base, inputs)
    apply(model, plan)
    remove(model)
    _same_model(model, before, weights, base, inputs)
    return "types, attributes, hooks, weights and outputs as before"


def _same_model(model: nn.Module, before: Any, weights: Any, base: Any, inputs: Inputs) -> None:
    after = snapshot(model)
    changed = [name for name in before if before[name] != after.get(name)]
    assert not changed, f"modules not restored: {changed[:3]}"
    state = model.state_dict()
    assert list(state) == list(weights), "state_dict keys changed"
    assert all(torch.equal(state[name], weights[name]) for name in weights), "weights changed"
    again = run(model, inputs)
    assert all(torch.equal(again[name], base[name]) for name in base), "outputs changed after remove()"


def check_oracle(model: nn.Module, plan: Plan, inputs: Inputs, atol: float = 1e-5) -> str:
    """Contract 3: masked-oracle equality (``atol`` times the output's size, at least ``atol``).

    A merged token is no hidden token: for methods that merge, equality with :func:`merged_oracle` takes its place.
    """
    merges = plan.stages["vision"].method.merges
    want, _ = (merged_oracle if merges else masked_oracle)(model, plan, inputs)
    with pruned(model, plan) as session:
        got = run(model, inputs)
        trace = session.trace
    _, encoder, row = locate(model)
    full = plan.stages["vision"].output != "survivors"
    for name in want:
        scale = max(1.0, float(want[name].abs().max()))
        for a, b in _survivor_rows(name, got[name], want[name], trace, row.prefix(encoder), full):
            worst = float((a - b).abs().max())
            assert worst <= _tolerance(want, atol) * scale, f"{name}: differs by {worst:.2e} (size {scale:.1f})"
    oracle = "the merged oracle (nothing is masked)" if merges else "the masked oracle"
    return f"{len(want)} output(s) equal to {oracle} within {_tolerance(want, atol):.0e}"


def check_batch(model: nn.Module, plan: Plan, inputs: Inputs, atol: float = 1e-5) -> str:
    """Contract 4: a sample's result does not depend on its batch mates; survivors are ascending and unique."""
    size = len(next(iter(inputs.values())))
    with pruned(model, plan) as session:
        together, trace = run(model, inputs), session.trace
        alone, traces = [], []
        for sample in range(size):
            alone.append(run(model, {name: value[sample : sample + 1] for name, value in inputs.items()}))
            traces.append(session.trace)
    _, encoder, row = locate(model)
    prefix, full = row.prefix(encoder), plan.stages["vision"].output != "survivors"
    for index, entry in enumerate(trace):
        for sample, kept in enumerate(entry.kept):
            assert torch.equal(kept, torch.unique(kept)), f"layer {entry.layer}: survivors not ascending and unique"
            single = traces[sample][index].kept[0]
            assert torch.equal(kept, single), (
                f"layer {entry.layer}, sample {sample}: other survivors in a batch than alone"
            )
    for name, value in together.items():
        assert value.shape[:1] == (size,), f"{name} of shape {tuple(value.shape)} has no row for each of {size} samples"
        for sample in range(size):
            want, got = alone[sample][name][0], value[sample]
            if got.ndim == 2 and not full:  # behind the survivors of this sample comes padding
                length = len(trace[-1].kept[sample])
                length += 0 if len(got) == int(trace[-1].tokens_out.max()) else prefix  # 0: candidates alone
                got, want = got[:length], want[:length]
            scale = max(1.0, float(want.abs().max()))
            worst = float((got - want).abs().max())
            assert worst <= _tolerance(together, atol) * scale, (
                f"{name}, sample {sample}: batch changes it by {worst:.2e}"
            )
    lengths = [len(kept) for kept in trace[-1].kept]
    return f"{size} samples, {min(lengths)}..{max(lengths)} survivors"


def check_on(model: nn.Module, plan: Plan, inputs: Inputs) -> str:
    """Contract 6: outputs differ, token counts equal the trace, and FLOPs fall as the token counts predict (2 %)."""
    with pruned(model, plan) as session:
        run(model, inputs)
        sample = int((session.trace[0].tokens_in - session.trace[-1].tokens_out).argmax())  # the one that loses most
    one = {name: value[sample : sample + 1] for name, value in inputs.items()}
    _, encoder, row = locate(model)
    blocks = list(part(encoder, row.blocks))
    base, base_flops, unknown = _flops(model, row, blocks, one)
    widths: list[int] = []

    def measure(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        widths.append((args[0] if args else next(iter(kwargs.values()))).shape[1])

    with ExitStack() as stack:
        session = stack.enter_context(pruned(model, plan))
        for block in blocks:  # what the parts of a block see, not the block: its input may be full length
            stack.callback(_first_part(block, row).register_forward_pre_hook(measure, with_kwargs=True).remove)
        output, flops, unknown_pruned = _flops(model, row, blocks, one)
        trace, placement = session.trace, session.status.stages["vision"].placement
    assert trace[-1].tokens_out[0] < trace[0].tokens_in[0], "no token was dropped"
    changed = [n for n, v in output.items() if v.shape != base[n].shape or not torch.equal(v, base[n])]
    assert changed, "tokens were dropped and no output changed"
    prefix, mid = row.prefix(encoder), placement == "mid"
    behind = dict(enumerate(widths))  # tokens that reach the MLP of each block
    for entry in trace:
        if entry.tokens_out[0] == entry.tokens_in[0]:
            continue
        want = prefix + int(entry.tokens_out[0])
        if entry.layer + 1 < len(blocks):
            seen = widths[entry.layer + 1]
            assert seen == want, f"layer {entry.layer}: the trace says {want} tokens, the next block saw {seen}"
        if mid:
            behind[entry.layer] = want
    predicted = 0.0
    for layer, (full, attention, mlp, squared) in enumerate(base_flops):
        n_in = widths[layer]
        predicted += squared * (n_in / full) ** 2 + attention * n_in / full + mlp * behind[layer] / full
    measured = sum(a + m + s for _, a, m, s in flops)
    error = abs(measured / predicted - 1)
    assert error <= 0.02, f"FLOPs are {error:.1%} off what the token counts predict"
    share = measured / sum(a + m + s for _, a, m, s in base_flops)
    return f"{share:.0%} of the blocks' FLOPs{left_out(unknown, unknown_pruned)}, {error:.1%} off the prediction"


def _block_spec(block: nn.Module, row: EncoderSpec) -> BlockSpec:
    return next(row.block_specs[c.__name__] for c in type(block).__mro__ if c.__name__ in row.block_specs)


def _first_part(block: nn.Module, row: EncoderSpec) -> nn.Module:
    spec = _block_spec(block, row)
    return part(units(block, spec)[0][0], spec.norm1 or spec.attn or "norm1")


def _flops(
    model: nn.Module, row: EncoderSpec, blocks: list[nn.Module], inputs: Inputs
) -> tuple[dict[str, Tensor], list[tuple[int, float, float, float]], list[str]]:
    """Outputs; per block: tokens in, linear FLOPs of the attention half, of the MLP, and FLOPs quadratic in tokens; operators
    that were not counted."""
    names = {
        module: f"{type(model).__name__}.{path}" if path else type(model).__name__
        for path, module in model.named_modules()
    }
    tokens: list[int] = []

    def length(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tokens.append((args[0] if args else next(iter(kwargs.values()))).shape[1])

    fast = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        torch.backends.mha.set_fastpath_enabled(False)  # its fused kernel does not say which half costs what
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast)
        for block in blocks:
            stack.callback(block.register_forward_pre_hook(length, with_kwargs=True).remove)
        output, counted = count_flops(lambda: run(model, inputs))
    by_module = counted.by_module
    out = []
    for index, block in enumerate(blocks):
        spec = _block_spec(block, row)  # of the model's own parts: scoring is matrix products too
        halves: list[list[dict[str, int]]] = [[by_module[names[block]]], []]  # without a seam all counts as one half
        if spec.seam:
            paths = (spec.padding or spec.attn, spec.mlp)
            halves = [
                [by_module[names[part(unit, path or "")]] for unit in parallel]
                for path, parallel in zip(paths, units(block, spec), strict=True)
            ]
        for _, table in spec.bias:  # computed for all pairs, whoever is left
            if isinstance(holder := part(block, table), nn.Module):
                parts = [by_module[names[child]] for child in holder.children() if names[child] in by_module]
                halves[0] += [{op: -flops for op, flops in counts.items()} for counts in parts]
        attention = {op: sum(half.get(op, 0) for half in halves[0]) for op in {op for half in halves[0] for op in half}}
        mlp = sum(sum(half.values()) for half in halves[1])
        squared = sum(v for op, v in attention.items() if "attention" in op or "bmm" in op)  # bmm: unfused
        out.append((tokens[index], float(sum(attention.values()) - squared), float(mlp), float(squared)))
    return output, out, counted.uncounted


def check_bad_input(model: nn.Module, plan: Plan, inputs: Inputs) -> str:
    """Contract 7: bad plans and bad pixels raise a clear error and leave the model alone."""
    before = snapshot(model)
    _, encoder, row = locate(model)
    depth = len(part(encoder, row.blocks))
    bad: list[tuple[str, Callable[[], Any]]] = [
        (f"{depth}", lambda: apply(model, Stage(Saint(), layers=[depth]))),
        ("threshold", lambda: apply(model, Saint(threshold=1.5))),
        ("neighbors", lambda: apply(model, Saint(neighbors=0))),
        ("empty", lambda: _run_pruned(model, plan, {n: v[:0] for n, v in inputs.items()})),
        ("budget", lambda: _run_pruned(model, Plan(vision=Saint(budget=10**6)), inputs)),
        ("NaN", lambda: _run_pruned(model, plan, {n: _poison(v) for n, v in inputs.items()})),
    ]
    for word, action in bad:
        try:
            action()
        except (ValueError, TypeError, SaintError) as error:
            assert word in str(error), f"the error for a bad {word} does not name it: {error}"
        except RuntimeError as error:  # an empty batch may not reach our code
            assert word == "empty", f"a bad {word} ends in: {error}"
        else:
            raise AssertionError(f"a bad {word} was accepted")
        assert snapshot(model) == before, f"the model is not as before after a bad {word}"
    return f"{len(bad)} kinds refused"


def _run_pruned(model: nn.Module, plan: Plan, inputs: Inputs) -> None:
    with pruned(model, plan):
        run(model, inputs)


def _poison(value: Tensor) -> Tensor:
    return (
        value.clone().index_fill_(0, torch.zeros(1, dtype=torch.long, device=value.device), torch.nan)
        if value.is_floating_point()
        else value
    )


def _tolerance(outputs: Mapping[str, Tensor], float32: float) -> float:
    low = any(value.dtype in (torch.float16, torch.bfloat16) for value in outputs.values())
    return max(float32, 2e-2) if low else float32


CONTRACTS: dict[str, Callable[[nn.Module, Plan, Inputs], str]] = {
    "identity": check_identity,
    "exact undo": check_undo,
    "masked oracle": check_oracle,
    "batch independence": check_batch,
    "really on": check_on,
    "bad input": check_bad_input,
}


@contextmanager
def _eval(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def outcomes(contracts: Mapping[str, Callable[..., str]], *given: Any) -> list[Result]:
    """One result per contract: what each says of ``given``."""
    results = []
    for name, contract in contracts.items():
        try:
            results.append(Result(name, "passed", contract(*given)))
        except AssertionError as error:
            results.append(Result(name, "failed", str(error)))
        except HookNeverFiredError as error:
            results.append(Result(name, "skipped", str(error)))
    return results


def check_model(model: nn.Module, plan: Plan | None = None, inputs: Inputs | None = None) -> list[Result]:
    """Run every contract.

    Args:
        model: holds one supported encoder; in eval mode during the checks.
        plan: with a vision stage; None searches one that drops different numbers of tokens from the example inputs.
        inputs: keyword inputs with at least two samples; None makes random pictures.

    Returns:
        One result per contract.

    Raises:
        UnsupportedModelError: the model is not in the support table.
    """
    locate(model)
    with _eval(model):
        inputs = example_inputs(model) if inputs is None else inputs
        plan = example_plan(model, inputs) if plan is None else plan
        return outcomes(CONTRACTS, model, plan, inputs)
