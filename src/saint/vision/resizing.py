"""A smaller picture in front of the layer that makes tokens of patches, and tokens of the former grid behind it.

What the smaller picture's patches became is laid out on the grid that the picture had, so whatever reads the tokens finds as
many as ever, each with a position; those that stand for no patch of the smaller picture leave in front of the first block
(:class:`saint.methods.Resize`).

Letters: B pictures, C channels, R x W patches of a picture, r x w of the smaller one, P side of a patch, m side of the squares of
patches that a model joins, F frames that enter the layer together, N patches with padding behind them, E channels of a token.
"""

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.nn.utils.rnn import pad_sequence

from .. import grids
from ..errors import UnsupportedModelError
from ..patch import Uncopyable
from ..runtime.forwards import Forwards
from .pixels import Patcher


class Resizing(Uncopyable):
    """Shows the layer that makes tokens smaller pictures, and notes in the forward which of its patches each token shows.

    Args:
        patcher: makes tokens of patches that do not overlap; rows of a layout that is known.
        keep: see :class:`saint.methods.Resize`.
        side: m; 1 where every patch is a token.
        forwards: of the encoder, whose state has ``grid``, ``grids``, ``resized`` and ``shows``.
        packed: grids of pictures are told beside them.
        raster: patches that enter the layer one by one lie row by row, and not square behind square.

    Raises:
        UnsupportedModelError: a convolution takes videos in one piece.
    """

    def __init__(
        self,
        patcher: Patcher,
        keep: int | float,
        side: int,
        forwards: Forwards[Any],
        *,
        packed: bool,
        raster: bool,
    ) -> None:
        if isinstance(patcher.layer, nn.Conv3d) and not packed:
            raise UnsupportedModelError(
                "smaller pictures are made of pictures, and this encoder takes videos in one piece: leave pixels out"
            )
        self.patcher, self.keep, self.side, self.forwards = patcher, keep, side, forwards
        self.packed, self.square = packed, 1 if raster else side

    def install(self, stack: ExitStack) -> None:
        """From now on; ``stack`` undoes it."""
        stack.callback(self.patcher.layer.register_forward_pre_hook(self._shrink).remove)
        stack.callback(self.patcher.layer.register_forward_hook(self._lay_out).remove)

    def _shrink(self, _module: nn.Module, args: tuple[Any, ...]) -> Any:
        forward, x = self.forwards.prelude(), args[0]
        kernel = self.patcher.sides
        forward.resized, forward.shows = True, None
        if self.patcher.rows:
            pieces = self.patcher.opened(x)
            small, forward.shows = self._of_rows(pieces, forward.grids) if self.packed else self._of_padded(pieces)
            small = self.patcher.closed(small)
        elif self.packed and tuple(x.shape[2:]) == kernel:
            small, forward.shows = self._of_rows(x, forward.grids)
        elif self.packed:
            small, forward.shows = self._of_canvas(x, [(rows, columns) for _, rows, columns in forward.grids])
        else:
            forward.grid = x.shape[-2] // kernel[-2], x.shape[-1] // kernel[-1]
            small, forward.shows = self._of_pictures(x, *forward.grid)
        return (small, *args[1:])

    def _lay_out(self, _module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor | None:
        forward = self.forwards.prelude()
        if forward.shows is None:
            return None
        if self.packed and forward.shows.ndim == 1:
            return out[forward.shows]
        if self.patcher.rows:
            return spread_out(out, forward.shows)
        spread = spread_out(out.flatten(2).mT, forward.shows).mT
        return spread.unflatten(2, forward.canvas)

    # -- what enters --------------------------------------------------------------------------------------------------

    def _smaller(self, rows: int, columns: int) -> tuple[int, int]:
        """Patches of the smaller picture, r and w."""
        fewer = grids.smaller(rows // self.side, columns // self.side, self.keep)
        return fewer[0] * self.side, fewer[1] * self.side

    def _resized(self, x: Tensor, rows: int, columns: int) -> Tensor:
        """Pictures [..., H, W] of so many patches."""
        high, wide = self.patcher.sides[-2:]
        size = (rows * high, columns * wide)
        flat = x.flatten(0, -4) if x.ndim > 3 else x.unsqueeze(0)
        # sums of many values: in half precision they would lose more than the picture has
        small = interpolate(flat.float(), size=size, mode="bicubic", antialias=True, align_corners=False)
        return small.to(x.dtype).view(*x.shape[:-2], *size)

    def _shown(self, rows: int, columns: int, device: torch.device) -> Tensor:
        """For each patch, row by row, the one that it shows of the smaller picture, int64 [R, W] below r * w."""
        fewer = self._smaller(rows, columns)
        row, column = (
            torch.tensor(_under(n, k, self.side), device=device) for n, k in zip((rows, columns), fewer, strict=True)
        )
        return row.unsqueeze(1) * fewer[1] + column

    def _of_pictures(self, x: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor | None]:
        """Pictures of one size, [B, C, H, W]."""
        fewer = self._smaller(rows, columns)
        self.forwards.prelude().canvas = rows, columns
        if fewer == (rows, columns):
            return x, None
        high, wide = self.patcher.sides
        small = self._resized(x[..., : rows * high, : columns * wide], *fewer)
        return small, self._shown(rows, columns, x.device).flatten()

    def _of_canvas(self, x: Tensor, sizes: list[tuple[int, int]]) -> tuple[Tensor, Tensor | None]:
        """Pictures of their own numbers of patches, each in the corner of a canvas [B, C, H, W]."""
        high, wide = self.patcher.sides
        canvas = self.forwards.prelude().canvas = x.shape[-2] // high, x.shape[-1] // wide
        fewer = [self._smaller(*size) for size in sizes]
        if fewer == sizes:
            return x, None
        most = max(rows for rows, _ in fewer), max(columns for _, columns in fewer)
        small = x.new_zeros(*x.shape[:2], most[0] * high, most[1] * wide)
        shows = torch.zeros(len(x), *canvas, dtype=torch.long, device=x.device)
        for sample, ((rows, columns), (down, right)) in enumerate(zip(sizes, fewer, strict=True)):
            picture = x[sample, :, : rows * high, : columns * wide]
            small[sample, :, : down * high, : right * wide] = self._resized(picture, down, right)
            own = self._shown(rows, columns, x.device)
            shows[sample, :rows, :columns] = own // right * most[1] + own % right
        return small, shows.flatten(1)

    def _of_rows(self, x: Tensor, sizes: list[list[int]]) -> tuple[Tensor, Tensor | None]:
        """Patches one by one, [patches, C, (F,) P, P], of one picture or video behind the other."""
        if all(self._smaller(rows, columns) == (rows, columns) for _, rows, columns in sizes):
            return x, None
        pieces, shows, end = list[Tensor](), list[Tensor](), 0
        for piece, (frames, rows, columns) in zip(x.split([t * r * c for t, r, c in sizes]), sizes, strict=True):
            small, own = self._of_piece(piece, frames, rows, columns)
            pieces.append(small)
            first = torch.arange(end, end + len(small), len(small) // frames, device=x.device)
            shows.append((first.unsqueeze(1) + own).flatten())
            end += len(small)
        return torch.cat(pieces), torch.cat(shows)

    def _of_padded(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Patches one by one, [B, N, C, P, P], of a picture each, behind whose last there may be padding."""
        forward = self.forwards.prelude()
        if not forward.grids:  # pictures of one size
            assert forward.grid is not None
            if self._smaller(*forward.grid) == forward.grid:
                return x, None
            small, own = self._of_piece(x.flatten(0, 1), x.shape[0], *forward.grid)
            return small.unflatten(0, (x.shape[0], -1)), own
        if all(self._smaller(rows, columns) == (rows, columns) for _, rows, columns in forward.grids):
            return x, None
        pairs = [self._of_piece(one[: t * r * c], t, r, c) for one, (t, r, c) in zip(x, forward.grids, strict=True)]
        shows = torch.zeros(x.shape[:2], dtype=torch.long, device=x.device)
        for sample, (_, own) in enumerate(pairs):
            shows[sample, : len(own)] = own
        return pad_sequence([small for small, _ in pairs], batch_first=True), shows

    def _of_piece(self, piece: Tensor, frames: int, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        """Patches of the smaller pictures, and for each patch of a picture the one that shows it, int64 [R * W] below r * w.

        Args:
            piece: patches of pictures of one size, [frames * R * W, C, (F,) P, P].
            frames: how many pictures.
            rows: R.
            columns: W.
        """
        fewer, m = self._smaller(rows, columns), self.square
        inner = piece.shape[1:-2].numel()  # channels, and frames that enter together
        cells = piece.reshape(frames, rows // m, columns // m, m, m, inner, *piece.shape[-2:])
        picture = cells.permute(0, 5, 1, 3, 6, 2, 4, 7).flatten(5).flatten(2, 4)  # [frames, inner, H, W]
        small = self._resized(picture, *fewer)
        cut = small.reshape(frames, inner, fewer[0] // m, m, piece.shape[-2], fewer[1] // m, m, piece.shape[-1])
        own = self._in_order(self._shown(rows, columns, piece.device))
        place = torch.argsort(self._in_order(torch.arange(fewer[0] * fewer[1], device=piece.device).view(fewer)))
        return cut.permute(0, 2, 5, 3, 6, 1, 4, 7).reshape(-1, *piece.shape[1:]), place[own]

    def _in_order(self, grid: Tensor) -> Tensor:
        """Values of a grid in the order of its patches, [R, W] -> [R * W]."""
        m = self.square
        return grid.view(grid.shape[0] // m, m, grid.shape[1] // m, m).transpose(1, 2).flatten()


def spread_out(rows: Tensor, shows: Tensor) -> Tensor:
    """Rows of the smaller pictures' patches, [B, r * w, ...], for each patch that there was: [B, R * W, ...].

    Args:
        rows: see above.
        shows: for each patch the one that it shows, int64 [R * W] or [B, R * W].
    """
    if shows.ndim == 1:
        return rows[:, shows]
    return rows[torch.arange(len(rows), device=rows.device).unsqueeze(1), shows]


def _under(count: int, fewer: int, side: int) -> list[int]:
    """:func:`saint.grids.under` of patches of which squares stay together."""
    units = grids.under(count // side, fewer // side)
    return [unit * side + inner for unit in units for inner in range(side)]
