"""`saint view --why`: when patches were dropped, what stands for them, and what the voting graph saw."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...methods.saint import Saint
from ...plans import Plan
from ..kinds.tiles import Tile
from . import explain
from .explain import Step
from .overlay import Cell, save_png, sheet

_CELL = 420  # pixels of a picture: the numbers on 14 x 14 patches stay legible
_MOST = 3  # drop points whose votes are drawn


def draw_reasons(
    head: str, plan: Plan, name: str, tile: Tile, steps: Sequence[Step], patch: tuple[int, int] | None, folder: Path
) -> Path:
    """One PNG of one photograph.

    Args:
        head: title.
        plan: with a vision stage.
        name: of the photograph.
        tile: what the encoder sees of it.
        steps: its drop points.
        patch: (row, column) of a patch whose neighbours are drawn; None: none.
        folder: for the picture.

    Raises:
        ValueError: ``patch`` is not on the grid.
    """
    grid, seen = tile.grid, tile.picture
    dropping = [step for step in steps if not bool(step.stays.all())]
    first = dropping[0] if dropping else steps[0]
    method: Any = _voting(plan)
    gone = sum(int((~step.stays).sum()) for step in dropping)
    merges = any(stage.method.merges for stage in plan.vision)
    rows = [
        [
            Cell(seen, name.replace("_", " "), f"{grid[0]} x {grid[1]} patches"),
            Cell(
                explain.dropped(seen, grid, dropping),
                f"{gone} patches dropped, by layer",
                "lines: became part of" if merges else "lines: most similar survivor",
            ),
        ]
    ]
    if patch is not None:
        threshold = 0.75 if method is None else method.threshold
        picture = explain.around(seen, grid, first, patch, threshold)
        note = f"cosine of keys, layer {first.layer}; lines from {threshold:g}"
        rows[0].append(Cell(picture, f"around patch {patch[0]},{patch[1]}", note))
    if method is not None:
        rows.append([])
        for step in dropping[:_MOST] or [first]:
            votes = explain.degrees(seen, grid, step, method.threshold, method.neighbors, center=method.center)
            note = f"white frame: {method.neighbors} or more, a vote"
            rows[-1].append(Cell(votes, f"neighbours, layer {step.layer}", note))
        if dropping and grid[1] % 2 == 0 and len(first.index) == grid[0] * grid[1]:
            notes = ("even positions can be dropped: columns", "chessboard, for comparison only")
            rows.append([])
            for board, note in zip((False, True), notes, strict=True):
                step = explain.split(first, grid, method, board=board)
                label = f"layer {first.layer}: {'another' if board else 'the published'} split"
                rows[-1].append(Cell(explain.dropped(seen, grid, [step], lines=False), label, note))
    path = folder / f"why_{name}.png"
    save_png(sheet(rows, head, "why patches are dropped", cell=_CELL), path)
    return path


def read_patch(text: str | None) -> tuple[int, int] | None:
    """``"5,7"`` as (5, 7).

    Raises:
        ValueError: anything else.
    """
    if text is None:
        return None
    parts = text.split(",")
    if len(parts) != 2 or not all(part.strip().isdecimal() for part in parts):
        raise ValueError(f"--patch takes ROW,COLUMN counted from 0, such as 5,7; got {text!r}")
    row, column = map(int, parts)
    return row, column


def _voting(plan: Plan) -> Any:
    """The voting method of the vision stage, where it has one."""
    return next((stage.method for stage in plan.vision if isinstance(stage.method, Saint)), None)
