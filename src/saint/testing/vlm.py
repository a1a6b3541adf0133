"""The contracts of a pruned vision-language model, as functions to run on your own.

Letters: B batch, L positions of the prompt, T new tokens, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..admission import proving, verdict_of
from ..errors import HookNeverFiredError
from ..methods.base import Method
from ..methods.saint import Saint
from ..methods.saint_full_graph import SaintFullGraph
from ..plans import Plan, Stage
from ..session import pruned
from ..tokens import LayerTrace
from ..upstream.names import LAYERS, MASK
from ..upstream.specs import FamilySpec
from ..vision.derive import with_tower
from ..vlm.locate import locate
from ..vlm.prompts import answered, placeholders, visual_places
from .contracts import Result, check_undo, evaluating, outcomes, snapshot
from .examples import poisoned
from .oracle import masked_oracle
from .outputs import Inputs, run
from .removal import holes_oracle, removal_oracle

Make = Callable[[Sequence[int]], Inputs]


def hybrid_plan(model: nn.Module) -> Plan:
    """Half to two thirds of the visual tokens go, at every stage that the family has."""
    from ..language.layers import read_layers, with_keys  # imports transformers

    _, vlm, spec = locate(model, "language")
    spec = with_tower(vlm, spec)
    decoder: Any = vlm.get_submodule(spec.decoder)
    depth = len(list(LAYERS.get(decoder).children()))
    shown = with_keys(read_layers(decoder.config, depth)) or range(depth)
    chosen = {min(shown, key=lambda layer: abs(layer - wanted)) for wanted in (min(1, depth - 1), depth // 2)}
    vision = None if spec.no_vision is not None else Stage(SaintFullGraph(keep=0.8), layers=[1])
    language = Stage(Saint(threshold=0.9, keep=0.6), layers=sorted(chosen))
    return Plan(vision=vision, connector=SaintFullGraph(keep=0.8), language=language)


def _words(model: nn.Module, inputs: Inputs) -> Tensor:
    """Positions that no plan can drop and that are no padding, bool [B, L]."""
    places = visual_places(model, inputs)
    mask = MASK.read(inputs)
    return ~places if mask is None else ~places & mask.bool()


def _off(got: Tensor, want: Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max().clamp_min(1e-12))


def _with(method: Method, stages: Sequence[Stage]) -> list[Stage] | None:
    """The same places with another method."""
    return [Stage(method, layers=stage.layers, placement=stage.placement) for stage in stages] or None


def check_identity(model: nn.Module, plan: Plan, make: Make) -> str:
    """A plan that keeps everything changes nothing (float32: 1e-5 of the size of the logits)."""
    inputs = make([0, 1])
    keep = Saint(threshold=1.0, keep=1.0)
    everything = SaintFullGraph(keep=1.0)
    nothing = Plan(
        vision=_with(everything, plan.vision),
        connector=everything,
        language=_with(keep, plan.language),
    )
    base = run(model, inputs)["logits"]
    with pruned(model, nothing) as session:
        same = run(model, inputs)["logits"]
        assert all(torch.equal(entry.tokens_in, entry.tokens_out) for entry in session.trace), "tokens were dropped"
    worst = _off(same, base)
    assert worst <= 1e-5, f"logits differ by {worst:.1e} of their size though nothing was dropped"
    return "bitwise equal" if worst == 0 else f"largest difference {worst:.1e}"


def check_oracle(model: nn.Module, plan: Plan, make: Make) -> str:
    """Logits of the prompt equal those of :func:`saint.testing.masked_oracle`."""
    _skip_recurrent(model)
    _skip_merging(plan)
    inputs = make([0, 1])
    words = _words(model, inputs)
    want, _ = masked_oracle(model, plan, inputs)
    with pruned(model, plan):
        got = run(model, inputs)["logits"]
    worst = _off(got[words], want["logits"][words])
    assert worst <= 1e-4, f"logits differ by {worst:.1e} of their size from the masked oracle's"
    return f"{int(words.sum())} positions within {worst:.1e}"


def check_generation(model: Any, plan: Plan, make: Make, steps: int = 8) -> str:
    """Greedy tokens equal those that the masked oracle chooses, recomputing everything at every step."""
    _skip_recurrent(model)
    _skip_merging(plan)
    inputs = make([0, 1])
    with pruned(model, plan), torch.no_grad():
        made = model.generate(
            **inputs, max_new_tokens=steps, do_sample=False, output_logits=True, return_dict_in_generate=True,
            suppress_tokens=placeholders(model),
        )  # fmt: skip
    length = inputs["input_ids"].shape[1]
    new = made.sequences[:, length:]
    # by induction over the steps, one forward over prompt and new tokens gives what recomputing at every step gives
    grown = answered(model, inputs, new)
    want = masked_oracle(model, plan, grown, inputs)[0]["logits"][:, length - 1 : -1]
    real = torch.ones_like(new, dtype=torch.bool)  # behind the first end of a sample generate only pads
    ends = model.generation_config.eos_token_id
    if ends is not None:
        over = torch.isin(new, torch.tensor(ends, device=new.device))
        real = over.cumsum(1) - over.long() == 0
    got = torch.stack(made.logits, 1)
    worst = _off(got[real], want[real])
    assert worst <= 1e-4, f"logits of new tokens differ by {worst:.1e} of their size from the masked oracle's"
    return f"{int(real.sum())} new tokens within {worst:.1e}"


def is_recurrent(decoder: Any) -> bool:
    """Tell whether layers of a decoder keep a state instead of keys, as its cache says."""
    return any("LinearAttention" in cls.__name__ for layer in _layers_of_cache(decoder) for cls in type(layer).__mro__)


def _layers_of_cache(decoder: Any) -> list[Any]:
    from transformers import DynamicCache

    return DynamicCache(config=decoder.config).layers


def sees_within(decoder: Any, length: int) -> bool:
    """Tell whether layers of a decoder see less than ``length`` positions."""
    fields = ("sliding_window", "attention_chunk_size")
    return any((getattr(decoder.config, name, None) or length) < length for name in fields)


def _skip_recurrent(model: nn.Module) -> None:
    _, vlm, spec = locate(model, "language")
    if is_recurrent(vlm.get_submodule(spec.decoder)):
        raise HookNeverFiredError(
            "recurrent layers: no token can be hidden from them; see the other oracle and contracts"
        )


def _skip_merging(plan: Plan) -> None:
    stages = [stage for stages in plan.slots.values() for stage in stages]
    if merging := [type(stage.method).__name__ for stage in stages if stage.method.merges]:
        raise HookNeverFiredError(
            f"{', '.join(merging)}: a merged token is no hidden one; see the other contracts, and merged_oracle of the encoder"
        )


def _front(plan: Plan) -> Plan | None:
    """Take of a plan what drops in front of the language model."""
    front = Plan(vision=plan.vision, connector=plan.connector)
    return front if front.slots else None


def _greedy(model: Any, inputs: Inputs, steps: int, **more: Any) -> tuple[Tensor, Tensor]:
    """New tokens [B, T] and the logits that chose them, [B, T, V]; the end of a text ends nothing."""
    with torch.no_grad():
        made = model.generate(
            **inputs, max_new_tokens=steps, min_new_tokens=steps, do_sample=False, output_logits=True,
            return_dict_in_generate=True, suppress_tokens=placeholders(model), **more,
        )  # fmt: skip
    return made.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(made.logits, 1)


def check_removal(model: Any, plan: Plan, make: Make, steps: int = 6) -> str:
    """Check that what is dropped in front of the language model is as if it were not there, and as a hole in every mask.

    Logits of the prompt and of new tokens equal those of :func:`saint.testing.removal_oracle`, and those of new tokens
    :func:`saint.testing.holes_oracle`'s. A hole is no removal for recurrent layers, and a removal moves the end of a window:
    a model that has either is held to the other oracle alone.
    """
    front = _front(plan)
    if front is None:
        return "the plan drops nothing in front of the language model"
    _skip_merging(front)
    inputs = make([0, 1])
    words, length = _words(model, inputs), inputs["input_ids"].shape[1]
    with pruned(model, front):
        prompt = run(model, inputs)["logits"]
        new, logits = _greedy(model, inputs, steps)
    _, vlm, spec = locate(model, "connector")
    decoder, errors = vlm.get_submodule(spec.decoder), dict[str, float]()
    recurrent, within = is_recurrent(decoder), sees_within(decoder, length + steps)
    if recurrent and within:
        raise HookNeverFiredError(
            "recurrent layers and a window that ends within the prompt: no oracle is right for both"
        )
    if not within:
        removed, _ = removal_oracle(model, front, answered(model, inputs, new), inputs)
        errors["of the prompt, removed"] = _off(prompt[words], removed["logits"][:, :length][words])
        errors["of new tokens, removed"] = _off(logits, removed["logits"][:, length - 1 : -1])
    if not recurrent:
        holes = holes_oracle(model, front, inputs, new, suppress_tokens=placeholders(model))
        errors["of new tokens, holes"] = _off(logits, holes)
    # what single steps of the model itself are off from one forward (recurrent layers compute the two in different ways)
    own = _off(*_in_steps_and_at_once(model, inputs, steps)) if recurrent else 0.0
    for which, worst in errors.items():
        assert worst <= max(1e-4, 4 * own), f"logits {which}: off by {worst:.1e} of their size"
    noise = f"; its own steps are off by {own:.1e} without a plan" if own > 1e-5 else ""
    return f"prompt and {new.numel()} new tokens within {max(errors.values()):.1e}{noise}"


def _in_steps_and_at_once(model: Any, inputs: Inputs, steps: int) -> tuple[Tensor, Tensor]:
    """Logits of new tokens without a plan, [B, T, V]: of generation, and of one forward over prompt and answer."""
    new, logits = _greedy(model, inputs, steps)
    start = inputs["input_ids"].shape[1] - 1
    return logits, run(model, answered(model, inputs, new))["logits"][:, start:-1]


def check_static(model: Any, plan: Plan, make: Make, steps: int = 16) -> str:
    """A static cache gives the tokens of a dynamic one, where it does so without a plan."""
    inputs = make([0, 1])
    base = _greedy(model, inputs, steps)[0]
    try:
        unpruned = _greedy(model, inputs, steps, cache_implementation="static")[0]
    except Exception as error:  # whatever a class says of a cache that it does not take
        return f"without a plan it does not generate with a static cache, either ({type(error).__name__})"
    if not torch.equal(base, unpruned):
        return "static and dynamic caches give other tokens without a plan, too"
    with pruned(model, plan):
        dynamic, static = (
            _greedy(model, inputs, steps, **more)[0] for more in ({}, {"cache_implementation": "static"})
        )
    assert torch.equal(dynamic, static), "a static cache gives other tokens than a dynamic one"
    return f"{static.numel()} new tokens"


def check_batch(model: nn.Module, plan: Plan, make: Make) -> str:
    """A sample's survivors and logits do not depend on its batch mates or on padding."""
    together, per_entry = make([0, 1]), []
    words = _words(model, together)
    with pruned(model, plan) as session:
        logits, trace = run(model, together)["logits"], session.trace
        alone: list[tuple[Tensor, list[LayerTrace]]] = []
        for sample in (0, 1):
            inputs = make([sample])
            alone.append((run(model, inputs)["logits"][_words(model, inputs)], session.trace))
    for sample in (0, 1):
        got = logits[sample][words[sample]]
        assert got.shape == alone[sample][0].shape, "the processor makes other prompts in a batch than alone"
        for entry, single in zip(trace, alone[sample][1], strict=True):
            if entry.stage != "vision":  # those count images, of which a sample may have several tiles
                per_entry.append(torch.equal(entry.kept[sample], single.kept[0]))
        worst = _off(got, alone[sample][0])
        assert worst <= 1e-3, f"sample {sample}: its batch changes its logits by {worst:.1e} of their size"
    assert all(per_entry), "other survivors in a batch than alone"
    return "2 samples, together and alone"


