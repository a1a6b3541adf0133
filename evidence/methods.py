"""Every method in every slot that it works in, in one frame: the same drop points, the same budgets, the same pictures.

    python evidence/methods.py small-llava --count 60
    python evidence/methods.py clip-b16 --photos DIR --count 120

Small LLaVA on scenes it was not trained on, at three shares of the visual tokens: the share of exact answers. CLIP ViT-B/16
on photographs, at three shares of the FLOPs: the cosine of the embedding with the unpruned one. Both picture by picture, so
that methods are paired. It writes evidence/results/methods.json after every method; a call goes on where the last one stopped,
a larger --count adds pictures to the rows, and --minutes ends it in time. `make tables` writes the tables of docs/methods.md.

A budget that a method cannot be told is met by its threshold, set on other pictures. What is left out stands in LEFT_OUT; parts
of a method that are measured alone in PARTS.
"""

import argparse
import functools
import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure_vlm import Answers
from PIL import Image

import saint
from saint import methods
from saint.flops import count_flops
from saint.gathers import is_dropped
from saint.lab.demo import scenes
from saint.lab.demo.small_llava import IMAGE_TOKENS
from saint.lab.describe import describe
from saint.lab.kinds.agreement import agreement
from saint.lab.records import environment, write_json
from saint.lab.sources.photos import load_images
from saint.methods import Grid, Method
from saint.needs import TOWER
from saint.planning import work_of
from saint.plans import Plan, Stage
from saint.tokens import Candidates

RECORD = Path(__file__).parent / "results" / "methods.json"
SLOTS = {"small-llava": ("vision", "connector", "language"), "clip-b16": ("vision",)}
# of the visual tokens behind the slot; of the FLOPs
BUDGETS = {"small-llava": (0.5, 0.25, 0.11), "clip-b16": (0.7, 0.5, 0.35)}
# where tokens leave, of every method: votes and pairs let half of them go at a drop point, so a tenth takes four. In the language
# model, whose first layers read the picture, behind the first layer, or as many as a method needs
LAYERS = {
    ("small-llava", "vision"): [1, 4, 7, 10],
    ("small-llava", "language"): [0, 1, 2, 3],
    ("clip-b16", "vision"): [*range(6)],
}
OWN_LAYERS = ("pyramiddrop",)  # that differ from others in their layers alone
VOTES = ", votes"  # behind the name of a method: by its threshold
VOTING = ("saint",)  # methods that have a fixed budget, and are measured by their threshold too
# parts of a method alone, behind its name
PARTS = {"hiprune": {"anchors alone": {"alpha": 1.0}, "registers alone": {"alpha": 0.0}}}
LEFT_OUT = {
    "evs": "pictures lose nothing: it compares frames of videos",
    "flat": "no setting says how many tokens leave",
    "saint_video": "without frames it chooses as `Saint` does, and in front of the language model lets half go at most",
}
WIDEST = 4.0  # values of normalised pixels lie closer together
OTHERS = 24  # pictures that thresholds are set on
COUNTED = 24  # pictures that FLOPs are the mean of, where pictures decide
CALIBRATION = scenes.HELD_OUT + 50_000  # their first scene
STEPS = 7  # in which they are found
NEAR = 0.03  # what a threshold may miss a budget by, on the pictures that it was set on


def names(slot: str) -> Iterator[str]:
    """What is measured in a slot: names of the registry, and those of methods by votes and of their parts."""
    for name in methods.names():
        method = methods.get(name)
        if not method.__module__.startswith("saint.") or slot not in method.stages:
            continue
        if name not in LEFT_OUT:
            yield from [name, name + VOTES] if name in VOTING else [name]
            yield from (f"{name}, {part}" for part in PARTS.get(name, {}))


def with_budget(name: str, budget: float) -> Method:
    """A method, or a part of it, with a fixed budget."""
    name, _, part = name.partition(", ")
    return methods.get(name)(**PARTS[name][part] if part else {}).keeping(budget)


def plan_of(model: str, slot: str, method: Method) -> Plan:
    """A method at the drop points of a slot."""
    own = slot == "connector" or method.name in OWN_LAYERS or method.needs & {"pixels", "resized"}
    layers = None if own else LAYERS[model, slot]
    if slot == "language" and layers and not method.votes:
        layers = layers[: next(steps for steps in range(1, 5) if _can(method, steps))]
    return Plan(**{slot: Stage(method, layers=layers)})


def _can(method: Method, steps: int) -> bool:
    try:
        method.validate(IMAGE_TOKENS, steps)
    except ValueError:
        return False
    return True


def fitted(reached: Callable[[float], float], budget: float, low: float, high: float, steps: int) -> float:
    """The largest setting with ``reached(setting) <= budget``, where more of it is more work; what is refused is too small."""
    for _ in range(steps):
        middle = (low + high) / 2
        try:
            low, high = (low, middle) if reached(middle) > budget else (middle, high)
        except ValueError:
            low = middle
    return low


