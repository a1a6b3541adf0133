"""What is kept of a photograph, as a picture: a row per tile that the model sees, a column per drop point."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from ...plans import Plan
from ...tokens import LayerTrace
from ..describe import describe
from ..kinds.tiles import Tile, placed
from ..report.figure import standing
from ..report.reading import behind
from .overlay import Cell, overlay, save_png, sheet

_WIDE = 4  # cells of a row, where there is one tile


def draw(
    head: str, about: str, name: str, tiles: Sequence[Tile], total: int, trace: Sequence[LayerTrace], path: Path
) -> Path:
    """Write one PNG of one photograph: what the model sees, and what is kept of it after the drop points.

    Args:
        head: title.
        about: line below it; tokens that lie on no grid are counted there.
        name: of the photograph.
        tiles: that the model sees of it.
        total: visual tokens of it; more than the tiles hold where some lie on no grid.
        trace: of its forward.
        path: of the picture.
    """
    counts = [tile.grid[0] * tile.grid[1] for tile in tiles]
    names = [name] if len(tiles) == 1 else [f"{name}, tile {i + 1} of {len(tiles)}" for i in range(len(tiles))]
    rows = [
        [Cell(tile.picture, label, f"{count} tokens")] for tile, label, count in zip(tiles, names, counts, strict=True)
    ]
    # a drop point that dropped nothing shows nothing new, except when it is the last
    shown = [t for t in trace if bool((t.tokens_out < t.tokens_in).any())] or list(trace[-1:])
    several = len({t.stage for t in trace}) > 1
    counted = []
    sizes = _smaller(trace[0], tiles) if trace else [None] * len(tiles)  # none: smaller pictures in front of the model
    for step in spaced(shown, 2 * _WIDE - 1 if len(tiles) == 1 else _WIDE + 1):
        where = _where(step, several)
        if step is shown[-1] and step is not trace[-1] and not several:
            where += f", to layer {trace[-1].layer}"  # the others dropped nothing
        kept_of = _of_tiles(step, tiles, total)
        if kept_of is None:
            counted.append(f"{where}: {int(step.tokens_out.sum())} of {total} tokens")
            continue
        for row, tile, smaller, kept, count in zip(rows, tiles, sizes, kept_of, counts, strict=True):
            said = f"{len(kept)} of {count} kept ({len(kept) / count:.0%})"
            if smaller is not None and step is trace[0]:
                where, said = (
                    "smaller picture",
                    f"{len(smaller[0])} x {len(smaller[1])} patches, {len(kept)} of {count}",
                )
            row.append(Cell(_kept(tile, kept, smaller), where, said))
    if len(rows) == 1:
        rows = [rows[0][i : i + _WIDE] for i in range(0, len(rows[0]), _WIDE)]
    extra = f"  \u00b7  not drawn (laid on no grid): {'; '.join(counted)}" if counted else ""
    save_png(sheet(rows, head, about + extra), path)
    return path


def dimmed(tile: Tile, trace: Sequence[LayerTrace]) -> Image.Image:
    """Return the first tile with what the last drop point kept of it."""
    kept_of = _of_tiles(trace[-1], [tile], tile.grid[0] * tile.grid[1])
    assert kept_of is not None, "of one tile every token is on its grid"
    return _kept(tile, kept_of[0], _smaller(trace[0], [tile])[0])


def _smaller(step: LayerTrace, tiles: Sequence[Tile]) -> list[tuple[list[int], list[int]] | None]:
    """Rows and columns of each tile at which the patches of a smaller picture stand; None where pictures stay as they are.

    Those that left in front of the layers, and are shown by others that lie in straight rows and columns, are such.
    """
    if step.stage != "vision" or step.placement != "input" or step.into is None or len(step.into) != len(tiles):
        return [None] * len(tiles)
    return [standing(into.tolist(), tile.grid) for into, tile in zip(step.into, tiles, strict=True)]


def _kept(tile: Tile, kept: Tensor, smaller: tuple[list[int], list[int]] | None) -> Image.Image:
    """Return the tile with what is kept of it; of a smaller picture as sharp as the model sees it."""
    if smaller is None:
        return overlay(tile.picture, kept, tile.grid)
    rows, columns = smaller
    size, (high, wide) = tile.picture.size, tile.grid
    small = tile.picture.resize((max(1, size[0] * len(columns) // wide), max(1, size[1] * len(rows) // high)))
    cells = [rows.index(n // wide) * len(columns) + columns.index(n % wide) for n in kept.tolist()]
    return overlay(small.resize(size, Image.Resampling.NEAREST), cells, (len(rows), len(columns)))


def title(name: str) -> str:
    """Return a file's name for people."""
    return name.replace("_", " ")


def legend(plan: Plan) -> str:
    """Return what the pictures show, in a line."""
    return f"{describe(plan)}  \u00b7  hatched patches were dropped"


def spaced(items: list[Any], most: int) -> list[Any]:
    """Return at most ``most`` of them, evenly spaced, with the last."""
    if len(items) <= most:
        return items
    return [items[round((i + 1) * len(items) / most) - 1] for i in range(most)]


def _of_tiles(step: LayerTrace, tiles: Sequence[Tile], total: int) -> list[Any] | None:
    """Return the tokens of each tile that are kept, on the CPU; None where they cannot be told apart."""
    found = step.kept if step.stage == "vision" else placed(list(tiles), step.kept[0].cpu(), total)
    return None if found is None or len(found) != len(tiles) else [kept.cpu() for kept in found]


def _where(step: LayerTrace, several: bool) -> str:
    if step.stage == "connector":
        return step.stage
    place = behind({"layer": step.layer, "placement": step.placement})
    return f"{step.stage}, {place}" if several else place
