"""The merged oracle: the forward of full length in which all tokens that became one share their mean.

It has no size in it: copies of a token are attended to as often as there are copies.
"""

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import HookNeverFiredError
from ..plans import Plan
from ..runtime.blocks import Block
from ..session import pruned
from ..tokens import LayerTrace
from ..upstream.specs import part
from ..vision.locate import locate
from .blocks import block_spec
from .hiding import HideKeys, hide_in_pools, stand_in, unfused
from .outputs import Inputs, run


def merged_oracle(model: nn.Module, plan: Plan, inputs: Inputs) -> tuple[dict[str, Tensor], list[LayerTrace]]:
    """The full-length forward in which all tokens that ``plan`` merges into one share a row from the merge on.

    That row is their mean, or of methods that do not average (:attr:`saint.methods.base.Method.averages`) the survivor's.

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
    stage = plan.vision[0]
    beta, averages, survivors = stage.method.size_bias(), stage.method.averages, stage.output == "survivors"
    with pruned(model, plan) as session:
        run(model, inputs)
        trace = session.trace
    _, encoder, spec = locate(model)
    blocks = list(part(encoder, spec.blocks))
    prefix, mode = spec.prefix(encoder), HideKeys()
    entries = [entry for entry in trace if entry.into is not None and entry.placement == "input"]
    by_layer = {entry.layer: entry for entry in trace if entry.into is not None and entry.placement != "input"}
    groups: list[Tensor] | None = None  # for each original candidate the survivor it is part of

    def share(y: Tensor) -> Tensor:
        assert groups is not None
        y = y.clone()
        for sample, into in enumerate(groups):
            for survivor in into.unique().tolist():
                members = prefix + (into == survivor).nonzero().flatten()
                y[sample, members] = y[sample, members].mean(0) if averages else y[sample, prefix + survivor].clone()
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
        most = max(map(len, groups))
        if table.shape[-2] != most:
            return table
        own = table.ndim == 4 and len(table) == len(groups)  # every sample has its own grid
        padded = [torch.cat([into, torch.arange(len(into), most, device=into.device)]) for into in groups]
        rows = torch.stack([(table[b] if own else table)[..., into, :] for b, into in enumerate(padded)])
        return rows.unsqueeze(1) if table.ndim == 2 else rows

    def pairs(bias: Tensor | None) -> Tensor | None:
        """A bias over all pairs of tokens, in which copies take rows and columns of the survivor."""
        if bias is None or groups is None:
            return bias
        rows = [torch.cat([torch.arange(prefix, device=into.device), prefix + into]) for into in groups]
        return torch.stack([bias.flatten(0, -3)[:, picked][:, :, picked] for picked in rows])

    def wrap(layer: int, block: Block, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            nonlocal groups
            groups = None if layer == 0 else groups
            for entry in entries if layer == 0 else ():
                groups = entry.into
                x = share(x)
            kwargs = block.named(args, kwargs)
            if groups is not None:
                kwargs |= {n: positions(kwargs[n]) for n in block.tables if kwargs.get(n) is not None}
            if block.spec.bias and block.mask in kwargs:
                kwargs[block.mask] = pairs(kwargs[block.mask])
            mode.visible, mode.masked = logits(x.shape[1], x), 0
            halves = layer in by_layer and by_layer[layer].placement == "mid"
            y = block.first(x, **kwargs) if halves else original(x, **kwargs)
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
        y, first = y.clone(), 0 if spec.pool_with_prefix(encoder) else prefix
        for sample, into in enumerate(groups):
            mode.visible[sample, prefix + into.unique()] = True
            y[sample, ~mode.visible[sample]] = y[sample, first:][mode.visible[sample, first:]].mean(0)
        return y

    with ExitStack() as stack:
        stack.enter_context(unfused())
        for layer, module in enumerate(blocks):
            block = Block(module, block_spec(module, spec), f"{spec.blocks}.{layer}")
            stand_in(stack, module, "forward", partial(wrap, layer, block))
            if block.bias is not None:
                holder, _, method = block.bias.rpartition(".")
                stand_in(stack, part(module, holder), method, lambda own: lambda *a, **k: pairs(own(*a, **k)))
        final = part(encoder, spec.final) if spec.final else None
        if final is not None:
            stack.callback(final.register_forward_hook(pooled).remove)
        hide_in_pools(stack, mode, encoder, spec)
        stack.enter_context(mode)
        return run(model, inputs), trace
