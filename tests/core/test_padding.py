"""A sample that is padded gets what it gets alone, without padding: every output, pool and place of a stage."""

import functools

import pytest
import torch

import saint
from saint import testing
from saint.methods import PPT, DivPrune, Match, OTPrune, PiToMe, Random, ToMe
from saint.plans import Plan, Stage
from support.padded import alone, naflex, padded_models, patches, with_padding

METHODS = {
    "votes": saint.Saint(threshold=0.5, neighbors=2, center=True),
    "share": saint.Saint(keep=0.6),
    "full-graph": saint.SaintFullGraph(keep=0.6),
    "divprune": DivPrune(0.6),
    "otprune": OTPrune(0.6),
    "random": Random(0.6, seed=1),
    "match": Match(keep=0.6),
    "weigh": Match(keep=0.6, fate="weigh"),
    "merge": Match(keep=0.6, fate="merge"),
    "tome": ToMe(keep=0.6),
    "pitome": PiToMe(keep=0.6),
    "ppt": PPT(keep=0.6),
}
LAYERS = {"input": None, "mid": [0, 2], "post": [0, 2]}

SWEPT = {"naflex-avg", "naflex-axial", "transformers/siglip2"}  # with every method; other pools with two of them

padded = functools.cache(with_padding)


def stage_of(method: str, placement: str, output: str) -> Stage:
    return Stage(METHODS[method], placement=placement, layers=LAYERS[placement], output=output)


def check_alone(model, plan, inputs) -> None:
    """Every output and every choice of each sample equals that of the sample alone; something is dropped."""
    with saint.pruned(model, plan) as session:
        together, trace = testing.run(model, inputs), session.trace
        prefix = session._stacks[0].prefix
        assert any(bool((entry.tokens_out < entry.tokens_in).any()) for entry in trace)
        for sample in range(len(trace[0].kept)):
            single = testing.run(model, alone(inputs, sample))
            for entry, own in zip(trace, session.trace, strict=True):
                assert torch.equal(entry.kept[sample], own.kept[0])
                assert int(entry.tokens_in[sample]) == int(own.tokens_in[0])
                assert (entry.into is None) == (own.into is None)
                assert entry.into is None or torch.equal(entry.into[sample], own.into[0])
            for name, value in together.items():
                got, want = value[sample], single[name][0]
                assert bool(torch.isfinite(got).all())
                if got.ndim == 2:  # behind a sample's own tokens comes padding
                    own_rows = prefix if len(want) >= prefix + len(trace[-1].kept[sample]) else 0
                    rows = int(trace[0].tokens_in[sample]) if plan.vision[0].output != "survivors" else None
                    count = own_rows + (len(trace[-1].kept[sample]) if rows is None else rows)
                    got, want = got[:count], want[:count]
                assert got.shape == want.shape
                scale = max(1.0, float(want.abs().max()))
                assert float((got - want).abs().max()) <= 1e-5 * scale, f"{name} of sample {sample}"


@pytest.mark.parametrize("output", ["survivors", "similar", "carried"])
@pytest.mark.parametrize("placement", LAYERS)
@pytest.mark.parametrize("name", padded_models())
def test_padding_changes_no_output(name, placement, output):
    model, inputs = padded(name)
    for method in METHODS if name in SWEPT else ("share", "merge"):
        if placement == "input" and METHODS[method].needs:
            continue  # no attention in front of all layers
        try:
            saint.apply(model, plan := Plan(vision=stage_of(method, placement, output))).remove()
        except saint.UnsupportedModelError:
            assert METHODS[method].size_bias(), "only what weighs tokens may ask for more than the encoder can do"
            continue
        check_alone(model, plan, inputs)
        if output == "survivors":
            check = "merged oracle" if METHODS[method].merges else "masked oracle"
            assert check in testing.check_oracle(model, plan, inputs)


@pytest.mark.parametrize("pool", ["avg", "avgmax", "map"])
def test_without_a_prefix_padding_changes_no_output(pool):
    model, inputs = naflex(pool, class_token=False, reg_tokens=0), patches()
    for output in ("survivors", "similar"):
        check_alone(model, Plan(vision=Stage(METHODS["share"], layers=[0, 2], output=output)), inputs)


@pytest.mark.parametrize("name", ["naflex-avg", "naflex-map"])
def test_grids_of_several_shapes_have_no_nearest_survivor(name):
    model, inputs = padded(name)
    plan = Plan(vision=Stage(METHODS["share"], layers=[0, 2], output="nearest"))
    with saint.pruned(model, plan), pytest.raises(ValueError, match="no nearest survivor"):
        testing.run(model, inputs)
