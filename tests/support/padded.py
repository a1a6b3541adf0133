"""Encoders of pictures of several shapes in one batch, behind whose patches comes padding."""

import torch
from torch import Tensor, nn

from saint.testing.examples import enliven
from support.models import prepared

POOLS = ("avg", "avgmax", "max", "map", "token")
SHAPES = ((6, 6), (4, 5), (6, 3))


def naflex(pool: str, rope: str = "none", **more: object) -> nn.Module:
    """A tiny NaFlexViT with class token and registers."""
    import timm

    torch.manual_seed(0)
    sizes = {"embed_dim": 48, "depth": 4, "num_heads": 3, "pos_embed_grid_size": (6, 6), "num_classes": 7}
    extra = {"global_pool": pool, "rope_type": rope, "class_token": True, "reg_tokens": 2, "fc_norm": False}
    return enliven(timm.create_model("naflexvit_base_patch16_gap", **{**sizes, **extra, **more}).eval())


def patches() -> dict[str, Tensor]:
    """Patches of three pictures, 6 x 6, 4 x 5 and 6 x 3, behind them padding."""
    generator = torch.Generator().manual_seed(3)
    x, coordinates = torch.randn(3, 36, 768, generator=generator), torch.zeros(3, 36, 2, dtype=torch.long)
    valid = torch.zeros(3, 36, dtype=torch.bool)
    for sample, (rows, columns) in enumerate(SHAPES):
        count = rows * columns
        coordinates[sample, :count] = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
        valid[sample, :count] = True
        x[sample, : count // 2] = x[sample, :1] + 0.1 * x[sample, : count // 2]
    return {"x": x, "patch_coord": coordinates, "patch_valid": valid}


def padded_models() -> list[str]:
    """The encoders that :func:`with_padding` makes."""
    return [f"naflex-{pool}" for pool in POOLS] + ["naflex-axial", "transformers/siglip2"]


def with_padding(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """An encoder and a batch of which all samples but the first are padded."""
    if not name.startswith("naflex"):
        model, _, inputs = prepared(name)
        return model, inputs
    return (naflex("avg", "axial") if name == "naflex-axial" else naflex(name.partition("-")[2])), patches()


def alone(inputs: dict[str, Tensor], sample: int) -> dict[str, Tensor]:
    """One sample of a batch, without its padding."""
    real = next(inputs[name] for name in ("patch_valid", "pixel_attention_mask") if name in inputs)[sample].bool()
    assert bool(real[: int(real.sum())].all())
    return {
        name: value[sample : sample + 1, : int(real.sum())]
        if value.shape[1] == len(real)
        else value[sample : sample + 1]
        for name, value in inputs.items()
    }
