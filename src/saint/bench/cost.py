"""What a forward needs, counted instead of timed: FLOPs and memory."""

import dataclasses
import re
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from .timing import synchronize

MIB = 2**20

_EXPENSIVE = re.compile(r"mm\b|mm_|conv|attention|linear|einsum|matmul|rnn|lstm|gru")


class _Watch(TorchDispatchMode):
    """Notes operators, and the peak of the bytes in live tensors that were made under it."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: set[Any] = set()
        self.live: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.operators.add(func._overloadpacket)
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
        uncounted: operators that look expensive and that torch's counter does not know.
        memory: MiB of activations alive at once: on CUDA by the allocator, elsewhere tensors (a kernel's own
            workspace is not seen).
    """

    flops: int
    by_operator: dict[str, int]
    uncounted: list[str]
    memory: float


def cost(run: Callable[[], Any], device: torch.device) -> Cost:
    """Run once and count."""
    # not inference_mode: there, composite operators reach the counter before they are taken apart
    with torch.no_grad(), FlopCounterMode(display=False) as counter, _Watch() as watch:
        run()
    by = {str(operator): int(n) for operator, n in counter.get_flop_counts().get("Global", {}).items()}
    names = {str(operator) for operator in watch.operators if operator not in flop_registry}
    peak = watch.peak
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        with torch.inference_mode():
            run()
        synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) - before
    return Cost(int(counter.get_total_flops()), by, sorted(filter(_EXPENSIVE.search, names)), peak / MIB)
