"""The small LLaVA on pictures it has not seen, unpruned and with each plan. Called by measure.py."""

import argparse
import dataclasses
import json
import random
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cells import interval, percent
from PIL import Image
from rich.console import Console
from rich.progress import track
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

import saint
from saint.gathers import is_dropped
from saint.lab import demo
from saint.lab.demo import scenes, small_llava
from saint.lab.demo.easy_vqa import easy_vqa
from saint.lab.eval import compare
from saint.lab.records import environment, write_json
from saint.methods import DivPrune, FastV, Grid, Random
from saint.plans import Plan, Stage

console = Console(width=150)


def plans() -> dict[str, dict[str, Plan]]:
    """By share of the visual tokens left, mean over the six layers of the language model; then by name.

    Votes are among every second token, so a budget of half in one drop point is no choice: there is a point more than that.
    A drop behind layer 0 leaves that layer all 196 tokens: 20 behind it are 49 in the mean, and 10 % cannot be had there.
    Settings were chosen on scenes of other seeds than those that are reported.
    """

    def vision(method: Any, layers: Any = (10,)) -> Stage:
        return Stage(method, layers=list(layers))

    def language(method: Any, layers: Any = (0,)) -> Stage:
        return Stage(method, layers=list(layers))

    full, voting = saint.SaintFullGraph, saint.Saint
    made: dict[str, dict[str, Plan]] = {}
    for share, n, layers in (("50 %", 98, [9, 10]), ("25 %", 49, [8, 9, 10]), ("10 %", 20, [7, 8, 9, 10])):
        made[share] = {
            "ViT-only, voting": Plan(vision=vision(voting(budget=n), layers)),
            "ViT-only, full graph": Plan(vision=vision(full(keep=n))),
            "connector, full graph": Plan(connector=full(keep=n)),
            "connector, DivPrune": Plan(connector=DivPrune(keep=n)),
            "connector, grid": Plan(connector=Grid(keep=n)),
            "connector, random": Plan(connector=Random(keep=n)),
        }
    made["50 %"] |= {
        "LLM-only, voting": Plan(language=language(voting(budget=69), [0, 1])),
        "LLM-only, full graph": Plan(language=language(full(keep=78))),
        "LLM-only, full graph, layer 1": Plan(language=language(full(keep=49), [1])),
        "LLM-only, FastV": Plan(language=language(FastV(keep=78))),
        "LLM-only, FastV, layer 1": Plan(language=language(FastV(keep=49), [1])),
        "LLM-only, random": Plan(language=language(Random(keep=78))),
        "hybrid, voting and full graph": Plan(vision=vision(voting(budget=147)), language=language(full(keep=88))),
        "hybrid, full graph and voting": Plan(
            vision=vision(full(keep=147)), language=language(voting(budget=82), [0, 1])
        ),
    }
    made["25 %"] |= {
        "ViT-only, voting, layers 2-4": Plan(vision=vision(voting(budget=49), [2, 3, 4])),
        "ViT-only, full graph, centred": Plan(vision=vision(full(keep=49, center=True))),
        "ViT-only, random": Plan(vision=vision(Random(keep=49))),
        "ViT-only, DivPrune": Plan(vision=vision(DivPrune(keep=49))),
        "LLM-only, full graph": Plan(language=language(full(keep=20))),
        "LLM-only, FastV": Plan(language=language(FastV(keep=20))),
        "LLM-only, random": Plan(language=language(Random(keep=20))),
        "hybrid, voting and full graph": Plan(vision=vision(voting(budget=147)), language=language(full(keep=29))),
        "hybrid, voting and random": Plan(vision=vision(voting(budget=147)), language=language(Random(keep=29))),
        "hybrid, full graph and voting": Plan(
            vision=vision(full(keep=90)), language=language(voting(budget=37), [0, 1])
        ),
        "hybrid, DivPrune and full graph": Plan(vision=vision(DivPrune(keep=172)), language=language(full(keep=24))),
    }
    made["10 %"] |= {
        "hybrid, voting and full graph": Plan(
            vision=vision(voting(budget=60), [9, 10]), language=language(full(keep=12))
        ),
    }
    made["as many as votes leave"] = {
        f"LLM-only, {name}": Plan(language=language(method, [0, 1, 2]))
        for name, method in {
            "tau 0.5": voting(threshold=0.5),
            "tau 0.7": voting(threshold=0.7),
            "tau 0.9": voting(threshold=0.9),
            "tau 0.7, batch": voting(threshold=0.7, budget="batch"),
            "tau 0.7, K 1": voting(threshold=0.7, neighbors=1),
            "tau 0.7, K 20": voting(threshold=0.7, neighbors=20),
        }.items()
    }
    made["as many as votes leave"]["LLM-only, gamma 0, keeps 69"] = Plan(
        language=language(voting(budget=69, gamma=0.0), [0, 1])
    )
    return made


