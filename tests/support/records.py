"""Records as the commands write them, small and made by hand; and how a test reads a page."""

import copy
import html.parser
import json
from typing import Any

import numpy as np
import pytest
from PIL import Image

from saint.lab.images import data_uri
from saint.lab.report import read_records

PLAN = {
    "version": 1,
    "vision": [{"method": {"method": "saint", "threshold": 0.7}, "layers": None, "output": "survivors"}],
}
FIELDS = frozenset(  # names of a record, which a test of hostile text leaves as they are
    [
        "version",
        "levers",
        "advice",
        "copies",
        "flat",
        "detail",
        "fine",
        "pictures",
        "target",
        "loss",
        "why",
        "slots",
        "missing",
        "candidates",
        "tokens_per_second",
        "kv",
        "decode",
        "total",
        "uncounted",
        "efficiency",
        "half",
        "reasons",
        "saint",
        "date",
        "kind",
        "model",
        "images",
        "count",
        "set",
        "questions",
        "seed",
        "settings",
        "parts",
        "stage",
        "layers",
        "tokens",
        "candidates",
        "protected",
        "quantities",
        "name",
        "title",
        "unit",
        "mean",
        "low",
        "high",
        "n",
        "droppable",
        "thresholds",
        "cka",
        "causal",
        "share",
        "measure",
        "methods",
        "stages",
        "verdict",
        "shown",
        "used",
        "segments",
        "first",
        "last",
        "what",
        "boundaries",
        "layer",
        "criteria",
        "survivors",
        "grid",
        "picture",
        "kept",
        "plan",
        "plan_line",
        "skipped",
        "left_out",
        "reason",
        "names",
        "environment",
        "vision",
        "method",
        "threshold",
        "output",
        "speedup",
        "median",
        "p20",
        "p80",
        "base",
        "pruned",
        "eager",
        "costs",
        "flops",
        "memory",
        "bound",
        "uncounted",
        "overhead",
        "scoring",
        "gathering",
        "conditions",
        "batch",
        "repeats",
        "warmup",
        "dtype",
        "image_size",
        "photos",
        "tokens_in",
        "tokens_out",
        "files",
        "agreement",
        "of",
        "min",
        "bench",
        "flops_bound",
        "prompt",
        "plans",
        "times",
        "gains",
        "per_token",
        "total",
        "kv_bytes",
        "prefill",
        "prompt_tokens",
        "new_tokens",
        "scores",
        "difference",
        "detectable",
        "better",
        "worse",
        "categories",
        "failures",
        "where",
        "reason",
        "names",
        "given",
        "evaluated",
        "against_first",
        "example_prompt",
        "torch",
        "cores",
        "device",
        "load_average",
        "threads",
        "efficiency",
        "pretrained",
        *("why", "gone", "into", "merged", "degree", "neighbors", "survivors_of", "left_out"),
        *("depth", "tuned", "held_out", "target", "place", "left", "reached", "loss", "per_image", "against", "work"),
        *("costs", "places", "center", "frontier", "missing", "speeds", "timing", "timed"),
    ]
)


def _head(kind: str) -> dict[str, Any]:
    environment = {"torch": "2.99", "device": "cpu", "cores": 2, "threads": 1}
    head = {
        "version": 1,
        "saint": "0.1.0",
        "date": "2026-11-25T00:00:00+00:00",
        "kind": kind,
        "environment": environment,
    }
    left = [{"reason": "the ending .csv is no picture's", "count": 9, "names": ["a.csv", "b.csv"]}]
    return {**head, "skipped": [["bad.jpg", "no picture"]], "left_out": left}


def _spread(median: float) -> dict[str, Any]:
    return {"median": median, "p20": median - 0.1, "p80": median + 0.1, "n": 5}


def _picture() -> str:
    return data_uri(Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)))


