"""What a reader of pictures still answers when tokens of a video leave: votes across frames beside EVS and others.

    python evidence/video.py [--videos 150]

Videos are made of held-out scenes: eight frames in which each object comes and goes, with sensor noise. ``still``: the camera
does not move. ``moving``: it drifts by 12 pixels a frame. There is no trained model of videos to be had here, so the small LLaVA,
which was trained on pictures, reads all tokens of all frames in one sequence, each at the position of its place in the picture.
Unpruned, it answers as well as about a picture. Methods choose by the projected features, at the connector; questions of a moving
camera leave out where things are and how many there are, since an object is seen at several places.

Writes evidence/results/video.json and the table in docs/video.md.
"""

import argparse
import dataclasses
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matching import FOLDER
from matching_pages import replaced, table, within
from PIL import Image
from torch import Tensor

from saint.lab import demo
from saint.lab.demo import scenes, small_llava
from saint.lab.records import environment, write_json
from saint.methods import EVS, DivPrune, Grid, Random, SaintFullGraph, SaintVideo
from saint.methods.base import Method
from saint.tokens import Candidates, TokenMap
from saint.upstream.names import CACHE, EMBEDDINGS, POSITIONS, Parameters

FRAMES, TOKENS, DRIFT = 8, small_llava.IMAGE_TOKENS, 12
KINDS = {"still": scenes.CATEGORIES, "moving": ("colour", "shape", "exists", "word")}
SHARES = (0.5, 0.25, 0.15)
THRESHOLDS = (0.95, 0.9, 0.8)
PAGE = Path(__file__).parent.parent / "docs" / "video.md"


class Within(SaintVideo):
    """The control: votes within frames alone, as if each token had no frame before."""

    def select(self, candidates: Candidates) -> Any:
        assert candidates.cells is not None
        return super().select(dataclasses.replace(candidates, cells=torch.full_like(candidates.cells, -1)))


def arms() -> dict[str, Method | None]:
    """Name -> method."""
    out: dict[str, Method | None] = {"unpruned": None}
    for cls in (EVS, DivPrune, SaintFullGraph, Grid, Random):
        out |= {f"{cls.__name__}(keep={share})": cls(keep=share) for share in SHARES}
    for threshold in THRESHOLDS:
        out[f"SaintVideo(threshold={threshold})"] = SaintVideo(threshold=threshold, floor=0.0)
        out[f"the same within frames ({threshold})"] = Within(threshold=threshold, floor=0.0)
    return out


def video(seed: int, kind: str) -> Iterator[Image.Image]:
    """The frames of a scene in which each object is there for a while."""
    made, draw, noise = scenes.scene(seed), random.Random(f"video {seed}"), np.random.default_rng(seed)
    spans = [sorted(draw.choices(range(FRAMES), k=2)) for _ in made.things]
    for number in range(FRAMES):
        there = tuple(t for t, (first, last) in zip(made.things, spans, strict=True) if first <= number <= last)
        pixels = np.asarray(dataclasses.replace(made, things=there).image()).astype(np.float32)
        if kind == "moving":
            pixels = np.roll(pixels, DRIFT * number, axis=1)
        pixels = pixels + noise.normal(0, 3, pixels.shape)
        yield Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


class Reader:
    """The small LLaVA on frames."""

    def __init__(self) -> None:
        self.model, self.words = small_llava.load(), small_llava.tokenizer()
        self.prepare = demo.MODELS["clip-b16"].preprocess
        self.language = self.model.model.language_model
        self.parameters = Parameters(type(self.language).forward)
        self.embed, self.end = self.model.get_input_embeddings(), small_llava.VOCABULARY.index("</s>")

    def features(self, seed: int, kind: str) -> Tensor:
        """What the projector makes of the frames, [frames * tokens, C]."""
        pixels = torch.stack([self.prepare(frame) for frame in video(seed, kind)])
        return torch.cat(list(self.model.model.get_image_features(pixel_values=pixels, return_dict=True).pooler_output))

    def answers(self, features: Tensor, kept: Tensor, questions: list[str]) -> list[str]:
        """Greedy, of the tokens ``kept``, each at the position of its place. They are read once for all questions."""
        cache = CACHE.get(self.read(features[kept], kept % TOKENS, None))
        out = []
        for question in questions:
            x = self.embed(torch.tensor(self.words(question, add_special_tokens=False).input_ids))
            positions, said = TOKENS + torch.arange(len(x)), list[int]()
            while len(said) < 4:
                state = self.read(x, positions, cache).last_hidden_state[0, -1]
                token = int(self.model.lm_head(state).argmax())
                if token == self.end:
                    break
                said.append(token)
                x, positions = self.embed(torch.tensor([token])), positions[-1:] + 1
            out.append(self.words.decode(said).strip())
            cache.crop(len(kept) - cache.get_seq_length())  # what the question and its answer added
        return out

    def read(self, x: Tensor, positions: Tensor, cache: Any) -> Any:
        """x [tokens, C] behind what the cache holds."""
        given = self.parameters.put({"use_cache": True}, EMBEDDINGS, x[None])
        given = self.parameters.put(given, POSITIONS, positions[None])
        return self.language(**(given if cache is None else self.parameters.put(given, CACHE, cache)))


