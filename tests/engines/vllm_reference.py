"""What the tests of the plug-in share: the same model in transformers, requests, and what their answers must be."""

import dataclasses
import importlib.util
import json
import os
import random
import sys
from pathlib import Path
from typing import ClassVar

import checkpoints
import pytest
import torch
from drive_vllm import picture

import saint
from saint.backends.vllm import budget, positions, selection
from saint.methods.base import FixedBudget
from saint.testing import masked_oracle
from saint.tokens import Candidates, Selection

HERE = Path(__file__).parent
PYTHON = os.environ.get("SAINT_VLLM_PYTHON") or (sys.executable if importlib.util.find_spec("vllm") else None)
needs_vllm = pytest.mark.skipif(PYTHON is None, reason="needs vllm: make engines, or SAINT_VLLM_PYTHON=its interpreter")
SIDE = (checkpoints.SIDE, checkpoints.SIDE)
TOKENS = checkpoints.TOKENS
SPECIAL = list(range(checkpoints.IMAGE, checkpoints.VOCAB))  # made on neither side: transformers would miss a picture
SMALL = {"max_model_len": 256, "max_num_seqs": 16, "limit_mm_per_prompt": {"image": 2}}
GRID = "<|vision_start|> <|image_pad|> <|vision_end|>"


@dataclasses.dataclass(frozen=True)
class Given(FixedBudget):
    """Keeps what it is told."""

    name: ClassVar[str] = "given"
    paper: ClassVar[str] = ""
    stages: ClassVar[frozenset[str]] = frozenset({"connector"})

    index: tuple[int, ...] = ()

    def choose(self, candidates: Candidates, goal: tuple[int, ...]) -> Selection:
        keep = torch.zeros(candidates.tokens.index.shape, dtype=torch.bool)
        keep[0, list(self.index)] = True
        return Selection.from_mask(keep, goal)


def environment():
    """For the other interpreter: this tree, and no plan."""
    paths = [str(HERE / "site"), str(HERE.parents[1] / "src")]
    return {k: v for k, v in os.environ.items() if k != "SAINT_PLAN"} | {"PYTHONPATH": os.pathsep.join(paths)}


def job(text, images=(), saint=None, new=6, videos=()):
    return {"text": text, "images": list(images), "videos": list(videos), "saint": saint, "new": new}


class Seen:
    """Notes the features that enter the language model."""

    def candidates(self, stage, layer, candidates):
        if stage == "connector":
            self.features = candidates.features


