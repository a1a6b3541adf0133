"""What torch and transformers tell of the backward pass and of checkpointing."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef


def backward_pass() -> int | None:
    """Number of the backward pass that runs on this thread: a layer that runs now is run again for its gradients. None outside.

    torch's own checkpointing asks the same private function; there is no public one.
    """
    if torch.compiler.is_compiling():
        return None  # cannot be traced; a compiled backward pass calls no module
    task = torch._C._current_graph_task_id()
    return None if task == -1 else task


class Memory:
    """The memory of a tensor, without holding it.

    Another tensor object may share it: hooks of FSDP hand a layer a view of its input, and that input alone is kept.
    """

    def __init__(self, x: Tensor) -> None:
        self._storage = StorageWeakRef(x.untyped_storage())

    @property
    def freed(self) -> bool:
        """Tell whether no tensor holds it any more."""
        return self._storage.expired()


def checkpointed(module: nn.Module, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``function``, a part of ``module``'s forward, under the module's own gradient checkpointing where that is on.

    transformers checkpoints inside ``forward`` (5.23 and later), which does not run where a block runs in parts; before, around
    ``__call__``, which does.
    """
    inside = type(module).__call__ is nn.Module.__call__
    on = getattr(module, "gradient_checkpointing", False) and module.training and torch.is_grad_enabled()
    run = getattr(module, "_gradient_checkpointing_func", None)
    if not (inside and on and run is not None):
        return function

    def checkpointing(x: Tensor, **kwargs: Any) -> Tensor:
        return run(partial(function, **kwargs), x)  # the hidden states by position, as its users must

    return checkpointing