class Answers:
    """Asks the small LLaVA. Questions share the tower's forward, pruned or not; the rest of the model runs for each."""

    def __init__(self, about: list[tuple[Image.Image, list[scenes.Question]]]) -> None:
        self.model, self.tokenizer = small_llava.load(), small_llava.tokenizer()
        self.core = self.model.model
        self.about = about
        self.known: dict[str, Tensor] = {}

    def features(self, vision: Stage | None) -> Tensor:
        """What the connector hands on, [pictures, 196, C]; rows of tokens that the tower dropped are marked."""
        key = json.dumps(Plan(vision=vision).to_dict(), sort_keys=True)
        if key not in self.known:
            with saint.pruned(self.model, Plan(vision=vision)):
                self.known[key] = self.look()
        return self.known[key]

    def look(self) -> Tensor:
        """Run the tower under the plan that the model carries: :meth:`features`."""
        found, info = [], demo.MODELS["clip-b16"]
        with torch.inference_mode():
            for i in track(range(0, len(self.about), 8), "tower", console=console, transient=True):
                pixels = torch.stack([info.preprocess(image) for image, _ in self.about[i : i + 8]])
                result = self.core.get_image_features(
                    pixels, vision_feature_layer=-2, vision_feature_select_strategy="default", return_dict=True
                )
                found += list(result.pooler_output)
        return torch.stack(found)

    def ask(self, plan: Plan, shift: int = 0, together: int = 4) -> tuple[dict[str, list[float]], float]:
        """Answers to every question.

        Args:
            shift: show the picture so many further on instead.
            together: pictures in a batch.

        Returns:
            Share of right answers of each picture, by category and as "all" (NaN: nothing asked), and visual tokens left, mean
            over layers and questions.
        """
        features = self.features(plan.vision)
        with saint.pruned(self.model, plan) as session:
            return self.answered(session, features, shift, together)

    def answered(
        self, session: Any, features: Tensor, shift: int = 0, together: int = 4
    ) -> tuple[dict[str, list[float]], float]:
        """:meth:`ask` in a session, of what the tower said."""
        categories = sorted({question.category for _, questions in self.about for question in questions})
        right: dict[str, list[float]] = {category: [] for category in ("all", *categories)}
        tokens = []
        for start in track(range(0, len(self.about), together), "questions", console=console, transient=True):
            chosen = range(start, min(start + together, len(self.about)))
            asked = [self.about[i][1] for i in chosen]
            shown = [features[(i + shift) % len(features)] for i, qs in zip(chosen, asked, strict=True) for _ in qs]
            said = self._generate([q.text for qs in asked for q in qs], shown)
            tokens += self._left(session, shown).tolist()
            for questions in asked:
                by: dict[str, list[float]] = defaultdict(list)
                for question in questions:
                    value = float(said.pop(0) == question.answer)
                    by[question.category].append(value)
                    by["all"].append(value)
                for category, values in right.items():
                    values.append(float(np.mean(by[category])) if by[category] else float("nan"))
        return right, float(np.mean(tokens))

    def _generate(self, texts: list[str], shown: list[Tensor]) -> list[str]:
        image = "<image> " * small_llava.IMAGE_TOKENS
        inputs = self.tokenizer([image + text for text in texts], return_tensors="pt", padding=True)
        seen = BaseModelOutputWithPooling(pooler_output=shown)  # the tower has run
        with torch.inference_mode():
            made = self.model.generate(**inputs, mm_encoder_outputs={"image": seen}, max_new_tokens=3, do_sample=False)
        new = made[:, inputs["input_ids"].shape[1] :]
        return [self.tokenizer.decode(row, skip_special_tokens=True).strip() for row in new]

    def _left(self, session: Any, shown: list[Tensor]) -> Tensor:
        """Visual tokens that each sample shows a layer, mean over the layers, [questions]."""
        depth = self.model.config.text_config.num_hidden_layers
        entered = torch.tensor([float((~is_dropped(row)).sum()) for row in shown])
        seen = entered.unsqueeze(1).repeat(1, depth)
        for entry in session.trace:
            if entry.stage == "connector":
                seen[:] = entry.tokens_out.float().unsqueeze(1)
            elif entry.stage == "language":
                seen[:, entry.layer + 1 :] = entry.tokens_out.float().unsqueeze(1)
        return seen.mean(1)


