"""What a release of transformers, timm or open_clip may change, and what must hold then.

The first part is the *name contract*: every path, method and argument of every row of the tables, against the installed
libraries, in seconds. Run it first when a release appears. The second part are the traps of one renaming (of the argument
for the cache); each was a wrong number or a lost cache in a version that only knew the new name.
"""

import copy
import dataclasses
import functools
import inspect
import re
import textwrap
import tomllib
import warnings
from pathlib import Path

import make_tables
import pytest
import torch
import transformers as hf
from torch import nn

import saint
from saint import testing
from saint.language.attention import check_attention
from saint.language.cache import RaggedLayer
from saint.language.call import REQUIRED
from saint.methods import FastV
from saint.runtime.blocks import Block, units
from saint.upstream import names, registry, versions
from saint.upstream.names import CACHE, Parameters, Role
from saint.upstream.names import LAYERS as TEXT_LAYERS
from saint.upstream.specs import part
from saint.upstream.verify import verify_encoder, verify_family
from saint.vision.locate import locate, locate_tower
from saint.vlm.locate import locate as locate_vlm
from support.families import FAMILIES, LAYERS, cache_of, cached, checkpoint, prompts
from support.models import BUILDERS, backbones
from support.oracles import Oracle, oracle_model, relative_error
from support.plans import BATCH, GREEDY, LANGUAGE, PLANS, VISION

LLAVA = FAMILIES["llava-llama"]

# -- the name contract ------------------------------------------------------------------------------------------------


def on_meta(build) -> nn.Module:
    with torch.device("meta"):
        return build()


def check_encoder_names(encoder: nn.Module, row) -> None:
    verify_encoder(encoder, row)
    for index, module in enumerate(part(encoder, row.blocks)):
        spec = next(row.block_specs[c.__name__] for c in type(module).__mro__ if c.__name__ in row.block_specs)
        block = Block(module, spec, f"{row.blocks}.{index}")  # raises where no keys show, or a segment argument is gone
        halves = (spec.attn, spec.norm1, spec.padding), (spec.mlp, spec.norm2)
        for parallel, paths in zip(units(module, spec), halves, strict=True):
            for unit in parallel:
                for name in paths:
                    assert name is None or hasattr(unit, name), f"{block.name} has no {name}"
        for method, _ in spec.bias:
            assert block.bias != method or callable(part(module, method))
        assert not spec.heads or block.heads > 0
        if row.packed:
            assert block.tables
    for name in (*row.dense_calls, *row.masked_pools):
        assert hasattr(encoder, name), f"{type(encoder).__name__} has no {name}"


@pytest.mark.parametrize("name", BUILDERS)
def test_names_of_encoders(name):
    _, encoder, row = locate(BUILDERS[name]())
    check_encoder_names(encoder, row)


def test_names_of_backbones():
    for model in backbones().values():
        check_encoder_names(*locate(model)[1:])


def tower_of(model):
    """The encoder in the tower of a tiny vision-language model, as `locate` gives one."""
    return locate_tower(*locate_vlm(model, "vision")[1:])


def test_names_of_every_branch_and_mask():
    """A part that only some instances have, or a mask, may be renamed without an error: each must exist somewhere."""
    seen: dict[str, set[str]] = {}
    wanted: dict[str, set[str]] = {}
    found = [locate(build()) for build in BUILDERS.values()]
    found += [tower_of(family.build()) for family in FAMILIES.values() if family.tower]
    for _, encoder, row in found:
        for module in part(encoder, row.blocks):
            spec = next(row.block_specs[c.__name__] for c in type(module).__mro__ if c.__name__ in row.block_specs)
            key = row.library + repr(spec)
            facts = {*spec.branch1, *spec.branch2}
            arguments = {str(role): role for role in (spec.mask, *spec.tables) if role is not None}
            wanted.setdefault(key, set()).update(facts | set(arguments))
            parameters = Parameters(type(module).forward)
            parallel = [unit for half in units(module, spec) for unit in half]
            seen.setdefault(key, set()).update(
                f for f in facts for unit in parallel if getattr(unit, f, None) is not None
            )
            seen[key].update(name for name, role in arguments.items() if parameters.has(role))
    assert {key: sorted(names - seen[key]) for key, names in wanted.items() if names - seen[key]} == {}


