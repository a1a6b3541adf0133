"""Pictures as rows of patches, cut by the libraries' own code, for encoders that are given them so."""

from collections.abc import Sequence

import torch
from torch import Tensor

SIDE = 16  # of a patch, in pixels


def as_rows(name: str, pictures: Sequence[Tensor], channels_last: bool = True) -> dict[str, Tensor]:
    """Inputs of one batch from pictures [C, H, W], padded to the one of most patches.

    Args:
        name: "transformers/siglip2", or anything with "naflex" in it.
        pictures: of whole patches.
        channels_last: timm's layout of a row.
    """
    shapes = [(picture.shape[1] // SIDE, picture.shape[2] // SIDE) for picture in pictures]
    most = max(rows * columns for rows, columns in shapes)
    if "naflex" in name:
        from timm.data.naflex_dataset import NaFlexCollator
        from timm.data.naflex_transforms import Patchify

        cut = Patchify(SIDE, channels_last=channels_last)
        batch, _ = NaFlexCollator(most)([(cut(picture), 0) for picture in pictures])
        return {"x": batch["patches"], "patch_coord": batch["patch_coord"], "patch_valid": batch["patch_valid"]}
    from transformers.models.siglip2.image_processing_siglip2 import convert_image_to_patches, pad_along_first_dim

    padded = [pad_along_first_dim(convert_image_to_patches(picture, SIDE), most) for picture in pictures]
    return {
        "pixel_values": torch.stack([rows for rows, _ in padded]),
        "pixel_attention_mask": torch.stack([mask for _, mask in padded]),
        "spatial_shapes": torch.tensor(shapes),
    }
