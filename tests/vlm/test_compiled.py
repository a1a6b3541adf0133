"""``torch.compile`` of whole vision-language models under fixed plans, against what upstream compiles to without one.

A prompt is looked at once: how many visual tokens it has is a number in Python, upstream's check of its placeholders is another.
"""

import pytest
import torch
from torch._dynamo.utils import counters

import saint
from saint import Plan, Stage
from support.calls import HOME
from support.families import FAMILIES, cache_of, cached, prompts

PLANS = {
    "vision": Plan(vision=Stage(saint.SaintFullGraph(keep=16), layers=[1])),
    "connector": Plan(connector=saint.SaintFullGraph(keep=0.5)),
    "language": Plan(language=Stage(saint.Saint(keep=0.6), layers=[1])),
}
CASES = [("llava-llama", stage) for stage in PLANS]
SAMPLES, STEPS = [[4, "0", 7]], 3


def step(model, inputs, cache, index):
    """One token behind a prompt and the steps before this one."""
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, index + 1), value=1)
    token = torch.full((len(mask), 1), 7 + index)
    return model(input_ids=token, attention_mask=mask, **cached(model, cache)).logits


def answer(model, inputs):
    """Logits of a prompt, and of each step behind it."""
    output = model(**inputs)
    yield output.logits
    cache = cache_of(output)
    for index in range(STEPS):
        yield step(model, inputs, cache, index)


def compiled(model, inputs):
    """Logits, graphs that were new and reasons of breaks, for a prompt, each step behind it, and the same once more."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    fast, found = torch.compile(model, backend=backend), []
    for _ in range(2):
        running = answer(fast, inputs)
        for _ in range(1 + STEPS):
            counters.clear()
            before = len(graphs)
            found.append((next(running), len(graphs) - before, sum(counters["graph_break"].values())))
    return found


@pytest.fixture(scope="module")
def unpruned():
    """Per family: the model, and new graphs of :func:`compiled` without a plan."""
    found = {}

    def get(name):
        if name not in found:
            model = FAMILIES[name].build()
            inputs = prompts(FAMILIES[name], model, SAMPLES)
            with torch.no_grad():
                found[name] = model, inputs, [new for _, new, _ in compiled(model, inputs)]
        return found[name]

    return get


@pytest.mark.parametrize(("name", "stage"), CASES)
def test_a_compiled_answer(unpruned, name, stage):
    model, inputs, graphs = unpruned(name)
    with saint.pruned(model, PLANS[stage]), torch.no_grad():
        want = list(answer(model, inputs))
        found = compiled(model, inputs)
    for (logits, _, _), expected in zip(found, 2 * want, strict=True):
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    news, breaks = [new for _, new, _ in found], [count for _, _, count in found]
    assert news[1 : 1 + STEPS] == graphs[1 : 1 + STEPS]
    assert (
        sum(news[1 + STEPS :]) <= 1
    )  # the prompt in front of which tokens left compiles one frame more at its second run
    assert breaks[1 : 1 + STEPS] == [0] * STEPS


@pytest.mark.parametrize("stage", PLANS)
def test_a_compiled_prompt_is_looked_at_once(unpruned, stage):
    model, inputs, _ = unpruned("llava-llama")
    torch._dynamo.reset()
    with saint.pruned(model, PLANS[stage]), torch.no_grad():
        explained = torch._dynamo.explain(model)(**inputs)
    places = {(frame.filename, frame.lineno) for reason in explained.break_reasons for frame in [reason.user_stack[-1]]}
    looks = {reason.user_stack[-1].name for reason in explained.break_reasons}
    assert len({place for place in places if place[0].startswith(HOME)}) <= 1, explained.break_reasons
    assert looks <= {"entering", "torch_compilable_check"}, explained.break_reasons
