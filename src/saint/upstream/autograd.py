"""What torch tells of the backward pass around a call."""

import torch


def in_backward() -> bool:
    """Whether autograd runs a backward pass on this thread: a layer that runs now is run again for its gradients.

    torch's own checkpointing asks the same private function; there is no public one.
    """
    if torch.compiler.is_compiling():
        return False  # and cannot be traced; a compiled backward pass calls no module
    return torch._C._current_graph_task_id() != -1
