"""What observers are told, kept as it comes, and attention by its definition."""

import math

import torch

import saint
from saint.lab.analysis.probe import Probe


class Raw:
    """Keeps everything that observers are told."""

    def __init__(self):
        self.keys, self.passed, self.calls = {}, {}, {}

    def candidates(self, stage, layer, candidates):
        self.keys[stage, layer] = candidates.keys.clone()

    def layer(self, stage, layer, passed):
        self.passed[stage, layer] = passed

    def attention(self, stage, layer, attended):
        self.calls[stage, layer] = attended


def observed(model, inputs):
    raw, probe = Raw(), Probe([0.5, 0.8], neighbors=2)
    with saint.pruned(model, saint.Plan(), observers=[raw, probe]), torch.no_grad():
        model(**inputs)
    return raw, probe.take()


def weights(call, sample, causal=False):
    """Head-mean attention by the definition."""
    q, k = call.query[sample].double(), call.key[sample].double()
    k = k.repeat_interleave(len(q) // len(k), 0)
    logits = q @ k.mT / math.sqrt(q.shape[-1])
    if causal:
        logits = logits.masked_fill(~torch.ones_like(logits, dtype=torch.bool).tril(), -torch.inf)
    return logits.softmax(-1).mean(0)


def entropy(p):
    return float(torch.special.entr(p).sum(-1).mean())