def check_alone(model: Any, plan: Plan, make: Make, steps: int = 8) -> str:
    """Logits of new tokens do not depend on batch mates or on padding."""
    worst = 0.0
    with pruned(model, plan):
        new, logits = _greedy(model, make([0, 1]), steps)
        for sample in (0, 1):
            alone, own = _greedy(model, make([sample]), steps)
            assert torch.equal(alone[0], new[sample]), f"sample {sample}: other new tokens in a batch than alone"
            worst = max(worst, _off(own[0], logits[sample]))
    assert worst <= 1e-3, f"its batch changes the logits of new tokens by {worst:.1e} of their size"
    return f"{new.numel()} new tokens within {worst:.1e}"


def check_on(model: nn.Module, plan: Plan, make: Make) -> str:
    """Tokens are dropped at every stage, the logits change, and the cache holds less."""
    inputs = make([0, 1])
    base = run(model, inputs)["logits"]
    with pruned(model, plan) as session:
        got, trace = run(model, inputs)["logits"], session.trace
        _greedy(model, inputs, 1)  # which makes a cache: not every decoder does
        memory = session.kv_memory
    stages = {entry.stage for entry in trace if bool((entry.tokens_out < entry.tokens_in).any())}
    assert stages == set(plan.slots), f"tokens were dropped at {sorted(stages)} of {sorted(plan.slots)}"
    assert not torch.equal(got, base), "tokens were dropped and no logit changed"
    _, vlm, spec = locate(model, "language")
    own = {type(layer).__module__ for layer in _layers_of_cache(vlm.get_submodule(spec.decoder))}
    if memory is None and own != {"transformers.cache_utils"}:
        return "tokens leave; its cache is of a kind of its own, whose bytes are not counted"
    assert memory is not None, "the prompt left no cache"
    if sees_within(vlm.get_submodule(spec.decoder), inputs["input_ids"].shape[1]):
        return "tokens leave; its windows are full all the same"
    assert memory.kept < memory.unpruned, "the cache holds as much as without pruning"
    return f"{memory.kept / memory.unpruned:.0%} of the KV cache"


