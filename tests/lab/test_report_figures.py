"""Every figure of a record stands in the page under the header that names it; plans that differ in anything are two plans.

All figures of a record here differ, so that two that are exchanged are seen.
"""

import copy
import html
import re

import pytest

from saint import methods
from saint.lab.report import make_report
from saint.plans import Stage
from support import records
from support.records import read


def tables(page: str) -> dict[str, list[dict[str, str]]]:
    """Rows of each table by its caption, cells by the head of their column."""
    found = {}
    for body in re.findall(r"<table.*?</table>", page, re.S):
        plain = [
            [html.unescape(re.sub("<[^>]+>", "", cell)) for cell in re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row, re.S)]
            for row in re.findall(r"<tr.*?</tr>", body, re.S)
        ]
        caption = html.unescape(re.search(r"<caption[^>]*>(.*?)</caption>", body, re.S)[1])
        assert len(set(plain[0])) == len(plain[0]), "two columns of one name"
        assert all(len(row) == len(plain[0]) for row in plain), caption
        assert caption not in found
        found[caption] = [dict(zip(plain[0], row, strict=True)) for row in plain[1:]]
    return found


def conditions(page: str) -> dict[str, str]:
    pairs = re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", page, re.S)
    return {html.unescape(name): html.unescape(value) for name, value in pairs}


def words(page: str) -> str:
    return " ".join(read(page).text.split())


def spread(median: float, p20: float, p80: float) -> dict:
    return {"median": median, "p20": p20, "p80": p80, "n": 5}


# -- conditions -----------------------------------------------------------------------------------------------------------

RANDOM = "random (--no-pretrained): numbers about accuracy mean nothing"


@pytest.mark.parametrize("kind", records.MAKERS)
@pytest.mark.parametrize("where", ["record", "conditions"])
@pytest.mark.parametrize("pretrained", [True, False, None])
def test_a_page_says_when_weights_are_random(written, kind, where, pretrained):
    record = records.MAKERS[kind]()
    record.pop("pretrained", None)
    if pretrained is not None:
        place = record if where == "record" else record.setdefault("conditions", {})
        place["pretrained"] = pretrained
    found = conditions(make_report(written(record)))
    assert found.get("weights") == (RANDOM if pretrained is False else None)


@pytest.mark.parametrize("kind", records.MAKERS)
@pytest.mark.parametrize(
    ("environment", "shown"),
    [
        ({"device_name": "A Chip", "device": "cuda:1", "threads": 7}, "A Chip, 7 thread(s)"),
        ({"device": "cuda:1", "threads": 7}, "cuda:1, 7 thread(s)"),
        ({"device": "cuda:1"}, "cuda:1"),
        ({}, None),
    ],
)
def test_conditions_of_every_kind(written, kind, environment, shown):
    record = records.MAKERS[kind]()
    versions = {
        "torch": "2.1",
        "timm": "1.2",
        "transformers": "5.3",
        "open_clip": "3.4",
        "numpy": "2.5",
        "pillow": "12.6",
        "python": "3.7",
    }
    record |= {"environment": {**environment, **versions}, "seed": 13, "saint": "0.9"}
    if "conditions" in record:
        record["conditions"] = {**record["conditions"], "dtype": "bfloat16"}
        record["conditions"].pop("threads", None)
    found = conditions(make_report(written(record)))
    assert found.get("device") == shown
    assert found["versions"] == "saint 0.9, " + ", ".join(f"{name} {version}" for name, version in versions.items())
    assert found["model"] == record.get("model", record.get("conditions", {}).get("model"))
    assert found["seed"] == "13"
    assert found["date"] == record["date"]
    assert found["record"] == "record0.json"
    assert found.get("data type") == ("bfloat16" if "conditions" in record else None)


