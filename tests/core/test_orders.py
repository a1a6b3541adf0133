"""Others put hooks on a model, wrap its methods or replace its modules; a plan comes and goes before, between and behind that."""

import itertools

import pytest
import torch

import saint
from saint import Plan, Stage
from saint.testing import snapshot
from support.families import FAMILIES, prompts
from support.models import build

STAGE = Stage(saint.Saint(keep=0.6), layers=[0, 1])


def encoder(name):
    model = build(name)
    pixels = torch.randn(2, 3, 96, 96)
    return model, lambda: model(pixels).logits if hasattr(model, "config") else model(pixels), Plan(vision=STAGE)


def llava():
    family = FAMILIES["llava-llama"]
    model = family.build()
    inputs = prompts(family, model, [[3, "0", 4], [2, "0", 6]])
    return model, lambda: model(**inputs).logits, Plan(vision=STAGE, language=STAGE)


MODELS = {
    "timm": lambda: encoder("timm/vit-augreg"),
    "transformers": lambda: encoder("transformers/vit"),
    "llava": llava,
}


# -- what others do: each puts something on a model and returns what takes it off ------------------------------------------


def accelerate_hooks(model):
    hooks = pytest.importorskip("accelerate.hooks")
    for module in list(model.modules()):
        hooks.add_hook_to_module(module, hooks.ModelHook(), append=True)
    return lambda: hooks.remove_hook_from_module(model, recurse=True)


def accelerate_hook_twice(model):
    accelerate_hooks(model)
    return accelerate_hooks(model)


def dispatched(model):
    accelerate = pytest.importorskip("accelerate")
    accelerate.dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True)
    return lambda: accelerate.hooks.remove_hook_from_module(model, recurse=True)


def torch_hooks(model):
    handles = [m.register_forward_pre_hook(lambda *_: None) for m in model.modules()]
    handles += [m.register_forward_hook(lambda *_: None) for m in model.modules()]
    return lambda: [handle.remove() for handle in handles]


def adapter(model):
    """LoRA as it begins: of no effect."""
    peft = pytest.importorskip("peft")
    outer = peft.get_peft_model(model, peft.LoraConfig(target_modules=r".*\.(fc1|up_proj)"))
    return outer.unload


def merged_adapter(model):
    peft = pytest.importorskip("peft")
    outer = peft.get_peft_model(model, peft.LoraConfig(target_modules=r".*\.(fc1|up_proj)"))
    return outer.merge_and_unload


def wrapped(model):
    """Closures around methods, put back one by one."""
    before = {m: m.forward for m in model.modules()}
    for module, forward in before.items():
        module.forward = lambda *args, call=forward, **kwargs: call(*args, **kwargs)

    def off():
        for module, forward in before.items():
            module.forward = forward

    return off


OTHERS = [accelerate_hooks, accelerate_hook_twice, dispatched, torch_hooks, adapter, merged_adapter, wrapped]
ORDERS = [
    order
    for order in itertools.permutations(("plan", "other", "undo", "off"))
    if order.index("plan") < order.index("undo") and order.index("other") < order.index("off")
]


@pytest.mark.parametrize("order", ORDERS, ids=" ".join)
@pytest.mark.parametrize("other", OTHERS, ids=lambda other: other.__name__)
@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_clean_whatever_leaves_first(name, other, order):
    if other is wrapped and order in {("other", "plan", "off", "undo"), ("plan", "other", "undo", "off")}:
        pytest.skip("what is put back is older than the plan, or was made from it: tested alone below")
    model, run, plan = MODELS[name]()
    with torch.no_grad():
        base = run()
        with saint.apply(model, plan):
            pruned = run()
        assert not torch.equal(pruned, base)
        session = off = None
        for step in order:
            if step == "plan":
                session = saint.apply(model, plan)
            elif step == "other":
                off = other(model)
            elif step == "undo":
                session.remove()
            else:
                off()
            on = session is not None and step != "undo" and "undo" not in order[: order.index(step)]
            torch.testing.assert_close(run(), pruned if on else base, rtol=0, atol=0)
            if on and other is not wrapped:  # it would put back methods of before the block
                with session.disabled():
                    assert torch.equal(run(), base)
                assert torch.equal(run(), pruned)
        assert saint.status(model) is None
        with saint.apply(model, plan):
            assert torch.equal(run(), pruned)
        assert torch.equal(run(), base)


@pytest.mark.parametrize("name", MODELS)
def test_what_others_kept_of_a_plan_that_is_gone_does_nothing(name):
    model, run, plan = MODELS[name]()
    with torch.no_grad():
        base = run()
        session = saint.apply(model, plan)
        off = wrapped(model)
        session.remove()
        assert torch.equal(run(), base)
        off()  # puts back methods of the plan
        assert torch.equal(run(), base)


@pytest.mark.parametrize("hooked_first", [True, False])
def test_hooks_of_accelerate_that_leave_before_the_plan(hooked_first):
    hooks = pytest.importorskip("accelerate.hooks")
    model, run, plan = MODELS["transformers"]()
    before = snapshot(model)
    with torch.no_grad():
        base = run()
        block = model.vit.layers[0]
        if hooked_first:
            hooks.add_hook_to_module(block, hooks.ModelHook())
            session = saint.apply(model, plan)
            hooks.remove_hook_from_module(block)
            session.remove()
        else:
            session = saint.apply(model, plan)
            hooks.add_hook_to_module(block, hooks.ModelHook())
            session.remove()
            hooks.remove_hook_from_module(block)
        assert torch.equal(run(), base)
    assert vars(block).pop("forward").__func__ is type(block).forward  # accelerate leaves the method on the instance
    assert snapshot(model) == before


@pytest.mark.parametrize("order", ["plan other undo off", "plan other off undo"])
@pytest.mark.parametrize("name", MODELS)
def test_weights_that_are_offloaded_under_a_plan(name, order):
    accelerate = pytest.importorskip("accelerate")
    model, run, plan = MODELS[name]()
    session = None
    with torch.no_grad():
        base = run()
        with saint.apply(model, plan):
            pruned = run()
        for step in order.split():
            if step == "plan":
                session = saint.apply(model, plan)
            elif step == "other":
                accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
                assert any(parameter.is_meta for parameter in model.parameters())
            elif step == "undo":
                session.remove()
            else:
                accelerate.hooks.remove_hook_from_module(model, recurse=True)
            assert torch.equal(run(), base if "undo" in order[: order.index(step) + 4] else pruned)