class Reference:
    """The same model in transformers."""

    def __init__(self, folder, image="<image>", side=SIDE):
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.model = AutoModelForImageTextToText.from_pretrained(folder).eval()
        self.processor = AutoProcessor.from_pretrained(folder)
        self.image, self.side, self.known = image, side, {}

    def inputs(self, text, seeds):
        images = [picture(seed, self.side) for seed in seeds]
        inputs = dict(self.processor(images=images or None, text=text, return_tensors="pt"))
        if "token_type_ids" in inputs:  # Gemma 3's bidirectional pictures, which vLLM's attention on CPUs does not have
            inputs["token_type_ids"] = torch.zeros_like(inputs["token_type_ids"])
        return inputs

    def kept(self, seed, settings):
        """Indices that transformers keeps of one picture."""
        key = seed, json.dumps(settings, sort_keys=True)
        if key not in self.known:
            inputs = self.inputs(f"w3 {self.image} w4", [seed])
            visual = inputs["input_ids"][0] == checkpoints.IMAGE
            if settings is None or settings.get("keep") == 1.0:
                self.known[key] = list(range(int(visual.sum())))
                return self.known[key]
            method, seen = saint.methods.from_dict({"method": "divprune", **settings}), Seen()
            plan = saint.Plan(connector=method)
            with saint.pruned(self.model, plan, observers=[seen]) as session, torch.no_grad():
                self.model(**inputs)
                (entry,) = [entry for entry in session.trace if entry.stage == "connector"]
                self.known[key] = entry.kept[0].tolist()
            runs = torch.unique_consecutive(visual, return_counts=True)
            if len(runs := tuple(runs[1][runs[0]].tolist())) > 1:  # tiles: in vLLM each has its own share
                choice = budget.Choice(method, runs, tuple(budget.shares(method.keep, runs)))
                self.known[key] = selection.choose(seen.features, choice)[0].tolist()
        return self.known[key]

    def planned(self, seed, plan, settings=None):
        """Patches that the tower keeps of one picture, and those of them that enter the language model."""
        key = seed, json.dumps([plan.to_dict(), settings], sort_keys=True)
        if key not in self.known:
            connector = (
                plan.connector if settings is None else saint.methods.from_dict({"method": "divprune", **settings})
            )
            with saint.pruned(self.model, saint.Plan(plan.vision, connector)) as session, torch.no_grad():
                self.model(**self.inputs(f"w3 {self.image} w4", [seed]))
                *_, tower = [entry.kept[0].tolist() for entry in session.trace if entry.stage == "vision"]
                chosen = [entry.kept[0].tolist() for entry in session.trace if entry.stage == "connector"]
            self.known[key] = tower, chosen[0] if chosen else tower
        return self.known[key]

    def greedy(self, request, new, never=SPECIAL, even=False, plan=None):
        """What the masked oracle answers behind each of the tokens ``new``: by induction, greedy decoding of them.

        ``even``: the survivors of the picture have positions of evenly spaced places. ``plan``: with a vision stage.
        """
        inputs = self.inputs(request["text"], request["images"])
        visual = (inputs["input_ids"][0] == checkpoints.IMAGE).nonzero().flatten()
        ids = torch.cat([inputs["input_ids"], torch.tensor([new])], 1)
        inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        for types in ("token_type_ids", "mm_token_type_ids"):
            if types in inputs:
                inputs[types] = torch.nn.functional.pad(inputs[types], (0, len(new)))
        kept, slots, start, left = [], [], 0, 0
        for seed in request["images"]:
            every = self.kept(seed, None)
            seen, mine = (
                (every, self.kept(seed, request["saint"]))
                if plan is None
                else self.planned(seed, plan, request["saint"])
            )
            kept += [start + index for index in mine]
            slots += [left + seen.index(index) for index in mine]  # among those that arrive at the connector
            start, left = start + len(every), left + len(seen)
        assert start == len(visual)
        there = torch.ones_like(ids[0])
        there[visual] = 0
        there[visual[kept]] = 1
        if "mm_token_type_ids" not in inputs:  # rows and columns are kept; elsewhere survivors stand side by side
            inputs["position_ids"] = (there.cumsum(0) - 1).clamp_min(0).unsqueeze(0)
        if even:
            types, grid = inputs["mm_token_type_ids"], inputs["image_grid_thw"]
            laid, _ = self.model.model.get_rope_index(ids, types, image_grid_thw=grid)  # [3, 1, L]
            places = positions.even(budget.Choice(Given(), (len(visual),), (len(kept),)))
            inputs["position_ids"] = laid.index_copy(2, visual[kept], laid[..., visual[places]])
        given = Given(keep=len(slots), index=tuple(slots)) if slots else None
        plan = saint.Plan(plan and plan.vision if slots else None, given)
        with torch.no_grad():
            logits = masked_oracle(self.model, plan, inputs)[0]["logits"]
        logits[..., never] = -torch.inf
        return logits[0, -len(new) - 1 : -1].argmax(-1).tolist()


BUDGETS = [None, {"keep": 0.25}, {"keep": 0.5}, {"keep": 1.0}]


def mixed(count, image="<image>"):
    """Requests of every kind in random order: budgets, text alone, two pictures; some pictures several times."""
    draw = random.Random(0)
    requests = []
    for number in range(count):
        words = " ".join(f"w{draw.randrange(2, 99)}" for _ in range(draw.randrange(1, 60)))
        seeds = [draw.randrange(12) for _ in range((1, 1, 2, 0)[number % 4])]
        text = f"w{draw.randrange(2, 99)} {f'{image} ' * len(seeds)}{words}"
        requests.append(job(text, seeds, draw.choice(BUDGETS) if seeds else None, new=draw.randrange(2, 9)))
    draw.shuffle(requests)
    return requests


def check_mixed(run, reference, requests, plan=None, **settings):
    """All at once, twice, the plug-in loaded three times: every answer is that of the masked oracle.

    ``plan``: of the engine, with a vision stage.
    """
    if plan is not None:
        settings["plan"] = json.dumps(plan.to_dict())
    got = run(
        [requests, requests], loads=2, max_num_batched_tokens=48, enable_prefix_caching=True, block_size=32, **settings
    )  # 48: less than the 36 places of a picture and the text around it
    first, again = got["rounds"]
    for request, answer in zip(requests, first, strict=True):
        asked = request["saint"]
        places = sum(
            len(reference.kept(seed, asked) if plan is None else reference.planned(seed, plan, asked)[1])
            for seed in request["images"]
        )
        assert len(answer["prompt"]) == len(request["text"].split()) - len(request["images"]) + places
        assert len(answer["new"]) == request["new"]
        assert answer["new"] == reference.greedy(request, answer["new"], plan=plan), request
    assert [answer["new"] for answer in again] == [answer["new"] for answer in first]
    assert sum(answer["cached"] for answer in again) > 0, "no block of the cache was used again"
    assert max(len(answer["prompt"]) for answer in first) > 48