@pytest.mark.parametrize(
    ("load", "cores", "said"), [(1.1, 2, True), (1.0, 2, False), (0.9, 2, False), (None, 2, False), (9, None, False)]
)
@pytest.mark.parametrize("kind", ["bench/encoder", "bench/generation", "demo"])
def test_a_busy_machine_is_told(written, kind, load, cores, said):
    record = records.MAKERS[kind]()
    given = record["photos"][0]["bench"]["conditions"] if kind == "demo" else record["conditions"]
    given["load_average"], record["environment"]["cores"] = load, cores
    text = words(make_report(written(record)))
    assert (f"The machine was busy before the timing (load average {load} on {cores} cores)" in text) == said
    assert ("busy" in text) == said


# -- figures --------------------------------------------------------------------------------------------------------------


def bench() -> dict:
    record = records.bench()
    record |= {
        "base": spread(20.1, 19.2, 21.3),
        "pruned": spread(15.4, 14.5, 16.6),
        "eager": spread(17.7, 16.8, 18.9),
        "speedup": spread(1.31, 1.22, 1.43),
        "bound": 1.54,
        "images": ["a", "b", "c"],
        "image_size": [224, 196],
        "costs": {
            "base": {"flops": 2.11e9, "memory": 8.12},
            "pruned": {"flops": 1.33e9, "memory": 6.24},
            "eager": {"flops": 1.45e9, "memory": 7.36},
        },
        "overhead": {
            "scoring": spread(1.17, 1, 2),
            "gathering": spread(0.58, 0.4, 0.6),
            "share": spread(0.234, 0.215, 0.271),
        },
        "layers": [
            {"layer": 0, "tokens_in": 93.0, "tokens_out": 82.0, "slots": 89},
            {"layer": 3, "tokens_in": 71.0, "tokens_out": 64.0, "slots": 68},
        ],
    }
    record["conditions"] = {
        "batch": 6,
        "dtype": "float16",
        "repeats": 31,
        "warmup": 4,
        "threads": 3,
        "load_average": 0.1,
    }
    return record


def test_figures_of_a_bench(written):
    page = make_report(written(bench()))
    head = ("variant", "ms per forward: median [p20, p80]", "GFLOPs", "activations MiB")
    expected = [
        ("unpruned", "20.1 [19.2, 21.3]", "2.110", "8.120"),
        ("pruned", "15.4 [14.5, 16.6]", "1.330", "6.240"),
        ("pruned, eager attention", "17.7 [16.8, 18.9]", "1.450", "7.360"),
    ]
    assert tables(page)["Forward"] == [dict(zip(head, row, strict=True)) for row in expected]
    assert [list(row.values()) for row in tables(page)["Tokens around each drop point"]] == [
        ["0", "93", "82", "89"],
        ["3", "71", "64", "68"],
    ]
    assert list(tables(page)["Tokens around each drop point"][0])[1:] == ["tokens in", "tokens out", "padded to"]
    text = words(page)
    assert "runs 1.31 [1.22, 1.43] times as fast as unpruned; FLOPs would allow 1.54." in text
    own = "Pruning itself: scoring 1.17 ms, gathering 0.58 ms, together 23.4 % of the unpruned forward [21.5, 27.1]."
    assert own in text
    assert "The FLOPs leave out aten.strange." in text
    found = conditions(page)
    assert (found["pixels"], found["batch"], found["pictures"]) == ("224 x 196", "6", "3 (a, b, c)")
    assert found["rounds"] == "31 interleaved after 4 of warm-up"
    assert found["device"] == "cpu, 3 thread(s)"
    slow = bench() | {"speedup": spread(0.83, 0.72, 0.94)}
    assert "is slower: 0.83 [0.72, 0.94] times the speed of the unpruned one; FLOPs would allow 1.54." in words(
        make_report(written(slow))
    )