def by_threshold(name: str) -> tuple[Callable[[float], Method], float]:
    """A method by the setting that decides how many tokens stay, ascending from 0, and the largest one."""
    if name == "duplicates":
        return lambda setting: methods.Duplicates(tau=WIDEST - setting), WIDEST
    return methods.get(name.removesuffix(VOTES))().voting, 0.999


class Copies:
    """How many patches a method of pixels leaves of pictures that were seen once."""

    def __init__(self, model: Any, inputs: dict[str, Any]) -> None:
        self.seen: list[Candidates] = []
        with saint.pruned(model, Plan(vision=methods.Duplicates()), observers=[self]), torch.inference_mode():
            model(**inputs)

    def candidates(self, stage: str, layer: int, candidates: Candidates) -> None:
        if candidates.facts.pixels is not None:  # in front of block 0
            self.seen.append(candidates)

    def left(self, method: Method) -> float:
        """Share of the patches."""
        counts = []
        for one in self.seen:
            found = method.select(one)
            counts += one.tokens.lengths if found is None else found.lengths
        return sum(counts) / sum(n for one in self.seen for n in one.tokens.lengths)


def takes_budget(name: str) -> bool:
    return name != "duplicates" and not name.endswith(VOTES)


class Llava:
    """The small LLaVA, asked about scenes."""

    name, measure = "small-llava", "exact"

    def __init__(self, count: int) -> None:
        self.about = [_asked(scenes.HELD_OUT + i) for i in range(count)]

    def method(self, slot: str, name: str, budget: float) -> Method | str:
        """The method with a budget, or why there is none."""
        if takes_budget(name):
            return with_budget(name, budget)
        made, most = by_threshold(name)
        found = fitted(lambda setting: self._behind(slot, made(setting)), budget, 0.0, most, STEPS)
        got = self._behind(slot, made(found))
        return (
            made(found) if abs(got - budget) <= NEAR else f"no threshold leaves it: {got:.0%} on {OTHERS} other scenes"
        )

    def _behind(self, slot: str, method: Method) -> float:
        """Share of the visual tokens that a threshold leaves of other scenes."""
        if "pixels" in method.needs:
            return self.copies.left(method)
        plan, answers = plan_of(self.name, slot, method), self.calibrating
        features = answers.features(plan.vision)
        _forget(answers)
        if slot == "vision":
            return float((~is_dropped(features)).float().mean())
        with saint.pruned(answers.model, plan) as session:
            answers.answered(session, features, together=OTHERS)
            return float((session.trace[-1].tokens_out / session.trace[0].tokens_in).mean())

    @functools.cached_property
    def copies(self) -> Copies:
        pictures = [_asked(CALIBRATION + i)[0] for i in range(OTHERS)]
        return Copies(self.calibrating.model, saint.demo.inputs(self.name, pictures, "what word is written"))

    @functools.cached_property
    def calibrating(self) -> Answers:
        """Other scenes, with a question to each."""
        return Answers([(image, asked[:1]) for image, asked in map(_asked, range(CALIBRATION, CALIBRATION + OTHERS))])

    @functools.cache  # noqa: B019  # one for each number of scenes that are known already
    def answers(self, first: int) -> Answers:
        return Answers(self.about[first:])

    def unpruned(self, first: int) -> dict[str, Any]:
        """:meth:`values` of the model as it is."""
        return _answered(*self.answers(first).ask(Plan()))

    def values(self, slot: str, chosen: Sequence[Method], first: int) -> Iterator[dict[str, Any]]:
        """Share of right answers of each scene from ``first`` on, and visual tokens that layers of the language model see.

        Methods differ in their budget alone: those that look at the tower are shown one run of it.
        """
        answers = self.answers(first)
        if not (slot == "connector" and chosen[0].asks(slot) & TOWER):
            for method in chosen:
                yield _answered(*answers.ask(plan_of(self.name, slot, method)))
                _forget(answers)
            return
        dial = chosen[0].keeping(chosen[0].fixed)  # a copy of our own
        with saint.pruned(answers.model, plan_of(self.name, slot, dial)) as session:
            features = answers.look()
            for method in chosen:
                object.__setattr__(dial, "keep", method.fixed)
                yield _answered(*answers.answered(session, features))

    @functools.cached_property
    def whole(self) -> float:
        return self.flops(Plan())[0]

    def flops(self, plan: Plan) -> tuple[float, list[str]]:
        """FLOPs of a prompt, tower and language model; a mean, where pictures decide."""
        answers = self.answers(0)
        return _mean_flops(answers.model, plan, self.inputs)

    @functools.cached_property
    def inputs(self) -> list[dict[str, Any]]:
        return [saint.demo.inputs(self.name, image, asked[0].text) for image, asked in self.about[:COUNTED]]


