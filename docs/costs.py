"""What is known of each method besides what it does: its year, the licence of its authors' code, and what choosing costs.

Formulas stand here as text, and are held against what the methods say of themselves.
"""

import dataclasses
import math
import re
from collections.abc import Iterable

from saint import methods
from saint.lab.report.markdown import table

# of the authors' code, where it was looked up; it is not used here
LICENCES = {"otprune": "Apache-2.0", "priortr": "Apache-2.0"}

# by registry name: the order, with C channels of keys or embeddings, K of N tokens kept, R tokens that are asked and V values of
# a patch; and the FLOPs that `flops()` counts, by settings too; "" where it counts none
COSTS = {
    "apet": ("N C", "7 min(basis, K) N C"),
    "cdpruner": ("N² C + N K²", "2 N**2 C + N K**2"),
    "d2pruner": ("N² C", "2 N**2 C"),
    "dart": ("N C", "2 pivots N C"),
    "divprune": ("N² C", "2 N**2 C"),
    "duplicates": ("N V", ""),
    "evs": ("N C", ""),
    "fastv": ("N C", ""),
    "flat": ("N V", ""),
    "grid": ("N", ""),
    "hiprune": ("N log N", ""),
    "match": ("N² C", "N**2 C / 2"),
    "mmr": ("N² C", "2 N**2 C"),
    "otprune": ("N² C + N K²", "2 N**2 C + N K**2"),
    "pitome": ("N² C", "2 N**2 C"),
    "ppt": ("N² C", "N**2 C / 2"),
    "priortr": ("R N C", ""),
    "prumerge": ("N K C", "2 N K C"),
    "pyramiddrop": ("N C", ""),
    "random": ("N log N", ""),
    "resize": ("N", ""),
    "saint": ("N² C", "N**2 C / 2"),
    "saint_full_graph": ("N C log(N / K)", "max(1, step log(N / K)) 4 N C"),
    "saint_video": ("N² C", "N**2 C / 2"),
    "scope": ("N² C + N² K", "2 N**2 C + 3 N**2 K"),
    "sparsevlm": ("R N C", ""),
    "tome": ("N² C", "N**2 C / 2"),
    "visionzip": ("N K C", "2 N ceil(contextual K) C"),
    "vispruner": ("N² C", "2 N**2 C"),
}
# what a method asks a stage for, in words
ASKS = {
    "frames": "frames of videos",
    "last_query": "attention of the last prompt token",
    "pixels": "pixels",
    "channels": "by channel",
    "question": "attention of the text behind the image",
    "first_query": "that of its first token",
    "raters": "attention of the text that is nearest",
    "resized": "smaller pictures",
    "text": "embeddings of the text",
    "tower_class": "attention of the tower's class token",
    "tower_joined": "attention of the tower's class token, all heads as one",
    "tower_keys": "keys of the tower",
    "tower_received": "attention of all tokens of the tower",
    "tower_values": "length of values",
}


def costs_table(among: Iterable[type[methods.Method]]) -> str:
    """A row for each method."""
    rows = []
    for method in among:
        order, formula = COSTS[method.name]
        asks = ", ".join(ASKS[one] for one in ASKS if one in method.needs) or "-"
        shown = re.sub(r"\*\*(\d)", lambda found: "⁰¹²³"[int(found[1])], formula).replace("_", " ")
        year = f"20{method.paper.rpartition('/')[2][:2]}"
        licence = LICENCES.get(method.name, "-")
        rows.append([f"`{method.__name__}`", year, licence, asks, f"O({order})", shown or "-"])
    return table(["method", "year", "authors' code", "asks for", "order of choosing", "FLOPs counted"], rows)


def counted(method: methods.Method, before: int, after: int, dim: int) -> float:
    """FLOPs by the formula of the table."""
    formula = COSTS[method.name][1]
    if not formula:
        return 0.0
    names = {field.name: getattr(method, field.name) for field in dataclasses.fields(method)}
    product = re.sub(r"(?<=[\w)]) (?=[\w(])", " * ", formula)
    return float(
        eval(
            product,
            {"log": math.log, "ceil": math.ceil, "min": min, "max": max},
            {**names, "N": before, "K": after, "C": dim},
        )
    )