def generation() -> dict:
    def times(t: float) -> dict:
        return {
            "first": spread(50 + t, 40 + t, 60 + t),
            "per_token": spread(20 + t, 10 + t, 30 + t),
            "total": spread(80 + t, 70 + t, 90 + t),
            "tokens_per_second": spread(7 + t, 6 + t, 8 + t),
            "kv_bytes": (5 + t) * 2**20,
            "prefill": {"flops": (3 + t) * 1e9},
        }

    def gain(first, bound, efficiency, total, decode, kv) -> dict:
        return {"first": first, "bound": bound, "efficiency": efficiency, "total": total, "decode": decode, "kv": kv}

    record = records.generation()
    other = copy.deepcopy(records.PLAN)
    other["vision"][0]["method"]["threshold"] = 0.31
    record |= {
        "plans": {"half": records.PLAN, "less": other},
        "times": {"base": times(0.1), "half": times(0.2), "less": times(0.3)},
        "gains": {
            "half": gain(
                spread(1.31, 1.22, 1.43), 1.54, 0.86, spread(1.21, 1.12, 1.33), spread(1.01, 0.92, 1.13), 0.51
            ),
            "less": gain(spread(1.65, 1.56, 1.77), 1.88, 0.88, spread(1.45, 1.36, 1.57), None, 0.27),
        },
    }
    record["times"]["less"]["per_token"] = None
    record["conditions"] |= {"batch": 6, "repeats": 31, "warmup": 4, "prompt_tokens": 317, "new_tokens": 9}
    return record


def test_figures_of_a_generation(written):
    page = make_report(written(generation()))
    head = (
        "",
        "first token ms",
        "ms per token",
        "total ms",
        "tokens/s",
        "KV MiB",
        "prefill GFLOPs",
    )
    expected = [
        (
            "unpruned",
            "50.1 [40.1, 60.1]",
            "20.1 [10.1, 30.1]",
            "80.1 [70.1, 90.1]",
            "7.10 [6.10, 8.10]",
            "5.100",
            "3.100",
        ),
        ("half", "50.2 [40.2, 60.2]", "20.2 [10.2, 30.2]", "80.2 [70.2, 90.2]", "7.20 [6.20, 8.20]", "5.200", "3.200"),
        ("less", "50.3 [40.3, 60.3]", "-", "80.3 [70.3, 90.3]", "7.30 [6.30, 8.30]", "5.300", "3.300"),
    ]
    than = tables(page)["Against the unpruned model: times as fast"]
    assert [list(row.values()) for row in than] == [
        ["half", "1.31 [1.22, 1.43]", "1.540", "0.860", "1.21 [1.12, 1.33]", "1.01 [0.92, 1.13]", "51%"],
        ["less", "1.65 [1.56, 1.77]", "1.880", "0.880", "1.45 [1.36, 1.57]", "-", "27%"],
    ]
    assert list(than[0])[1:] == [
        "first token",
        "FLOPs bound",
        "efficiency",
        "end to end",
        "time of a further token",
        "KV",
    ]
    assert tables(page)["Generation, median [p20, p80]"] == [dict(zip(head, row, strict=True)) for row in expected]
    text = words(page)
    assert "The first token comes soonest with “less”: 1.65 [1.56, 1.77] times as fast as unpruned." in text
    assert "half : vision: saint (threshold 0.7)" in text
    assert "less : vision: saint (threshold 0.31)" in text
    found = conditions(page)
    assert found["tokens"] == "317 of the prompt, 9 new, batch 6"
    assert found["rounds"] == "31 interleaved after 4 of warm-up"
    assert (found["question"], found["pictures"]) == ("what is it", "2 (a, b)")
    slow = generation()
    for gain in slow["gains"].values():
        gain["first"]["p20"] = 0.9
    assert "No plan shows a faster first token; the best, “less”, is at 1.65 [0.90, 1.77]" in words(
        make_report(written(slow))
    ).replace("0.900", "0.90")


def paired(t: float, **more) -> dict:
    """Shares whose hundredths are t, all different; of 100 + t samples."""
    return {
        "n": round(100 + t),
        "base": 0.8 + t / 1e4,
        "pruned": 0.7 + t / 1e4,
        "difference": -0.1 + t / 1e4,
        "low": -0.2 + t / 1e4,
        "high": -0.05 + t / 1e4,
        "detectable": 0.04 + t / 1e4,
        "better": round(7 + t),
        "worse": round(31 + t),
        **more,
    }


