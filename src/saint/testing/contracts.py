"""The contracts every pruned encoder must keep, one function each, and all of them at once."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..errors import AlreadyAppliedError, HookNeverFiredError, SaintError
from ..flops import left_out
from ..methods.saint import Saint
from ..plans import Plan, Stage
from ..session import apply, pruned, remove, status
from ..tokens import LayerTrace
from ..upstream.specs import part
from ..vision.locate import locate
from .blocks import block_flops, first_part
from .examples import example_inputs, example_plan, poisoned
from .merging import merged_oracle
from .oracle import masked_oracle
from .outputs import Inputs, run


@dataclass(frozen=True)
class Result:
    """Outcome of one contract: "passed", "failed" or "skipped" (with the reason in ``detail``)."""

    contract: str
    outcome: str
    detail: str


def snapshot(model: nn.Module) -> dict[str, tuple[Any, ...]]:
    """Record what undo must give back: type, attributes and hook counts of every module."""
    return {
        name: (
            type(module),
            tuple(vars(module)),
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
            module.training,
        )
        for name, module in model.named_modules()
    }


def check_identity(model: nn.Module, plan: Plan, inputs: Inputs) -> str:
    """Contract 1: a plan that drops nothing changes nothing (float32: 1e-6 of the output's size)."""
    votes = Saint(threshold=1.0, neighbors=10**6)
    nothing = Plan(vision=[Stage(votes, layers=s.layers, placement=s.placement) for s in plan.vision])
    base = run(model, inputs)
    with pruned(model, nothing) as session:
        same = run(model, inputs)
    assert session.trace, "a removed session tells nothing of its last forward"
    dropped = any(bool((t.tokens_in != t.tokens_out).any()) for t in session.trace)
    assert not dropped, "a threshold no pair can reach dropped tokens"
    worst = 0.0
    for name, want in base.items():
        assert same[name].shape == want.shape, f"{name}: shape {tuple(same[name].shape)} against {tuple(want.shape)}"
        worst = max(worst, float((same[name] - want).abs().max() / want.abs().max().clamp_min(1)))
    assert worst <= _tolerance(base, 1e-6), f"outputs differ by {worst:.2e} though nothing was dropped"
    return "bitwise equal" if worst == 0 else f"largest difference {worst:.1e}"


def check_undo(model: nn.Module, plan: Plan, inputs: Inputs) -> str:
    """Contract 2: exact undo, also after an exception; applying twice is refused."""
    base, before = run(model, inputs), snapshot(model)
    weights = copy.deepcopy(model.state_dict())
    with apply(model, plan):
        run(model, inputs)
        assert status(model) is not None, "status() is None although a plan is applied"
        try:
            apply(model, plan)
        except AlreadyAppliedError:
            pass
        else:
            raise AssertionError("applying a second plan was not refused")
    assert status(model) is None, "status() still reports a plan"
    _same_model(model, before, weights, base, inputs)
    try:
        with pruned(model, plan):
            raise KeyError("raised inside the context")
    except KeyError:
        pass
    _same_model(model, before, weights, base, inputs)
    apply(model, plan)
    remove(model)
    _same_model(model, before, weights, base, inputs)
    return "types, attributes, hooks, weights and outputs as before"


def _same_model(model: nn.Module, before: Any, weights: Any, base: Any, inputs: Inputs) -> None:
    after = snapshot(model)
    changed = [name for name in before if before[name] != after.get(name)]
    assert not changed, f"modules not restored: {changed[:3]}"
    state = model.state_dict()
    assert list(state) == list(weights), "state_dict keys changed"
    assert all(_equal(state[name], weights[name]) for name in weights), "weights changed"
    again = run(model, inputs)
    assert all(torch.equal(again[name], base[name]) for name in base), "outputs changed after remove()"


def _equal(one: Any, other: Any) -> bool:
    """Compare entries of a state, which are no plain tensors where weights are quantised."""
    if isinstance(one, Tensor) and is_traceable_wrapper_subclass(one):
        keys, _ = one.__tensor_flatten__()
        return type(one) is type(other) and all(_equal(getattr(one, key), getattr(other, key)) for key in keys)
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(map(_equal, one, other))
    return torch.equal(one, other) if isinstance(one, Tensor) else bool(one == other)


def check_oracle(model: nn.Module, plan: Plan, inputs: Inputs, atol: float = 1e-5) -> str:
    """Contract 3: masked-oracle equality (``atol`` times the output's size, at least ``atol``).

    A merged token is no hidden token: for methods that merge, equality with :func:`merged_oracle` takes its place.
    """
    merges = any(stage.method.merges for stage in plan.vision)
    want, _ = (merged_oracle if merges else masked_oracle)(model, plan, inputs)
    with pruned(model, plan) as session:
        got = run(model, inputs)
        trace = session.trace
    _, encoder, spec = locate(model)
    full = plan.vision[0].output != "survivors"
    for name in want:
        scale = max(1.0, float(want[name].abs().max()))
        for a, b in _survivor_rows(name, got[name], want[name], trace, spec.prefix(encoder), full):
            worst = float((a - b).abs().max())
            assert worst <= _tolerance(want, atol) * scale, f"{name}: differs by {worst:.2e} (size {scale:.1f})"
    oracle = "the merged oracle (nothing is masked)" if merges else "the masked oracle"
    return f"{len(want)} output(s) equal to {oracle} within {_tolerance(want, atol):.0e}"


def _survivor_rows(
    name: str, got: Tensor, want: Tensor, trace: list[LayerTrace], prefix: int, full: bool
) -> list[tuple[Tensor, Tensor]]:
    """Pairs to compare: full tensors, or for a sequence of tokens the rows of each sample's survivors.

    Args:
        name: of the output, for the message.
        got: from the pruned forward.
        want: from the oracle.
        trace: of the pruned forward.
        prefix: P; an output may hold the candidates alone.
        full: the pruned forward hands on full-length maps.
    """
    entry = trace[-1]
    if want.ndim == 3 and want.shape[1] < prefix + int(trace[0].tokens_in.max()):
        prefix = 0
    tokens = want.ndim == 3 and want.shape[1] >= prefix + max(int(k.max()) + 1 if len(k) else 0 for k in entry.kept)
    tokens = (
        tokens and got.ndim == 3 and got.shape[1] == (want.shape[1] if full else prefix + int(entry.tokens_out.max()))
    )
    if not tokens:
        assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)} against {tuple(want.shape)}"
        return [(got, want)]
    pairs = []
    for sample, index in enumerate(entry.kept):
        rows = torch.cat([torch.arange(prefix, device=index.device), index + prefix])
        pairs.append((got[sample, rows] if full else got[sample, : len(rows)], want[sample, rows]))
    return pairs


