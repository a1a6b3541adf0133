"""How many operators a drop point adds to a forward. Each is a launch on a GPU, so they are counted and may not grow unseen."""

import pytest
import timm
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import saint
from saint import operators, tokens
from saint.runtime import deciding

# what those of this library launch where they are kernels: the second also makes a tensor of its counts
LAUNCHES = {"saint.vote.default": 1, "saint.survivors.default": 3}
NOTHING_RUNS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.empty_like.default)


class Counter(TorchDispatchMode):
    """Counts operators that compute: no views, no reads of a number, no memory that is only set aside."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        alias = function._schema.returns[0].alias_info if function._schema.returns else None
        view = alias is not None and not alias.is_write
        if not view and function not in NOTHING_RUNS:
            self.names += [str(function)] * LAUNCHES.get(str(function), 1)
        return function(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", depth=3, embed_dim=48, num_heads=4).eval()


def added(vit, method, *, same_lengths):
    """Operators of a forward with one drop point, less those of the forward without."""
    x = torch.randn(8, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    plan = saint.Plan(vision=saint.Stage(method, layers=[1], placement="mid"))
    with torch.no_grad():
        with Counter() as base:
            vit(x)
        with saint.apply(vit, plan) as session:
            with Counter() as pruned:
                vit(x)
            counts = session.trace[0].tokens_out.tolist()
    assert (len(set(counts)) == 1) == same_lengths, counts
    return len(pruned.names) - len(base.names)


# where a look at a tensor waits for the device, nothing is checked for NaN, and a mask is sorted instead of listed; kernels take
# the place of the vote and of the choice there. They are called by the same operators everywhere, here in their plain form
@pytest.fixture(params=["cpu", "device", "kernels"])
def path(request, monkeypatch):
    if request.param != "cpu":
        for module in (tokens, deciding):
            monkeypatch.setattr(module, "reads_are_free", lambda device: False)
    if request.param == "kernels":
        monkeypatch.setattr(operators, "fused", lambda x, width=0: True)
    return request.param


def test_a_fixed_budget(vit, path):
    assert added(vit, saint.Saint(keep=0.6), same_lengths=True) <= {"cpu": 25, "device": 24, "kernels": 14}[path]


def test_votes_in_a_ragged_batch(vit, path):
    method = saint.Saint(threshold=0.55, neighbors=5)
    assert added(vit, method, same_lengths=False) <= {"cpu": 37, "device": 36, "kernels": 27}[path]


def test_votes_that_drop_nothing(vit, path):
    method = saint.Saint(threshold=1.0)
    assert added(vit, method, same_lengths=True) <= {"cpu": 11, "device": 10, "kernels": 5}[path]