def row_of(plan: str, group: str, score: str, t: int, first: str, second: str) -> dict:
    return {
        "plan": plan,
        "category": group,
        "score": score,
        "n": f"{100 + t}",
        f"{first} %": f"{80 + t / 100:.2f}",
        f"{second} %": f"{70 + t / 100:.2f}",
        "difference [95 %]": f"{-10 + t / 100:+.2f} [{-20 + t / 100:+.2f}, {-5 + t / 100:+.2f}]",
        "better": f"{7 + t}",
        "worse": f"{31 + t}",
        "could show": f"{4 + t / 100:.2f}",
    }


PLANS = dict.fromkeys(  # a row without a value
    ["plan", "cosine [95 %]", "same top1 [95 %]", "kl [95 %]"]
    + [f"{score} {what}" for score in ("top1", "top5") for what in ("%", "difference [95 %]")],
    "-",
)


@pytest.mark.parametrize("kind", ["eval/images", "eval/vqa"])
def test_figures_of_an_evaluation(written, kind):
    record = records.MAKERS[kind]() | {
        "plans": {"half": records.PLAN, "less": records.PLAN},
        "given": 123,
        "evaluated": 117,
        "scores": {
            "half": {"top1": paired(1), "top5": paired(2)},
            "less": {"top1": paired(3), "top5": paired(4, low=None, high=None, detectable=None)},
        },
        "categories": {
            "red": {"half": {"top1": paired(5)}, "less": {"top1": paired(6)}},
            "blue": {"half": {"top1": paired(7)}, "less": {}},
        },
        "against_first": {"less": {"top1": paired(8), "top5": paired(9)}},
        "agreement": {
            "half": {
                "cosine": {"mean": 0.9711, "median": 0.9722, "p20": 0.9533, "p80": 0.9944, "n": 61},
                "same_top1": {"mean": 0.625, "median": 1.0, "p20": 0.0, "p80": 1.0, "n": 62},
            },
            "less": {"kl": {"mean": 0.1155, "median": 0.1166, "p20": 0.1077, "p80": 0.1288, "n": 63}},
        },
    }
    page = make_report(written(record))
    found = tables(page)
    whole = row_of("less", "all", "top5", 4, "unpruned", "pruned") | {"difference [95 %]": "-9.96", "could show": "-"}
    assert found["Scores, in %; could show: smallest true difference seen with 80 % probability"] == [
        row_of("half", "all", "top1", 1, "unpruned", "pruned"),
        row_of("half", "all", "top5", 2, "unpruned", "pruned"),
        row_of("less", "all", "top1", 3, "unpruned", "pruned"),
        whole,
        row_of("half", "red", "top1", 5, "unpruned", "pruned"),
        row_of("less", "red", "top1", 6, "unpruned", "pruned"),
        row_of("half", "blue", "top1", 7, "unpruned", "pruned"),
    ]
    assert found["Plans, on 117 samples"] == [
        {**PLANS, "plan": "unpruned", "same top1 [95 %]": "100 %", "top1 %": "80.0", "top5 %": "80.0"},
        {
            **PLANS,
            "plan": "half",
            "cosine [95 %]": "0.9711",
            "same top1 [95 %]": "62.5 %",
            "top1 %": "70.0",
            "top1 difference [95 %]": "-10.0 [-20.0, -5.0]",
            "top5 %": "70.0",
            "top5 difference [95 %]": "-10.0 [-20.0, -5.0]",
        },
        {
            **PLANS,
            "plan": "less",
            "kl [95 %]": "0.1155",
            "top1 %": "70.0",
            "top1 difference [95 %]": "-10.0 [-20.0, -5.0]",
            "top5 %": "70.0",
            "top5 difference [95 %]": "-10.0",
        },
    ]
    assert found["Against the first plan, half"] == [
        row_of("less", "all", "top1", 8, "half", "this"),
        row_of("less", "all", "top5", 9, "half", "this"),
    ]
    assert [list(row.values()) for row in found["Agreement with the unpruned model"]] == [
        ["half", "cosine", "0.9711 [0.9533, 0.9944]", "61"],
        ["half", "same_top1", "62.5 %", "62"],
        ["less", "kl", "0.1155 [0.1077, 0.1288]", "63"],
    ]
    text = words(page)
    assert (
        "“half” keeps the top class on 39 of 62: top1 80.0 % unpruned, 70.0 % pruned, difference -10.0 points [-20.0, -5.0]"
        in text
    )
    named = conditions(page)
    assert named["questions" if kind == "eval/vqa" else "images"] == "117 of 123 evaluated"
    assert "Not evaluated: 1" in text
    assert "x.jpg: broken" in text