def analyze() -> dict[str, Any]:
    """Of noise: curves of six layers."""
    rng, depth = np.random.default_rng(0), 6

    def curve() -> dict[str, Any]:
        mean = rng.random(depth)
        return {"mean": mean.tolist(), "low": (mean - 0.05).tolist(), "high": (mean + 0.05).tolist()}

    def part(stage: str, shown: bool) -> dict[str, Any]:
        drops = [curve() for _ in range(2)]
        quantity = {"name": "key_similarity", "title": "similarity of keys", "unit": "cosine", "n": 20, **curve()}
        quantity["mean"][2] = quantity["low"][2] = quantity["high"][2] = None
        return {
            "stage": stage,
            "layers": depth,
            "tokens": {"candidates": 196.0, "protected": 1},
            "quantities": [quantity],
            "missing": [],
            "droppable": {
                "thresholds": [0.7, 0.8],
                **{key: [d[key] for d in drops] for key in ("mean", "low", "high")},
            },
            "cka": {"mean": rng.random((depth, depth)).tolist()},
            "causal": {"share": 0.25, "measure": "1 - cosine", "methods": {"random": curve(), "saint": curve()}},
            "stages": {
                "verdict": "three stages, boundaries in front of layers 2 and 4" if shown else "not shown",
                "shown": shown,
                "reasons": [] if shown else ["20 images are too few"],
                "used": ["key_similarity"],
                "segments": [{"first": 0, "last": 1, "what": "rising"}, {"first": 2, "last": 5, "what": "flat"}],
                "boundaries": [{"layer": 2, "low": 1, "high": 3}, {"layer": 4, "low": 4, "high": 5}],
                "criteria": {"bic": {"1": 3.0, "2": None}, "p_permutation": 0.003},
            },
        }

    return {
        **_head("analyze"),
        "model": "demo:clip",
        "images": {"count": 20, "set": "noise"},
        "questions": {"count": 3},
        "seed": 0,
        "candidates": "visual tokens",
        "settings": {"thresholds": [0.7, 0.8], "neighbors": 5, "saint": {"vision": {"method": "saint"}}},
        "parts": [part("vision", True), part("language", False)],
        "survivors": [survivor()],
        "survivors_of": {"plan": PLAN, "why": "the proposed plan", "left_out": [["c.png", "is gone"]]},
        "plan": PLAN,
        "plan_line": "saint.Plan(vision=saint.Saint(threshold=0.7))",
    }


def survivor() -> dict[str, Any]:
    """2 x 3 patches: 2 and 4 leave behind layer 0 for 1, then 1 behind layer 3 for 5; sources 0, 2, 4, then 0, 3."""
    first = {"gone": [2, 4], "into": [1, 1], "merged": False, "degree": [1, 3, 2], "neighbors": 2, "threshold": 0.7}
    then = {"gone": [1], "into": [5], "merged": False, "degree": [2, 0], "neighbors": 2, "threshold": 0.7}
    layers = [
        {"layer": 0, "tokens_in": 6, "tokens_out": 4, "kept": [0, 1, 3, 5], "why": first},
        {"layer": 3, "tokens_in": 4, "tokens_out": 3, "kept": [0, 3, 5], "why": then},
    ]
    return {"name": "b", "grid": [2, 3], "picture": _picture(), "layers": layers}


def _ends(mean: float) -> dict[str, float]:
    return {"mean": mean, "low": mean - 0.01, "high": mean + 0.01}


def _reached(flops: float, loss: float) -> dict[str, Any]:
    found = {"flops": _ends(flops), "measure": "1 - cosine", "loss": _ends(loss), "agreement": _ends(1 - loss)}
    found["flops"] |= {"low": flops, "high": flops}
    return found


def tune() -> dict[str, Any]:
    """Of an encoder, for its FLOPs, with two other budgets; a third cannot be reached."""
    rival = {"work": 0.6, "measure": "1 - cosine", "loss": _ends(0.08), "agreement": _ends(0.92)}
    rivals = [{"name": "published saint", **rival, "difference": _ends(-0.04)},
              {"name": "random", **rival, "difference": {"mean": -0.004, "low": -0.01, "high": 0.01}}]  # fmt: skip
    curve = {"places": [-1, 0, 1, 2], "mean": [0.05, 0.04, 0.03, 0.04]}
    curve |= {"low": [0.04, 0.03, 0.02, 0.03], "high": [0.06, 0.05, 0.04, 0.05]}
    costs = [{"method": {"method": name, "center": center}, "left": left, "share": 1 - left / 10, **curve}
             for name, center in (("saint", True), ("match", False)) for left in (5, 8)]  # fmt: skip
    frontier = [{"work": 0.4, "layers": [], **{"reached": _reached(0.4, 0.2)}, "plan": PLAN},
                {"work": 0.8, "layers": [], **{"reached": _reached(0.8, 0.01)}, "plan": PLAN},
                {"work": 0.2, "missing": "0.25 is the least"}]  # fmt: skip
    return {
        **_head("tune"),
        "model": "timm:t",
        "class": "VisionTransformer",
        "depth": {"vision": 6},
        "tokens": 10,
        "images": {"set": "photos", "tuned": 8, "held_out": 4},
        "target": {"flops": 0.6},
        "layers": [{"place": "input", "method": "saint", "left": 8}, {"place": 2, "method": "match", "left": 5}],
        "reached": _reached(0.59, 0.04),
        "tuned_loss": 0.03,
        "per_image": False,
        "against": rivals,
        "additivity": [],
        "costs": costs,
        "frontier": frontier,
        "plan": PLAN,
    }


