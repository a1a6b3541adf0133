"""What a plan may be applied to is read off the model: families that are not known, wrappers, heads."""

import types
import warnings

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import saint
from saint import Plan, Stage, testing
from saint.errors import UnsupportedModelError
from saint.language.locate import find as find_text
from saint.methods import DivPrune
from saint.upstream.decoders import TEXT
from saint.upstream.tiny import make, text_config, tower_config
from saint.vision.locate import find as find_encoders
from saint.vlm.locate import find as find_family
from support.families import FAMILIES, prompts
from support.models import snapshot

hf = pytest.importorskip("transformers")

STAGE = Stage(saint.Saint(keep=0.7), layers=[0, 1])
LANGUAGE = Plan(language=Stage(saint.Saint(keep=0.6), layers=[1]))
PLANS = {
    "vision": Plan(vision=STAGE),
    "connector": Plan(connector=Stage(DivPrune(keep=0.5))),
    "language": LANGUAGE,
    "hybrid": Plan(vision=STAGE, language=LANGUAGE.language),
}


# -- vision-language models of no known family -----------------------------------------------------------------------------


def every_vlm():
    """Models on the meta device of all such classes that can hold a CLIP tower and a Llama."""
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    for kind, name in modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.items():
        parts = hf.CLIPVisionConfig(**tower_config()).to_dict(), hf.LlamaConfig(**text_config()).to_dict()
        try:
            config = CONFIG_MAPPING[kind](vision_config=parts[0], text_config=parts[1])
            with torch.device("meta"):
                model = getattr(hf, name if isinstance(name, str) else name[0])(config)
        except Exception:  # a class that takes other parts; the number of those that do not is held below
            continue
        if find_encoders(model):
            yield kind, model


def test_every_vision_language_model_is_of_a_family_or_refused_with_its_tower():
    unknown = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        models = dict(every_vlm())
    for kind, model in models.items():
        if find_family(model) is not None:
            continue
        unknown.append(kind)
        tower = find_encoders(model)[0][0]
        for plan in PLANS.values():
            with pytest.raises(UnsupportedModelError, match="of no known family") as error:
                saint.apply(model, plan)
            assert f"saint.apply(model.{tower}, ...)" in str(error.value)
        with pytest.raises(UnsupportedModelError, match="of no known family"):
            saint.apply(Held(model), PLANS["vision"])
    read_off = {"vipllava", "aya_vision", "cohere2_vision", "deepseek_vl", "llava_next_video", "lfm2_vl", "video_llava"}
    assert {"llava", "llava_next", "gemma3"} | read_off <= models.keys() - set(unknown)


