"""The headline benchmark: what follows from its rounds, how a part of its record grows, and its tables."""

import json
import random
import sys
from pathlib import Path

import answers
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import headline
import rounds

MARKS = [1, 32, 256]


def run(first, step, short=0.0):
    """The ms to each mark of an answer; the first 32 tokens may be quicker than the others."""
    return [first, first + 31 * (step - short), first + 255 * step]


# -- arithmetic -------------------------------------------------------------------------------------------------------


def test_times_are_medians_over_the_rounds_that_have_the_variant():
    taken = [{"a": run(10, 2)}, {"b": run(1, 1)}, {"a": run(30, 4)}, {"a": run(20, 3)}]
    times = rounds.Times.of(taken, "a", MARKS)
    assert (times.first.median, times.first.n) == (20, 3)
    assert (times.first.p20, times.first.p80) == (14, 26)
    assert {mark: spread.median for mark, spread in times.per_token.items()} == {32: 3, 256: 3}
    assert {mark: spread.median for mark, spread in times.total.items()} == {1: 20, 32: 20 + 31 * 3, 256: 20 + 255 * 3}


def test_time_per_token_is_that_of_its_own_length():
    times = rounds.Times.of([{"a": run(10, 3, short=1)}], "a", MARKS)
    assert {mark: spread.median for mark, spread in times.per_token.items()} == {32: 2, 256: 3}


def test_a_gain_is_the_ratio_of_medians_beside_the_ratios_of_rounds():
    taken = [
        {"base": run(100, 4), "a": run(50, 2)},
        {"base": run(300, 4), "a": run(60, 8)},
        {"base": run(110, 4), "a": run(100, 4)},
        {"base": run(9999, 9999)},
        {"a": run(1, 1)},
    ]
    gain = rounds.Gain.of(taken, "base", "a", MARKS)
    assert gain.first.of_medians == 110 / 60
    assert gain.first.rounds.median == 2  # of 2, 5 and 1.1
    assert gain.first.rounds.n == 3
    assert gain.per_token[256].of_medians == 1
    assert gain.total[1] == gain.first
    assert gain.total[32].of_medians == (110 + 31 * 4) / (100 + 31 * 4)
    assert rounds.Gain.of(taken[3:], "base", "a", MARKS) is None


@pytest.mark.parametrize(
    ("one", "other", "ahead", "tokens"),
    [
        ((10, 2), (20, 2), "always", None),
        ((20, 2), (10, 2), "never", None),
        ((10, 2), (10, 2), "never", None),  # a tie
        ((10, 3), (20, 2), "until", 10),  # at 11 both need 40
        ((20, 2), (10, 3), "from", 12),
        ((10, 3), (265.5, 2), "always", None),  # would be behind from 257 on
        ((10, 3), (264.5, 2), "until", 255),
        ((20, 2), (10, 50), "from", 2),
    ],
)
def test_a_crossing_is_that_of_the_lines(one, other, ahead, tokens):
    assert rounds.Crossing.of(rounds.Line(*one), rounds.Line(*other), 256) == (ahead, tokens)


def test_crossings_and_the_fastest_agree_with_every_length_tried():
    draw = random.Random(0)
    kinds = set()
    for _ in range(200):
        lines = {name: rounds.Line(draw.randint(1, 60), draw.randint(1, 9)) for name in "abcd"}
        found = rounds.Crossing.of(lines["a"], lines["b"], 40)
        kinds.add(found.ahead)
        best = rounds.fastest(lines, 40)
        for tokens in range(1, 41):
            ahead = lines["a"].first + lines["a"].step * (tokens - 1) < lines["b"].first + lines["b"].step * (
                tokens - 1
            )
            said = {
                "always": True,
                "never": False,
                "until": tokens <= (found.tokens or 0),
                "from": tokens >= (found.tokens or 0),
            }
            assert said[found.ahead] == ahead
            name = [name for start, name in best if start <= tokens][-1]
            totals = {name: line.first + line.step * (tokens - 1) for name, line in lines.items()}
            assert totals[name] == min(totals.values())
    assert kinds == {"always", "never", "until", "from"}


def test_rounds_that_say_otherwise_are_counted():
    base = run(20, 2)
    taken = [
        {"a": run(10, 3), "b": base},
        {"a": run(10, 2.5), "b": base},
        {"a": run(30, 3), "b": base},
        {"a": run(1, 1)},
    ]
    found = rounds.Ahead.of(taken, "a", "b", MARKS)
    assert found.found == ("until", 10)
    assert (found.alike, found.rounds, found.low, found.high) == (2, 3, 10, 20)
    assert rounds.Ahead.of(taken[3:], "a", "b", MARKS) is None


