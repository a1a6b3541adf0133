"""Copies, pickles, conversions and signatures of a patched model: what they are of an unpatched one."""

import copy
import inspect
import io
import pickle

import pytest
import torch
import transformers as hf
from torch import nn

import saint
from support.families import FAMILIES, prompts
from support.models import build, snapshot
from support.plans import BATCH, HALF, HYBRID

PIXELS = {"pixels": torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))}


def through_pickle(model):
    return pickle.loads(pickle.dumps(model))


def through_torch_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def through_python_pickle(model):
    file = io.BytesIO()
    pickle._Pickler(file, 2).dump(model)
    return pickle.loads(file.getvalue())


COPIES = [copy.deepcopy, through_pickle, through_torch_save, through_python_pickle]


def encoder(name):
    model, pixels = build(name), PIXELS["pixels"]
    return model, lambda m: first(m(pixels)), HALF


def first(output):
    return output if isinstance(output, torch.Tensor) else output[0]


def llava():
    return vlm("llava-llama")


def vlm(name):
    model = FAMILIES[name].build()
    inputs = prompts(FAMILIES[name], copy.deepcopy(model), BATCH)
    return model, lambda m: m(**inputs).logits, HYBRID


MODELS = {
    "timm": lambda: encoder("timm/vit-augreg"),
    "timm-relpos": lambda: encoder("timm/relpos"),  # wraps a method that makes a bias
    "transformers": lambda: encoder("transformers/vit"),
    "open_clip": lambda: encoder("open_clip/vit"),
    "llava": llava,
    "qwen2.5-vl": lambda: vlm("qwen2.5-vl"),
}


