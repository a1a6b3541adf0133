"""Anatomy of a residual block: run its two halves from its own modules.

Pruning between attention and MLP needs a seam inside the block. No forward is copied: a fact table names the parts, the
halves are composed of the block's own modules, and the composition is compared with the block's own forward before
anything is touched. Upstream drift becomes a :class:`~saint.errors.ParityError`, never a wrong number.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import HookNeverFiredError, ParityError
from ..upstream.names import Parameters
from ..upstream.specs import Anatomy


def part(module: nn.Module, path: str) -> Any:
    """Attribute at a dotted path, or None where any step is missing."""
    node: Any = module
    for name in path.split("."):
        node = getattr(node, name, None)
    return node


def _chain(block: nn.Module, names: tuple[str, ...]) -> list[Any]:
    return [step for name in names if (step := getattr(block, name, None)) is not None]


class Block:
    """One block seen through its anatomy; holds no state of a forward."""

    def __init__(self, module: nn.Module, anatomy: Anatomy, name: str) -> None:
        self.module, self.anatomy, self.name = module, anatomy, name
        self.parameters = Parameters(type(module).forward)
        names = self.parameters.names
        self.mask = None if anatomy.mask is None else anatomy.mask.among(names)
        self.tables = tuple(found for table in anatomy.tables if (found := table.among(names)) is not None)
        self.segments = None if anatomy.segments is None else anatomy.segments.among(names)
        if self.segments is None and anatomy.segments is not None:
            raise ParityError(f"{name} ({type(module).__name__}) takes no {anatomy.segments}, which ends its segments")
        source = next((path for path in anatomy.keys if part(module, path) is not None), None)
        if source is None:
            raise ParityError(
                f"{name} ({type(module).__name__}) has none of {', '.join(anatomy.keys)} to read keys from"
            )
        self.key_source = source
        self._source = part(module, source)
        self.heads = next((n for path in anatomy.heads if (n := part(module, path)) is not None), 0)

    def named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """All arguments of a call behind the hidden states, by name."""
        return self.parameters.named(args, kwargs, skip=1)

    # -- keys ---------------------------------------------------------------------------------------------------------

    def watch_keys(self, keep: Callable[[Tensor], None]) -> Callable[[], None]:
        """Call ``keep`` with what shows the keys of each call; returns the undo."""
        shown = self._source if isinstance(self._source, nn.Module) else part(self.module, self.anatomy.norm1 or "")

        def hook(_module: nn.Module, _args: Any, output: Tensor) -> None:
            keep(output)

        return shown.register_forward_hook(hook).remove

    def head_mean_keys(self, keys: Tensor | None, prefix: int) -> Tensor:
        """Keys averaged over heads, without the prefix: float32 or the weights' dtype, [B, N, D].

        Args:
            keys: what :meth:`watch_keys` kept of the call.
            prefix: P.

        Raises:
            HookNeverFiredError: nothing was kept: the module that shows the keys was not called.
        """
        if keys is None:
            raise HookNeverFiredError(
                f"{self.name}.{self.key_source} was not called during the forward, so there are no keys to score: this "
                "version of the model computes its attention differently from what the support table knows"
            )
        keys = keys.detach()
        if self.anatomy.fused:
            keys = keys.chunk(3, -1)[1]
        if self.segments is not None:
            keys = keys.unsqueeze(0)
        if not isinstance(self._source, nn.Module):
            return self._project(self._source, keys[:, prefix:])
        if keys.ndim == 4:
            return keys[:, :, prefix:].sum(1, dtype=torch.float32) / keys.shape[1]
        batch, count, width = keys.shape
        heads = keys.reshape(batch, count, self.heads, width // self.heads)
        return heads[:, prefix:].sum(2, dtype=torch.float32) / self.heads

    def _project(self, weight: Tensor, x: Tensor) -> Tensor:
        """Head-mean keys from the attention's input; the mean over heads is linear, so D columns suffice instead of C."""
        width = weight.shape[0] // 3
        bias = part(self.module, self.key_source.replace("weight", "bias"))
        with torch.no_grad():
            w = weight[width : 2 * width].view(self.heads, width // self.heads, -1).mean(0)
            b = None if bias is None else bias[width : 2 * width].view(self.heads, -1).mean(0)
            return nn.functional.linear(x, w, b)

    # -- halves -------------------------------------------------------------------------------------------------------

    def first(self, x: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """x + attention branch. x [B, P + N, C]."""
        y = self._normed("norm1", x)
        y = getattr(self.module, self.anatomy.attn)(y, **kwargs)
        return x + self._branch(self.anatomy.branch1, y[0] if isinstance(y, tuple) else y)

    def second(self, x: Tensor) -> Tensor:
        """x + MLP branch."""
        y = getattr(self.module, self.anatomy.mlp)(self._normed("norm2", x))
        return x + self._branch(self.anatomy.branch2, y)

    def _normed(self, which: str, x: Tensor) -> Tensor:
        name = getattr(self.anatomy, which)
        return x if name is None else getattr(self.module, name)(x)

    def _branch(self, names: tuple[str, ...], y: Tensor) -> Tensor:
        for step in _chain(self.module, names):
            y = step(y) if isinstance(step, nn.Module) else y * step
        return y

    # -- proof --------------------------------------------------------------------------------------------------------

    def prove(self, width: int, prefix: int, table: Callable[[str, Tensor], Any]) -> None:
        """Compare the two halves with the block's own forward on a random input; also that keys appear.

        Args:
            width: C.
            prefix: P.
            table: makes a positional-table argument, from its name, for the patch tokens of a random input [..., P + N, C].

        Raises:
            ParityError: they differ, or the block cannot be called as the fact table says.
        """
        weight = next(p for p in self.module.parameters() if p.is_floating_point())
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(2, prefix + 6, width, generator=generator).to(weight)
        kwargs: dict[str, Any] = {}
        if self.segments is not None:
            x = x.flatten(0, 1)
            kwargs[self.segments] = torch.tensor([0, 4, len(x)], dtype=torch.int32, device=x.device)
        kwargs |= {name: table(name, x) for name in self.tables}
        if self.mask is not None:
            kwargs[self.mask] = None
        training = [m for m in self.module.modules() if m.training]
        shown: list[Tensor] = []
        unwatch = self.watch_keys(shown.append)
        try:
            for module in training:
                module.training = False
            with torch.no_grad():
                expected = self.module.forward(x, **kwargs)
                composed = self.second(self.first(x, kwargs))
                self.head_mean_keys(shown[-1] if shown else None, prefix)
        except (TypeError, RuntimeError, AttributeError) as error:
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