def test_a_line_that_misses_says_by_how_much():
    assert rounds.misfit([run(10, 2)], MARKS) == 0
    assert rounds.misfit([run(10, 2, short=1)], MARKS) == pytest.approx(31 / 41)  # 72 foretold, 41 measured


# -- a part of the record ---------------------------------------------------------------------------------------------

FLOPS = {"first": 8.0, "token": 2.0}
TOLD = {
    "7b/unpruned/dynamic": {"flops": FLOPS, "kv_share": 1.0},
    "7b/unpruned/static compiled": {"flops": FLOPS, "kv_share": 1.0, "ready_s": 7.0},
    "7b/connector/dynamic": {"flops": {"first": 2.0, "token": 1.0}, "kv_share": 0.3},
    "7b/connector/dynamic compiled": {"flops": {"first": 2.0, "token": 1.0}, "kv_share": 0.3, "ready_s": 9.0},
    "7b/language/static": {"refused": "ValueError: no | such cache: use a DynamicCache"},
}
DEPENDS = {
    "marks": MARKS,
    "threads": 1,
    "dtype": "float32",
    "visual": 576,
    "text": 40,
    "tower": {"num_hidden_layers": 2},
    "shapes": {"7b": {"num_hidden_layers": 32, "hidden_size": 512}},
    "real": {"7b": {"num_hidden_layers": 32, "hidden_size": 4096}},
    "environment": {"cpu": "A CPU", "threads": 1, "torch": "2", "transformers": "5", "timm": "1"},
}
CALL = {"date": "2026-01-02T03:04:05+00:00", "load_average": 0.25}


def both(first=40.0):
    return {
        "7b/unpruned/dynamic": run(100, 10),
        "7b/unpruned/static compiled": run(100, 5),
        "7b/connector/dynamic": run(first, 10),
        "7b/connector/dynamic compiled": run(first + 10, 8),
    }


def test_a_call_adds_its_rounds_to_those_before():
    some = {name: times for name, times in both(80.0).items() if "compiled" not in name}
    one = json.loads(json.dumps(rounds.section(None, DEPENDS, TOLD, [both()], CALL)))
    two = rounds.section(one, DEPENDS, {name: TOLD[name] for name in some}, [some, some], CALL)
    assert two["rounds"] == [both(), some, some]
    assert [call["rounds"] for call in two["calls"]] == [1, 2]
    assert two["calls"][1]["variants"] == sorted(some)
    assert two["variants"] == TOLD
    gain = two["derived"]["gains"]["7b/connector/dynamic"]
    assert gain["over"] == "7b/unpruned/dynamic"
    assert gain["first"]["of_medians"] == 100 / 80
    assert gain["first"]["rounds"]["n"] == 3
    assert gain["bounds"] == {"first": 4.0, "token": 2.0}
    assert gain["of_the_bound"] == 100 / 80 / 4
    pairs = {(pair["name"], pair["than"]): pair for pair in two["derived"]["ahead"]}
    # only with what ran: the compiled connector has no unpruned twin of the same way here, and static is refused
    assert pairs.keys() == {
        ("7b/connector/dynamic", "7b/unpruned/dynamic"),
        ("7b/connector/dynamic compiled", "7b/connector/dynamic"),
    }
    compiled = pairs["7b/connector/dynamic compiled", "7b/connector/dynamic"]
    assert compiled["found"] == {"ahead": "from", "tokens": 7}  # 50 + 8 (n - 1) < 40 + 10 (n - 1)
    assert compiled["rounds"] == 1
    (group,) = two["derived"]["fastest"]  # the later rounds have fewer variants, all of them among these
    assert (group["among"], group["rounds"]) == (list(both()), 1)
    assert group["order"] == [
        {"from": 1, "variant": "7b/connector/dynamic"},
        {"from": 7, "variant": "7b/connector/dynamic compiled"},
        {"from": 18, "variant": "7b/unpruned/static compiled"},
    ]


def test_groups_that_took_turns_are_the_largest_ones():
    taken = [{name: [1.0] for name in names} for names in ("ab", "bcd", "cb", "e", "ab")]
    assert rounds.beside(taken, list("abcde")) == [["b", "c", "d"], ["a", "b"]]
    assert rounds.beside(taken, list("abde")) == [["a", "b"], ["b", "d"]]


def test_rounds_of_other_conditions_are_not_mixed():
    before = json.loads(json.dumps(rounds.section(None, DEPENDS, TOLD, [both()], CALL)))
    with pytest.raises(ValueError, match="threads: 1 there, 2 now.*--anew"):
        rounds.section(before, {**DEPENDS, "threads": 2}, TOLD, [both()], CALL)


