"""What torch's FSDP2 (``fully_shard``) does to a module, and how it is undone for the length of a look."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ..errors import UnsupportedModelError


@contextmanager
def gathered(module: nn.Module, name: str) -> Iterator[None]:
    """Inside, the parameters of ``module`` are plain tensors; all processes must enter. Does nothing where they are already.

    Raises:
        UnsupportedModelError: they are sharded, and not by ``fully_shard`` of the module itself or of its parts.
    """
    if not _sharded(module):
        yield
        return
    from torch.distributed.fsdp import FSDPModule

    owners = [part for part in module.modules() if isinstance(part, FSDPModule)]
    for owner in owners:
        owner.unshard()
    try:
        if left := _sharded(module):
            raise UnsupportedModelError(
                f"parameters of {name} are sharded by a module around it ({left[0]} is a DTensor), and must be whole to be "
                'looked at: apply the plan before the model is sharded, shard each block as well, or use placement="post"'
            )
        yield
    finally:
        for owner in owners:
            owner.reshard()


def _sharded(module: nn.Module) -> list[str]:
    """Names of the parameters that are shards."""
    tensor = sys.modules.get("torch.distributed.tensor")  # not imported: nothing is sharded
    return [] if tensor is None else [n for n, p in module.named_parameters() if isinstance(p, tensor.DTensor)]
