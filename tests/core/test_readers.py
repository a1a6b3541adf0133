"""Every head of transformers that holds a supported encoder: results of the unpruned shape, or a refusal that says what works.

What is swept is read off the library: heads beside the encoders in their modules, and classes that take one as their backbone.
"""

import copy
import importlib
import inspect

import pytest
import torch
from torch import nn

import saint
from saint import Stage, testing
from saint.errors import UnsupportedModelError
from saint.testing.examples import enliven
from saint.upstream.registry import ENCODERS
from saint.vision.locate import find

hf = pytest.importorskip("transformers")
SIZES = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 24, "patch_size": 4}
SIZES |= {
    "intermediate_size": 48,
    "mlp_ratio": 2,
    "encoder_stride": 4,
    "num_labels": 5,
    "num_patches": 36,
    "projection_dim": 16,
}
TEXT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "vocab_size": 64}
BEIT = {"use_relative_position_bias": True, "out_indices": [1, 2, 3, 4], "pool_scales": (1, 2)}
MAPS = {"out_indices": [1, 2, 3, 4], "reshape_hidden_states": True}
NECK = {"neck_hidden_sizes": [8, 8, 16, 16], "fusion_hidden_size": 16, "reassemble_factors": [4, 2, 1, 0.5]}
PIXELS = torch.randn(3, 3, 24, 24, generator=torch.Generator().manual_seed(0))
PIXELS[0] = nn.functional.interpolate(PIXELS[:1, :, :2, :2], size=24)[0]  # smooth: loses another number of tokens

# the configuration class of each module that has a supported encoder
CONFIGS = {
    "vit": "ViTConfig", "deit": "DeiTConfig", "beit": "BeitConfig", "dinov2": "Dinov2Config", "dinov3_vit": "DINOv3ViTConfig",
    "dinov2_with_registers": "Dinov2WithRegistersConfig", "clip": "CLIPVisionConfig", "siglip": "SiglipVisionConfig",
    "siglip2": "Siglip2VisionConfig",
}  # fmt: skip


def encoder_config(kind, **more):
    more = {**(BEIT if kind == "beit" else {}), **more}
    return getattr(hf, CONFIGS[kind])(**{**SIZES, **more})


def own_heads():
    """(module, class) of every class beside a supported encoder that holds one."""
    found = set()
    for spec in ENCODERS:
        if spec.library != "transformers":
            continue
        place, _, _ = spec.encoder.rpartition(".")
        for name, cls in vars(importlib.import_module(place)).items():
            own = inspect.isclass(cls) and issubclass(cls, hf.PreTrainedModel) and cls.__module__ == place
            if own and not name.endswith(("PreTrainedModel", "Encoder")) and "Text" not in name:
                found.add((place.split(".")[-2], name))
    return sorted(found)


def own_head(kind, name):
    cls, config = getattr(hf, name), encoder_config(kind)
    if not issubclass(cls.config_class, type(config)):  # of both towers
        text = getattr(hf, type(config).__name__.replace("Vision", "Text"))(**TEXT, projection_size=32)
        config = cls.config_class(text_config=text, vision_config=config, projection_dim=16, num_labels=5)
    return enliven(cls(config).eval())


def backbone(kind, folded=True, **more):
    return encoder_config(kind, **{**MAPS, "reshape_hidden_states": folded, **more})


def dual_encoder(kind):
    text = hf.BertConfig(**TEXT)
    config = hf.VisionTextDualEncoderConfig.from_vision_text_configs(encoder_config(kind), text, projection_dim=16)
    return hf.VisionTextDualEncoderModel(config)


def encoder_decoder(kind, decoder="trocr"):
    if decoder == "trocr":
        width = {"d_model": 32, "cross_attention_hidden_size": 32, "vocab_size": 64, "max_position_embeddings": 64}
        text = hf.TrOCRConfig(decoder_layers=2, decoder_attention_heads=2, decoder_ffn_dim=48, **width)
    elif decoder == "gpt2":
        text = hf.GPT2Config(n_embd=48, n_layer=2, n_head=2, vocab_size=64, n_positions=64)
    else:
        text = hf.BertConfig(**TEXT)
    config = hf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder_config(kind), text)
    config.decoder_start_token_id, config.pad_token_id = 2, 0
    return hf.VisionEncoderDecoderModel(config)