@pytest.mark.parametrize(
    ("low", "high", "detectable", "n", "said"),
    [
        (-0.2, -0.05, 0.04, 50, "difference -10.0 points [-20.0, -5.0]."),
        (0.05, 0.2, 0.04, 50, "difference -10.0 points [+5.0, +20.0]."),
        (
            -0.2,
            0.05,
            0.043,
            50,
            "no difference shown (difference -10.0 points [-20.0, +5.0]; 50 samples could have shown 4.3 points).",
        ),
        (0.0, 0.05, None, 50, "no difference shown (difference -10.0 points [+0.0, +5.0])."),
        (-0.2, 0.0, None, 50, "no difference shown (difference -10.0 points [-20.0, +0.0])."),
        (None, None, None, 1, "of 1 sample: too few for an interval."),
        (None, None, None, 3, "of 3 samples: too few for an interval."),
    ],
)
def test_the_verdict_of_an_evaluation(written, low, high, detectable, n, said):
    record = records.eval_images()
    record["scores"]["half"]["top1"] = paired(0, low=low, high=high, detectable=detectable, n=n)
    assert said in words(make_report(written(record)))


def test_scores_that_are_equal_in_everything_are_one_row(written):
    record = records.eval_vqa()
    record["scores"] = {"half": {"exact": paired(1), "anls": paired(1), "top1": paired(2)}}
    found = tables(make_report(written(record)))[
        "Scores, in %; could show: smallest true difference seen with 80 % probability"
    ]
    assert [row["score"] for row in found if row["category"] == "all"] == ["exact = anls", "top1"]


@pytest.mark.parametrize(
    ("measure", "words"),
    [
        ("same_answer", "the answer"),
        ("same_top1", "the top class"),
        ("same_first_token", "the first word of the answer"),
    ],
)
def test_the_verdict_of_an_evaluation_says_what_is_kept_first(written, measure, words):
    record = records.eval_vqa()
    same = {"mean": 0.97, "median": 1.0, "p20": 1.0, "p80": 1.0, "n": 100}
    share = {"mean": 0.25, "median": 0.25, "p20": 0.25, "p80": 0.25, "n": 100}
    record["agreement"] = {"half": {measure: same, "kept": share}}
    said = words_of_verdict(make_report(written(record)))
    assert said.startswith(f"“half” keeps {words} on 97 of 100 with 25 % of the tokens: top1 ")


def words_of_verdict(page: str) -> str:
    return html.unescape(re.search(r'<p class="verdict">(.*?)</p>', page, re.S)[1])


def test_without_labels_the_verdict_is_agreement(written):
    record = records.eval_images() | {"scores": {"half": {}}}
    text = words(make_report(written(record)))
    assert "“half”: cosine with the unpruned model 0.9700 (no labels, so no accuracy)." in text


def ends(mean: float, low: float, high: float) -> dict:
    return {"mean": mean, "low": low, "high": high}


