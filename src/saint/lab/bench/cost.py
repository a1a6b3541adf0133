"""What a forward needs, counted instead of timed: FLOPs and memory."""

import dataclasses
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ...flops import count_flops
from .timing import synchronize

MIB = 2**20


class _Watch(TorchDispatchMode):
    """Notes the peak of the bytes in live tensors that were made under it."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        output = func(*args, **kwargs)
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in given and storage._cdata not in self.live:  # neither view nor in place
                    self._made(storage)
        return output

    def _made(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self.live[key] = size
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.now -= self.live.pop(key, 0)


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one forward needs, counted.

    Attributes:
        flops: floating-point operations; a multiply-add is two.
        by_operator: the same, by operator.
        uncounted: operators that look expensive and have no FLOP formula: ``flops`` is without them.
        memory: MiB of activations alive at once: on CUDA by the allocator, elsewhere tensors (a kernel's own
            workspace is not seen).
    """

    flops: float
    by_operator: Mapping[str, float]
    uncounted: list[str]
    memory: float

    @classmethod
    def mean(cls, costs: "Sequence[Cost]") -> "Cost":
        """Return the mean of several forwards; the memory is that of the largest."""
        if len(costs) == 1:
            return costs[0]
        operators = {name for one in costs for name in one.by_operator}
        return cls(
            sum(one.flops for one in costs) / len(costs),
            {name: sum(one.by_operator.get(name, 0) for one in costs) / len(costs) for name in sorted(operators)},
            sorted({name for one in costs for name in one.uncounted}),
            max(one.memory for one in costs),
        )


def cost(run: Callable[[], Any], device: torch.device) -> Cost:
    """Run once and count."""
    with torch.no_grad(), _Watch() as watch:
        counted = count_flops(run)[1]
    peak = watch.peak
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        with torch.inference_mode():
            run()
        synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) - before
    return Cost(counted.total, counted.by_operator, counted.uncounted, peak / MIB)
