"""Families that no spec is written for: read off the instance, admitted by contracts on a twin."""

import json

import pytest
import torch
import transformers as hf

import saint
from saint import admission
from saint.errors import UnsupportedModelError
from saint.files import cache_dir
from saint.testing import shrink, twins, zoo
from saint.testing.removal import removal_oracle
from saint.testing.shrink import configs, shrunken
from saint.upstream.derive import MERGES, derive
from saint.upstream.names import ENCODED, Parameters, Role
from saint.upstream.specs import part
from saint.vision import derive as vision_derive
from saint.vlm.locate import find
from support.decoders import pad_behind
from support.families import FAMILIES
from support.oracles import relative_error

PLAN = saint.Plan(connector=saint.SaintFullGraph(keep=0.6))
TYPES = zoo.types()

if not Parameters(hf.LlavaForConditionalGeneration.forward).has(ENCODED):
    pytest.skip("this release takes no features that were computed earlier", allow_module_level=True)


def here(*names):
    return [name for name in names if name in TYPES]


@pytest.fixture
def alone(monkeypatch, tmp_path):
    """Nothing is known of any derived family."""
    monkeypatch.setattr(admission, "_seen", {})
    monkeypatch.setattr(admission, "_shipped", lambda: "{}")
    monkeypatch.setattr(admission, "_file", lambda: cache_dir() / "admitted.json")
    monkeypatch.setenv("SAINT_CACHE", str(tmp_path))
    return tmp_path / "admitted.json"


# -- what is read off -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_read_off_is_what_is_written(name):
    model = FAMILIES[name].build()
    path, vlm, written = find(model)
    assert not written.derived
    merging = [(place, one) for place, one in model.named_modules() if any(hasattr(one, name) for name in MERGES)]
    again, inner, derived = derive(merging)

    assert (again, inner) == (path, vlm)
    assert derived.derived
    assert derived.decoder == written.decoder
    assert derived.tower == written.tower
    assert derived.model == written.model
    assert {str(role) for role in written.pixels} <= {str(role) for role in derived.pixels}


@pytest.mark.parametrize("name", here("mistral3", "gemma4", "llama4", "aria"))
def test_the_decoder_owns_layers_and_the_tower_is_the_tower(name):
    model = zoo.build(name)
    _, vlm, spec = find(model)

    assert spec.derived
    assert len(part(vlm, spec.decoder).layers) >= 2
    assert "ision" in type(part(vlm, spec.tower)).__name__ or spec.tower in ("", "vision_tower")


def test_a_language_model_and_an_encoder_are_no_family():
    for model in (
        hf.LlamaForCausalLM(shrunken(hf.LlamaConfig())),
        hf.CLIPModel(shrunken(hf.CLIPConfig())),
    ):
        assert find(model) is None


# -- twins ------------------------------------------------------------------------------------------------------------


def test_a_twin_has_every_kind_of_layer_and_is_small():
    config = hf.Qwen3VLConfig()
    kinds = ["sliding_attention"] * 5 + ["full_attention"]
    gemma = hf.Gemma3Config(text_config={"layer_types": kinds * 4, "num_hidden_layers": 24})
    for given in (config, gemma):
        small = shrunken(given)
        assert sum(p.numel() for p in zoo.grown(_class(small), small).parameters()) < 3_000_000
    assert set(shrunken(gemma).text_config.layer_types) == {"sliding_attention", "full_attention"}
    assert len(gemma.text_config.layer_types) == 24, "the given configuration was changed"
    tower = shrunken(config).vision_config
    assert all(layer < tower.depth for layer in tower.deepstack_visual_indexes)


def _class(config):
    return getattr(hf, TYPES[config.model_type])


def test_layers_with_shared_keys_and_settings_of_their_own_stay():
    if "gemma4" not in TYPES:
        pytest.skip("not in this release")
    given = hf.Gemma4Config(text_config={"num_kv_shared_layers": 10})
    small = shrunken(given).text_config
    assert 0 < small.num_kv_shared_layers < small.num_hidden_layers
    heads = {small.per_layer_config[layer].head_dim for layer in range(small.num_hidden_layers)}
    assert heads == {32}


def test_special_tokens_stay_apart():
    small = shrunken(hf.Qwen3VLConfig())
    tokens = [
        value for one in configs(small) for name, value in vars(one).items() if name.endswith("token_id") and value
    ]
    assert max(tokens) < small.text_config.vocab_size
    assert small.image_token_id != small.video_token_id


def test_a_prompt_is_the_same_alone_and_beside_the_other():
    make = twins.Prompts(zoo.build("llava"))
    both, first = make([0, 1]), make([0])
    length = int(first["attention_mask"].sum())
    assert torch.equal(both["input_ids"][0, -length:], first["input_ids"][0])
    assert torch.equal(
        both["mm_encoder_outputs"]["image"].pooler_output[0], first["mm_encoder_outputs"]["image"].pooler_output[0]
    )
    assert not torch.equal(both["input_ids"][0], both["input_ids"][1])


def test_a_model_whose_widths_cannot_be_cut_has_a_twin_as_wide_as_itself(alone, monkeypatch):
    model = zoo.build("llava_next_video")
    monkeypatch.setattr(twins, "SMALL", 0)

    def narrow(config, grids):
        raise ValueError("widths of this class depend on each other")

    monkeypatch.setattr(shrink, "_narrow", narrow)
    small, _ = twins.twin(model)
    assert type(small) is type(model)
    assert small.config.text_config.hidden_size == model.config.text_config.hidden_size
    monkeypatch.setattr(twins, "WIDE", 0)
    with pytest.raises(UnsupportedModelError, match="no twin of it runs .*depend on each other"):
        twins.twin(model)