def check_batch(model: nn.Module, plan: Plan, inputs: Inputs, atol: float = 1e-5) -> str:
    """Contract 4: a sample's result does not depend on its batch mates; survivors are ascending and unique."""
    size = len(next(iter(inputs.values())))
    with pruned(model, plan) as session:
        together, trace = run(model, inputs), session.trace
        alone, traces = [], []
        for sample in range(size):
            alone.append(run(model, {name: value[sample : sample + 1] for name, value in inputs.items()}))
            traces.append(session.trace)
    _, encoder, spec = locate(model)
    prefix, full = spec.prefix(encoder), plan.vision[0].output != "survivors"
    for index, entry in enumerate(trace):
        for sample, kept in enumerate(entry.kept):
            assert torch.equal(kept, torch.unique(kept)), f"layer {entry.layer}: survivors not ascending and unique"
            single = traces[sample][index].kept[0]
            assert torch.equal(kept, single), (
                f"layer {entry.layer}, sample {sample}: other survivors in a batch than alone"
            )
    for name, value in together.items():
        assert value.shape[:1] == (size,), (
            f"{name} of shape {tuple(value.shape)} is not one entry for each of {size} samples"
        )
        for sample in range(size):
            want, got = alone[sample][name][0], value[sample]
            if got.ndim == 2 and not full:  # behind the survivors of this sample comes padding
                length = len(trace[-1].kept[sample])
                length += 0 if len(got) == int(trace[-1].tokens_out.max()) else prefix  # 0: candidates alone
                got, want = got[:length], want[:length]
            scale = max(1.0, float(want.abs().max()))
            worst = float((got - want).abs().max())
            assert worst <= _tolerance(together, atol) * scale, (
                f"{name}, sample {sample}: batch changes it by {worst:.2e}"
            )
    lengths = [len(kept) for kept in trace[-1].kept]
    return f"{size} samples, {min(lengths)}..{max(lengths)} survivors"