def test_figures_of_a_tuning(written):
    record = records.tune()
    record["reached"] = {
        "flops": ends(0.591, 0.582, 0.603),
        "measure": "1 - cosine",
        "loss": ends(0.0411, 0.0322, 0.0533),
        "agreement": ends(0.9589, 0.9467, 0.9678),
    }
    record["images"] = {"set": "photos", "tuned": 83, "held_out": 41}
    rival = {"measure": "1 - cosine", "agreement": ends(0.9, 0.8, 0.95)}
    record["against"] = [
        {
            "name": "published saint",
            "work": 0.592,
            "loss": ends(0.0844, 0.0755, 0.0966),
            **rival,
            "difference": ends(-0.0433, -0.0522, -0.0311),
        },
        {
            "name": "random",
            "work": 0.593,
            "loss": ends(0.0377, 0.0288, 0.0499),
            **rival,
            "difference": ends(0.0034, 0.0021, 0.0056),
        },
        {
            "name": "tome",
            "work": 0.594,
            "loss": ends(0.0412, 0.0233, 0.0544),
            **rival,
            "difference": ends(0.0013, -0.0021, 0.0046),
        },
        {
            "name": "far",
            "work": 0.712,
            "loss": ends(0.0612, 0.0533, 0.0744),
            **rival,
            "difference": ends(0.0213, 0.0121, 0.0346),
        },
    ]
    page = make_report(written(record))
    head = ("plan", "share of the FLOPs used", "1 - cosine", "this plan less that one (below 0: it loses less)")
    expected = [
        ("this plan", "0.591", "0.0411 [0.0322, 0.0533]", "-"),
        ("published saint", "0.592", "0.0844 [0.0755, 0.0966]", "-0.0433 [-0.0522, -0.0311]"),
        ("random", "0.593", "0.0377 [0.0288, 0.0499]", "0.0034 [0.0021, 0.0056]"),
        ("tome", "0.594", "0.0412 [0.0233, 0.0544]", "0.0013 [-0.0021, 0.0046]"),
        ("far", "0.712", "0.0612 [0.0533, 0.0744]", "0.0213 [0.0121, 0.0346]"),
    ]
    found = tables(page)
    assert found["On 41 images held back, mean [95 % interval]"] == [
        dict(zip(head, row, strict=True)) for row in expected
    ]
    assert [list(row.values()) for row in found["Where tokens are dropped"]] == [
        ["in front of the layers", "saint", "8 of 10", "80%"],
        ["layer 2", "match", "5 of 10", "50%"],
    ]
    assert list(found["Where tokens are dropped"][0]) == ["where", "method", "tokens kept", "share kept"]
    text = words(page)
    assert (
        "Met: 59.1 % of the FLOPs are used (60 % of the FLOPs asked for); "
        "agreement 0.9589 [0.9467, 0.9678] with the unpruned model on 41 images held back." in text
    )
    same = "it loses less than published saint, and it loses more than random, and no difference to tome is shown."
    assert same in text
    assert "Not at the same work, so not compared: far at 71.2 % of the FLOPs, the plan at 59.1 %." in text
    assert conditions(page)["images"] == "83 to tune on, 41 held back (photos)"
    assert "0.20 of the FLOPs: 0.25 is the least" in text.replace("0.200", "0.20")
    record["reached"]["flops"]["mean"] = 0.601
    assert "Missed: 60.1 % of the FLOPs are used" in words(make_report(written(record)))


def test_curves_of_one_method_are_told_apart_by_what_differs(written):
    record = records.tune()
    (curve, *_) = record["costs"]
    method = {"method": "match", "threshold": 0.75, "beta": 0.3}
    record["costs"] = [{**curve, "method": {**method, "fate": fate}} for fate in ("weigh", "drop")]
    record["costs"].append({**curve, "method": {"method": "random", "seed": 0}})
    page = make_report(written(record))
    (head,) = [list(rows[0]) for caption, rows in tables(page).items() if caption.startswith("Loss when")]
    assert head == ["layer", "match, fate weigh", "match, fate drop", "random"]


def test_counts_of_tokens_begin_at_zero_and_show_the_unpruned_count(written):
    """A drop of 5 % is not the whole height of a chart."""
    record = records.tune()
    page = make_report(written(record))
    (chart,) = [part for part in page.split("<figure")[1:] if "Tokens kept behind each layer" in part]
    assert "unpruned 10" in chart
    ticks = re.findall(r'text-anchor="end">(\d+)<', chart)
    assert ticks[0] == "0"
    assert "input" in chart
    assert "-1" not in re.sub(r"<[^>]*>", " ", chart)


