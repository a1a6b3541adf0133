"""The tables of docs/matching.md from the records in evidence/results: `python evidence/matching_pages.py`.

Each stands between `<!-- NAME: generated -->` and `<!-- end NAME -->`; a record that is not there leaves its table as it is.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "matching.md"


def table(headings: list[str], rows: Iterable[Iterable[str]]) -> list[str]:
    lines = [headings, ["---"] * len(headings), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def within(value: float, interval: list[float], digits: int) -> str:
    return f"{value:.{digits}f} [{interval[0]:.{digits}f}, {interval[1]:.{digits}f}]"


def matching(record: dict[str, Any]) -> list[str]:
    rows = (
        [
            f"{row['share']:.3f}", row["name"], f"{row['reached']:.3f}", within(row["mean"], row["interval"], 4),
            within(row["error_ratio"], row["ratio_interval"], 2), *(speedup(row, batch) for batch in ("1", "8")),
        ]
        for row in sorted(record["results"], key=lambda row: row["share"])
    )  # fmt: skip
    return table(["FLOPs", "plan", "reached", "agreement", "error ratio", "faster, batch 1", "batch 8"], rows)


def speedup(row: dict[str, Any], batch: str) -> str:
    found = row.get("speedup", {}).get(batch)
    return "" if found is None else f"x{found['median']:.2f} [{found['p20']:.2f}, {found['p80']:.2f}]"


def tuned(record: dict[str, Any]) -> list[str]:
    rows = []
    for row in record["results"]:
        share = f"{row['target']['flops']:.2f}"
        rows.append([share, "the tuned plan", f"{row['reached']:.3f}", within(row["mean"], row["interval"], 4), ""])
        for name, rival in row["rivals"].items():
            ratio = within(rival["ratio"], rival["ratio_interval"], 2)
            rows.append([share, name, f"{rival['reached']:.3f}", f"{rival['mean']:.4f}", ratio])
    return table(["FLOPs", "plan", "reached", "agreement", "error of the tuned plan over this one's"], rows)


def guard(record: dict[str, Any]) -> list[str]:
    kinds = list(record["pictures"])
    rows = (
        [
            f"{row['share']:.2f}", f"{row['guard']:g}" if row["guard"] else "none", f"{row['reached']:.3f}",
            *(f"{row['loss'][kind]:.4f}" for kind in kinds), f"{row['mean']:.4f}", f"{row['95 % are below']:.4f}",
        ]
        for row in record["rows"]
    )  # fmt: skip
    counted = [f"{record['pictures'][kind]} {kind}" for kind in kinds]
    return table(["FLOPs", "guard", "reached", *counted, "all", "95 % of all are below"], rows)


def labelled(record: dict[str, Any]) -> list[str]:
    called = {"stamps": "clip-art stamps"}  # what they are, where they stand beside photographs
    rows = []
    for part in record["sets"]:
        pictures = f"{part['pictures']} {called.get(part['set'], part['set'])}"
        for row in part["rows"]:
            knn = row["knn"]
            points = within(100 * knn["difference"], [100 * knn["low"], 100 * knn["high"]], 1)
            rows.append(
                [
                    pictures, row["plan"], f"{row['flops']:.3f}", f"{100 * knn['base']:.1f}",
                    f"{100 * knn['pruned']:.1f}", points, f"{row['cosine']['mean']:.4f}",
                ]
            )  # fmt: skip
    return table(["pictures", "plan", "FLOPs", "unpruned %", "pruned %", "difference in points", "cosine"], rows)


def bound(record: dict[str, Any]) -> list[str]:
    best, each = record["best plan of all photographs"], record["best plan of each photograph"]
    drawn = record["random"]
    rows = [
        [
            f"best of {record['plans']} plans, one for all",
            str(record["photographs"]),
            within(best["mean"], best["interval"], 4),
        ],
        ["the same, one for each photograph", str(record["photographs"]), within(each["mean"], each["interval"], 4)],
        *(
            [f"best of {k} random subsets", str(drawn["photographs"]), f"{mean:.4f}"]
            for k, mean in drawn["best of"].items()
        ),
    ]
    return table(["with the output in view", "photographs", "agreement"], rows)


TABLES: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "matching-clip-b16": matching,
    "matching-dinov2-s": matching,
    "tuned-clip-b16": tuned,
    "tuned-dinov2-s": tuned,
    "guard": guard,
    "labelled": labelled,
    "bound-clip-b16": bound,
    "bound-dinov2-s": bound,
}


def replaced(text: str, name: str, lines: Iterable[str]) -> str:
    """``text`` with ``lines`` as the table ``name``, where it has such a table."""
    start, end = f"<!-- {name}: generated -->", f"<!-- end {name} -->"
    if start not in text:
        return text
    head, _, rest = text.partition(start)
    _, _, tail = rest.partition(end)
    return "\n".join([f"{head}{start}", *lines, f"{end}{tail}"])


def main() -> None:
    text = PAGE.read_text()
    for name, make in TABLES.items():
        file = HERE / "results" / f"{name}.json"
        if file.exists():
            text = replaced(text, name, make(json.loads(file.read_text())))
    PAGE.write_text(text)


if __name__ == "__main__":
    main()
