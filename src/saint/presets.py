"""Plans with a name: published settings, and settings measured to suit a kind of model. Looks plans up, also in files."""

import difflib
import json
import os
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from .methods.divprune import DivPrune
from .methods.fastv import FastV
from .methods.match import Match
from .methods.ppt import PPT
from .methods.saint import Saint
from .methods.saint_full_graph import SaintFullGraph
from .methods.sparsevlm import SparseVLM
from .methods.tome import ToMe
from .plans import Plan, Stage


class Recipe(NamedTuple):
    """A named plan and what it does."""

    plan: Plan
    about: str


def _tower(keep: int) -> Stage:
    return Stage(SaintFullGraph(keep=keep, step=16), layers=[19])


def _decoder(keep: int, first: int = 7) -> Stage:
    return Stage(Saint(threshold=0.83, keep=keep), layers=range(first, first + 10))


def _diffrate(*kept: int) -> Plan:
    """Stages that merge down to ``kept`` patches behind each block, as shares; of fewer than half, half."""
    shares = [max(after, (before + 1) // 2) / before for before, after in pairwise(kept)]
    return Plan(vision=[Stage(ToMe(keep=share), layers=[block]) for block, share in enumerate(shares, 1)])


# Equivalent tokens: mean over the 32 layers of the 7B model of the visual tokens a layer sees, of 576. A test measures them.
_RECIPES = {
    "vit/published": Recipe(
        Plan(vision=Saint(threshold=0.75)),
        "the authors' ViT setting: voting graph, threshold 0.75, first half of the blocks",
    ),
    "vit/published-batch": Recipe(
        Plan(vision=Saint(threshold=0.75, budget="batch")),
        "the same with the published batch rule: every image drops the mean of the batch's votes",
    ),
    "vit/dense": Recipe(
        Plan(vision=Stage(Saint(threshold=0.70, center=True), layers=[0, 2, 4], output="similar")),
        "for DINO-like encoders of 12 layers under a dense head: centred keys, three drop points, full-length output",
    ),
    "vit/match": Recipe(
        Plan(vision=Match(keep=0.25, fate="weigh")),
        "about half of the FLOPs of any ViT, without a threshold: matching at every other block, who stays counts for who left",
    ),
    "vit/tome": Recipe(
        Plan(vision=Stage(ToMe(r=8), output="similar")),
        "baseline, ToMe as published: 8 tokens merge in every block, proportional attention, average pools weigh sizes",
    ),
    "vit/ppt": Recipe(
        Plan(vision=PPT(r=50)),
        "baseline, PPT as published for 196 patches: 50 are dropped or merged at a quarter, half and three quarters of the depth",
    ),
    "vit/diffrate": Recipe(
        _diffrate(196, 193, 175, 155, 140, 132, 120, 106, 87, 63, 55, 2),
        "baseline, for ViTs of 12 blocks: the shares that DiffRate learned for DeiT-S at 2.9 GFLOPs, merged as ToMe does (the "
        "last block half of 55 patches, where DiffRate leaves 2)",
    ),
    "small-llava/hybrid": Recipe(
        Plan(
            vision=Stage(Saint(keep=147), layers=[10]),
            language=Stage(SaintFullGraph(keep=29), layers=[0]),
        ),
        "for demo:small-llava: 147 of 196 tokens behind the tower (votes), 29 in the decoder (full graph): a quarter in the mean",
    ),
    "llava-1.5/vit": Recipe(
        Plan(vision=_tower(375)),
        "published ViT-only: full graph at CLIP layer 19, keeps 375 of 576 tokens",
    ),
    "llava-1.5/llm": Recipe(
        Plan(language=Stage(Saint(threshold=0.83), layers=range(7, 17))),
        "published LLM-only: voting graph, threshold 0.83, LLM layers 7..16; what stays depends on image and prompt",
    ),
    "llava-1.5/hybrid": Recipe(
        Plan(vision=_tower(375), language=Stage(Saint(threshold=0.83), layers=range(7, 17))),
        "published hybrid: 375 of 576 tokens behind the encoder, then the voting graph at LLM layers 7..16",
    ),
    **{
        f"llava-1.5/vit-{keep}": Recipe(
            Plan(vision=_tower(keep)), f"ViT-only, {keep} equivalent tokens: keeps {keep} of 576 behind the encoder"
        )
        for keep in (192, 128, 64)
    },
    **{
        f"llava-1.5/llm-{equivalent}": Recipe(
            Plan(language=_decoder(keep, first)),
            f"LLM-only, {equivalent} equivalent tokens at 32 layers: 576 down to {keep} over LLM layers {first}..{first + 9}",
        )
        for equivalent, keep, first in ((192, 67, 4), (128, 36, 2), (64, 12, 0))
    },
    **{
        f"llava-1.5/hybrid-{equivalent}": Recipe(
            Plan(vision=_tower(behind), language=_decoder(keep)),
            f"hybrid, {equivalent} equivalent tokens at 32 layers: {behind} of 576 behind the encoder, down to {keep} over LLM "
            "layers 7..16",
        )
        for equivalent, behind, keep in ((192, 288, 135), (128, 192, 90), (64, 96, 45))
    },
    **{
        f"llava-1.5/fastv-{equivalent}": Recipe(
            Plan(language=FastV(keep=keep)),
            f"baseline, FastV with K = 2: {equivalent} equivalent tokens at 32 layers: 576 in two layers, then {keep}",
        )
        for equivalent, keep in ((192, 166), (128, 98), (64, 30))
    },
    **{
        f"llava-1.5/sparsevlm-{equivalent}": Recipe(
            Plan(
                language=[Stage(SparseVLM(keep=k), layers=[layer]) for k, layer in zip(kept, (1, 5, 14), strict=True)]
            ),
            f"baseline, SparseVLM's numbers for {equivalent} tokens: {', '.join(map(str, kept))} of 576 behind layers 1, 5 and "
            f"14 of 32; {mean} in the mean, since what leaves is not recycled",
        )
        for equivalent, kept, mean in ((192, (300, 200, 110), 188), (128, (303, 110, 36), 124), (64, (66, 30, 17), 62))
    },
    **{
        f"llava-1.5/divprune-{keep}": Recipe(
            Plan(connector=DivPrune(keep=keep)),
            f"baseline, DivPrune: {keep} equivalent tokens: keeps {keep} of 576 in front of the language model",
        )
        for keep in (192, 128, 64)
    },
}


def recipes() -> dict[str, str]:
    """Names of all recipes and what each does."""
    return {name: recipe.about for name, recipe in _RECIPES.items()}


# titles of the families that recipes are made for, by the first part of their names; the others suit any encoder
_FAMILIES = {"llava-1.5": "LLaVA-1.5", "small-llava": "LLaVA-1.5"}


def family(source: object) -> str | None:
    """The title of the family that a recipe is made for; None of one for any, and of what is no recipe's name."""
    return _FAMILIES.get(source.partition("/")[0]) if isinstance(source, str) and source in _RECIPES else None


def recipe(name: str) -> Plan:
    """The plan called ``name``.

    Raises:
        ValueError: unknown name; the message lists close matches.
    """
    if name in _RECIPES:
        return _RECIPES[name].plan
    close = difflib.get_close_matches(name, _RECIPES)
    hint = f"did you mean {' or '.join(map(repr, close))}? All" if close else "all"
    raise ValueError(f"unknown recipe {name!r:.80}; {hint} {len(_RECIPES)}: saint.recipes(), saint list")


def load(source: str | os.PathLike[str]) -> Plan:
    """See :meth:`saint.Plan.load`."""
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(f"a recipe's name, JSON text or the path of a plan file is expected, got {source!r:.80}")
    if isinstance(source, os.PathLike):
        return _read_file(Path(source))
    text = source.strip()
    if text in _RECIPES:
        return _RECIPES[text].plan
    if text.endswith(".json"):
        return _read_file(Path(text))
    if text.startswith(("{", "[")) or _is_json(text):
        return Plan.from_json(text)
    return _read_file(Path(text)) if _is_file(text) else recipe(text)


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True  # 5, null or "text": no plan, and no recipe either


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except (OSError, ValueError):  # too long for a name, or with a null byte: no file can be called this
        return False


def _read_file(path: Path) -> Plan:
    try:
        return Plan.from_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        beside = [file.name for file in path.parent.glob("*.json")] if path.parent.is_dir() else []
        close = difflib.get_close_matches(path.name, beside)
        hint = f"did you mean {' or '.join(map(repr, close))}?" if close else "Plan.save(path) writes one"
        raise FileNotFoundError(error.errno, f"no such plan file; {hint}", str(path)) from error
    except ValueError as error:  # bytes that are no UTF-8 are one too
        raise ValueError(f"{path} holds no plan: {error}") from error