def advise() -> dict[str, Any]:
    """Of an encoder: one lever that it does not have, and copies that are worth their own sentence."""
    levers = [
        {"name": name, "plan": PLAN, "flops": flops, "loss": _ends(loss), "agreement": _ends(1 - loss)}
        for name, flops, loss in (("duplicates", 0.71, 0.002), ("pruning", 0.49, 0.04), ("both", 0.48, 0.03))
    ]
    levers.append({"name": "smaller pictures", "plan": None, "why": "its patches arrive as rows"})
    return {
        **_head("advise"),
        "model": "timm:t",
        "set": "pages",
        "target": 0.5,
        "measure": "1 - cosine",
        "pictures": {"count": 7, "copies": 0.31, "flat": 0.22, "tokens": 196.0, "detail": 0.43, "fine": True},
        "levers": levers,
        "advice": "both",
        "reached": True,
        "copies": True,
        "plan": PLAN,
    }


def view() -> dict[str, Any]:
    layers = [
        {"layer": 0, "tokens_in": 6, "tokens_out": 4, "kept": [0, 1, 3, 4]},
        {"layer": 2, "tokens_in": 4, "tokens_out": 1, "kept": [0]},
    ]
    photos = [{"name": "a", "picture": _picture(), "layers": layers}]
    return {**_head("view"), "model": "timm:x", "plan": PLAN, "grid": [2, 3], "photos": photos, "files": []}


def bench() -> dict[str, Any]:
    cost = {"flops": 2e9, "memory": 8.0}
    return {
        **_head("bench/encoder"),
        "model": "timm:x",
        "pretrained": True,
        "image_size": [224, 224],
        "images": ["a"],
        "plan": copy.deepcopy(PLAN),
        "layers": [{"layer": i, "tokens_in": 10.0 - i, "tokens_out": 9.0 - i, "slots": 9} for i in range(3)],
        "base": _spread(20.0),
        "pruned": _spread(15.0),
        "eager": None,
        "speedup": {"median": 1.3, "p20": 1.2, "p80": 1.4, "n": 5},
        "costs": {"base": cost, "pruned": cost},
        "bound": 1.5,
        "efficiency": 0.9,
        "uncounted": ["aten.strange"],
        "overhead": {"scoring": _spread(1.0), "gathering": _spread(0.5), "share": _spread(0.2), "keep_all": None},
        "conditions": {"batch": 1, "dtype": "float32", "repeats": 5, "warmup": 1, "threads": 1, "load_average": 9.0},
    }


def demo() -> dict[str, Any]:
    photo = {
        **view()["photos"][0],
        "agreement": 0.98,
        "bench": {k: bench()[k] for k in ("base", "pruned", "speedup", "bound", "conditions")},
    }
    return {
        **_head("demo"),
        "model": "timm:y",
        "title": "a model",
        "image_size": [224, 224],
        "grid": [2, 3],
        "plan": PLAN,
        "speedup": 1.2,
        "flops_bound": 1.3,
        "agreement": {"measure": "cosine", "of": "logits", "mean": 0.98, "min": 0.98},
        "photos": [photo],
        "files": [],
    }


