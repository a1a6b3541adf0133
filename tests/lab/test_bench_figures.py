"""Every figure of a benchmark, recomputed from the times it was made of.

A clock of our own says how long each run took: the times are uneven, so that a mean is no median, a ratio no difference, and no
variant resembles another.
"""

import inspect
import io
import json
import re
import statistics
from pathlib import Path

import pytest
import torch

import saint
from saint.lab import bench
from saint.lab.bench import forward as forward_bench
from saint.lab.bench import generation as generation_bench
from saint.lab.bench import timing
from saint.lab.bench.cost import cost
from saint.lab.bench.timing import Spread
from saint.lab.kinds.agreement import agreement
from saint.lab.records import plain
from saint.lab.report import Record
from saint.lab.report.sheets import sheet_of
from saint.lab.report.terminal import show
from saint.plans import Plan, Stage
from saint.runtime import observe
from support.families import FAMILIES, prompts
from support.models import build


class Clock:
    """Stands in for ``time.perf_counter``; :meth:`spend` makes it go on."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def spend(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    found = Clock()
    for module in (timing, observe, generation_bench):
        monkeypatch.setattr(module.time, "perf_counter", found)
    return found


def spread(values: list[float]) -> tuple[float, float, float, int]:
    """Median, 20th and 80th percentile by linear interpolation between the order statistics."""
    ordered, last = sorted(values), len(values) - 1

    def at(share: float) -> float:
        low = int(share * last)
        return ordered[low] + (share * last - low) * (ordered[min(low + 1, last)] - ordered[low])

    return at(0.5), at(0.2), at(0.8), len(values)


def is_spread(got: Spread, values: list[float]) -> None:
    assert (got.median, got.p20, got.p80, got.n) == pytest.approx(spread(values), rel=1e-6)


@pytest.mark.parametrize(
    "values", [[7.0], [1.0, 2.0], [5.0, 1.0, 1.5], [1.0, 9.0, 2.0, 30.0], [0.0, 1.0, 2.0, 4.0, 8.0, 100.0]]
)
def test_spread_of_uneven_values(values):
    is_spread(Spread.of(values), values)
    assert Spread.of(values).median == statistics.median(values)
    assert len(values) < 3 or Spread.of(values).median != pytest.approx(statistics.fmean(values))


# -- timing -------------------------------------------------------------------------------------------------------------


def test_milliseconds_of_the_timed_rounds_only(clock):
    made = {"a": iter([9.0, 0.5, 0.25, 0.75]), "b": iter([7.0, 0.125, 2.0, 0.0625])}
    runs = {name: lambda took=took: clock.spend(next(took)) for name, took in made.items()}
    times = timing.interleave(runs, torch.device("cpu"), repeats=3, warmup=1, tick=lambda: clock.spend(50))
    assert times == {"a": [500.0, 250.0, 750.0], "b": [125.0, 2000.0, 62.5]}


def test_collections_wait(monkeypatch):
    import gc

    seen = []
    assert gc.isenabled()
    timing.interleave({"a": lambda: seen.append(gc.isenabled())}, torch.device("cpu"), 1, 1)
    assert seen == [False, False]
    assert gc.isenabled()
    gc.disable()
    try:
        timing.interleave({"a": lambda: None}, torch.device("cpu"), 1, 0)
        assert not gc.isenabled()
    finally:
        gc.enable()


# -- encoders -----------------------------------------------------------------------------------------------------------

PLAN = Plan(vision=saint.Saint(keep=0.5))
# seconds per round: two of warm-up, then five
TIMES = {
    "base": [9.0, 9.0, 0.100, 0.120, 0.400, 0.110, 0.130],
    "pruned": [9.0, 9.0, 0.050, 0.080, 0.100, 0.044, 0.026],
    "metered": [9.0, 9.0, 0.2, 0.2, 0.2, 0.2, 0.2],
    "keep_all": [9.0, 9.0, 0.110, 0.150, 0.420, 0.132, 0.143],
    "eager": [9.0, 9.0, 0.300, 0.310, 0.500, 0.350, 0.360],
}
# seconds per forward of the metered variant and per call: scoring at each of two drop points, gathering at each of four blocks
SCORE = [5.0, 5.0, 0.001, 0.002, 0.009, 0.003, 0.004]
GATHER = [5.0, 5.0, 0.010, 0.004, 0.005, 0.001, 0.002]


@pytest.fixture
def measured(clock, monkeypatch):
    """A benchmark in which each variant takes the seconds of its list, and choosing and handing on take theirs."""
    rounds = {name: iter(values) for name, values in TIMES.items()}
    names: list[str] = []
    real = forward_bench.interleave

    def interleave(runs, *args):
        def timed(name, run):
            def go():
                names.append(name)
                clock.running = name
                run()
                clock.now = clock.start + next(rounds[name])

            return go

        def start(name, run):
            def go():
                clock.start = clock.now
                timed(name, run)()

            return go

        return real({name: start(name, run) for name, run in runs.items()}, *args)

    select = saint.Saint.select
    monkeypatch.setattr(forward_bench, "interleave", interleave)

    def slow(self, candidates):
        if getattr(clock, "running", "") == "metered":
            clock.spend(SCORE[names.count("metered") - 1])
        return select(self, candidates)

    monkeypatch.setattr(saint.Saint, "select", slow)
    from saint.runtime import deciding as pruning

    real_gather = pruning.gather_tokens

    def slow_gather(*args):
        if getattr(clock, "running", "") == "metered":
            clock.spend(GATHER[names.count("metered") - 1])
        return real_gather(*args)

    monkeypatch.setattr(pruning, "gather_tokens", slow_gather)
    model = build("timm/vit-augreg")
    return bench.bench_forward(model, PLAN, {"x": torch.randn(2, 3, 96, 96)}, repeats=5, warmup=2)


def ms(name: str) -> list[float]:
    return [1e3 * t for t in TIMES[name][2:]]


def test_every_figure_of_an_encoder(measured):
    is_spread(measured.base, ms("base"))
    is_spread(measured.pruned, ms("pruned"))
    is_spread(measured.eager, ms("eager"))
    ratios = [a / b for a, b in zip(ms("base"), ms("pruned"), strict=True)]
    is_spread(measured.speedup, ratios)
    assert measured.speedup.median == pytest.approx(2.5)
    assert measured.bound == measured.costs["base"].flops / measured.costs["pruned"].flops > 1
    assert measured.efficiency == pytest.approx(2.5 / measured.bound)
    recorded = measured.conditions["times_ms"]
    assert {name: recorded[name] for name in TIMES} == {name: pytest.approx(ms(name)) for name in TIMES}
    assert measured.conditions["interleaved"] == list(TIMES)
    assert (measured.conditions["repeats"], measured.conditions["warmup"], measured.conditions["batch"]) == (5, 2, 2)


def test_what_pruning_itself_costs(measured):
    own = measured.overhead
    scoring, gathering = [2 * 1e3 * t for t in SCORE[2:]], [2 * 1e3 * t for t in GATHER[2:]]
    is_spread(own.scoring, scoring)
    is_spread(own.gathering, gathering)
    is_spread(own.share, [(s + g) / b for s, g, b in zip(scoring, gathering, ms("base"), strict=True)])
    is_spread(own.keep_all, [k / b - 1 for k, b in zip(ms("keep_all"), ms("base"), strict=True)])
    assert own.keep_all.median == pytest.approx(0.1)


def numbers(text: str) -> list[float]:
    return [float(n.replace(",", "")) for n in re.findall(r"-?\d[\d,]*(?:\.\d+)?(?:e-?\d+)?", text)]


def printed(kind: str, result, **more) -> str:
    """What the command prints of a result."""
    from rich.console import Console

    record = {"kind": kind, "model": "m", "images": ["a.png"], **more, **result.to_dict()}
    console = Console(width=240, file=io.StringIO())
    show(console, sheet_of(Record("", Path(), plain(record))))
    return console.file.getvalue()


def test_every_printed_figure_of_an_encoder(measured):
    text = printed("bench/encoder", measured, image_size=[96, 96])

    def row(word: str) -> list[float]:
        (found,) = [line for line in text.splitlines() if word in line]
        return numbers(found.partition(word)[2])

    shown = {" unpruned ": "base", " pruned ": "pruned", " pruned, eager attention": "eager"}
    for words, name in shown.items():
        (found,) = [line for line in text.splitlines() if re.match(rf"{words}\s", line)]
        median, p20, p80, _ = spread(ms(name))
        cost = measured.costs[name]
        assert numbers(found) == pytest.approx([median, p20, p80, cost.flops / 1e9, cost.memory], rel=6e-3, abs=6e-4)
    ratios = spread([a / b for a, b in zip(ms("base"), ms("pruned"), strict=True)])
    assert row("the model runs") == pytest.approx([*ratios[:3], measured.bound], rel=6e-3)
    assert row("Efficiency (speed-up / FLOPs bound):") == pytest.approx([ratios[0] / measured.bound], abs=6e-3)
    rates = [1e3 * 2 / spread(ms(name))[0] for name in ("base", "pruned")]  # 2 images per forward
    assert row("Images per second:") == pytest.approx(rates, rel=6e-3)
    scoring, gathering = [2e3 * t for t in SCORE[2:]], [2e3 * t for t in GATHER[2:]]
    share = spread([100 * (s + g) / b for s, g, b in zip(scoring, gathering, ms("base"), strict=True)])
    idle = spread([100 * (k / b - 1) for k, b in zip(ms("keep_all"), ms("base"), strict=True)])
    want = [spread(scoring)[0], spread(gathering)[0], *share[:3], *idle[:3]]
    assert row("Pruning itself:") == pytest.approx(want, rel=6e-3)


def test_the_metered_and_the_idle_variant_do_what_they_say(monkeypatch):
    """Keep-all scores at every drop point and drops nothing."""
    model = build("timm/vit-augreg")
    idle = forward_bench._keep_all(
        Plan(vision=Stage(saint.Saint(threshold=0.2, neighbors=1, center=True), layers=[0, 2]))
    )
    assert idle.vision[0].layers == (0, 2)
    assert idle.vision[0].method.center
    with saint.pruned(model, idle) as session, torch.no_grad():
        model(torch.zeros(2, 3, 96, 96))
        assert [e.tokens_out.tolist() for e in session.trace] == [[36, 36]] * 2
    assert forward_bench._keep_all(Plan(vision=saint.SaintFullGraph(keep=9))) is None


def test_token_counts_of_a_ragged_batch():
    trace = [saint.LayerTrace("vision", 3, torch.tensor([10, 7]), torch.tensor([9, 2]), [])]
    (layer,) = forward_bench.layer_tokens(trace)
    assert (layer.layer, layer.tokens_in, layer.tokens_out, layer.slots) == (3, 8.5, 5.5, 9)


def test_memory_is_the_peak_of_what_lives_at_once():
    mib = 2**20

    def run():
        a = torch.zeros(mib // 4)  # 1 MiB
        b = torch.zeros(mib // 2)  # 2 MiB more
        c = a + 1  # 1 MiB more
        c.add_(1).view(-1, 2)  # no more
        del a, b
        return torch.zeros(mib // 4)

    assert cost(run, torch.device("cpu")).memory == pytest.approx(4.0, abs=0.01)


def test_every_printed_figure_of_the_demo(tmp_path, capsys):
    """Over the photographs together: the sum of the medians, and the sum of the FLOPs."""
    from PIL import Image

    from saint.lab.cli import main

    folder, plan = tmp_path / "photos", Plan(vision=saint.Saint(threshold=0.9, neighbors=1, center=True, floor=0.0))
    folder.mkdir()
    Image.linear_gradient("L").resize((200, 170)).convert("RGB").save(folder / "sky.png")
    Image.effect_noise((180, 220), 80).convert("RGB").save(folder / "noise.png")
    threads = torch.get_num_threads()
    with pytest.raises(SystemExit) as ended:
        main([
            "demo", "timm:test_vit", "--no-pretrained", "--threads", "1", "--device", "cpu", "--images", str(folder),
            "--output", str(tmp_path / "out"), "--repeats", "3", "--plan", json.dumps(plan.to_dict()),
        ])  # fmt: skip
    torch.set_num_threads(threads)
    assert not ended.value.code
    text = capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    benches = [photo["bench"] for photo in record["photos"]]
    medians = {n: sum(statistics.median(b["conditions"]["times_ms"][n]) for b in benches) for n in ("base", "pruned")}
    flops = {n: sum(b["costs"][n]["flops"] for b in benches) for n in ("base", "pruned")}
    assert record["speedup"] == pytest.approx(medians["base"] / medians["pruned"], rel=1e-3)
    assert record["flops_bound"] == pytest.approx(flops["base"] / flops["pruned"])
    values = [photo["agreement"] for photo in record["photos"]]
    assert len(set(values)) == 2
    assert record["agreement"]["mean"] == pytest.approx(statistics.fmean(values))
    assert record["agreement"]["min"] == min(values)
    said = " ".join(text.split())
    found = numbers(re.search(r"the model runs (.*?) on 2 pictures", said)[1])
    want = [record["speedup"], record["flops_bound"], statistics.fmean(values), min(values)]
    assert found == pytest.approx(want, abs=6e-3)
    assert found[2:] == pytest.approx(want[2:], abs=6e-5)
    left = [photo["layers"][-1]["tokens_out"] for photo in record["photos"]]
    for photo, measured in zip(record["photos"], benches, strict=True):
        (row,) = [row for row in text.splitlines() if row.strip().startswith(photo["name"])]
        got = numbers(row.replace(photo["name"], ""))
        want = [
            measured["base"]["median"],
            measured["pruned"]["median"],
            measured["speedup"]["median"],
            measured["bound"],
        ]
        assert got == pytest.approx([photo["layers"][-1]["tokens_out"], 100, *want, photo["agreement"]], rel=8e-3)
    rows = [numbers(row) for row in text.partition("Tokens kept, vision")[2].splitlines()]
    assert statistics.fmean(left) == pytest.approx([row for row in rows if len(row) == 4][-1][1], rel=1e-2)


# -- generation ---------------------------------------------------------------------------------------------------------

FAMILY = FAMILIES["llava-llama"]
PLANS = {
    "vision": Plan(vision=Stage(saint.SaintFullGraph(keep=18, step=6), layers=[1])),
    "language": Plan(language=Stage(saint.Saint(keep=0.25), layers=[1, 2])),
}
STEPS = 4
# seconds: (first token, each further) of one round of warm-up and three rounds
LAPS = {
    "base": [(9.0, 9.0), (0.40, 0.10), (0.80, 0.11), (0.44, 0.40)],
    "vision": [(9.0, 9.0), (0.20, 0.12), (0.25, 0.10), (0.40, 0.20)],
    "language": [(9.0, 9.0), (0.10, 0.05), (0.40, 0.10), (0.30, 0.08)],
}


@pytest.fixture
def generated(clock, monkeypatch):
    order: list[str] = []
    real = generation_bench.interleave

    def interleave(runs, *args):
        counts = dict.fromkeys(runs, -1)

        def timed(name, run):
            def go():
                counts[name] += 1
                clock.lap = LAPS[name][counts[name]]
                order.append(name)
                run()

            return go

        return real({name: timed(name, run) for name, run in runs.items()}, *args)

    call = generation_bench.Clock.__call__

    def tick(self, ids, scores, **more):
        first, further = getattr(clock, "lap", (3.0, 3.0))
        clock.spend(first if not self.stamps else further)
        return call(self, ids, scores, **more)

    monkeypatch.setattr(generation_bench, "interleave", interleave)
    monkeypatch.setattr(generation_bench.Clock, "__call__", tick)
    model = FAMILY.build()
    inputs = prompts(FAMILY, model, [[4, "0", 7], [8, "0", 3]])
    result = bench.bench_generation(model, PLANS, inputs, new_tokens=STEPS, repeats=3, warmup=1)
    assert order[:3] == ["language", "vision", "base"]
    return result


def lap_times(name: str) -> tuple[list[float], list[float], list[float]]:
    """ms to the first token, per further token, and in all, per round."""
    first = [1e3 * a for a, _ in LAPS[name][1:]]
    step = [1e3 * b for _, b in LAPS[name][1:]]
    return first, step, [a + (STEPS - 1) * b for a, b in zip(first, step, strict=True)]


def test_every_figure_of_generation(generated):
    base = lap_times("base")
    for name, times in generated.times.items():
        first, step, total = lap_times(name)
        is_spread(times.first, first)
        is_spread(times.per_token, step)
        is_spread(times.total, total)
        is_spread(times.tokens_per_second, [2 * STEPS / (t / 1e3) for t in total])
    for name, gain in generated.gains.items():
        first, step, total = lap_times(name)
        is_spread(gain.first, [a / b for a, b in zip(base[0], first, strict=True)])
        is_spread(gain.total, [a / b for a, b in zip(base[2], total, strict=True)])
        is_spread(gain.decode, [b / a for a, b in zip(base[1], step, strict=True)])
        flops = {n: t.prefill.flops for n, t in generated.times.items()}
        assert gain.bound == flops["base"] / flops[name] > 1
        assert gain.efficiency == pytest.approx(gain.first.median / gain.bound)
        assert gain.kv == generated.times[name].kv_bytes / generated.times["base"].kv_bytes < 1
    steps = generated.conditions["steps_ms"]
    for name, laps in LAPS.items():
        want = [[1e3 * (a + i * b) for i in range(STEPS)] for a, b in laps[1:]]
        assert [pytest.approx(lap, abs=1e-3) for lap in want] == steps[name]


def test_every_printed_figure_of_generation(generated):
    text = printed("bench/generation", generated, prompt="what")
    rows = [line.strip() for line in text.splitlines()]
    base = lap_times("base")
    for name, shown in {"base": "unpruned", "vision": "vision", "language": "language"}.items():
        times, *gains = (numbers(row.removeprefix(shown)) for row in rows if re.match(rf"{shown}  ", row))
        first, step, total = lap_times(name)
        want = [n for values in (first, step, total, [2e3 * STEPS / t for t in total]) for n in spread(values)[:3]]
        found = generated.times[name]
        assert times == pytest.approx([*want, found.kv_bytes / 2**20, found.prefill.flops / 1e9], rel=6e-3, abs=6e-4)
        if name == "base":
            assert not gains
            continue
        gain = generated.gains[name]
        ratios = spread([a / b for a, b in zip(base[0], first, strict=True)])
        ends = spread([a / b for a, b in zip(base[2], total, strict=True)])
        decode = spread([b / a for a, b in zip(base[1], step, strict=True)])
        want = [*ratios[:3], gain.bound, ratios[0] / gain.bound, *ends[:3], *decode[:3], 100 * gain.kv]
        assert gains == [pytest.approx(want, rel=8e-3)]


# -- agreement ----------------------------------------------------------------------------------------------------------


def test_agreement_is_cosine_or_correlation():
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(3, 5, generator=g), torch.randn(3, 5, generator=g) + 1
    want = [float((x @ y) / (x.norm() * y.norm())) for x, y in zip(a.double(), b.double(), strict=True)]
    assert agreement(a, b).values == pytest.approx(want)
    assert agreement(a, b).same_top1 is None
    x, y = torch.rand(2, 1, 4, 6, generator=g), torch.rand(2, 1, 4, 6, generator=g)
    stacked = [torch.stack([p.flatten(), q.flatten()]) for p, q in zip(x, y, strict=True)]
    found = agreement(x, y)
    assert found.values == pytest.approx([float(torch.corrcoef(s)[0, 1]) for s in stacked], abs=1e-5)
    assert (found.answer, found.measure) == ("output", "correlation")
    logits = {"image_embeds": None, "logits": a, "pooler_output": b}
    both = agreement(logits, {**logits, "logits": b})
    assert both.answer == "logits"
    assert both.same_top1 == (a.argmax(1) == b.argmax(1)).tolist()
    assert agreement({**logits, "image_embeds": a}, {**logits, "image_embeds": b}).answer == "image_embeds"
    rows = torch.randn(2, 7, 5, generator=g)  # of tokens the first is compared
    assert agreement(rows, rows[:, :4]).values == pytest.approx([1, 1])
    assert agreement((a, b), (b, a)).values == pytest.approx(want)
    with pytest.raises(ValueError, match="no answer"):
        agreement({"attentions": a}, {"attentions": a})


def test_how_long_is_measured_unless_told():
    defaults = {name: p.default for name, p in inspect.signature(bench.bench_generation).parameters.items()}
    assert (defaults["new_tokens"], defaults["repeats"], defaults["warmup"]) == (32, 10, 2)
    defaults = {name: p.default for name, p in inspect.signature(bench.bench_forward).parameters.items()}
    assert (defaults["repeats"], defaults["warmup"], defaults["extras"]) == (20, 3, True)
