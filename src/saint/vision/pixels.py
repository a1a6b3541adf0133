"""What the candidates of an encoder show: their pixels, read in front of the layer that makes tokens of them.

Letters: B pictures, N patches of one, C channels, V values of a channel in a patch, P side of a patch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModelError
from ..upstream.specs import EncoderSpec, RowLayout, part


@dataclass(frozen=True)
class Patcher:
    """The layer that makes a token of each patch.

    Attributes:
        layer: a convolution, or a layer to which patches arrive as rows.
        layout: of the rows; None where it is not known, and of a convolution.
    """

    layer: nn.Module
    layout: RowLayout | None = None

    @property
    def kind(self) -> str:
        """Name of its class, for messages."""
        return type(self.layer).__name__

    @property
    def rows(self) -> bool:
        """Tell whether patches arrive as rows."""
        return not isinstance(self.layer, nn.Conv2d | nn.Conv3d)

    @property
    def sides(self) -> tuple[int, ...]:
        """Of a patch, as the sides of a kernel."""
        if isinstance(self.layer, nn.Conv2d | nn.Conv3d):
            return tuple(self.layer.kernel_size)
        assert self.layout is not None
        return self.layout.high, self.layout.wide

    def patches(self, x: Tensor) -> Tensor:
        """Cut what enters the layer into its patches: [B, C, ...], [B, N, row] or [N, row] -> [B, N, C, V].

        Packed rows are pictures of one patch each, as those of a convolution are: [N, 1, C, V].
        """
        if not self.rows:
            return patches(x, self.sides)
        x = x.unsqueeze(1) if x.ndim == 2 else x
        return x.unsqueeze(2) if self.layout is None else self.opened(x).flatten(3)

    def opened(self, rows: Tensor) -> Tensor:
        """Patches as pieces of pictures: rows [..., row] of a known layout -> [..., C, P, P]."""
        assert self.layout is not None
        channels, high, wide, last = self.layout
        if last:
            return rows.unflatten(-1, (high, wide, channels)).movedim(-1, -3)
        return rows.unflatten(-1, (channels, high, wide))

    def picture(self, rows: Tensor, high: int, wide: int) -> Tensor:
        """Put a picture of ``high`` x ``wide`` patches together: rows [N, row], padding behind them -> [1, C, H, W]."""
        pieces = self.opened(rows[: high * wide]).unflatten(0, (high, wide))
        return pieces.permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2).unsqueeze(0)

    def closed(self, pieces: Tensor) -> Tensor:
        """Undo :meth:`opened`: [..., C, P, P] -> [..., row]."""
        assert self.layout is not None
        return (pieces.movedim(-3, -1) if self.layout.channels_last else pieces).flatten(-3)


def patcher(encoder: nn.Module, spec: EncoderSpec, *, channels: bool) -> Patcher:
    """The layer that makes a token of each patch: that of the spec, or the first convolution outside of the blocks.

    Args:
        encoder: owns the blocks.
        spec: what is known of its class.
        channels: it must be known which values of a patch are of which channel, and where they lie.

    Raises:
        UnsupportedModelError: there is none, its patches overlap or leave gaps, or the layout or grid of rows is not known.
    """
    kinds = (nn.Conv2d, nn.Conv3d)
    rows = None if spec.rows is None else part(encoder, spec.rows.linear)
    if spec.rows is not None and isinstance(rows, nn.Module) and not isinstance(rows, kinds):
        layout = spec.rows.layout(part(encoder, spec.rows.linear.rpartition(".")[0]), rows)
        if not channels or (layout is not None and (spec.packed or spec.rows.grid is not None)):
            return Patcher(rows, layout)
        raise UnsupportedModelError(
            f"{type(encoder).__name__} does not show the pixels of its tokens by channel: its patches arrive as rows whose "
            "layout or grid is not known; use Duplicates, or a method that looks at keys"
        )
    inside = {id(module) for module in part(encoder, spec.blocks).modules()}
    root = encoder if spec.patch is None else part(encoder, spec.patch)
    found = next((one for one in root.modules() if isinstance(one, kinds) and id(one) not in inside), None)
    why = "no convolution makes its tokens"
    if found is not None:
        apart = found.stride == found.kernel_size and set(found.dilation) == {1} and found.groups == 1
        if apart and (found.padding == "valid" or set(found.padding) == {0}):
            return Patcher(found)
        why = "its patches overlap, or more than one patch makes a token"
    raise UnsupportedModelError(
        f"{type(encoder).__name__} does not show the pixels of its tokens: {why}; use a method that looks at keys"
    )


def patches(x: Tensor, kernel: Sequence[int]) -> Tensor:
    """Cut what enters a convolution into its patches: [B, C, ...] -> [B, N, C, V].

    Args:
        x: pictures [B, C, H, W], or with an axis of time.
        kernel: sides of a patch. What is left over at the far ends is not read, as in the convolution.
    """
    counts = [size // side for size, side in zip(x.shape[2:], kernel, strict=True)]
    for axis, (count, side) in enumerate(zip(counts, kernel, strict=True)):
        x = x.narrow(2 + axis, 0, count * side)
    x = x.reshape(x.shape[0], x.shape[1], *(n for pair in zip(counts, kernel, strict=True) for n in pair))
    cells, inside = range(2, x.ndim, 2), range(3, x.ndim, 2)
    return (
        x.permute(0, *cells, 1, *inside).flatten(1 + len(counts)).flatten(1, len(counts)).unflatten(2, (x.shape[1], -1))
    )


def laid_out(rows: Tensor, shape: torch.Size, places: Tensor | None) -> Tensor:
    """The pixels of the candidates, those of all members where patches are joined: [B, N, C, V].

    Args:
        rows: of every patch, see :func:`patches`.
        shape: of the sequences that enter the blocks, without channels.
        places: see :class:`saint.runtime.state.LayerState`, in the order of ``rows``.

    Raises:
        ValueError: there are other tokens than patches.
    """
    flat = shape[0] == 1 and places is not None  # packed: as many samples as the grids say
    if rows.shape[0] * rows.shape[1] != shape.numel() or not (flat or rows.shape[:2] == shape):
        raise ValueError(
            f"the pixels of {rows.shape[0]} x {rows.shape[1]} patches were read, and tokens of {tuple(shape)} enter the blocks: "
            "which token shows which pixels is not known: use a method that looks at keys"
        )
    return rows if places is None else rows.flatten(0, 1)[places].transpose(2, 3).flatten(3)