OUTSIDE = {
    "dpt": lambda kind: hf.DPTForDepthEstimation(hf.DPTConfig(backbone_config=backbone(kind, folded=False), **NECK)),
    "upernet": lambda kind: hf.UperNetForSemanticSegmentation(
        hf.UperNetConfig(backbone_config=backbone(kind), hidden_size=16, pool_scales=[1, 2], num_labels=5,
                         use_auxiliary_head=True, auxiliary_in_channels=32, auxiliary_channels=8)
    ),
    "depth-anything": lambda kind: hf.DepthAnythingForDepthEstimation(
        hf.DepthAnythingConfig(backbone_config=backbone(kind, folded=False), patch_size=4, reassemble_hidden_size=32,
                               **NECK, head_hidden_size=8)
    ),
    "zoedepth": lambda kind: hf.ZoeDepthForDepthEstimation(
        hf.ZoeDepthConfig(backbone_config=backbone(kind, folded=False), **NECK, bottleneck_features=16, num_relative_features=8,
                          bin_embedding_dim=8, patch_transformer_hidden_size=16, patch_transformer_intermediate_size=16,
                          num_patch_transformer_layers=1, patch_transformer_num_attention_heads=2)
    ),
    "dual-encoder": dual_encoder,
    "encoder-decoder": encoder_decoder,
    "encoder-decoder-gpt2": lambda kind: encoder_decoder(kind, "gpt2"),
    "encoder-decoder-bert": lambda kind: encoder_decoder(kind, "bert"),
}  # fmt: skip
DEPTH = ("dpt", "depth-anything", "zoedepth")  # take one prefix token only
CASES = own_heads()
CASES += [(kind, "upernet") for kind in ("beit", "dinov2", "dinov2_with_registers", "dinov3_vit")]
CASES += [(kind, name) for name in DEPTH for kind in ("beit", "dinov2")]
CASES += [(kind, "dual-encoder") for kind in ("vit", "siglip")]
CASES += [(kind, "encoder-decoder") for kind in ("vit", "deit", "beit", "dinov2", "clip", "siglip")]
CASES += [("vit", "encoder-decoder-gpt2"), ("vit", "encoder-decoder-bert")]
REFUSED = {"Siglip2ForImageClassification"}  # with survivors


def make(kind, name):
    torch.manual_seed(0)
    return enliven(OUTSIDE[name](kind).eval()) if name in OUTSIDE else own_head(kind, name)


def inputs_of(model, name):
    names = inspect.signature(model.forward).parameters
    out = {"pixel_values": PIXELS}
    if name.startswith("Siglip2"):
        patches = PIXELS.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 4, 5, 1).reshape(3, 36, 48)
        out = {"pixel_values": patches, "pixel_attention_mask": torch.ones(3, 36, dtype=torch.long)}
        out["spatial_shapes"] = torch.tensor([[6, 6]] * 3)
    if "input_ids" in names:
        out["input_ids"] = torch.arange(2, 17).view(3, 5)
    if "decoder_input_ids" in names:
        out["decoder_input_ids"] = torch.arange(2, 17).view(3, 5)
    return out


def tensors(out):
    """Results by name: what a head computes, not the rows of the encoder that are returned beside it."""
    rows = (
        "hidden_states",
        "attentions",
        "last_hidden_state",
        "vision_model_output",
        "cache",
        "cross_attentions",
        "text_model_output",
    )
    return {
        (key, i): value
        for key, values in out.items()
        if not key.endswith(rows)
        for i, value in enumerate(values if isinstance(values, tuple | list) else [values])
        if isinstance(value, torch.Tensor)
    }


def shapes(found):
    return {key: tuple(value.shape) for key, value in found.items()}


def run(model, inputs):
    with torch.no_grad():
        return tensors(model(**inputs))


def alone(inputs, sample):
    return {key: value[sample : sample + 1] for key, value in inputs.items()}


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_results_have_the_unpruned_shape_or_the_plan_is_refused(kind, name):
    """A square number of survivors, another one, and numbers that differ between pictures."""
    model = make(kind, name)
    inputs = inputs_of(model, name)
    base = run(model, inputs)
    assert base
    before = testing.snapshot(model)
    output = "survivors"
    if name in REFUSED:
        with pytest.raises(UnsupportedModelError, match='output="similar"'):
            saint.apply(model, Stage(saint.Saint(keep=25), layers=[0, 1]))
        assert testing.snapshot(model) == before
        output = "similar"
    for budget in (25, 24, "sample"):
        stage = Stage(saint.Saint(threshold=0.3, budget=budget), layers=[0, 1], output=output)
        with saint.pruned(model, stage) as session:
            got = run(model, inputs)
            counts = session.trace[-1].tokens_out.tolist()
            assert len(set(counts)) > 1 if budget == "sample" else counts == [budget] * 3
            assert shapes(got) == shapes(base)
            assert any(not torch.equal(got[key], base[key]) for key in base)
            for sample in range(3 if budget == "sample" else 0):
                single = run(model, alone(inputs, sample))
                for key, value in single.items():
                    if value.shape[:1] == (1,) and not key[0].startswith("logits_per"):  # these are of all pairs
                        torch.testing.assert_close(got[key][sample : sample + 1], value, atol=1e-4, rtol=1e-4)
    assert testing.snapshot(model) == before
    again = run(model, inputs)
    assert all(torch.equal(again[key], base[key]) for key in base)


