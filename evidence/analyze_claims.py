"""What the records of `analyze.py` say about three claims of the paper (arXiv 2503.11549), with the figures that decide."""

from typing import Any

PARTS = (("early", "first third"), ("late", "the other layers"), ("all", "all layers"))
Named = list[tuple[str, dict[str, Any]]]  # titles of stacks of layers with trained weights, and their parts of records


def claims(stacks: Named, again: list[dict[str, Any]]) -> str:
    """A section of markdown."""
    tried = [(title, part["causal"]) for title, part in stacks if "attention" in part["causal"]["methods"]]
    things = {title: part.get("things", "photographs") for title, part in stacks}
    without = [title for title, part in stacks if "attention" not in part["causal"]["methods"]]
    merged = {"tome": "ToMe", "tome_plain": "ToMe, beta 0"}
    lines = [
        "## Three claims of the paper, on these models\n",
        INTRO.format(
            share=f"{tried[0][1]['share']:.0%}",
            counts=", ".join(f"{c['methods']['saint']['n']} {things[title]} for {title}" for title, c in tried),
            without=f"; not measured for {' and '.join(without)}" if without else "",
        ),
        "### Tokens go through the same three stages in encoders and language models\n",
        _staged(stacks),
        "### Similarity of keys is a better signal than attention\n",
        _word(
            "what SAINT drops costs less than what CLS or the last prompt token attends to least", tried, ["attention"]
        ),
        ATTENDED,
        _table(tried, {"attention": "by attention", "random": "at random"}),
        "### Dropping is better than merging in early layers\n",
        _word("in the first third, what SAINT drops costs less than as many merges", tried, list(merged), "early"),
        _word("in the other layers, the same", tried, list(merged), "late"),
        _table(tried, merged),
    ]
    return "\n".join([*lines, _again(again)])


INTRO = """Computed from the records. Losses are those of the tables below: {share} of the tokens leave at one layer alone
({counts}{without}).
Differences are paired by photograph or passage: the loss of the other choice minus that of SAINT, a mean over layers, with its
95 % bootstrap interval over these, uncorrected for the number of intervals. Above zero, SAINT loses less. "Held up" means
that every interval lies above zero, "contradicted" that every one lies below, "not decided" anything else.
"""


ATTENDED = """In a language model the loss is that of the next token, read from the last one of the prompt, and the choice by
attention goes by what that very token attends to at that layer.
"""


AGAIN = """Other photographs, another seed: how many of the 95 % intervals of the two runs overlap. Where nothing but the
photographs differs, intervals of equal width overlap in 99.4 % of the cases.
"""


def _staged(stacks: Named) -> str:
    three = [title for title, part in stacks if len(part["stages"]["segments"]) == 3]
    held = len(three) == len(stacks)
    split = []
    for kind, slot in (("encoders", "vision"), ("language models", "language")):
        own = [title for title, part in stacks if part["stage"] == slot]
        split.append(f"{len(set(own) & set(three))} of {len(own)} {kind}")
    rows = [
        "| layers of | stages | BIC, best staircase | BIC, smooth curves | p, smooth curves with noise | p, other orders |",
        "|---|---|---|---|---|---|",
    ]
    for title, part in stacks:
        found = part["stages"]["criteria"]
        steps = min(value for key, value in found["bic"].items() if key.isdigit() and int(key) > 1)
        smooth = min(found["bic"]["smooth"], found["bic"]["line"])
        rows.append(
            f"| {title} | {part['stages']['verdict']} | {steps:.0f} | {smooth:.0f} | {found['p_smooth']:.3f} | "
            f"{found['p_permutation']:.3f} |"
        )
    alpha = stacks[0][1]["stages"]["criteria"]["alpha"]
    word = "held up" if held else "not shown"
    return (
        f"**{word.capitalize()}**: three stages are shown in {len(three)} of {len(stacks)} stacks of layers: "
        f"{' and '.join(split)}.\nStages need a "
        f"staircase whose BIC is the lowest and both p at most {alpha:g}.\n\n" + "\n".join(rows) + "\n"
    )


def _word(claim: str, tried: Named, methods: list[str], where: str = "all") -> str:
    """The verdict on a claim, from the intervals of ``methods`` over the layers ``where``."""
    spans = [(title, c["more_than_saint"]) for title, c in tried]
    found = [(title, by[m][where]) for title, by in spans for m in methods if m in by]
    above = [title for title, f in found if f["low"] > 0]
    below = [title for title, f in found if f["high"] < 0]
    word = "held up" if len(above) == len(found) else "contradicted" if len(below) == len(found) else "not decided"
    said = f"- **{word.capitalize()}**: {claim}: {len(above)} of {len(found)} intervals above zero, {len(below)} below."
    for side, titles in (("Above", above), ("Below", below)):
        said += f" {side}: {'; '.join(dict.fromkeys(titles))}." if titles else ""
    return said + "\n"


def _table(tried: Named, methods: dict[str, str]) -> str:
    head = " | ".join(f"{title}: {name}" for title in methods.values() for _, name in PARTS)
    rows = [f"| layers of | {head} |", "|---" * (1 + len(PARTS) * len(methods)) + "|"]
    for title, causal in tried:
        cells = []
        for method in methods:
            found = causal["more_than_saint"].get(method)
            cells += ["" if found is None else _interval(found[name]) for name, _ in PARTS]
        rows.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def _interval(found: dict[str, float]) -> str:
    return f"{found['mean']:+.4f} ({found['low']:+.4f} to {found['high']:+.4f})"


def _again(again: list[dict[str, Any]]) -> str:
    """What second runs say."""
    if not again:
        return ""
    lines = [
        "## A second run\n",
        "Other photographs or passages, another seed: how many of the 95 % intervals of the two runs overlap.\n",
    ]
    for record in again:
        for part in record["parts"]:
            same, total = (sum(pair[i] for pair in part["counts"].values()) for i in (0, 1))
            low = [name for name, (a, b) in part["counts"].items() if a < b]
            first, second = part["stages"]
            lines.append(
                f"- {record['model']}, {part['stage']}, {record['images'][0]} and {record['images'][1]} "
                f"{record.get('things', 'photographs')}: "
                f"{same} of {total} pairs of layer and quantity ({same / total:.1%})"
                + (f"; not everywhere: {', '.join(low)}" if low else "")
                + f". Stages: {first}, and again {second}."
            )
    return "\n".join(lines) + "\n"