def test_a_variant_that_is_refused_now_keeps_its_rounds_and_is_compared_no_more():
    before = json.loads(json.dumps(rounds.section(None, DEPENDS, TOLD, [both()], CALL)))
    told = {"7b/connector/dynamic": {"refused": "ValueError: not any more"}}
    after = rounds.section(before, DEPENDS, told, [], CALL)
    assert after["rounds"] == [both()]
    assert "7b/connector/dynamic" not in {*after["derived"]["times"], *after["derived"]["gains"]}
    assert after["derived"]["ahead"] == []


class Fake:
    """A variant that takes a second, or cannot."""

    def __init__(self, name, order, error=None):
        self.name, self.order, self.error = name, order, error

    def warm(self):
        if self.error is not None:
            raise self.error

    def take(self):
        self.order.append(self.name)
        return [1.0]

    def flops(self):
        return {"first": 2.0}

    def facts(self):
        return {"batch": 1}


def test_what_does_not_run_is_told_with_its_reason():
    errors = {"a": None, "b": ValueError("no such\ncache"), "c": RuntimeError("torn")}
    running, told = headline.ready({name: Fake(name, [], error) for name, error in errors.items()})
    assert list(running) == ["a"]
    assert told == {
        "a": {"flops": {"first": 2.0}, "batch": 1},
        "b": {"refused": "ValueError: no such cache"},
        "c": {"failed": "RuntimeError: torn"},
    }


def test_every_second_round_of_a_part_goes_backwards():
    order = []

    taken = list(headline.measure({name: Fake(name, order) for name in "abc"}, "cpu", 3, before=1))
    assert "".join(order) == "cbaabccba"
    assert [list(one) for one in taken] == [["a", "b", "c"]] * 3


def test_the_larger_model_is_held_against_the_smaller_where_it_has_no_unpruned_one():
    told = ["7b/unpruned/dynamic", "13b/connector/dynamic"]
    assert rounds.unpruned_of("13b/connector/dynamic", dict.fromkeys(told)) == "7b/unpruned/dynamic"
    told.append("13b/unpruned/dynamic")
    assert rounds.unpruned_of("13b/connector/dynamic", dict.fromkeys(told)) == "13b/unpruned/dynamic"
    assert rounds.unpruned_of("13b/connector/static", dict.fromkeys(told)) is None
    assert rounds.unpruned_of("7b/unpruned/dynamic", dict.fromkeys(told)) is None


# -- its tables -------------------------------------------------------------------------------------------------------


@pytest.fixture
def written(tmp_path, monkeypatch):
    """A record with one part, where the tables look for it."""
    file = tmp_path / "headline.json"
    made = rounds.section(None, DEPENDS, TOLD, [both(), both(60.0), both()], CALL)
    file.write_text(json.dumps({"llava": {"7b": made}}))
    monkeypatch.setattr(answers, "RECORD", file)