def test_a_tuned_plan_with_and_without_its_other_budgets_is_one_section(written):
    record = records.tune()
    alone = {**record, "frontier": None}
    for both in ((record, alone), (alone, record)):
        page = make_report(written(*both))
        assert page.count("<section") == 1
        assert "Other budgets" in page
    other = {**alone, "tokens": record["tokens"] + 1}
    assert make_report(written(record, other)).count("<section") == 2


def test_a_plan_of_many_stages_is_said_in_a_line_and_in_full_on_demand(written):
    record = records.tune()
    stage = {"layers": [3], "placement": "mid", "output": "survivors"}
    stages = [{**stage, "layers": [i], "method": {"method": "match", "keep": 0.9 + i / 100}} for i in range(4)]
    stages[0] |= {"layers": None, "placement": "input"}
    record["plan"] = {"version": 1, "vision": stages}
    page = make_report(written(record))
    box = page[page.index('class="plan"') :]
    first, rest = box.split("<details>", 1)
    assert "vision: match at the input and layers 1, 2, 3" in first
    assert "keep 0.93" not in first
    assert "keep 0.93" in rest


def test_figures_of_a_demo(written):
    record = records.demo() | {"speedup": 1.21, "flops_bound": 1.32, "image_size": [224, 196]}
    record["agreement"] = {"measure": "cosine", "of": "logits", "mean": 0.9811, "min": 0.9722}
    (photo,) = record["photos"]
    photo["bench"] |= {
        "base": spread(20.1, 1, 2),
        "pruned": spread(15.2, 1, 2),
        "speedup": spread(1.43, 1, 2),
        "bound": 1.54,
    }
    photo["agreement"] = 0.965
    page = make_report(written(record))
    head = ("picture", "tokens kept", "ms unpruned", "ms pruned", "speed-up", "FLOPs bound", "cosine")
    row = ("a", "1 of 6", "20.10", "15.20", "1.430", "1.540", "0.965")
    assert tables(page)["Per picture"] == [dict(zip(head, row, strict=True))]
    said = "runs 1.21 times as fast (FLOPs bound 1.32), and its logits agrees with the unpruned one to a "
    said += "cosine of 0.9811 (lowest 0.9722) on 1 picture."
    assert said in words(page)
    assert conditions(page)["pixels"] == "224 x 196"