def check_on(model: nn.Module, plan: Plan, inputs: Inputs) -> str:
    """Contract 6: outputs differ, token counts equal the trace, and FLOPs fall as the token counts predict (2 %)."""
    with pruned(model, plan) as session:
        run(model, inputs)
        sample = int((session.trace[0].tokens_in - session.trace[-1].tokens_out).argmax())  # the one that loses most
    one = {name: value[sample : sample + 1] for name, value in inputs.items()}
    _, encoder, spec = locate(model)
    blocks = list(part(encoder, spec.blocks))
    base, base_flops, unknown = block_flops(model, spec, blocks, one)
    widths: list[int] = []

    def measure(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        widths.append((args[0] if args else next(iter(kwargs.values()))).shape[1])

    with ExitStack() as stack:
        session = stack.enter_context(pruned(model, plan))
        for block in blocks:  # what the parts of a block see, not the block: its input may be full length
            stack.callback(first_part(block, spec).register_forward_pre_hook(measure, with_kwargs=True).remove)
        output, flops, unknown_pruned = block_flops(model, spec, blocks, one)
        trace = session.trace
    assert trace[-1].tokens_out[0] < trace[0].tokens_in[0], "no token was dropped"
    changed = [n for n, v in output.items() if v.shape != base[n].shape or not torch.equal(v, base[n])]
    assert changed, "tokens were dropped and no output changed"
    prefix = spec.prefix(encoder)
    behind = dict(enumerate(widths))  # tokens that reach the MLP of each block
    for entry in trace:
        if entry.tokens_out[0] == entry.tokens_in[0]:
            continue
        want = prefix + int(entry.tokens_out[0])
        after = entry.layer if entry.placement == "input" else entry.layer + 1
        if after < len(blocks):
            seen = widths[after]
            assert seen == want, f"layer {entry.layer}: the trace says {want} tokens, the next block saw {seen}"
        if entry.placement == "mid":
            behind[entry.layer] = want
    predicted = 0.0
    for layer, (full, attention, mlp, squared) in enumerate(base_flops):
        n_in = widths[layer]
        predicted += squared * (n_in / full) ** 2 + attention * n_in / full + mlp * behind[layer] / full
    measured = sum(a + m + s for _, a, m, s in flops)
    error = abs(measured / predicted - 1)
    assert error <= 0.02, f"FLOPs are {error:.1%} off what the token counts predict"
    share = measured / sum(a + m + s for _, a, m, s in base_flops)
    return f"{share:.0%} of the blocks' FLOPs{left_out(unknown, unknown_pruned)}, {error:.1%} off the prediction"


def check_bad_input(model: nn.Module, plan: Plan, inputs: Inputs) -> str:
    """Contract 7: bad plans and bad pixels raise a clear error and leave the model alone."""
    before = snapshot(model)
    _, encoder, spec = locate(model)
    depth = len(part(encoder, spec.blocks))
    bad: list[tuple[str, Callable[[], Any]]] = [
        (f"{depth}", lambda: apply(model, Stage(Saint(), layers=[depth]))),
        ("threshold", lambda: apply(model, Saint(threshold=1.5))),
        ("neighbors", lambda: apply(model, Saint(neighbors=0))),
        ("empty", lambda: _run_pruned(model, plan, {n: v[:0] for n, v in inputs.items()})),
        ("keep", lambda: _run_pruned(model, Plan(vision=Saint(keep=10**6)), inputs)),
        ("NaN", lambda: _run_pruned(model, plan, {n: poisoned(v) for n, v in inputs.items()})),
    ]
    for word, action in bad:
        try:
            action()
        except (ValueError, TypeError, SaintError) as error:
            assert word in str(error), f"the error for a bad {word} does not name it: {error}"
        except RuntimeError as error:  # an empty batch may not reach our code
            assert word == "empty", f"a bad {word} ends in: {error}"
        else:
            raise AssertionError(f"a bad {word} was accepted")
        assert snapshot(model) == before, f"the model is not as before after a bad {word}"
    return f"{len(bad)} kinds refused"


def _run_pruned(model: nn.Module, plan: Plan, inputs: Inputs) -> None:
    with pruned(model, plan):
        run(model, inputs)


def _tolerance(outputs: Mapping[str, Tensor], float32: float) -> float:
    low = any(value.dtype in (torch.float16, torch.bfloat16) for value in outputs.values())
    return max(float32, 2e-2) if low else float32


CONTRACTS: dict[str, Callable[[nn.Module, Plan, Inputs], str]] = {
    "identity": check_identity,
    "exact undo": check_undo,
    "masked oracle": check_oracle,
    "batch independence": check_batch,
    "really on": check_on,
    "bad input": check_bad_input,
}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts every module in eval mode for the length of the block; each gets its own mode back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def outcomes(
    contracts: Mapping[str, Callable[..., str]], *given: Any, tick: Callable[[], None] = lambda: None
) -> list[Result]:
    """One result per contract: what each says of ``given``; ``tick`` is called behind each."""
    results = []
    for name, contract in contracts.items():
        try:
            results.append(Result(name, "passed", contract(*given)))
        except AssertionError as error:
            results.append(Result(name, "failed", str(error)))
        except HookNeverFiredError as error:
            results.append(Result(name, "skipped", str(error)))
        except Exception as error:  # whatever a forward ended in: the other contracts have their say
            results.append(Result(name, "failed", f"{type(error).__name__}: {error}"))
        tick()
    return results


def check_model(
    model: nn.Module, plan: Plan | None = None, inputs: Inputs | None = None, *, tick: Callable[[], None] = lambda: None
) -> list[Result]:
    """Run every contract.

    Args:
        model: holds one supported encoder; in eval mode during the checks.
        plan: with a vision stage; None searches one that drops different numbers of tokens from the example inputs.
        inputs: keyword inputs with at least two samples; None makes random pictures.
        tick: called behind each contract, for a progress bar.

    Returns:
        One result per contract.

    Raises:
        UnsupportedModelError: the model is not in the support table.
    """
    locate(model)
    with evaluating(model):
        inputs = example_inputs(model) if inputs is None else inputs
        plan = example_plan(model, inputs) if plan is None else plan
        return outcomes(CONTRACTS, model, plan, inputs, tick=tick)