def rows(text):
    """Cells of a table, by row, without its head."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


@pytest.mark.usefixtures("written")
def test_the_table_of_answers_shows_times_gains_and_what_is_refused():
    text = answers.answers_table()
    made = rows(text)
    assert made[0] == ["7B", "none", "dynamic", "100%", "100", "10.0", "10.0", "0.41", "2.65", "", "", ""]
    where, first, total = made[2][:3], made[2][9], made[2][11]
    assert where == ["7B", "connector", "dynamic"]
    assert first == "x2.50 [2.00, 2.50] (x4.00)"
    assert total == f"x{2650 / 2590:.2f} [{2650 / 2598:.2f}, {2650 / 2590:.2f}]"
    assert made[3][9:] == ["", "", ""]  # no unpruned variant of this way ran
    assert made[4][:4] == ["7B", "language", "static", "refused: ValueError: no / such cache"]
    assert "32 of 32 layers, width 512 of 4096" in text
    assert "Compiling (7 to 9 s per variant, less where" in text
    assert (
        "A CPU, 1 thread, float32, torch 2, transformers 5, timm 1, 3 interleaved rounds, load average before" in text
    )


@pytest.mark.usefixtures("written")
def test_the_table_of_lengths_says_which_is_ahead_when():
    text = answers.ahead_table()
    assert rows(text) == [
        ["7B", "connector", "dynamic", "unpruned, dynamic", "every length up to 256", "3 of 3"],
        ["7B", "connector", "dynamic compiled", "dynamic", "7 [7, 7] tokens or more", "3 of 3"],
    ]
    ways = "dynamic, static compiled, dynamic compiled"
    assert f"Fastest in the 7B shape among the 4 that took turns ({ways}): from 1 token on" in text
    assert "from 1 token on connector, dynamic; from 7 tokens on connector, dynamic compiled" in text
    assert "miss the measured totals by at most 0.0%" in text


def test_the_table_of_both_models_shows_the_share_of_time_that_is_left(tmp_path, monkeypatch):
    told = {"7b/unpruned/dynamic": TOLD["7b/unpruned/dynamic"], "13b/hybrid/dynamic": TOLD["7b/connector/dynamic"]}
    taken = [dict(zip(told, [run(100, 10), run(first, 10)], strict=True)) for first in (40, 50, 80)]
    record = {"llava": {"both": rounds.section(None, DEPENDS, told, taken, CALL)}}
    file = tmp_path / "headline.json"
    file.write_text(json.dumps(record))
    monkeypatch.setattr(answers, "RECORD", file)
    # of the speed-ups 2.5, 2 and 1.25 the fifths are 1.55 and 2.3
    assert rows(answers.both_table())[0][:3] == ["13b", "hybrid", f"0.50 [{1 / 2.3:.2f}, {1 / 1.55:.2f}]"]


@pytest.mark.usefixtures("written")
def test_parts_that_are_missing_say_how_they_are_measured():
    assert answers.encoder_table().startswith("Not measured yet: `python benchmarks/headline.py vit-h` writes")
    assert answers.both_table().startswith("Not measured yet: `python benchmarks/headline.py both` writes")


# -- the script -------------------------------------------------------------------------------------------------------


@pytest.fixture
def script(tmp_path, monkeypatch):
    """The script on few narrow layers; returns a function of further arguments, which returns the record."""
    limits = ("recompile_limit", "accumulated_recompile_limit", "fail_on_recompile_limit_hit")
    before, threads = {name: getattr(torch._dynamo.config, name) for name in limits}, torch.get_num_threads()
    out = tmp_path / "record.json"

    def call(part, *more):
        small = ["--layers", "3", "--width", "64", "--rounds", "1", "--out", str(out)]
        monkeypatch.setattr(sys, "argv", ["headline.py", part, *small, *more])
        headline.main()
        return json.loads(out.read_text())

    yield call
    torch.set_num_threads(threads)
    for name, value in before.items():
        setattr(torch._dynamo.config, name, value)


def test_the_script_measures_answers_in_pieces(script, monkeypatch):
    few = ["--new-tokens", "2", "3", "--ways", "dynamic", "static"]
    script("7b", *few, "--settings", "connector")
    record = script("7b", *few, "--settings", "language")
    part = record["llava"]["7b"]
    assert [call["rounds"] for call in part["calls"]] == [1, 1]
    assert part["conditions"]["marks"] == [1, 2, 3]
    assert sorted(part["rounds"][0]) == sorted(
        f"7b/{setting}/{way}" for setting in ("unpruned", "connector") for way in ("dynamic", "static")
    )
    assert part["variants"].keys() >= {"7b/language/dynamic", "7b/language/static"}
    for name, variant in part["variants"].items():
        times = [one[name] for one in part["rounds"] if name in one]
        assert bool(times) == ("flops" in variant) != bool({"refused", "failed"} & variant.keys())
        assert all(0 < a < b < c for a, b, c in times)
    tokens = part["variants"]["7b/connector/dynamic"]
    assert tokens["kv_share"] == pytest.approx((144 + 40) / 616)
    assert part["derived"]["gains"]["7b/connector/dynamic"]["bounds"]["first"] > 1.5
    with pytest.raises(ValueError, match=r"marks.*--anew"):
        script("7b", "--new-tokens", "2")
    monkeypatch.setattr(answers, "RECORD", Path(sys.argv[sys.argv.index("--out") + 1]))
    assert len(rows(answers.answers_table())) == len(part["variants"])


def test_the_script_measures_an_encoder_at_half_of_the_flops(script, monkeypatch):
    part = script("vit-h", "--layers", "4")["vit-h"]
    for batch in (1, 4):
        whole = part["variants"][f"batch {batch}/unpruned"]["flops"]["first"]
        for plan in ("plan_for", "votes"):
            left = part["variants"][f"batch {batch}/{plan}"]["flops"]["first"] / whole
            assert left == pytest.approx(0.5, abs=0.02)
    monkeypatch.setattr(answers, "RECORD", Path(sys.argv[sys.argv.index("--out") + 1]))
    assert [row[:2] for row in rows(answers.encoder_table())] == [
        [batch, plan] for batch in "14" for plan in ("plan_for", "votes")
    ]


def test_the_script_measures_the_larger_model_beside_the_smaller(script):
    few = ["--new-tokens", "2", "--settings", "hybrid"]
    with pytest.raises(FileNotFoundError):
        script("both", *few, "--rounds", "0")  # nothing is timed, and nothing written
    with pytest.raises(SystemExit):
        script("both", *few, "--ways", "static")
    part = script("both", *few)["llava"]["both"]
    assert list(part["rounds"][0]) == ["7b/unpruned/dynamic", "13b/hybrid/dynamic"]
    assert part["derived"]["gains"].keys() == {"13b/hybrid/dynamic"}