def _by_category(right: dict[str, list[float]]) -> dict[str, float]:
    return {category: float(np.nanmean(values)) for category, values in right.items()}


def _held_out(count: int) -> list[tuple[Image.Image, list[scenes.Question]]]:
    held = (scenes.scene(scenes.HELD_OUT + i) for i in range(count))
    return [(scene.image(), scene.questions()) for scene in held]


def _rounded(values: list[float]) -> list[float]:
    return [round(value, 4) for value in values]


def about_scenes(options: argparse.Namespace, results: Path) -> None:
    _measure("vlm", plans(), _held_out(options.pictures), results)


def about_modes(options: argparse.Namespace, results: Path) -> None:
    """One plan of each mode, and random, on a larger sample: who is ahead of whom. ``--only`` adds rows to the record."""
    wanted = options.only or (
        "hybrid, DivPrune and full graph", "hybrid, voting and full graph", "LLM-only, full graph", "ViT-only, DivPrune",
        "ViT-only, voting", "ViT-only, random",
    )  # fmt: skip
    quarter = plans()["25 %"]
    record = json.loads((results / "modes.json").read_text()) if options.only else None
    _measure("modes", {"25 %": {name: quarter[name] for name in wanted}}, _held_out(options.pictures), results, record)


def about_easy(options: argparse.Namespace, results: Path) -> None:
    """Three questions about each picture of the test set of easy-VQA, with the plans of the smallest budgets."""
    rng, every = random.Random(0), plans()
    asked = [
        (image, rng.sample(questions, min(3, len(questions))))
        for image, questions in easy_vqa("test", options.pictures)
    ]
    _measure("easy", {share: every[share] for share in ("25 %", "10 %")}, asked, results)


def _measure(
    name: str,
    chosen: dict[str, dict[str, Plan]],
    about: list[tuple[Image.Image, list[scenes.Question]]],
    results: Path,
    record: dict[str, Any] | None = None,
) -> None:
    answers = Answers(about)
    base, _ = answers.ask(Plan())
    if record is not None and record["unpruned by picture"] != _rounded(base["all"]):
        raise SystemExit(f"{name}.json holds other answers of the unpruned model: measure it without --only")
    record = record or _unpruned(name, answers, base)
    console.print("unpruned", record["unpruned"], "\nanother picture", record["another picture"])
    for share, group in chosen.items():
        for title, plan in group.items():
            found, tokens = answers.ask(plan)
            paired = compare(base["all"], found["all"])
            row = {
                "share": share, "plan": title, "settings": plan.to_dict(), "left": tokens, "by_category": _by_category(found),
                "paired": dataclasses.asdict(paired), "by_picture": _rounded(found["all"]), "environment": environment("cpu"),
            }  # fmt: skip
            record["rows"] = [
                other for other in record["rows"] if other["plan"] != title or other["share"] != share
            ] + [row]
            console.print(
                f"{share} {title}: {tokens:.1f} tokens, {paired.base:.3f} -> {paired.pruned:.3f} "
                f"[{paired.low:+.3f}, {paired.high:+.3f}]"
            )
            write_json(results / f"{name}.json", record)