# -- what is proved ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", here("aya_vision", "mistral3", "kimi_k25", "qwen3_5", "gemma4_unified", "lfm2_vl"))
def test_a_derived_family_equals_the_oracle(name):
    model = zoo.build(name)
    make = twins.Prompts(model)
    inputs = make([0, 1])

    with saint.pruned(model, PLAN) as session, torch.no_grad():
        got = model(**inputs).logits
        trace = session.trace
    want, _ = removal_oracle(model, PLAN, inputs)

    assert trace[0].tokens_out.tolist() == [round(0.6 * n) for n in trace[0].tokens_in.tolist()]
    words = inputs["attention_mask"].bool() & (inputs["input_ids"] != make.image)
    if getattr(model.get_decoder().config, "sliding_window", None) != 24:  # the end of a window moves with a removal
        assert relative_error(got[words], want["logits"][words]) < 1e-4
    with torch.no_grad():
        assert relative_error(model(**inputs).logits[words], got[words]) > 1e-3


def test_what_was_proved_is_remembered(alone, monkeypatch):
    proofs = []
    prove = admission.prove
    monkeypatch.setattr(admission, "prove", lambda *given: proofs.append(given) or prove(*given))
    model = zoo.build("llava_next_video")

    saint.apply(model, PLAN).remove()
    saint.apply(model, PLAN).remove()
    assert len(proofs) == 1
    remembered = json.loads(alone.read_text())
    assert [name.partition(" ")[0].rpartition(".")[2] for name in remembered] == ["LlavaNextVideoModel"]

    monkeypatch.setattr(admission, "_seen", {})  # as in another process
    saint.apply(model, PLAN).remove()
    assert len(proofs) == 1
    alone.write_text("{ cut off")
    monkeypatch.setattr(admission, "_seen", {})
    saint.apply(model, PLAN).remove()
    assert len(proofs) == 2
    assert json.loads(alone.read_text()) == remembered


def test_a_cache_that_cannot_be_written_is_said(alone, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SAINT_CACHE", str(tmp_path / "file" / "below"))
    with pytest.warns(UserWarning, match="not remembered"):
        saint.apply(zoo.build("llava_next_video"), PLAN).remove()


def test_a_contract_that_fails_refuses_the_model(alone, monkeypatch):
    """Padding behind the survivors passes through the state of recurrent layers: an answer would be wrong, silently."""
    if "qwen3_5" not in TYPES:
        pytest.skip("not in this release")
    pad_behind(monkeypatch)
    model = zoo.build("qwen3_5")
    before = saint.testing.contracts.snapshot(model)
    with pytest.raises(
        UnsupportedModelError,
        match=r"connector stage was not proved on a small twin of it: removal oracle: logits of new",
    ):
        saint.apply(model, PLAN)
    assert saint.testing.contracts.snapshot(model) == before


def test_a_class_that_takes_no_features_is_refused_with_the_reason(alone, monkeypatch):
    model = zoo.build("llava_next_video")
    monkeypatch.setattr(twins, "ENCODED", Role("no_such_argument"))
    with pytest.raises(UnsupportedModelError, match="takes no no_such_argument"):
        saint.apply(model, PLAN)


def test_features_of_sounds_stay():
    name = "gemma4_unified" if "gemma4_unified" in TYPES else "gemma3n"
    model = zoo.build(name)
    inputs = twins.Prompts(model)([0])
    sound = model.config.audio_token_id
    inputs["input_ids"][0, 1] = sound
    with saint.pruned(model, saint.Plan(connector=saint.SaintFullGraph(keep=0.5))) as session, torch.no_grad():
        model(**inputs)
        assert session.trace[0].tokens_in.tolist() == [int((inputs["input_ids"] == model.config.image_token_id).sum())]


def test_observers_and_plans_do_without_a_tower_that_is_not_understood(monkeypatch):
    model = zoo.build("aria")
    inputs = twins.Prompts(model)([0])
    looked = []
    measure = vision_derive._facts
    monkeypatch.setattr(vision_derive, "_facts", lambda *given: looked.append(1) or measure(*given))
    counted = int((inputs["input_ids"] == model.config.image_token_index).sum())
    assert saint.planning.work_of(model, inputs).shape.visual == counted
    assert saint.plan_for(model, keep=0.7, inputs=inputs).slots
    assert len(looked) == 1, "its tower was measured more than once"


# -- the sweep --------------------------------------------------------------------------------------------------------


def test_the_sweep_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    table, proved = tmp_path / "table.csv", tmp_path / "proved.json"
    some = {name: TYPES[name] for name in here("llava", "blip", "vipllava")}
    monkeypatch.setattr(zoo, "types", lambda: some)
    arguments = ["vlm", "--table", str(table), "--proved", str(proved)]
    assert zoo.main([*arguments, "--only", "llava"]) == 0
    assert zoo.main([*arguments, "--names"]) == 1
    assert capsys.readouterr().out.splitlines()[-2:] == ["blip", "vipllava"]
    assert zoo.main(arguments) == 0
    assert "llava:" not in capsys.readouterr().out.replace("vipllava:", "")
    rows = zoo.read(table)
    assert (rows["llava"].family, rows["llava"].connector) == ("written", "holds")
    assert (rows["vipllava"].family, rows["vipllava"].connector) == ("derived", "holds")
    assert rows["blip"].connector.startswith("refused: it has no method")
    assert [name.partition(" ")[0].rpartition(".")[2] for name in json.loads(proved.read_text())] == ["VipLlavaModel"]
