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
from .smaller import logn_of, show_smaller, softer


def merged_oracle(model: nn.Module, plan: Plan, inputs: Inputs) -> tuple[dict[str, Tensor], list[LayerTrace]]:
    """The full-length forward in which all tokens that ``plan`` merges into one share a row from the merge on.

    That row is their mean, or of methods that do not average (:attr:`saint.methods.base.Method.averages`) the survivor's.

    What becomes part of none is hidden, as a key, from every attention behind.

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
    with pruned(model, plan) as session:
        run(model, inputs)
        trace = session.trace
    with ExitStack() as stack:
        stack.enter_context(unfused())
        _Sharing(model, plan, trace).install(stack)
        return run(model, inputs), trace


class _Sharing:
    """Tokens that became one share a row, in an encoder of full length.

    Args:
        model: holds the encoder.
        plan: see :func:`merged_oracle`.
        trace: of the pruned forward.
    """

    def __init__(self, model: nn.Module, plan: Plan, trace: list[LayerTrace]) -> None:
        stage = next(stage for stage in plan.vision if stage.method.merges)
        self.plan, self.logn = plan, logn_of(plan)
        self.beta, self.averages = stage.method.size_bias(), stage.method.averages
        self.survivors = stage.output == "survivors"
        _, self.encoder, self.spec = locate(model)
        self.blocks = list(part(self.encoder, self.spec.blocks))
        self.prefix, self.mode = self.spec.prefix(self.encoder), HideKeys()
        self.total = trace[0].tokens_in
        merges = [entry for entry in trace if entry.into is not None]
        self.entries = [entry for entry in merges if entry.placement == "input"]
        self.by_layer = {entry.layer: entry for entry in merges if entry.placement != "input"}
        self.groups: list[Tensor] | None = None  # for each original candidate the survivor it is part of
        self.shown: list[Tensor] = []  # of smaller pictures: candidates that stay in front of all else
        if plan.pixels is not None:
            self.shown = [torch.zeros(len(into), dtype=torch.bool) for into in self.entries[0].into or ()]
            for flags, kept in zip(self.shown, self.entries.pop(0).kept, strict=True):
                flags[kept.cpu()] = True

    def install(self, stack: ExitStack) -> None:
        """From now on; ``stack`` undoes it."""
        encoder, spec = self.encoder, self.spec
        show_smaller(stack, encoder, spec, self.plan, None)
        for layer, module in enumerate(self.blocks):
            block = Block(module, block_spec(module, spec), f"{spec.blocks}.{layer}")
            stand_in(stack, module, "forward", partial(self._wrap, layer, block))
            if block.bias is not None:
                holder, _, method = block.bias.rpartition(".")
                stand_in(stack, part(module, holder), method, lambda own: lambda *a, **k: self._pairs(own(*a, **k)))
        final = part(encoder, spec.final) if spec.final else None
        if final is not None:
            stack.callback(final.register_forward_hook(self._pooled).remove)
        hide_in_pools(stack, self.mode, encoder, spec)
        stack.enter_context(self.mode)

    def _share(self, y: Tensor) -> Tensor:
        assert self.groups is not None
        y = y.clone()
        for sample, into in enumerate(self._real(self.groups)):
            for survivor in into[into >= 0].unique().tolist():
                members = self.prefix + (into == survivor).nonzero().flatten()
                y[sample, members] = (
                    y[sample, members].mean(0) if self.averages else y[sample, self.prefix + survivor].clone()
                )
        return y

    def _logits(self, count: int, like: Tensor) -> Tensor | None:
        if not self.shown and self.groups is None:
            return None
        groups = [torch.arange(len(flags)) for flags in self.shown] if self.groups is None else self.groups
        if not self.shown and self.beta == 1 and not any(bool((into < 0).any()) for into in groups):
            return None
        out = like.new_zeros(len(groups), count)
        for sample, into in enumerate(self._real(groups)):
            sizes = into[into >= 0].bincount()[into.clamp_min(0)].to(like.dtype)
            bias = ((self.beta - 1) * sizes.log()).masked_fill(into < 0, -torch.inf)
            out[sample, self.prefix : self.prefix + len(into)] = bias
        return out

    def _real(self, groups: list[Tensor]) -> list[Tensor]:
        """Mark candidates that smaller pictures do not show, by -1, as those that are part of none."""
        if not self.shown:
            return groups
        return [into.masked_fill(~flags.to(into.device), -1) for into, flags in zip(groups, self.shown, strict=True)]

    def _soften(self) -> None:
        """Soften attention where tokens are missing."""
        if self.groups is None and not self.shown:
            return
        counts = (
            [int(flags.sum()) for flags in self.shown]
            if self.groups is None
            else [len(g[g >= 0].unique()) for g in self.groups]
        )
        self.mode.softer = softer(self.prefix + torch.tensor(counts), self.prefix + self.total, self.logn)

    def _positions(self, table: Any) -> Any:
        if isinstance(table, tuple):
            return tuple(self._positions(t) for t in table)
        assert self.groups is not None
        most = max(map(len, self.groups))
        if table.shape[-2] != most:
            return table
        own = table.ndim == 4 and len(table) == len(self.groups)  # every sample has its own grid
        padded = [torch.cat([into, torch.arange(len(into), most, device=into.device)]) for into in self.groups]
        rows = torch.stack([(table[b] if own else table)[..., into, :] for b, into in enumerate(padded)])
        return rows.unsqueeze(1) if table.ndim == 2 else rows

    def _pairs(self, bias: Tensor | None) -> Tensor | None:
        """A bias over all pairs of tokens, in which copies take rows and columns of the survivor."""
        if bias is None or self.groups is None:
            return bias
        rows = [torch.cat([torch.arange(self.prefix, device=into.device), self.prefix + into]) for into in self.groups]
        return torch.stack([bias.flatten(0, -3)[:, picked][:, :, picked] for picked in rows])

    def _wrap(self, layer: int, block: Block, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.groups = None if layer == 0 else self.groups
            for entry in self.entries if layer == 0 else ():
                self.groups = entry.into
                x = self._share(x)
            kwargs = block.named(args, kwargs)
            if self.groups is not None:
                kwargs |= {n: self._positions(kwargs[n]) for n in block.tables if kwargs.get(n) is not None}
            if block.spec.bias and block.mask in kwargs:
                kwargs[block.mask] = self._pairs(kwargs[block.mask])
            self.mode.visible, self.mode.masked = self._logits(x.shape[1], x), 0
            self._soften()
            halves = layer in self.by_layer and self.by_layer[layer].placement == "mid"
            y = block.first(x, **kwargs) if halves else original(x, **kwargs)
            if self.mode.visible is not None and self.mode.masked == 0:
                raise HookNeverFiredError(f"the attention of block {layer} does not go through torch's fused functions")
            self.mode.visible = self.mode.softer = None
            if layer in self.by_layer:
                self.groups = self.by_layer[layer].into
                y = self._share(y)
            y = block.second(y) if halves else y
            return self._pooled(None, None, y) if layer == len(self.blocks) - 1 else y

        return forward

    def _pooled(self, _module: Any, _args: Any, y: Tensor) -> Tensor | None:
        """Show pools the survivors alone, as in :func:`masked_oracle`."""
        if self.groups is None or not self.survivors or y.ndim != 3 or y.shape[1] < self.prefix + len(self.groups[0]):
            return y
        self.mode.visible = torch.zeros(y.shape[:2], dtype=torch.bool, device=y.device)
        self.mode.visible[:, : self.prefix] = True
        y, first = y.clone(), 0 if self.spec.pool_with_prefix(self.encoder) else self.prefix
        for sample, into in enumerate(self.groups):
            self.mode.visible[sample, self.prefix + into[into >= 0].unique()] = True
            y[sample, ~self.mode.visible[sample]] = y[sample, first:][self.mode.visible[sample, first:]].mean(0)
        return y
