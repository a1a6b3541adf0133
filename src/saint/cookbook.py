"""Plans with a name: published settings, and settings measured to suit a kind of model."""

import difflib
from typing import NamedTuple

from .methods.saint import Saint
from .plan import Plan, Stage


class Recipe(NamedTuple):
    """A named plan and what it does."""

    plan: Plan
    about: str


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
        Plan(vision=Stage(Saint(threshold=0.70, center=True), layers=[0, 2, 4], output="nearest")),
        "for DINO-like encoders of 12 layers under a dense head: centred keys, three drop points, full-length output",
    ),
}


def recipes() -> dict[str, str]:
    """Names of all recipes and what each does."""
    return {name: recipe.about for name, recipe in _RECIPES.items()}


def recipe(name: str) -> Plan:
    """The plan called ``name``.

    Raises:
        ValueError: unknown name; the message lists close matches.
    """
    if name in _RECIPES:
        return _RECIPES[name].plan
    close = difflib.get_close_matches(name, _RECIPES)
    hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
    raise ValueError(f"unknown recipe {name!r}{hint} Known: {', '.join(_RECIPES)}")
