"""A residual block seen through its parts: run its two halves from its own modules.

Pruning between attention and MLP needs a seam inside the block. No forward is copied: a fact table names the parts, the
halves are composed of the block's own modules, and the composition is compared with the block's own forward before
anything is touched. Upstream drift becomes a :class:`~saint.errors.ParityError`, never a wrong number.
"""

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import HookNeverFiredError, ParityError, UnsupportedModelError
from ..patch import override
from ..upstream.names import KEYS_FROM, Parameters
from ..upstream.sharded import gathered
from ..upstream.specs import BlockSpec, part


def refuse_meta(module: nn.Module) -> None:
    """Refuse a module whose parts cannot be run, for it is without weights.

    Raises:
        UnsupportedModelError: parameters on ``meta``.
    """
    for parameter in module.parameters():
        if parameter.is_meta:
            raise UnsupportedModelError(
                f"{type(module).__name__} has parameters on the meta device: load its weights before applying a plan "
                "(and offload them, where they must be, behind it)"
            )


def _attention(unit: nn.Module, path: str) -> tuple[nn.Module | None, str]:
    """Find what holds the weight at ``path`` when it is used, and the path from there: adapters stand around an attention."""
    name, _, rest = path.partition(".")
    outer = part(unit, name)
    if not isinstance(outer, nn.Module):
        return None, rest
    return next((m for m in outer.modules() if isinstance(m, nn.MultiheadAttention)), outer), rest


def _known(unit: nn.Module, paths: tuple[str, ...]) -> tuple[str, Any]:
    """The first path at which there is something, and that."""
    for path in paths:
        found = part(unit, path)
        inner, rest = _attention(unit, path)
        found = part(inner, rest) if found is None and inner is not None and rest else found
        if found is not None:
            return path, found
    return "", None


def units(module: nn.Module, spec: BlockSpec) -> tuple[list[nn.Module], list[nn.Module]]:
    """The modules that hold the names of each half: the block itself, or its parallel attentions and MLPs."""
    if spec.units is None:
        return [module], [module]
    first, second = (list(part(module, path) or ()) for path in spec.units)
    return first, second