def check_bad_input(model: nn.Module, plan: Plan, make: Make) -> str:
    """Bad budgets and bad pixels raise a clear error and leave the model alone."""
    inputs, before = make([0, 1]), snapshot(model)
    pixels = {n: poisoned(v) if n.startswith("pixel_values") else v for n, v in inputs.items()}
    bad = [
        ("keep", Plan(connector=SaintFullGraph(keep=10**6)), inputs),
        ("keep", Plan(language=Stage(Saint(keep=10**6), layers=[0])), inputs),
        ("NaN", plan, pixels),
    ]
    for word, wrong, given in bad:
        try:
            with pruned(model, wrong):
                run(model, given)
        except ValueError as error:
            assert word in str(error), f"the error for a bad {word} does not name it: {error}"
        else:
            raise AssertionError(f"a bad {word} was accepted")
        assert snapshot(model) == before, f"the model is not as before after a bad {word}"
    return f"{len(bad)} kinds refused"


CONTRACTS: dict[str, Callable[[Any, Plan, Make], str]] = {
    "identity": check_identity,
    "exact undo": lambda model, plan, make: check_undo(model, plan, make([0, 1])),
    "masked oracle": check_oracle,
    "generation": check_generation,
    "removal oracle": check_removal,
    "static cache": check_static,
    "batch independence": check_batch,
    "answer independence": check_alone,
    "really on": check_on,
    "bad input": check_bad_input,
}


