"""Answers of a model under a plan."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import saint
from support.families import cache_of
from support.plans import GREEDY


class Answer(NamedTuple):
    """New tokens [B, T], the logits that chose them [B, T, V], and what the session and the model have of it."""

    tokens: Tensor
    logits: Tensor
    trace: tuple
    memory: Any
    cache: Any


def generated(model: nn.Module, plan: saint.Plan, inputs: dict, steps: int, **more) -> Answer:
    """Greedy generation under a plan."""
    with saint.pruned(model, plan) as session, torch.no_grad():
        out = model.generate(
            **inputs, max_new_tokens=steps, output_logits=True, return_dict_in_generate=True, **GREEDY, **more
        )
        trace, memory = session.trace, session.kv_memory
    new = out.sequences[:, inputs["input_ids"].shape[1] :]
    return Answer(new, torch.stack(out.logits, 1), trace, memory, cache_of(out))