class Held(nn.Module):
    """A wrapper that nobody knows."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


def vipllava():
    clip, llama = hf.CLIPVisionConfig(**tower_config()), hf.LlamaConfig(**text_config())
    config = hf.VipLlavaConfig(
        vision_config=clip, text_config=llama, image_token_index=100, vision_feature_layers=[-2, -3]
    )
    return make(hf.VipLlavaForConditionalGeneration, config), 36


def test_the_part_that_is_named_works():
    """The tower alone, at full length: the model around it runs, on other features."""
    model, count = vipllava()
    ids = torch.cat([torch.full((2, 3), 5), torch.full((2, count), 100), torch.arange(8, 16).view(2, 4)], 1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(2, 3, 24, 24)}
    with pytest.raises(UnsupportedModelError) as error:
        saint.apply(model, STAGE)
    tower = model.get_submodule(str(error.value).partition("saint.apply(model.")[2].partition(",")[0])
    with torch.no_grad():
        base = model(**inputs).logits
        with saint.pruned(tower, Stage(saint.Saint(threshold=0.3), layers=[0, 1], output="similar")) as session:
            got = model(**inputs).logits
            assert len(session.trace) == 2
            assert got.shape == base.shape
            assert not torch.equal(got, base)
            single = model(**{key: value[1:] for key, value in inputs.items()}).logits
            torch.testing.assert_close(got[1:], single, atol=1e-4, rtol=1e-4)
        assert torch.equal(model(**inputs).logits, base)


def test_a_model_of_a_user_that_feeds_a_language_model():
    class Mine(nn.Module):
        def __init__(self):
            super().__init__()
            self.eyes = hf.CLIPVisionModel(hf.CLIPVisionConfig(**tower_config()))
            self.llm = hf.OPTForCausalLM(
                hf.OPTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, ffn_dim=32, vocab_size=64,
                             word_embed_proj_dim=32, max_position_embeddings=64)
            )  # fmt: skip

    with pytest.raises(
        UnsupportedModelError, match=r"llm \(OPTForCausalLM\) is a language model .* saint.apply\(model.eyes"
    ):
        saint.apply(Mine(), STAGE)


def dual_encoders():
    clip, text = hf.CLIPVisionConfig(**tower_config()), hf.LlamaConfig(**text_config())
    siglip = hf.SiglipVisionConfig(**tower_config())
    small = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "vocab_size": 64,
    }
    of_bert = hf.VisionTextDualEncoderConfig.from_vision_text_configs(clip, hf.BertConfig(**small), projection_dim=16)
    of_llama = hf.VisionTextDualEncoderConfig.from_vision_text_configs(clip, text, projection_dim=16)
    return {
        "clip": hf.CLIPModel(
            hf.CLIPConfig(text_config=hf.CLIPTextConfig(**small), vision_config=clip, projection_dim=16)
        ),
        "siglip": hf.SiglipModel(
            hf.SiglipConfig(text_config=hf.SiglipTextConfig(**small, projection_size=64), vision_config=siglip)
        ),
        "of bert": hf.VisionTextDualEncoderModel(of_bert),
        "of llama": hf.VisionTextDualEncoderModel(of_llama),
    }


def test_dual_encoders_are_none_of_them():
    for name, model in dual_encoders().items():
        with torch.no_grad(), saint.pruned(model.eval(), STAGE) as session:
            model.get_image_features(pixel_values=torch.randn(2, 3, 24, 24))
            assert session.trace[-1].tokens_out.tolist() == [25, 25], name
        with pytest.raises(UnsupportedModelError, match="none that is known"):
            saint.apply(model, LANGUAGE)


# -- language models inside others -------------------------------------------------------------------------------------------


def seeded(cls, config):
    torch.manual_seed(0)
    return cls(config).eval()


def llama(cls=None):
    return seeded(cls or hf.LlamaForCausalLM, hf.LlamaConfig(**text_config()))


IDS = torch.randint(2, 99, (2, 14), generator=torch.Generator().manual_seed(0))


def lora(model, **config):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "k_proj"], **config)).eval()


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    store = torch.distributed.FileStore(str(tmp_path_factory.mktemp("store") / "file"), 1)
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=store)
    yield
    torch.distributed.destroy_process_group()


def sharded(model):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (1,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


WRAPPERS = {
    "lora": lora,
    "lora for its task": lambda m: lora(m, task_type="CAUSAL_LM"),
    "ddp": DistributedDataParallel,
    "lora in ddp": lambda m: DistributedDataParallel(lora(m)),
    "fsdp2": sharded,
}


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_wrappers_are_looked_through(group, wrap):
    model = llama()
    with torch.no_grad():
        base = model(IDS).logits
        with saint.apply(model, LANGUAGE) as session:
            expected, kept = model(IDS).logits, session.trace[0].kept
        assert not torch.equal(expected, base)
        outer = WRAPPERS[wrap](model)
        before = testing.snapshot(outer)
        with saint.apply(outer, LANGUAGE) as session:
            torch.testing.assert_close(outer(input_ids=IDS).logits, expected)
            assert all(map(torch.equal, session.trace[0].kept, kept))
        assert testing.snapshot(outer) == before
        torch.testing.assert_close(outer(input_ids=IDS).logits, base)


@pytest.mark.parametrize("name", sorted({title for title in TEXT.values()}))
def test_heads_for_one_answer(name):
    """Read off the last token, which never goes."""
    path = next(path for path, title in TEXT.items() if title == name)
    config = {"llama": "LlamaConfig", "mistral": "MistralConfig", "qwen2": "Qwen2Config", "qwen3": "Qwen3Config",
              "gemma": "GemmaConfig", "gemma3": "Gemma3TextConfig"}[path.split(".")[-2].removeprefix("modeling_")]  # fmt: skip
    cls = getattr(hf, path.rpartition(".")[2].removesuffix("Model") + "ForSequenceClassification")
    more = {"sliding_window": None} if name == "Mistral" else {}
    model = seeded(cls, getattr(hf, config)(**text_config(**more), num_labels=3))
    with torch.no_grad():
        base = model(IDS).logits
        with saint.pruned(model, LANGUAGE) as session:
            got = model(IDS).logits
            hidden = model.model(IDS).last_hidden_state
            assert len(session.trace) == 1
        assert got.shape == base.shape
        assert not torch.equal(got, base)
        torch.testing.assert_close(got, model.score(hidden[:, -1]))


class Mine(hf.LlamaForCausalLM):
    """May bring images."""


@pytest.mark.parametrize(
    ("build", "part"),
    [
        (lambda: Held(llama()), "inner.model"),
        (lambda: llama(Mine), "model"),
        (lambda: llama(hf.LlamaForTokenClassification), "model"),
        (lambda: llama(hf.LlamaForQuestionAnswering), "transformer"),
        (lambda: lora(llama(hf.LlamaForTokenClassification)), "base_model.model.model"),
    ],
    ids=["wrapper", "subclass", "token classification", "question answering", "lora on token classification"],
)
def test_what_is_not_understood_is_refused_with_the_part_to_pass(build, part):
    model = build()
    before = testing.snapshot(model)
    with pytest.raises(
        UnsupportedModelError, match=rf"holds a language model at {part} \(Llama\).* saint.apply\(model.{part}, "
    ):
        saint.apply(model, LANGUAGE)
    assert testing.snapshot(model) == before
    saint.apply(model.get_submodule(part), LANGUAGE).remove()


def test_adapters_that_add_tokens_to_the_prompt():
    peft = pytest.importorskip("peft")
    for config in (peft.PromptTuningConfig, peft.PrefixTuningConfig):
        model = peft.get_peft_model(llama(), config(task_type="CAUSAL_LM", num_virtual_tokens=3))
        assert find_text(model) is None
        with pytest.raises(
            UnsupportedModelError, match=r"PeftModelForCausalLM holds a language model at base_model.model"
        ):
            saint.apply(model, LANGUAGE)


def test_a_compiled_model_is_refused_wherever_it_is():
    for model in (torch.compile(llama()), lora(torch.compile(llama()))):
        with pytest.raises(UnsupportedModelError, match="the model is compiled"):
            saint.apply(model, LANGUAGE)


def test_a_vision_language_model_inside_wrappers(group):
    family = FAMILIES["llava-llama"]
    model = family.build()
    inputs = prompts(family, model, [[3, "0", 4], [2, "0", 6]])
    with torch.no_grad():
        with saint.apply(model, PLANS["hybrid"]):
            expected = model(**inputs).logits
        for outer in (Held(model), types.SimpleNamespace(model=model), DistributedDataParallel(model)):
            with saint.apply(outer, PLANS["hybrid"]):
                assert torch.equal(getattr(outer, "model", outer)(**inputs).logits, expected)


# -- parts of vision-language models ------------------------------------------------------------------------------------------

PARTS = {
    "tower": ("vision_tower", Plan(vision=STAGE)),
    "tower of full length": (
        "vision_tower",
        Plan(vision=Stage(saint.Saint(keep=0.7), layers=[0, 1], output="similar")),
    ),
    "language model": ("language_model", LANGUAGE),
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", ["llava-llama", "gemma3"])
def test_a_part_that_was_pruned_alone_is_refused_inside_the_whole_model(name, part):
    """Its model would end in an error of its own, or lose text without a word; alone the part runs."""
    family = FAMILIES[name]
    model = family.build()
    inputs = prompts(family, model, [[4, "0", 7]])
    path, plan = PARTS[part]
    inner = getattr(model.model, path)
    before = snapshot(model)
    with saint.pruned(inner, plan):
        with pytest.raises(
            UnsupportedModelError, match=r"alone, and this forward runs it as a part of .*the whole model"
        ):
            model.generate(**inputs, max_new_tokens=2)
        if path == "vision_tower":
            inner(inputs["pixel_values"])
    assert snapshot(model) == before
    model.generate(**inputs, max_new_tokens=2)


def test_a_recipe_of_another_family_says_so():
    for name, said in (("qwen2-vl", True), ("llava-llama", False)):
        model = FAMILIES[name].build()
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            saint.apply(model, "llava-1.5/divprune-64").remove()
            saint.apply(model, saint.plan("llava-1.5/divprune-64")).remove()  # a plan of one's own by now
        told = [str(one.message) for one in seen if "is made for LLaVA-1.5, and this is Qwen2-VL" in str(one.message)]
        assert len(told) == said


def test_looking_for_the_whole_costs_one_forward():
    model = hf.CLIPVisionModel(hf.CLIPVisionConfig(**tower_config())).eval()
    with saint.pruned(model, Plan(vision=STAGE)), torch.no_grad():
        watching = sum(len(m._forward_pre_hooks) for m in model.modules())
        model(torch.randn(1, 3, 24, 24))
        assert sum(len(m._forward_pre_hooks) for m in model.modules()) == watching - 1