def choose(method: Method | None, features: Tensor) -> Tensor:
    """The tokens that stay, ascending."""
    everything = torch.arange(len(features))
    if method is None:
        return everything
    shown, tokens = features[None], TokenMap.full(1, len(features), features.device)
    selection = method.select(Candidates(shown, shown, tokens, 0, 1, cells=(everything % TOKENS)[None]))
    return everything if selection is None else selection.slots[0]


def measure(reader: Reader, kind: str, videos: int) -> dict[str, Any]:
    """Per method the share of tokens kept and of questions answered, with intervals over videos."""
    correct: dict[str, list[list[bool]]] = {}
    shares: dict[str, list[float]] = {}
    frames: dict[str, list[list[float]]] = {}
    for seed in range(scenes.HELD_OUT, scenes.HELD_OUT + videos):
        asked = [question for question in scenes.scene(seed).questions() if question.category in KINDS[kind]]
        features = reader.features(seed, kind)
        for name, method in arms().items():
            kept = choose(method, features)
            shares.setdefault(name, []).append(len(kept) / len(features))
            frames.setdefault(name, []).append((kept // TOKENS).bincount(minlength=FRAMES).div(TOKENS).tolist())
            said = reader.answers(features, kept, [question.text for question in asked])
            right = [answer == question.answer for answer, question in zip(said, asked, strict=True)]
            correct.setdefault(name, []).append(right)
        print(kind, seed - scenes.HELD_OUT + 1, flush=True)
    picks = np.random.default_rng(0).integers(0, videos, (10_000, videos))
    counts = np.array([len(right) for right in correct["unpruned"]])
    base = np.array([sum(right) for right in correct["unpruned"]])
    rows = []
    for name in arms():
        hits = np.array([sum(right) for right in correct[name]])
        total = counts[picks].sum(1)
        rows.append({
            "name": name,
            "kept": round(float(np.mean(shares[name])), 4),
            "kept_range": [round(float(q), 4) for q in np.quantile(shares[name], [0.05, 0.95])],
            "first_frame": round(float(np.mean(frames[name], axis=0)[0]), 4),
            "later_frames": round(float(np.mean(frames[name], axis=0)[1:].mean()), 4),
            "right": round(float(hits.sum() / counts.sum()), 4),
            "interval": [round(float(q), 4) for q in np.quantile(hits[picks].sum(1) / total, [0.025, 0.975])],
            "difference": round(float((hits - base).sum() / counts.sum()), 4),
            "difference_interval": [
                round(float(q), 4) for q in np.quantile((hits - base)[picks].sum(1) / total, [0.025, 0.975])
            ],
        })  # fmt: skip
    return {"questions": int(counts.sum()), "rows": rows}


def page(record: dict[str, Any]) -> list[str]:
    """The table, methods by the share they keep of videos of a still camera."""
    moving = {row["name"]: row for row in record["kinds"]["moving"]["rows"]}
    rows = []
    for row in sorted(record["kinds"]["still"]["rows"], key=lambda row: -row["kept"]):
        cells = [f"`{row['name']}`" if "(keep" in row["name"] or "(thr" in row["name"] else row["name"]]
        for one in (row, moving[row["name"]]):
            cells.append(f"{100 * one['kept']:.0f} %")
            points = within(100 * one["difference"], [100 * x for x in one["difference_interval"]], 1)
            cells.append(f"{100 * one['right']:.1f}" if row["name"] == "unpruned" else points)
        rows.append(cells)
    return table(["method", "still camera: kept", "points", "moving camera: kept", "points"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=int, default=150)
    parser.add_argument("--tables", action="store_true", help="only write the table of the page, from the record")
    options = parser.parse_args()
    file = FOLDER / "video.json"
    if not options.tables:
        reader = Reader()
        with torch.inference_mode():
            kinds = {kind: measure(reader, kind, options.videos) for kind in KINDS}
        facts = {"frames": FRAMES, "tokens": TOKENS, "drift": DRIFT, "videos": options.videos}
        write_json(file, {"kind": "video", **facts, "kinds": kinds, "environment": environment("cpu")})
    record = json.loads(file.read_text())
    PAGE.write_text(replaced(PAGE.read_text(), "video", page(record)))


if __name__ == "__main__":
    main()