@pytest.mark.parametrize("name", FAMILIES)
def test_names_of_families(name):
    model = on_meta(FAMILIES[name].build)
    _, vlm, row = locate_vlm(model, "language")
    verify_family(vlm, row)
    decoder = vlm.get_submodule(row.decoder)
    for layer in TEXT_LAYERS.get(decoder):
        assert Parameters(type(layer).forward).missing(*REQUIRED) == []
        check_attention(layer, "layer", flash=False)
    assert names.IMPLEMENTATION.of(decoder.config) is not None
    assert names.IMAGE_TOKEN.of(vlm.config) is not None
    if row.no_vision is None:
        _, tower, tower_row = locate_tower(vlm, row)
        check_encoder_names(tower, tower_row)


def test_every_family_and_tower_is_checked_for_its_names():
    checked = {locate_vlm(on_meta(family.build), "language")[2].model for family in FAMILIES.values()}
    assert checked == {spec.model for spec in registry.FAMILIES}
    towers = {tower_of(on_meta(f.build))[2].encoder for f in FAMILIES.values() if f.tower}
    assert {spec.tower_spec.encoder for spec in registry.FAMILIES if spec.tower_spec} <= towers
    here = [locate(model)[2].encoder for model in [*(build() for build in BUILDERS.values()), *backbones().values()]]
    assert {spec.encoder for spec in registry.ENCODERS} == set(here)


@pytest.mark.parametrize("spec", registry.ENCODERS, ids=lambda spec: spec.encoder)
def test_tiny_encoders_are_of_their_spec(spec):
    for name, make in spec.tiny.items():
        key = f"{spec.library}/{name}"
        if "forward" not in spec.dense_calls and key not in BUILDERS:
            continue  # not in this release
        assert locate(make())[2] is spec, key


@pytest.mark.parametrize("spec", registry.FAMILIES, ids=lambda spec: spec.title)
def test_tiny_families_are_of_their_spec(spec):
    """What a tiny model says of itself, which tests build on, and what its spec reads off the instance."""
    for tiny in spec.tiny:
        assert FAMILIES[tiny.name] is tiny  # no other has its name
        model = on_meta(tiny.build)
        _, vlm, found = locate_vlm(model, "language")
        assert found is spec
        assert model.get_submodule(tiny.decoder) is TEXT_LAYERS.get(vlm.get_submodule(spec.decoder))
        assert tiny.merge_size == (spec.merge_size(vlm) or 1)
        assert (tiny.tower is None) == (spec.no_vision is not None)
        if tiny.tower is not None:
            _, encoder, tower = locate_tower(vlm, spec)
            assert tower is spec.tower_spec or (spec.tower_spec is None and tower in registry.ENCODERS)
            assert model.get_submodule(tiny.tower) is part(encoder, tower.blocks)
            assert tiny.prefix == tower.prefix(encoder)