class Block:
    """One block seen through the spec of its class; holds no state of a forward."""

    def __init__(self, module: nn.Module, spec: BlockSpec, name: str) -> None:
        self.module, self.spec, self.name = module, spec, name
        self.parameters = Parameters(type(module).forward)
        names = self.parameters.names
        self.mask = None if spec.mask is None else spec.mask.among(names)
        self.tables = tuple(found for table in spec.tables if (found := table.among(names)) is not None)
        self.segments = None if spec.segments is None else spec.segments.among(names)
        if self.segments is None and spec.segments is not None:
            raise ParityError(f"{name} ({type(module).__name__}) takes no {spec.segments}, which ends its segments")
        self.units = units(module, spec)
        parallel = self.units[0]
        source, shown = _known(parallel[0], spec.keys) if parallel else ("", None)
        if spec.keys and not source:
            raise ParityError(f"{name} ({type(module).__name__}) has none of {', '.join(spec.keys)} to read keys from")
        self.key_source, self.recomputes = source, isinstance(shown, Tensor)
        self.heads = _known(parallel[0], spec.heads)[1] or 0 if parallel else 0
        dim = part(parallel[0], f"{source.rpartition('.')[0]}.head_dim") if parallel and source else None
        self.key_width = self.heads * dim if isinstance(dim, int) else 0
        self.bias = next((method for method, table in spec.bias if part(module, table) is not None), None)

    def named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """All arguments of a call behind the hidden states, by name."""
        return self.parameters.named(args, kwargs, skip=1)

    # -- keys ---------------------------------------------------------------------------------------------------------

    def watch_keys(self, keep: Callable[[int, Any], None]) -> Callable[[], None]:
        """Call ``keep`` with the number of the parallel attention and what shows its keys, at each call; returns the undo."""

        def watch(index: int) -> Callable[..., None]:
            def hook(_module: nn.Module, _args: Any, output: Any) -> None:
                keep(index, output[0] if isinstance(output, tuple) else output)  # vLLM's layers return (output, bias)

            return hook

        def read(index: int, attention: nn.Module, path: str, original: Callable[..., Any]) -> Callable[..., Any]:
            parameters = Parameters(type(attention).forward)

            def forward(*args: Any, **kwargs: Any) -> Any:
                keep(index, (KEYS_FROM.read(parameters.named(args, kwargs)), *self._key_weights(attention, path)))
                return original(*args, **kwargs)

            return forward

        undo = ExitStack()
        for index, unit in enumerate(self.units[0] if self.key_source else ()):
            if self.recomputes:
                # where the weight is used: an adapter may put another in its place for the length of the call
                attention, path = _attention(unit, self.key_source)
                assert attention is not None
                override(undo, attention, "forward", partial(read, index, attention, path))
            else:
                undo.callback(part(unit, self.key_source).register_forward_hook(watch(index)).remove)
        return undo.close

    def head_mean_keys(self, keys: Any, prefix: int) -> Tensor:
        """Keys averaged over heads, without the prefix: float32 or the weights' dtype, [B, N, D].

        Args:
            keys: what :meth:`watch_keys` kept of the call: keys, or the input of an attention with what makes keys of it.
            prefix: P.

        Raises:
            HookNeverFiredError: nothing was kept: the module that shows the keys was not called.
        """
        if keys is None:
            raise HookNeverFiredError(
                f"{self.name}.{self.key_source} was not called during the forward, so there are no keys to score: either it "
                "was replaced since the plan was applied (an adapter was merged or unloaded: take the plan off and apply it "
                "again), or this version of the model computes its attention differently from what the support table knows"
            )
        if self.recomputes:
            x, weight, bias = keys
            with torch.no_grad():
                return nn.functional.linear(x[:, prefix:], weight, bias)
        keys = keys.detach()
        if self.spec.fused:
            own = self.key_width or keys.shape[-1] // 3
            keys = keys[..., -2 * own : -own]  # queries may have more heads
        if self.segments is not None:
            keys = keys.unsqueeze(0)
        if self.spec.keys_by_token:
            return keys[:, prefix:].mean(2, dtype=torch.float32)
        if keys.ndim == 4:
            return keys[:, :, prefix:].mean(1, dtype=torch.float32)
        batch, count, width = keys.shape
        heads = keys.reshape(batch, count, self.heads, width // self.heads)
        return heads[:, prefix:].mean(2, dtype=torch.float32)

    def _key_weights(self, attention: nn.Module, path: str) -> tuple[Tensor, Tensor | None]:
        """Average over heads what makes keys of an attention's input: the mean is linear, so D columns suffice instead of C."""
        weight, bias = part(attention, path), part(attention, path.replace("weight", "bias"))
        width = weight.shape[0] // 3
        with torch.no_grad():
            w = weight[width : 2 * width].view(self.heads, width // self.heads, -1).mean(0)
            return w, None if bias is None else bias[width : 2 * width].view(self.heads, -1).mean(0)

    # -- halves -------------------------------------------------------------------------------------------------------

    def first(self, x: Tensor, **kwargs: Any) -> Tensor:
        """x + attention branch. x [B, P + N, C]."""
        names = self.spec
        assert names.attn is not None
        return self._add(x, self.units[0], names.norm1, names.attn, names.branch1, kwargs)

    def second(self, x: Tensor) -> Tensor:
        """x + MLP branch."""
        names = self.spec
        assert names.mlp is not None
        return self._add(x, self.units[1], names.norm2, names.mlp, names.branch2, {})

    def _add(
        self,
        x: Tensor,
        parallel: list[nn.Module],
        norm: str | None,
        name: str,
        branch: tuple[str, ...],
        kwargs: dict[str, Any],
    ) -> Tensor:
        branches = []
        for unit in parallel:
            y = getattr(unit, name)(x if norm is None else getattr(unit, norm)(x), **kwargs)
            y = y[0] if isinstance(y, tuple) else y
            for step_name in branch:
                if (step := getattr(unit, step_name, None)) is not None:
                    y = step(y) if isinstance(step, nn.Module) else y * step
            branches.append(y.reshape(x.shape))  # experts may return the tokens of all samples in one row
        return x + (branches[0] if len(branches) == 1 else torch.stack(branches).sum(0))

    # -- proof --------------------------------------------------------------------------------------------------------

    def prove(self, width: int, prefix: int, table: Callable[[str, Tensor], Any]) -> None:
        """Compare the two halves with the block's own forward on a random input; also that keys appear.

        Args:
            width: C.
            prefix: P.
            table: makes a positional-table argument, from its name, for the patch tokens of a random input [..., P + N, C].

        Raises:
            ParityError: they differ, or the block cannot be called as the fact table says.
            UnsupportedModelError: parameters are sharded by a module around the block.
        """
        with gathered(self.module, self.name):
            self._prove(width, prefix, table)

    def _prove(self, width: int, prefix: int, table: Callable[[str, Tensor], Any]) -> None:
        weight = next(p for p in self.module.parameters() if p.is_floating_point())
        generator = torch.Generator().manual_seed(0)
        # a bias over all pairs of tokens fits one number of tokens only
        count = prefix + 6 if self.bias is None else part(self.module, self.bias)().shape[-1]
        x = torch.randn(2, count, width, generator=generator).to(weight)
        kwargs: dict[str, Any] = {}
        if self.segments is not None:
            x = x.flatten(0, 1)
            kwargs[self.segments] = torch.tensor([0, 4, len(x)], dtype=torch.int32, device=x.device)
        kwargs |= {name: table(name, x) for name in self.tables}
        if self.mask is not None:
            kwargs[self.mask] = None
        training = [m for m in self.module.modules() if m.training]
        shown: dict[int, Any] = {}
        unwatch = self.watch_keys(shown.__setitem__)
        try:
            for module in training:
                module.training = False
            with torch.no_grad():
                expected = self.module.forward(x, **kwargs)
                composed = self.second(self.first(x, **kwargs))
                if self.key_source:
                    keys = list(shown.values())
                    self.head_mean_keys(torch.cat(keys, 1) if len(keys) > 1 else next(iter(keys), None), prefix)
        except (TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise ParityError(
                f"{self.name} ({type(self.module).__name__}) does not have the anatomy known for its class: {error}. "
                "Its library may have changed; placement='post' does not need the anatomy"
            ) from error
        finally:
            unwatch()
            for module in training:
                module.training = True
        tolerance = 1e-6 if x.dtype in (torch.float32, torch.float64) else 1e-2
        if not torch.allclose(expected, composed, rtol=tolerance, atol=tolerance):
            worst = (expected - composed).abs().max().item()
            raise ParityError(
                f"{self.name} ({type(self.module).__name__}) recomposed from its parts differs from its own forward by "
                f"{worst:.2e}: its library has changed the block. placement='post' does not need the anatomy"
            )