def test_figures_of_an_analysis(written):
    record = records.analyze()
    part, _ = record["parts"]
    part["tokens"] = {"candidates": 187.0, "protected": 3}
    page = make_report(written(record))
    text = words(page)
    assert "6 layers, 187 tokens that may be dropped, 3 protected." in text
    shown = re.findall(r"<table.*?</table>", page, re.S)
    plain = [
        [re.sub("<[^>]+>", "", cell) for cell in re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", table, re.S)]
        for table in shown
    ]
    curve = next(cells for cells in plain if "threshold 0.7" in cells)
    from saint.lab.report.words import interval

    drop = part["droppable"]
    for place, threshold in enumerate(("threshold 0.7", "threshold 0.8")):
        column = curve.index(threshold)
        width = 3
        for layer in range(6):
            values = (drop[key][place][layer] for key in ("mean", "low", "high"))
            assert curve[(layer + 1) * width + column] == interval(*values), (threshold, layer)
    assert "when 25 % of the tokens are dropped at this layer alone" in text


# -- plans against each other ---------------------------------------------------------------------------------------------


def other(value):
    """Another value than ``value``, of its kind where there is one."""
    if value is None:
        return [1]
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 0.125
    return value[1:] if isinstance(value, list) and value else f"{value}x"


def one_field_away() -> list:
    """Pairs of plans that differ in one field of one stage of one slot: of all fields of stages and of every method."""
    made = []
    for slot in ("vision", "connector", "language"):
        for name in methods.names():
            if slot not in methods.get(name).stages:
                continue
            plan = {"version": 1, slot: [Stage(methods.get(name)()).to_dict()]}
            for field in plan[slot][0]:
                if field != "method":
                    changed = copy.deepcopy(plan)
                    changed[slot][0][field] = other(plan[slot][0][field])
                    made.append((f"{slot}: {name}.{field}", plan, changed))
            for field, value in plan[slot][0]["method"].items():
                changed = copy.deepcopy(plan)
                changed[slot][0]["method"][field] = other(value)
                made.append((f"{slot}: {name}, {field}", plan, changed))
    stage = records.PLAN["vision"][0]
    whole = {"version": 1, "vision": [stage], "language": [stage], "connector": [stage]}
    for slot in ("vision", "connector", "language"):
        made.append((f"without {slot}", whole, {name: value for name, value in whole.items() if name != slot}))
        made.append((f"twice {slot}", whole, {**whole, slot: [stage, stage]}))
    one, all_of_them = (copy.deepcopy(records.PLAN) for _ in range(2))
    one["vision"][0]["method"]["keep"], all_of_them["vision"][0]["method"]["keep"] = 1, 1.0
    made.append(("one token and all of them", one, all_of_them))
    return made


PAIRS = one_field_away()


def points(page: str) -> list[str]:
    return [entry["aria-label"] for _, entry in read(page).found if entry.get("class") == "point"]


@pytest.mark.parametrize(("what", "plan", "another"), PAIRS, ids=[pair[0] for pair in PAIRS])
def test_plans_that_differ_in_one_field_are_two_points(what, plan, another):
    """Speed of both, quality of one: the unpruned model and one plan, never the speed of the other."""
    from pathlib import Path

    from saint.lab.report.reading import Record
    from saint.lab.report.trade import trades

    fast, slow = records.generation(), records.generation()
    quality = records.eval_vqa()
    fast["plans"], slow["plans"], quality["plans"] = {"half": plan}, {"half": another}, {"half": plan}
    slow["gains"]["half"]["first"] = spread(7.5, 7, 8)
    found = trades([Record("r", Path(), record) for record in (fast, slow, quality)])
    assert {trade.point.x for trade in found} == {1.3}, what
    encoder, encoders = records.bench(), records.bench()
    encoder["plan"], encoders["plan"] = plan, another
    encoders["speedup"] = spread(7.5, 7, 8)
    quality = records.eval_images() | {"plans": {"half": plan}}
    found = trades([Record("r", Path(), record) for record in (encoder, encoders, quality)])
    assert {trade.point.x for trade in found} == {1.3}, what


def test_figures_of_accuracy_against_speed(written):
    fast = bench() | {"plan": records.PLAN}
    quality = records.eval_images()
    quality["scores"]["half"]["top1"] = paired(1)
    quality["agreement"]["half"]["kept"] = quality["agreement"]["half"]["cosine"]
    found = tables(make_report(written(fast, quality)))
    captions = [caption for caption in found if caption.startswith("timm:x: ")]
    assert captions == ["timm:x: top1, 0 to 1", "timm:x: cosine with the unpruned model"]
    assert [list(row.values()) for row in found[captions[0]]] == [
        ["1: unpruned", "unpruned", "1", "0.8001", "yes"],
        # the interval is the base with the ends of the paired difference on it
        ["2: half (batch 6, float16)", "saint", "1.31 [1.22, 1.43]", "0.7001 [0.6002, 0.7502]", "yes"],
    ]
    assert list(found[captions[0]][0]) == ["plan", "method", "speed-up", "top1, 0 to 1", "unbeaten"]
    assert [list(row.values()) for row in found[captions[1]]] == [
        ["1: unpruned", "unpruned", "1", "1", "yes"],
        ["2: half (batch 6, float16)", "saint", "1.31 [1.22, 1.43]", "0.9700", "yes"],
    ]
    elsewhere = bench() | {"plan": records.PLAN, "model": "timm:y"}
    assert not points(make_report(written(elsewhere, quality)))  # another model's speed is nobody's