def _unpruned(name: str, answers: Answers, base: dict[str, list[float]]) -> dict[str, Any]:
    """A record without rows yet."""
    blind, _ = answers.ask(Plan(), shift=1)
    about = answers.about
    return {
        "kind": f"evidence/{name}", "command": f"python evidence/measure.py {name}", "pictures": len(about),
        "questions": sum(len(questions) for _, questions in about),
        "unpruned": _by_category(base), "another picture": _by_category(blind), "rows": [],
        "unpruned by picture": _rounded(base["all"]),
        "environment": environment("cpu"),
    }  # fmt: skip


def modes_table(record: dict[str, Any]) -> list[str]:
    """As :func:`table`, with each plan against the one above instead of categories."""
    lines = [
        f"{_conditions(record)} Behind: difference to the row above, paired likewise.",
        "",
        "| plan, 25 % | left | all | difference | relative | detectable | behind the row above |",
        "|---|---|---|---|---|---|---|",
        f"| unpruned | 196 | {percent(record['unpruned']['all'])} | | | | |",
    ]
    above: list[float] = []
    for row in sorted(record["rows"], key=lambda row: -row["paired"]["pruned"]):
        paired = row["paired"]
        behind = interval(dataclasses.asdict(compare(above, row["by_picture"]))) if above else ""
        above = row["by_picture"]
        relative = ", ".join(percent(paired[key] / paired["base"], "+") for key in ("low", "high"))
        lines.append(
            f"| {row['plan']} | {row['left']:.0f} | {percent(paired['pruned'])} | {interval(paired)} | "
            f"{percent(paired['difference'] / paired['base'], '+')} % [{relative}] | {percent(paired['detectable'])} | "
            f"{behind} |"
        )
    return lines


def table(record: dict[str, Any]) -> list[str]:
    names = [category for category in record["unpruned"] if category != "all"]
    lines = [
        _conditions(record),
        "",
        "| plan | left | all | difference | detectable | " + " | ".join(names) + " |",
        "|---|---|---|---|---|" + "---|" * len(names),
    ]
    for label, key in (("unpruned", "unpruned"), ("unpruned, another picture", "another picture")):
        by = record[key]
        lines.append(
            f"| {label} | 196 | {percent(by['all'])} | | | " + " | ".join(percent(by[n]) for n in names) + " |"
        )
    share = ""
    for row in record["rows"]:
        if row["share"] != share:
            share = row["share"]
            lines.append(f"| **{share}** | | | | | " + " | ".join("" for _ in names) + " |")
        by, paired = row["by_category"], row["paired"]
        lines.append(
            f"| {row['plan']} | {row['left']:.0f} | {percent(by['all'])} | {interval(paired)} | "
            f"{percent(paired['detectable'])} | " + " | ".join(percent(by[n]) for n in names) + " |"
        )
    return lines


def _conditions(record: dict[str, Any]) -> str:
    return (
        f"Exact match on {record['questions']} questions about {record['pictures']} pictures (mean over pictures), greedy "
        "generation. Left: visual tokens of 196, mean over the layers of the language model. Difference in points with its 95 % "
        "interval (paired, by picture), and the smallest difference that so many pictures could have shown with 80 % power."
    )