@pytest.mark.parametrize("copied", COPIES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", MODELS)
def test_a_copy_of_a_patched_model_is_a_clean_model(name, copied):
    model, run, plan = MODELS[name]()
    before, reference = snapshot(model), copy.deepcopy(model)
    with torch.no_grad():
        with saint.apply(model, plan) as session:
            patched = snapshot(model)
            twin = copied(model)
            assert snapshot(twin) == before
            assert saint.status(twin) is None
            assert snapshot(model) == patched  # the original is as it was
            base, pruned = run(reference), run(model)
            assert not torch.equal(base, pruned)
            assert torch.equal(run(twin), base)
            assert session.trace
            later = copy.deepcopy(model)
            assert snapshot(later) == snapshot(reference)  # upstream installs hooks at the first forward
            assert torch.equal(run(later), base)
            with saint.apply(twin, plan) as other:  # they are independent
                assert torch.equal(run(twin), pruned)
                session.remove()
                assert torch.equal(run(twin), pruned)
                assert other.trace
        assert torch.equal(run(model), base)
    assert not {id(m) for m in model.modules()} & {id(m) for m in twin.modules()}
    assert not {id(p) for p in model.parameters()} & {id(p) for p in twin.parameters()}


def test_a_copy_of_a_disabled_model_and_of_a_part_is_clean():
    model, run, plan = llava()
    with torch.no_grad():
        base = run(model)
        before = snapshot(model)
        with saint.apply(model, plan) as session, session.disabled():
            twin = copy.deepcopy(model)
            assert snapshot(twin) == before
            assert torch.equal(run(twin), base)
        with saint.apply(model, plan):
            layer = copy.deepcopy(model.model.language_model.layers[1])
            assert snapshot(layer)[""] == before["model.language_model.layers.1"]
            holder = copy.deepcopy(nn.ModuleList([model]))
            assert torch.equal(run(holder[0]), base)


def test_a_copy_keeps_what_the_user_hung_on_the_model():
    model, run, plan = encoder("timm/vit-augreg")
    seen = []
    model.blocks[1].register_forward_hook(lambda *_: seen.append("before"))
    with saint.apply(model, plan), torch.no_grad():
        model.blocks[1].register_forward_hook(lambda *_: seen.append("after"))
        model.note = "mine"
        twin = copy.deepcopy(model)
        run(twin)
    assert seen == ["before", "after"]
    assert twin.note == "mine"


def test_a_session_itself_is_not_copied():
    model, _, plan = encoder("timm/vit-augreg")
    with saint.apply(model, plan) as session:
        for call in (copy.deepcopy, pickle.dumps):
            with pytest.raises(RuntimeError, match="belongs to one model"):
                call(session)


@pytest.mark.parametrize(
    ("name", "assign"), [("timm", False), ("timm", True), ("transformers", True), ("open_clip", True)]
)
def test_states_and_weights_move_as_ever(name, assign):
    model, run, plan = MODELS[name]()
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    other = {k: v + 0.3 * torch.randn(v.shape) for k, v in weights.items()}
    with torch.no_grad(), saint.apply(model, plan):
        pruned = run(model)
        assert list(model.state_dict()) == list(weights)
        model.load_state_dict(other, assign=assign)
        changed = run(model)
        twin = copy.deepcopy(model)
        with saint.apply(twin, plan):
            assert torch.equal(run(twin), changed)
        assert not torch.equal(changed, pruned)
        model.load_state_dict(weights, assign=assign)
        assert torch.equal(run(model), pruned)


@pytest.mark.parametrize("convert", [nn.Module.double, nn.Module.bfloat16, lambda m: m.to(torch.float64)])
@pytest.mark.parametrize("name", ["timm", "transformers"])
def test_a_converted_model_prunes_as_one_that_was_converted_before(name, convert):
    model, _, plan = MODELS[name]()
    twin = convert(copy.deepcopy(model))
    pixels = PIXELS["pixels"].to(next(twin.parameters()).dtype)
    with torch.no_grad(), saint.apply(model, plan), saint.apply(twin, plan):
        model(PIXELS["pixels"])
        assert convert(model) is model
        assert torch.equal(first(model(pixels)), first(twin(pixels)))


def test_transformers_saves_a_patched_model(tmp_path):
    model, run, plan = llava()
    with torch.no_grad():
        base = run(model)
        with saint.apply(model, plan):
            pruned = run(model)
            model.save_pretrained(tmp_path)
            loaded = hf.LlavaForConditionalGeneration.from_pretrained(tmp_path).eval()
            assert torch.equal(run(loaded), base)
            assert torch.equal(run(model), pruned)


def test_accelerate_hooks_of_before_and_of_later_are_copied():
    hooks = pytest.importorskip("accelerate.hooks")

    class Marked(hooks.ModelHook):
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            Marked.calls += 1
            return args, kwargs

    model, run, plan = encoder("timm/vit-augreg")
    hooks.add_hook_to_module(model.blocks[1], Marked())
    with torch.no_grad():
        base = run(model)
        before = snapshot(model)
        with saint.apply(model, plan):
            pruned = run(model)
            calls = Marked.calls
            twin = copy.deepcopy(model)
            assert snapshot(twin) == before
            assert torch.equal(run(twin), base)
            assert Marked.calls == calls + 1
        hooks.remove_hook_from_module(model.blocks[1])
        session = saint.apply(model, plan)
        hooks.add_hook_to_module(model.blocks[1], Marked())
        assert torch.equal(run(model), pruned)
        twin = copy.deepcopy(model)
        assert torch.equal(run(twin), base)
        assert twin.blocks[1]._old_forward.__self__ is twin.blocks[1]
        hooks.remove_hook_from_module(model.blocks[1])
        session.remove()


# layers whose keys are scored must have their adapter before the plan: README, Limits
@pytest.mark.parametrize(
    ("name", "targets"),
    [("timm", ["qkv", "fc1"]), ("transformers", ["q_proj", "v_proj", "fc1"]), ("llava", ["v_proj", "up_proj"])],
)  # fmt: skip
def test_adapters_of_peft_may_come_after_the_plan(name, targets):
    peft = pytest.importorskip("peft")
    model, run, plan = MODELS[name]()
    twin = copy.deepcopy(model)

    def adapted(m):
        torch.manual_seed(0)
        m = peft.get_peft_model(m, peft.LoraConfig(target_modules=targets)).eval()
        for key, parameter in m.named_parameters():
            if "lora_" in key:
                nn.init.normal_(parameter, std=0.2)
        return m

    with torch.no_grad():
        plain = run(model)
        twin = adapted(twin)
        base = run(twin)
        session = saint.apply(model, plan)
        model = adapted(model)
        after = run(model)
        assert session.trace
        assert not torch.equal(base, plain)
        with saint.apply(twin, plan):
            assert torch.equal(run(twin), after)
        assert saint.status(model) is not None
        saint.remove(model)
        assert torch.equal(run(model), base)


# -- signatures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_signatures_are_those_of_the_methods_in_whose_place_things_stand(name):
    model, _, plan = MODELS[name]()
    names = [(path, key) for path, m in model.named_modules() for key in ("forward", *_overridable(m))]

    def read():
        found = {}
        for path, key in names:
            method = getattr(model.get_submodule(path), key)
            found[path, key] = (inspect.signature(method), method.__name__, method.__doc__, method.__qualname__)
        return found

    before = read()
    with saint.apply(model, plan):
        put = [(path, key) for path, key in names if key in vars(model.get_submodule(path))]
        assert len(put) >= 4
        assert read() == before
        for path, key in put:
            assert getattr(model.get_submodule(path), key).__wrapped__.__self__ is model.get_submodule(path)
    assert read() == before


def _overridable(module):
    return [
        key for key in ("forward_intermediates", "get_image_features", "get_placeholder_mask") if hasattr(module, key)
    ]
