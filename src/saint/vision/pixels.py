"""What the candidates of an encoder show: their pixels, read in front of the convolution that makes tokens of them.

Letters: B pictures, N patches of one, C channels, V values of a channel in a patch.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModelError
from ..upstream.specs import EncoderSpec, part


def patcher(encoder: nn.Module, spec: EncoderSpec) -> nn.Conv2d | nn.Conv3d:
    """The convolution that makes a token of each patch: the first one outside of the blocks.

    Raises:
        UnsupportedModelError: there is none, or its patches overlap or leave gaps.
    """
    inside = {id(module) for module in part(encoder, spec.blocks).modules()}
    root = encoder if spec.patch is None else part(encoder, spec.patch)
    kinds = (nn.Conv2d, nn.Conv3d, nn.Linear)
    found = next((one for one in root.modules() if isinstance(one, kinds) and id(one) not in inside), None)
    why = "no convolution makes its tokens"
    if isinstance(found, nn.Linear):
        why = "its patches arrive as rows whose layout is not known"
    elif found is not None:
        apart = found.stride == found.kernel_size and set(found.dilation) == {1} and found.groups == 1
        if apart and (found.padding == "valid" or set(found.padding) == {0}):
            return found
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