def generation() -> dict[str, Any]:
    times = {
        "first": _spread(50.0),
        "per_token": None,
        "total": _spread(90.0),
        "tokens_per_second": _spread(20.0),
        "kv_bytes": 10_000_000,
        "prefill": {"flops": 3e9},
    }
    gain = {"first": {"median": 1.3, "p20": 1.2, "p80": 1.4, "n": 5}, "bound": 1.4, "efficiency": 0.93, "decode": None}
    gain |= {"total": {"median": 1.25, "p20": 1.15, "p80": 1.35, "n": 5}, "kv": 0.5, "uncounted": []}
    return {
        **_head("bench/generation"),
        "model": "hf:v",
        "pretrained": False,
        "prompt": "what is it",
        "images": ["a", "b"],
        "plans": {"half": PLAN},
        "times": {"base": times, "half": times},
        "gains": {"half": gain},
        "conditions": {**bench()["conditions"], "prompt_tokens": 300, "new_tokens": 1},
    }


def _paired() -> dict[str, Any]:
    ends = {"low": -0.03, "high": 0.01, "detectable": 0.04}
    return {"n": 100, "base": 0.8, "pruned": 0.79, "difference": -0.01, **ends, "better": 1, "worse": 2}


def eval_images() -> dict[str, Any]:
    summary = {"mean": 0.97, "median": 0.98, "p20": 0.95, "p80": 0.99, "n": 100}
    return {
        **_head("eval/images"),
        "given": 101,
        "evaluated": 100,
        "failures": [{"where": "x.jpg", "reason": "broken"}],
        "plans": {"half": PLAN},
        "scores": {"half": {"top1": _paired()}},
        "agreement": {"half": {"cosine": summary}},
        "categories": {},
        "against_first": {},
        "conditions": {"model": "timm:x", "dtype": "float32", "batch": 32},
    }


def eval_vqa() -> dict[str, Any]:
    summary = {"mean": 0.9, "median": 1.0, "p20": 1.0, "p80": 1.0, "n": 100}
    return {
        **eval_images(),
        "kind": "eval/vqa",
        "conditions": {"model": "hf:v", "example_prompt": "what is it"},
        "agreement": {"half": {"same_answer": summary}},
        "categories": {"colour": {"half": {"top1": _paired()}}},
    }


def compared() -> dict[str, Any]:
    """Of two plans for an encoder, one of which is the faster and the other the closer."""
    found = eval_images()
    speeds = {
        name: {"flops": flops, "kept": kept, "speedup": _spread(speed), "bound": 1 / flops, "timed": ["a", "b"]}
        for name, flops, kept, speed in (("half", 0.5, 0.25, 1.8), ("most", 0.9, 0.8, 1.1))
    }
    summary = {"mean": 0.995, "median": 0.99, "p20": 0.99, "p80": 1.0, "n": 100, "low": 0.99, "high": 1.0}
    return {
        **found,
        "kind": "compare",
        "model": "timm:x",
        "plans": {"half": PLAN, "most": PLAN},
        "scores": {"half": {"top1": _paired()}, "most": {"top1": _paired()}},
        "agreement": {
            "half": {"cosine": {**summary, "mean": 0.97, "low": 0.96, "high": 0.98}},
            "most": {"cosine": summary},
        },
        "speeds": speeds,
        "timing": {"batch": 1, "repeats": 5, "warmup": 1, "load_average": 9.0},
    }


MAKERS = {
    "advise": advise,
    "analyze": analyze,
    "bench/encoder": bench,
    "bench/generation": generation,
    "compare": compared,
    "demo": demo,
    "eval/images": eval_images,
    "eval/vqa": eval_vqa,
    "tune": tune,
    "view": view,
}


VOID = {"meta", "link", "input", "img"}


class Reader(html.parser.HTMLParser):
    """Text by element, attributes, and whether every element is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("style", "script"):
            self.text += data + " "


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    assert reader.open == []
    return reader


@pytest.fixture
def written(tmp_path):
    """Writes records; gives those read back."""

    def write(*records: dict) -> list:
        files = []
        for i, record in enumerate(records):
            files.append(tmp_path / f"record{i}.json")
            files[-1].write_text(json.dumps(record))
        return read_records(files)

    return write


def by_key(rows):
    found = {}
    for row in rows:
        assert row["key"] not in found, f"{row['key']} is there twice"
        found[row["key"]] = row
    return found