def check_tower(model: nn.Module, plan: Plan, make: Make) -> str:
    """Logits of the prompt under a vision stage equal those of both oracles, where they are right."""
    inputs = make([0, 1])
    words = _words(model, inputs)
    _, vlm, spec = locate(model, "vision")
    decoder = vlm.get_submodule(spec.decoder)
    with pruned(model, plan) as session:
        got, trace = run(model, inputs)["logits"], session.trace
    assert bool((trace[-1].tokens_out < trace[0].tokens_in).any()), "no token left the tower"
    assert _off(got[words], run(model, inputs)["logits"][words]) > 1e-3, "tokens were dropped and no logit changed"
    errors = {}
    if not sees_within(decoder, inputs["input_ids"].shape[1]):
        errors["removed"] = _off(got[words], removal_oracle(model, plan, inputs)[0]["logits"][words])
    if not is_recurrent(decoder):
        errors["masked"] = _off(got[words], masked_oracle(model, plan, inputs)[0]["logits"][words])
    for which, worst in errors.items():
        assert worst <= 1e-4, f"logits of the prompt, {which}: off by {worst:.1e} of their size"
    return f"{int(words.sum())} positions within {max(errors.values()):.1e}"


def contracts_for(plan: Plan) -> dict[str, Callable[[Any, Plan, Make], str]]:
    """The contracts that a plan must hold on a twin, whose prompts come without pixels but for the vision stage's."""
    if plan.vision:
        return {"oracles of the tower": check_tower}
    front = ("removal oracle", "static cache", "batch independence", "really on")
    behind = ("batch independence", "answer independence", "masked oracle", "generation", "static cache", "really on")
    return {name: CONTRACTS[name] for name in (behind if plan.language else front)}


def check_vlm(
    model: nn.Module, make: Make, plan: Plan | None = None, *, tick: Callable[[], None] = lambda: None
) -> list[Result]:
    """Run every contract on a vision-language model.

    Args:
        model: of a supported family; in eval mode during the checks.
        make: keyword inputs of the model for these samples, of two (0 and 1) with one image each and prompts of different
            length.
        plan: with a language stage; None takes :func:`hybrid_plan`.
        tick: called behind each contract, for a progress bar.

    Returns:
        One result per contract; of a family that no spec is written for, first what was proved on its twin.

    Raises:
        UnsupportedModelError: it is no vision-language model.
    """
    _, vlm, spec = locate(model, "language")
    plan = hybrid_plan(model) if plan is None else plan
    proved = [_of_twin(model, vlm, spec)] if spec.derived else []
    with evaluating(model), proving():
        return [*proved, *outcomes(CONTRACTS, model, plan, make, tick=tick)]


def _of_twin(model: nn.Module, vlm: nn.Module, spec: FamilySpec) -> Result:
    verdict = verdict_of(model, vlm, spec)
    held = ", ".join(stage for stage, reason in verdict.items() if not reason)
    failed = "; ".join(f"{stage}: {reason}" for stage, reason in verdict.items() if reason)
    return Result(
        "small twin", "failed" if failed else "passed", "; ".join(filter(None, [held and f"holds: {held}", failed]))
    )