def test_names_of_the_cache():
    layer = hf.cache_utils.DynamicLayer()
    layer.update(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4))
    for name in ("keys", "values", "is_initialized", "device", "is_sliding"):
        assert hasattr(layer, name)
    for method in ("update", "get_seq_length", "get_mask_sizes", "get_max_length", "crop", "reset", "reorder_cache",
                   "batch_select_indices", "batch_repeat_interleave"):  # fmt: skip
        ours, theirs = (inspect.signature(getattr(cls, method)) for cls in (RaggedLayer, type(layer)))
        need = [p.name for p in theirs.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
        assert need == [p.name for p in ours.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD], method
    unknown = {
        name for name, value in vars(hf.cache_utils.DynamicSlidingWindowLayer).items() if inspect.isfunction(value)
    } - set(vars(RaggedLayer)) - {"__init__", "lazy_initialization", "activate_past_recording"}  # fmt: skip
    assert not unknown, f"methods of upstream's cache layers that a ragged layer inherits unseen: {unknown}"
    assert isinstance(hf.DynamicCache().layers, list)
    assert hf.DynamicCache().layer_class_to_replicate is hf.cache_utils.DynamicLayer


# -- a mock release ---------------------------------------------------------------------------------------------------


class Renamed(nn.Module):
    """A decoder layer of a release that has renamed the argument for the cache, with a shim for the old name."""

    def forward(self, hidden_states, attention_mask=None, kv_store=None, position_embeddings=None):
        return hidden_states if kv_store is None else kv_store.update(hidden_states, hidden_states, 0)[0]

    @staticmethod
    def shimmed(forward):
        @functools.wraps(forward)
        def shim(self, *args, **kwargs):
            if "cache" in kwargs:
                warnings.warn("`cache` is deprecated and will be removed", FutureWarning, stacklevel=2)
                kwargs.setdefault("kv_store", kwargs.pop("cache"))
            return forward(self, *args, **kwargs)

        return shim


Renamed.forward = Renamed.shimmed(Renamed.forward)


def test_a_renamed_argument_is_one_more_spelling():
    layer, store = Renamed(), object()
    parameters = Parameters(type(layer).forward)
    assert parameters.missing(CACHE) == ["cache or past_key_values"]  # refused, by name, until the line is written
    role = Role("kv_store", *CACHE.spellings)
    assert parameters.missing(role) == []
    for spelling in role.spellings:
        assert role.read({spelling: store}) is store
        assert parameters.put({spelling: None, "attention_mask": 1}, role, store) == {
            "kv_store": store,
            "attention_mask": 1,
        }
    assert role.read({"past_key_values": 1, "kv_store": None}) is None  # newest wins, as in upstream's shims


def test_a_mock_release_of_transformers(monkeypatch):
    """Argument and merge method renamed once more, with shims: two spellings bring all back, results stay the same."""
    model, plan = LLAVA.build(), PLANS["hybrid"]
    inputs = prompts(LLAVA, model, BATCH)
    with saint.pruned(model, plan), torch.no_grad():
        want = model.generate(**inputs, max_new_tokens=5, **GREEDY)
    old = CACHE.among(Parameters(type(model).forward).names)

    def rename(cls):
        forward = cls.forward
        signature = inspect.signature(forward)

        def renamed(self, *args, **kwargs):
            assert old not in kwargs or "kv_store" not in kwargs, "two spellings at once"
            if "kv_store" in kwargs:
                kwargs[old] = kwargs.pop("kv_store")
            return forward(self, *args, **kwargs)

        renamed.__signature__ = signature.replace(
            parameters=[p.replace(name="kv_store") if p.name == old else p for p in signature.parameters.values()]
        )
        monkeypatch.setattr(cls, "forward", renamed)

    text = model.model.language_model
    # the model's own code calls the merge method: its source with the other name is what a release would hold
    vlm = type(model.model)
    source = textwrap.dedent(inspect.getsource(inspect.unwrap(vlm.forward)))
    scope = dict(vars(inspect.getmodule(vlm)))
    exec(source[source.index("def forward") :].replace("get_placeholder_mask", "find_placeholders"), scope)
    monkeypatch.setattr(vlm, "find_placeholders", vlm.get_placeholder_mask, raising=False)
    monkeypatch.delattr(vlm, "get_placeholder_mask")
    monkeypatch.setattr(vlm, "forward", scope["forward"])
    for cls in (type(text.layers[0]), type(text.layers[0].self_attn), type(text), vlm):
        rename(cls)

    with pytest.raises(saint.UnsupportedModelError, match=r"argument cache or past_key_values.*get_placeholder_mask"):
        saint.apply(model, plan)
    monkeypatch.setitem(vars(names.CACHE), "spellings", ("kv_store", *CACHE.spellings))
    monkeypatch.setitem(vars(names.PLACEHOLDER_MASK), "spellings", ("find_placeholders", "get_placeholder_mask"))
    with saint.pruned(model, plan), torch.no_grad():
        assert torch.equal(model.generate(**inputs, max_new_tokens=5, **GREEDY), want)


@pytest.mark.parametrize(
    ("lose", "named"),
    [
        (lambda m: delattr(m.model, "multi_modal_projector"), r"no multi_modal_projector \(connector\)"),
        (lambda m: delattr(m.model, "vision_tower"), r"no vision_tower \(tower\)"),
        (lambda m: delattr(m.model.language_model, "layers"), r"language_model\.layers"),
    ],
)
def test_what_a_model_lacks_is_named_before_anything_is_touched(lose, named):
    model = LLAVA.build()
    lose(model)
    before = testing.snapshot(model)
    with pytest.raises(saint.UnsupportedModelError, match=named + r".*known from transformers .* installed is"):
        saint.apply(model, saint.Plan(language=LANGUAGE))
    assert testing.snapshot(model) == before


def test_what_an_encoder_lacks_is_named():
    vit = BUILDERS["timm/vit-augreg"]()
    vit.trunk, vit.blocks = vit.blocks, None
    with pytest.raises(saint.UnsupportedModelError, match=r"no blocks \(blocks\).*known from timm"):
        saint.apply(vit, saint.Saint())


@pytest.mark.parametrize(
    ("name", "fact", "named"),
    [
        ("llava-llama", {"pixels": (Role("pictures", "images"),)}, "argument pictures or images"),
        ("qwen3-vl", {"reads": lambda m: m.visual.deep_indexes}, "hidden states that it reads: .*deep_indexes"),
        ("gemma3", {"merge_size": lambda m: m.multi_modal_projector.side}, "size of merged squares: .*side"),
        ("llava-llama", {"feature_layer": lambda m, depth: m.config.layer}, "layer of its features: .*layer"),
    ],
)
def test_every_fact_of_a_family_is_verified(name, fact, named):
    _, vlm, row = locate_vlm(on_meta(FAMILIES[name].build), "language")
    verify_family(vlm, row)
    with pytest.raises(saint.UnsupportedModelError, match=named):
        verify_family(vlm, dataclasses.replace(row, **fact))


@pytest.mark.parametrize(
    ("fact", "named"),
    [
        ({"prefix": lambda m: m.prefix_length}, "protected tokens: .*prefix_length"),
        ({"patch": "stem.conv"}, r"stem\.conv \(patch embedding\)"),
        ({"final": "last"}, r"last \(last norm\)"),
        ({"order": Role("shuffle", "reorder")}, "method shuffle or reorder"),
        ({"masked_pools": {"_reduce": Role("valid")}}, r"method _reduce \(pools\)"),
    ],
)
def test_every_fact_of_an_encoder_is_verified(fact, named):
    _, encoder, row = locate(BUILDERS["timm/vit-augreg"]())
    with pytest.raises(saint.UnsupportedModelError, match=named):
        verify_encoder(encoder, dataclasses.replace(row, **fact))


def test_a_release_that_was_not_tested_is_said_once(monkeypatch):
    vit = BUILDERS["timm/vit-augreg"]()
    monkeypatch.setattr(versions, "installed", lambda name: {"timm": "99.1.0.dev0", "transformers": "5.12.0"}.get(name))
    monkeypatch.setattr(versions, "_told", set())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            saint.apply(vit, saint.Saint()).remove()
    assert [warning.filename for warning in caught] == [__file__]
    assert re.match(r"timm 99\.1\.0\.dev0 is newer .*`saint check MODEL`", str(caught[0].message))
    with pytest.warns(UserWarning, match=r"transformers 5\.12\.0 is older .*5\.17\.0 to"):
        saint.apply(LLAVA.build(), saint.Plan(language=LANGUAGE))
    assert versions.release("2.14.1+cpu") == (2, 14, 1)
    assert versions.release("5.25.0.dev0") > versions.release("5.24.0") > versions.release("5.9.4")


def test_the_tested_ranges_are_those_of_the_package_and_of_the_lock():
    root = Path(__file__).parents[2]
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    floors = {
        "torch": next(r for r in project["dependencies"] if r.startswith("torch>")),
        "timm": extras["timm"][0],
        "open_clip_torch": extras["open-clip"][0],
        "transformers": extras["transformers"][0],
    }
    for name, floor in floors.items():
        assert floor.partition(">=")[2] in versions.TESTED[name][0], name
        assert "<" not in floor
    assert extras["vlm"] == ["transformers>=" + ".".join(versions.VLM_FLOOR["transformers"].split(".")[:2])]
    lines = [line for line in (root / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert not [line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9a-z.]*", line)]
    locked = dict(line.split("==") for line in lines)
    for name, (_, newest) in versions.TESTED.items():
        assert versions.release(locked[name]) <= versions.release(newest), name


# -- the traps of a renamed cache -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llava():
    return LLAVA.build()


def test_vision_only_plans_tell_the_cache_its_logical_length(llava):
    inputs = prompts(LLAVA, llava, BATCH)
    length = inputs["input_ids"].shape[1]
    with saint.pruned(llava, PLANS["vision"]) as session, torch.no_grad():
        out = llava.generate(**inputs, max_new_tokens=8, output_logits=True, return_dict_in_generate=True, **GREEDY)
        trace = session.trace
    cache, gone = cache_of(out), 36 - int(trace[-1].tokens_out[0])
    assert gone > 0
    assert [cache.get_seq_length(layer) for layer in range(LAYERS)] == [length + 7] * LAYERS
    assert [layer.keys.shape[-2] for layer in cache.layers] == [length + 7 - gone] * LAYERS
    expected = Oracle(LLAVA, oracle_model(llava), trace, inputs).continued(out.sequences[:, length:])
    assert relative_error(torch.stack(out.logits, 1), expected) < 1e-4


def test_a_second_look_of_the_attention_adds_nothing_to_the_cache(llava):
    inputs = prompts(LLAVA, llava, BATCH)
    length = inputs["input_ids"].shape[1]
    with saint.pruned(llava, saint.Plan(language=saint.Stage(FastV(keep=0.5), layers=[1]))), torch.no_grad():
        cache = cache_of(llava(**inputs))
    assert [layer.keys.shape[-2] for layer in cache.layers] == [length] * 2 + [length - 18] * (LAYERS - 2)


@pytest.mark.parametrize("evict", [False, True])
def test_applied_in_the_middle_of_a_conversation(llava, evict):
    text, first = prompts(LLAVA, llava, [[6], [6]], seed=6), prompts(LLAVA, llava, [[4, "0", 7], [8, "0", 3]])
    cache = hf.DynamicCache(config=llava.config.get_text_config())
    stage = saint.Stage(LANGUAGE.method, layers=LANGUAGE.layers, evict=evict)
    mask = torch.cat([text["attention_mask"], first["attention_mask"]], 1)
    with torch.no_grad():
        llava(**text, **cached(llava, cache))  # ordinary layers, filled by the unpatched model
        with saint.pruned(llava, saint.Plan(vision=VISION, language=stage)) as session:
            logits = llava(**{**first, "attention_mask": mask}, **cached(llava, cache)).logits
            trace = session.trace
    whole = {"input_ids": torch.cat([text["input_ids"], first["input_ids"]], 1), "attention_mask": mask}
    oracle = Oracle(LLAVA, oracle_model(llava), trace, {**whole, "pixel_values": first["pixel_values"]})
    here = mask.bool() & ~oracle.gone_before(99)
    assert relative_error(logits[here[:, 6:]], oracle().logits[:, 6:][here[:, 6:]]) < 1e-4
    stored = [layer.keys.shape[-2] for layer in cache.layers]
    assert len(set(stored)) == (1 if evict else 3)


def test_decode_steps_leave_the_trace_of_the_prompt(llava):
    inputs = prompts(LLAVA, llava, BATCH)
    with saint.pruned(llava, PLANS["hybrid"]) as session, torch.no_grad():
        llava(**inputs)
        want = [(e.stage, e.layer, [k.tolist() for k in e.kept]) for e in session.trace]
        llava.generate(**inputs, max_new_tokens=4, **GREEDY)
        assert [(e.stage, e.layer, [k.tolist() for k in e.kept]) for e in session.trace] == want
        step = {"input_ids": torch.tensor([[7]] * 3)}
        out = llava(**inputs)
        llava(**step, **cached(llava, cache_of(out)))
        assert [e.stage for e in session.trace] == [stage for stage, *_ in want]
    assert {stage for stage, *_ in want} == {"vision", "connector", "language"}


@pytest.mark.parametrize("plan", [*PLANS.values(), saint.Plan(language=saint.Stage(FastV(keep=0.5), layers=[1]))])
def test_checkpointing_without_gradients_keeps_the_cache_where_upstream_does(llava, plan):
    inputs = prompts(LLAVA, llava, BATCH)
    twin = copy.deepcopy(llava).train()
    checkpoint(twin)

    def cached_positions(model):
        cache = cache_of(model(**inputs, use_cache=True))
        return 0 if cache is None else max((cache.get_seq_length(i) for i in range(len(cache.layers))), default=0)

    with torch.no_grad():
        unpruned = cached_positions(twin)
        with saint.pruned(llava, plan):
            want = llava(**inputs).logits
        with saint.pruned(twin, plan) as session:
            assert cached_positions(twin) == unpruned
            assert (session.kv_memory is None) == (unpruned == 0)
            assert torch.allclose(twin(**inputs).logits, want, atol=1e-5)
            new = twin.generate(**inputs, max_new_tokens=4, **GREEDY)
        if unpruned:  # before 5.24 generation in train mode is wrong upstream, too
            with saint.pruned(llava, plan):
                assert torch.equal(llava.generate(**inputs, max_new_tokens=4, **GREEDY), new)


def test_a_cache_that_checkpointing_takes_away_holds_nothing(llava):
    inputs = prompts(LLAVA, llava, BATCH)
    twin = copy.deepcopy(llava).train()
    checkpoint(twin)
    cache = hf.DynamicCache(config=llava.config.get_text_config())
    stage = saint.Stage(LANGUAGE.method, layers=LANGUAGE.layers, evict=True)
    with saint.pruned(twin, saint.Plan(vision=VISION, language=stage)) as session:
        twin(**inputs, **cached(twin, cache), labels=inputs["input_ids"]).loss.backward()
        assert session.kv_memory is None
        assert [entry.stage for entry in session.trace] == ["vision", "language", "language"]
    assert cache.get_seq_length() == 0


def test_a_checkpointed_encoder_keeps_its_trace_through_the_backward_pass():
    vit = BUILDERS["timm/vit-augreg"]().train()
    vit.set_grad_checkpointing()
    images = torch.randn(2, 3, 96, 96)
    with saint.pruned(vit, saint.Saint(keep=20)) as session:
        loss = vit(images).square().sum()
        before = [(entry.layer, entry.tokens_out.tolist()) for entry in session.trace]
        loss.backward()
        assert [(entry.layer, entry.tokens_out.tolist()) for entry in session.trace] == before
    assert before[-1][1] == [20, 20]


def test_croppable_is_answered_for_every_layer():
    family = FAMILIES["llava-mistral"]
    model = family.build()
    inputs = prompts(family, model, [[4, "0", 20]])
    with saint.pruned(model, PLANS["language"]), torch.no_grad():
        assert all(layer.is_croppable for layer in cache_of(model(**inputs)).layers if isinstance(layer, RaggedLayer))
    model.config.text_config.sliding_window = 40
    with saint.pruned(model, PLANS["language"]), torch.no_grad():
        layers = cache_of(model(**inputs)).layers
        ragged = [layer for layer in layers if isinstance(layer, RaggedLayer)]
        assert ragged
        assert not any(layer.is_croppable for layer in ragged)
        with pytest.raises(ValueError, match=r"crop|roll"):
            model.generate(**inputs, max_new_tokens=24, prompt_lookup_num_tokens=4, **GREEDY)


def test_outputs_of_a_tower_do_not_replace_those_of_the_model(llava):
    inputs = prompts(LLAVA, llava, BATCH)
    with torch.no_grad():
        output = llava.model(**inputs)
    read = testing.run(llava.model, inputs)
    assert torch.equal(read["last_hidden_state"], output.last_hidden_state)
    nested = {name for name in read if name.startswith("image_outputs.")}
    assert bool(nested) == (getattr(output, "image_outputs", None) is not None)
    made = {"last_hidden_state": torch.zeros(1), "image_outputs": {"last_hidden_state": torch.ones(1)}}
    assert dict(testing.tensors(made)) == {
        "last_hidden_state": made["last_hidden_state"],
        "image_outputs.last_hidden_state": made["image_outputs"]["last_hidden_state"],
    }


@pytest.mark.parametrize("name", ["gemma3", "paligemma"])
def test_the_readme_says_who_refuses_flash_attention(name):
    model = on_meta(FAMILIES[name].build)
    row = next(line for line in make_tables.vlm_table().splitlines() if locate_vlm(model, "language")[2].title in line)
    assert row.endswith("| yes |") == bool(type(model)._supports_flash_attn)


def test_older_spellings_of_callers_are_read(llava):
    """Hooks run in front of upstream's shims: a caller may still use the name of an older release."""
    inputs = prompts(LLAVA, llava, BATCH)
    step = {"input_ids": torch.tensor([[7], [8], [9]])}
    newest = CACHE.among(Parameters(type(llava).forward).names)
    with saint.pruned(llava, PLANS["hybrid"]), torch.no_grad():
        want = llava(**step, **cached(llava, cache_of(llava(**inputs)))).logits
        for spelling in CACHE.spellings[CACHE.spellings.index(newest) :]:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                assert torch.equal(llava(**step, **{spelling: cache_of(llava(**inputs))}).logits, want)
                inner = llava.model(**step, **{spelling: cache_of(llava(**inputs))}).last_hidden_state
            assert torch.equal(llava.lm_head(inner), want)