def _asked(seed: int) -> tuple[Image.Image, list[scenes.Question]]:
    made = scenes.scene(seed)
    return made.image(), made.questions()


def _forget(answers: Answers) -> None:
    """Hold the features of the unpruned tower alone."""
    answers.known = {plan: features for plan, features in answers.known.items() if "method" not in plan}


def _answered(right: dict[str, list[float]], tokens: float) -> dict[str, Any]:
    return {"values": right["all"], "seen": tokens}


def divided(found: Sequence[Any], count: int) -> tuple[list[Any], list[Any]]:
    """Photographs to measure, and others that thresholds are set on.

    Those of a smaller ``count`` are the first of a larger one, so that a record grows by photographs that it has not got; the
    others are the same at every ``count``.

    Raises:
        ValueError: there are fewer than ``count`` beside the others.
    """
    mixed = random.Random(0).sample(found, len(found))
    if count + OTHERS > len(mixed):
        raise ValueError(f"of {len(mixed)} photographs {OTHERS} are for thresholds: count {count} leaves too few")
    return mixed[:count], mixed[-OTHERS:]


class Clip:
    """CLIP ViT-B/16, shown photographs."""

    name, measure = "clip-b16", "cosine"

    def __init__(self, folder: Path, count: int) -> None:
        self.photos, rest = divided(load_images(folder)[0], count)
        self.others = [saint.demo.inputs(self.name, photo.image) for photo in rest]
        self.model = saint.demo.model(self.name)
        self.copies = Copies(self.model, saint.demo.inputs(self.name, [photo.image for photo in rest]))
        self.work = work_of(self.model)

    def method(self, slot: str, name: str, budget: float) -> Method | str:
        """The method with the largest budget that leaves no more FLOPs, or why there is none."""
        if takes_budget(name):
            made, most, reached = functools.partial(with_budget, name), 1.0, self._by_shape
        elif name == "duplicates":
            made, most = by_threshold(name)
            reached = self._by_copies
        else:
            made, most = by_threshold(name)
            reached = self._of_others
        found = made(
            fitted(lambda setting: reached(made(setting)), budget, 0.0, most, 14 if takes_budget(name) else STEPS)
        )
        got = reached(found)
        if budget - got > NEAR and name != "resize":  # its sizes are few
            return f"no setting leaves it: {got:.2f}"
        return found

    def _by_shape(self, method: Method) -> float:
        return self.work.left(plan_of(self.name, "vision", method))

    def _of_others(self, method: Method) -> float:
        return _mean_flops(self.model, plan_of(self.name, "vision", method), self.others)[0] / self.whole

    def _by_copies(self, method: Method) -> float:
        """By how many patches of other photographs enter the first layer, as if all had their mean."""
        count = round(self.copies.left(method) * self.work.shape.patches)
        return self.work.left(Plan(vision=Stage(Grid(keep=count), placement="input")))

    @functools.cached_property
    def whole(self) -> float:
        return self.flops(Plan())[0]

    def flops(self, plan: Plan) -> tuple[float, list[str]]:
        """FLOPs of a photograph; a mean, where photographs decide."""
        return _mean_flops(
            self.model, plan, [saint.demo.inputs(self.name, photo.image) for photo in self.photos[:COUNTED]]
        )

    def unpruned(self, first: int) -> dict[str, Any]:
        """:meth:`values` of the model as it is."""
        return {"values": [1.0] * len(self.photos[first:])}

    def values(self, slot: str, chosen: Sequence[Method], first: int) -> Iterator[dict[str, Any]]:
        """Cosine of each photograph from ``first`` on."""
        for method in chosen:
            with saint.pruned(self.model, plan_of(self.name, slot, method)):
                answers = self._run(first)
            found = [agreement(a, b).values for a, b in zip(self.base(first), answers, strict=True)]
            yield {"values": [value for part in found for value in part]}

    @functools.cache  # noqa: B019
    def base(self, first: int) -> list[Any]:
        """Unpruned embeddings of the photographs."""
        return self._run(first)

    def _run(self, first: int) -> list[Any]:
        shown = [photo.image for photo in self.photos[first:]]
        with torch.inference_mode():
            return [self.model(**saint.demo.inputs(self.name, shown[i : i + 8])) for i in range(0, len(shown), 8)]


