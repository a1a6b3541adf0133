"""Grids of patches, and the smaller ones that a smaller picture has. Pure numbers.

A cell of the smaller grid stands where its centre lies on the larger one.
"""

import math


def smaller(rows: int, columns: int, keep: int | float) -> tuple[int, int]:
    """Rows and columns of a picture with fewer pixels, of about the same shape; never more than there are.

    Args:
        rows: of the grid.
        columns: likewise.
        keep: share of the cells, in (0, 1], or how many at most.
    """
    if isinstance(keep, float):
        side = math.sqrt(keep)
        return min(rows, max(1, round(rows * side))), min(columns, max(1, round(columns * side)))
    if keep >= rows * columns:
        return rows, columns
    side = math.sqrt(keep / (rows * columns)) + 1e-9
    fewer = max(1, min(keep, math.floor(rows * side)))
    return fewer, max(1, min(keep // fewer, math.floor(columns * side)))


def at(count: int, fewer: int) -> list[int]:
    """Place each of ``fewer`` cells of an axis among the ``count`` that there were: ascending, none twice."""
    return [(2 * cell + 1) * count // (2 * fewer) for cell in range(fewer)]


def under(count: int, fewer: int) -> list[int]:
    """Say for each of ``count`` cells of an axis which of the ``fewer`` covers its centre; :func:`at` is its inverse."""
    return [(2 * cell + 1) * fewer // (2 * count) for cell in range(count)]