def test_the_sweep_is_not_empty():
    names = {name for _, name in own_heads()}
    assert {"ViTForMaskedImageModeling", "BeitForSemanticSegmentation", "Siglip2ForImageClassification"} <= names
    assert {kind for kind, _ in own_heads()} == set(CONFIGS)


@pytest.mark.parametrize("name", ["ViTForMaskedImageModeling", "BeitForSemanticSegmentation"])
@pytest.mark.parametrize("output", ["similar", "nearest", "carried"])
def test_heads_on_the_grid_take_every_output(name, output):
    model = make({"ViT": "vit", "Bei": "beit"}[name[:3]], name)
    base = run(model, inputs_of(model, name))
    with saint.pruned(model, Stage(saint.Saint(keep=24), layers=[0, 1], output=output)):
        assert shapes(run(model, inputs_of(model, name))) == shapes(base)


# -- decoders that attend to the rows -----------------------------------------------------------------------------------------

RAGGED = Stage(saint.Saint(threshold=0.3), layers=[0, 1])


def test_a_decoder_attends_to_what_it_would_alone_also_in_generation():
    model = make("vit", "encoder-decoder")
    settings = {"max_new_tokens": 6, "num_beams": 2, "do_sample": False, "output_scores": True, "min_new_tokens": 6}
    settings["return_dict_in_generate"] = True
    with torch.no_grad(), saint.pruned(model, RAGGED):
        together = model.generate(pixel_values=PIXELS, **settings)
        for sample in range(3):
            single = model.generate(pixel_values=PIXELS[sample : sample + 1], **settings)
            assert torch.equal(together.sequences[sample], single.sequences[0])
            torch.testing.assert_close(
                together.sequences_scores[sample], single.sequences_scores[0], atol=1e-4, rtol=1e-4
            )


def test_rows_are_hidden_behind_a_projection():
    """Of encoder and decoder of different widths, and of features that were kept from an earlier call."""
    model = make("vit", "encoder-decoder-gpt2")
    assert hasattr(model, "enc_to_dec_proj")
    ids = torch.arange(2, 17).view(3, 5)
    with torch.no_grad(), saint.pruned(model, RAGGED):
        first = model.encoder(PIXELS)
        model(pixel_values=PIXELS.flip(0), decoder_input_ids=ids)  # another forward in between
        logits = model(encoder_outputs=first, decoder_input_ids=ids).logits
        for sample in range(3):
            single = model(pixel_values=PIXELS[sample : sample + 1], decoder_input_ids=ids[sample : sample + 1]).logits
            torch.testing.assert_close(logits[sample : sample + 1], single, atol=1e-4, rtol=1e-4)


class Captions(nn.Module):
    """A model of a user: torch's decoder reads a ViT."""

    def __init__(self):
        super().__init__()
        self.vit = hf.ViTModel(encoder_config("vit"))
        self.words = nn.Embedding(64, 32)
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(32, 2, 48, batch_first=True), 2)

    def forward(self, pixel_values, ids):
        return self.decoder(self.words(ids), self.vit(pixel_values).last_hidden_state)


def test_other_decoders_are_refused_where_rows_may_be_padding():
    torch.manual_seed(0)
    model = enliven(Captions().eval())
    before = testing.snapshot(model)
    for stage in (RAGGED, Stage(saint.Saint(keep=0.5), layers=[1], guard=0.9)):
        with pytest.raises(UnsupportedModelError, match=r'a fraction as keep .* or output="similar".*model.vit'):
            saint.apply(model, stage)
    assert testing.snapshot(model) == before
    ids = torch.arange(2, 17).view(3, 5)
    for stage in (
        Stage(saint.Saint(keep=0.5), layers=[1]),
        Stage(saint.Saint(threshold=0.3), layers=[1], output="similar"),
    ):
        with torch.no_grad(), saint.pruned(model, stage):
            out = model(PIXELS, ids)
            for sample in range(3):
                single = model(PIXELS[sample : sample + 1], ids[sample : sample + 1])
                torch.testing.assert_close(out[sample : sample + 1], single, atol=1e-4, rtol=1e-4)


def test_a_copy_of_a_reader_is_without_the_plan():
    for kind, name in (("vit", "ViTForMaskedImageModeling"), ("vit", "encoder-decoder-gpt2")):
        model = make(kind, name)
        inputs, before = inputs_of(model, name), testing.snapshot(model)
        base = run(model, inputs)
        with saint.apply(model, RAGGED):
            twin = copy.deepcopy(model)
        assert testing.snapshot(twin) == before
        assert all(torch.equal(value, base[key]) for key, value in run(twin, inputs).items())
        assert find(twin)