def _mean_flops(model: Any, plan: Plan, inputs: Sequence[dict[str, Any]]) -> tuple[float, list[str]]:
    """Mean FLOPs of forwards at batch 1, and operators that it is without; one is enough where budgets are fixed."""
    decided = any(stage.method.votes for slot in plan.slots.values() for stage in slot)
    counted, missing = [], set[str]()
    with saint.pruned(model, plan), torch.inference_mode():
        for one in inputs if decided else inputs[:1]:
            found = count_flops(functools.partial(model, **one))[1]
            counted.append(found.total)
            missing |= set(found.uncounted)
    return float(np.mean(counted)), sorted(missing)


# -- the record -----------------------------------------------------------------------------------------------------------


def stored(file: Path = RECORD) -> dict[str, Any]:
    """What was measured so far."""
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"rows": []}


def numbers(row: dict[str, Any]) -> list[float]:
    """Values of a row, a picture each."""
    return [float(value) for value in row["values"].split()]


def run(
    subject: Llava | Clip, slots: Sequence[str], count: int, ends: float, only: Sequence[str] = (), file: Path = RECORD
) -> None:
    """Measure what is not there yet, row by row, until ``ends``; rows with fewer than ``count`` pictures get the others."""
    record = stored(file)
    rows = {(row["model"], row["slot"], row["method"], row["budget"]): row for row in record["rows"]}
    key = (subject.name, "", "unpruned", 1.0)
    first = len(numbers(rows[key])) if key in rows else 0
    if first < count:
        rows[key] = _added(rows.get(key), key, subject.unpruned(first))
    for slot in slots:
        for name in only or names(slot):
            if time.monotonic() > ends:
                print("time is over: call again to go on")
                return
            _method(subject, slot, name, count, rows)
            record["rows"] = list(rows.values())
            write_json(file, {"kind": "methods", **record, "left_out": LEFT_OUT, "environment": environment("cpu")})


def _method(subject: Llava | Clip, slot: str, name: str, count: int, rows: dict[Any, Any]) -> None:
    """Measure a method at every budget that it lacks pictures at."""
    by_first: dict[int, list[tuple[Any, Method]]] = {}
    for budget in BUDGETS[subject.name]:
        key = (subject.name, slot, name, budget)
        first = len(numbers(rows[key])) if key in rows else 0
        if first >= count or (key in rows and "why" in rows[key]):
            continue
        setting = rows[key]["setting"] if first else None
        method = methods.from_dict(setting) if setting else subject.method(slot, name, budget)
        if isinstance(method, str):
            rows[key] = {"model": key[0], "slot": slot, "method": name, "budget": budget, "why": method, "values": ""}
        else:
            by_first.setdefault(first, []).append((key, method))
    for first, chosen in by_first.items():
        found = list(subject.values(slot, [method for _, method in chosen], first))
        for (key, method), one in zip(chosen, found, strict=True):
            plan = plan_of(subject.name, slot, method)
            facts: dict[str, Any] = {"flops": rows[key]["flops"], "uncounted": rows[key]["uncounted"]} if first else {}
            if not facts:
                counted, missing = subject.flops(plan)
                facts = {"flops": round(counted / subject.whole, 4), "uncounted": missing}
            rows[key] = _added(rows.get(key), key, one) | facts | {"plan": describe(plan), "setting": method.to_dict()}
            print(
                *key,
                f"{np.mean(numbers(rows[key])):.4f} at {facts['flops']:.3f}",
                time.strftime("%H:%M:%S"),
                flush=True,
            )


def _added(row: dict[str, Any] | None, key: Any, one: dict[str, Any]) -> dict[str, Any]:
    """A row with further values."""
    before = numbers(row) if row else []
    values = before + [round(value, 5) for value in one["values"]]
    made = {
        "model": key[0], "slot": key[1], "method": key[2], "budget": key[3],
        "values": " ".join(f"{value:g}" for value in values),
    }  # fmt: skip
    if "seen" in one:
        old = row["seen"] * len(before) if row else 0.0
        made["seen"] = round((old + one["seen"] / IMAGE_TOKENS * len(one["values"])) / len(values), 4)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=list(SLOTS))
    parser.add_argument("--slots", nargs="+", choices=SLOTS["small-llava"])
    parser.add_argument("--count", type=int, required=True, help="scenes or photographs")
    parser.add_argument("--photos", type=Path, help="a folder of photographs; for clip-b16")
    parser.add_argument("--minutes", type=float, default=8.0, help="start no further method after so many")
    parser.add_argument("--record", type=Path, default=RECORD)
    parser.add_argument("--only", nargs="+", default=[], metavar="METHOD")
    options = parser.parse_args()
    if options.model == "clip-b16" and options.photos is None:
        parser.error("clip-b16 is measured on photographs: give --photos DIR")
    ends = time.monotonic() + 60 * options.minutes
    subject = Llava(options.count) if options.model == "small-llava" else Clip(options.photos, options.count)
    run(subject, options.slots or SLOTS[options.model], options.count, ends, options.only, options.record)


if __name__ == "__main__":
    main()
