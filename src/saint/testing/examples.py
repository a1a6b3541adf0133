"""Inputs and plans for a model that comes without any: pictures of different redundancy, a threshold that drops some."""

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ..methods.saint import Saint
from ..plans import Plan, Stage
from ..session import pruned
from ..vision.inputs import own_size
from ..vision.locate import locate
from .outputs import Inputs, run


def example_inputs(model: nn.Module, batch: int = 3, seed: int = 0) -> dict[str, Tensor]:
    """Random pictures of very different redundancy for a supported encoder: noise, flat with noise, half and half, ...

    Args:
        model: holds one supported encoder.
        batch: B.
        seed: of a private generator.

    Returns:
        Keyword inputs of ``model.forward``.
    """
    _, encoder, spec = locate(model)
    generator = torch.Generator().manual_seed(seed)
    parameter = next(p for p in encoder.parameters() if p.is_floating_point())
    config = getattr(encoder, "config", None)
    if spec.patch is None:  # patches arrive flattened and padded (SigLIP 2 NaFlex)
        return _flattened_inputs(config, batch, generator, parameter)
    height, width = own_size(encoder) or (224, 224)
    noise = torch.randn(batch, 3, height, width, generator=generator)
    calm = torch.randn(batch, 3, 1, 1, generator=generator) + 0.1 * noise
    images = noise.clone()
    for sample in range(batch):
        rows = height * (sample % 3) // 2  # none, half, all of the picture is calm
        images[sample, :, :rows] = calm[sample, :, :rows]
    name = getattr(model, "main_input_name", None) or "x"
    if not hasattr(model, "main_input_name") and config is not None:
        name = "pixel_values"
    return {name: images.to(parameter)}


def _flattened_inputs(config: Any, batch: int, generator: torch.Generator, like: Tensor) -> dict[str, Tensor]:
    side = int(config.num_patches**0.5)
    shapes = torch.tensor([(side, side - sample % 3) for sample in range(batch)])
    count = side * side
    pixels = torch.randn(batch, count, config.num_channels * config.patch_size**2, generator=generator)
    for sample in range(batch):
        calm = count * (sample % 3) // 2
        pixels[sample, :calm] = pixels[sample, :1] + 0.1 * pixels[sample, :calm]
    mask = torch.arange(count) < shapes.prod(1, keepdim=True)
    return {
        "pixel_values": (pixels * mask.unsqueeze(-1)).to(like),
        "pixel_attention_mask": mask.long().to(like.device),
        "spatial_shapes": shapes.to(like.device),
    }


def example_plan(model: nn.Module, inputs: Inputs, **stage: Any) -> Plan:
    """A voting plan under which ``inputs`` really lose tokens, and samples lose different numbers of them.

    Random weights have no meaningful threshold; this searches for one.

    Raises:
        ValueError: no threshold drops anything.
    """
    fallback = None
    for threshold in (0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.3, 0.1, -0.1, -0.3, -0.5):
        method = Saint(threshold=threshold, neighbors=2, center=True, floor=0.05)
        plan = Plan(vision=Stage(method, **stage))
        with pruned(model, plan) as session, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run(model, inputs)
            trace = session.trace
        dropped = trace[-1].tokens_out < trace[0].tokens_in
        if dropped.any():
            fallback = fallback or plan
            if len(set(trace[-1].tokens_out.tolist())) > 1:
                return plan
    if fallback is None:
        raise ValueError("no threshold makes these inputs lose tokens")
    return fallback


def poisoned(value: Tensor) -> Tensor:
    """A copy whose first sample is NaN, of a floating-point tensor [B, ...]; any other tensor itself."""
    return (
        value.clone().index_fill_(0, torch.zeros(1, dtype=torch.long, device=value.device), torch.nan)
        if value.is_floating_point()
        else value
    )


def enliven(model: nn.Module) -> nn.Module:
    """Weights under which every layer and every branch shows in the output."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if any(word in key for word in ("gamma", "lambda1", "ls1", "ls2", "layer_scale")):
                parameter.copy_(0.5 + 0.1 * torch.randn(parameter.shape, generator=generator))  # 1e-5 hides every error
            elif parameter.ndim < 2 or any(word in key for word in ("token", "pos", "probe", "latent", "relative")):
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
            else:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter[0].numel() ** -0.5)
    return model
