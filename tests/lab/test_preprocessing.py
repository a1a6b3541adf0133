"""The pixels a model gets are those its own library would give it: colourful pictures, wider than high and higher than wide."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from PIL import Image

from saint.lab import demo
from saint.lab.demo import small_llava
from saint.lab.kinds import Encoder
from saint.lab.view import overlay
from support.models import build


def photo(width: int, height: int) -> Image.Image:
    """Red grows to the right, green downwards, blue is a checkerboard; every channel has its own mean and spread."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    checks = (np.indices((height, width)) // 9).sum(0) % 2
    return Image.fromarray((255 * np.stack([x, 0.2 + 0.5 * y**2, 0.1 + 0.25 * checks], -1)).round().astype(np.uint8))


PHOTOS = [photo(300, 200), photo(190, 280)]


def close(a: torch.Tensor, b: torch.Tensor, atol: float = 1e-5) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() <= atol)


def drawn(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float()


def shows(loaded, picture: Image.Image) -> None:
    """``picture()`` is what ``preprocess`` gives, without the normalisation, at twice the resolution."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in loaded.source.norm())
    pixels = ((loaded.preprocess(picture) * std + mean) * 255).clamp(0, 255)
    once, twice = drawn(loaded.picture(picture, 1)), drawn(loaded.picture(picture))
    assert close(once, pixels, 0.51)
    height, width = loaded.image_size
    assert twice.shape == (3, 2 * height, 2 * width)
    small = torch.nn.functional.avg_pool2d(twice[None], 2)[0]
    assert (small - pixels).abs()[:2].mean() < 4, "another crop or other colours"
    assert ((small - pixels).abs().mean((1, 2)) < 25).all()
    # colours are those of the photograph: the middle of the crop is the middle of the picture
    middle = picture.getpixel((picture.width // 2, picture.height // 2))
    assert (twice[:2, height, width] - torch.tensor(middle[:2]).float()).abs().max() < 6


def literal(picture: Image.Image, side: int, crop: float, mean, std) -> torch.Tensor:
    """Resize the short side to side / crop, cut the middle out, normalise: Pillow and arithmetic only."""
    short = math.floor(side / crop)
    scale = short / min(picture.size)
    size = tuple(short if edge == min(picture.size) else int(edge * scale) for edge in picture.size)
    big = picture.resize(size, Image.Resampling.BICUBIC)
    left, top = round((size[0] - side) / 2), round((size[1] - side) / 2)
    array = np.array(big.crop((left, top, left + side, top + side))).astype(np.float32) / 255
    return torch.from_numpy(((array - np.array(mean)) / np.array(std)).astype(np.float32)).permute(2, 0, 1)


@pytest.mark.parametrize("picture", PHOTOS, ids=["wide", "high"])
@pytest.mark.parametrize("name", ["test_vit", "deit_tiny_patch16_224", "vit_tiny_patch16_224"])
def test_timm(name, picture):
    import timm

    loaded = Encoder.load(f"timm:{name}", pretrained=False)
    cfg = timm.get_pretrained_cfg(name)
    want = timm.data.create_transform(
        input_size=cfg.input_size, mean=cfg.mean, std=cfg.std, interpolation=cfg.interpolation, crop_pct=cfg.crop_pct
    )(picture)
    got = loaded.preprocess(picture)
    assert loaded.image_size == cfg.input_size[1:]
    assert torch.equal(got, want)
    assert close(got, literal(picture, cfg.input_size[1], cfg.crop_pct, cfg.mean, cfg.std), 0.02)
    assert cfg.crop_pct < 1
    shows(loaded, picture)
    assert torch.equal(loaded.pixels([picture, picture])["x"][1], want)


def test_timm_at_another_size():
    import timm

    loaded = Encoder.load("timm:test_vit", pretrained=False, size=96)
    cfg = timm.get_pretrained_cfg("test_vit")
    assert (loaded.image_size, loaded.grid) == ((96, 96), (6, 6))
    want = literal(PHOTOS[0], 96, cfg.crop_pct, cfg.mean, cfg.std)
    assert close(loaded.preprocess(PHOTOS[0]), want, 0.02)


def test_height_comes_before_width():
    loaded = Encoder.load("timm:test_vit", pretrained=False)
    loaded = dataclasses.replace(loaded, source=loaded.source._replace(image_size=(64, 96)))
    assert loaded.grid == (4, 6)
    assert loaded.preprocess(PHOTOS[0]).shape == (3, 64, 96)
    assert loaded.picture(PHOTOS[0]).size == (192, 128)


@pytest.mark.parametrize("picture", PHOTOS, ids=["wide", "high"])
def test_open_clip(picture):
    import open_clip

    loaded = Encoder.load("open_clip:ViT-S-32-alt/none")
    _, _, transform = open_clip.create_model_and_transforms("ViT-S-32-alt", pretrained=None)
    want = transform(picture)
    assert torch.equal(loaded.preprocess(picture), want)
    assert close(want, literal(picture, 224, 1.0, open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD), 0.05)
    shows(loaded, picture)


PROCESSORS = {
    # resize the short side, then crop less than that
    "crop": lambda hf: hf.CLIPImageProcessor(
        size={"shortest_edge": 120},
        crop_size={"height": 96, "width": 96},
        image_mean=[0.3, 0.5, 0.2],
        image_std=[0.2, 0.3, 0.4],
    ),
    # squeeze the whole picture into the square
    "squeeze": lambda hf: hf.ViTImageProcessor(
        size={"height": 96, "width": 96}, image_mean=[0.6, 0.4, 0.1], image_std=[0.5, 0.25, 0.3]
    ),
}


@pytest.mark.parametrize("picture", PHOTOS, ids=["wide", "high"])
@pytest.mark.parametrize("kind", PROCESSORS)
def test_transformers(kind, picture, tmp_path):
    import transformers

    processor = PROCESSORS[kind](transformers)
    build("transformers/vit").save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = Encoder.load(f"hf:{tmp_path}")
    want = processor(images=picture, return_tensors="pt")["pixel_values"][0]
    assert torch.equal(loaded.preprocess(picture), want)
    assert torch.equal(loaded.pixels([picture])["pixel_values"][0], want)
    if kind == "crop":
        assert close(want, literal(picture, 96, 96 / 120, processor.image_mean, processor.image_std), 0.1)
        shows(loaded, picture)
        twice = processor(
            images=picture, return_tensors="pt", size={"shortest_edge": 240}, crop_size={"height": 192, "width": 192}
        )["pixel_values"][0]
    else:
        twice = processor(images=picture, return_tensors="pt", size={"height": 192, "width": 192})["pixel_values"][0]
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (processor.image_mean, processor.image_std))
    assert close(drawn(loaded.picture(picture)), ((twice * std + mean) * 255).clamp(0, 255), 0.51)
    larger = Encoder.load(f"hf:{tmp_path}", size=128)
    scaled = (
        {"size": {"shortest_edge": 160}, "crop_size": {"height": 128, "width": 128}}
        if kind == "crop"
        else {"size": {"height": 128, "width": 128}}
    )
    assert torch.equal(
        larger.preprocess(picture), processor(images=picture, return_tensors="pt", **scaled)["pixel_values"][0]
    )


@pytest.mark.parametrize("picture", PHOTOS, ids=["wide", "high"])
def test_demo_models(picture):
    """Without their weights: the constants are those that OpenAI and the DINOv2 authors normalise with."""
    from transformers import image_utils

    known = {
        "clip-b16": (image_utils.OPENAI_CLIP_MEAN, image_utils.OPENAI_CLIP_STD),
        "dinov2-s": (image_utils.IMAGENET_DEFAULT_MEAN, image_utils.IMAGENET_DEFAULT_STD),
    }
    assert set(known) == set(demo.MODELS)
    for name, (mean, std) in known.items():
        facts = demo.MODELS[name]
        assert facts.mean == pytest.approx(mean)
        assert facts.std == pytest.approx(std)
        for size in (96, 224):
            got = facts.preprocess(picture, size)
            assert got.shape == (3, size, size)
            # the checkerboard is where resampling before and after the crop differ
            assert close(got[:2], literal(picture, size, 1.0, mean, std)[:2], 0.06)
            assert (got - literal(picture, size, 1.0, mean, std)).abs().mean() < 0.1
        assert facts.preprocess(picture).shape == (3, facts.image_sizes[0], facts.image_sizes[0])


@pytest.mark.parametrize("picture", PHOTOS, ids=["wide", "high"])
def test_the_small_llava_sees_what_its_tower_was_made_for(picture):
    processor, tower = small_llava.processor(), demo.MODELS["clip-b16"]
    made = processor(images=picture, text="<image> what color is the star", return_tensors="pt")
    (pixels,) = made["pixel_values"]
    assert close(pixels, literal(picture, 224, 1.0, tower.mean, tower.std), 0.06)


def test_patches_of_a_picture_that_is_not_square():
    """Rows and columns of the grid are not exchanged when what was dropped is drawn."""
    picture = Image.new("RGB", (60, 20), (10, 20, 30))
    out = np.array(overlay(picture, [1, 5], (2, 6)))  # cells of 10 x 10: the second of the first row, the last of it
    kept = (out == (10, 20, 30)).all(-1)
    want = np.zeros((20, 60), dtype=bool)
    want[:10, 10:20] = want[:10, 50:60] = True
    assert (kept == want).all()
