"""FSDP2 (`fully_shard`) on one process, before and after a plan, with gradient checkpointing."""

import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import saint
from saint import Plan, Stage
from saint.errors import UnsupportedModelError
from saint.upstream.specs import part
from support.families import FAMILIES, checkpoint, prompts
from support.models import build

# path of the blocks, and of a weight whose gradient is compared
MODELS = {
    "timm/vit-augreg": ("blocks", "attn.qkv.weight"),
    "timm/beit": ("blocks", "mlp.fc1.weight"),
    "transformers/vit": ("vit.layers", "mlp.fc1.weight"),
}


@pytest.fixture(scope="module")
def mesh(tmp_path_factory):
    store = distributed.FileStore(str(tmp_path_factory.mktemp("store") / "file"), 1)
    distributed.init_process_group("gloo", rank=0, world_size=1, store=store)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def shard(model, blocks, mesh, **policy):
    for block in part(model, blocks):
        fully_shard(block, mesh=mesh, **policy)
    fully_shard(model, mesh=mesh, **policy)


def checkpointed(model):
    if hasattr(model, "set_grad_checkpointing"):
        model.set_grad_checkpointing(True)
    else:
        model.train()
        checkpoint(model)


def gradient(model, path, weight):
    out = model(torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0)))
    (out if isinstance(out, torch.Tensor) else out.logits).pow(2).sum().backward()
    grad = part(part(model, path)[0], weight).grad
    return grad.full_tensor() if hasattr(grad, "full_tensor") else grad


@pytest.mark.parametrize("budget", ["sample", 0.6])
@pytest.mark.parametrize("placement", ["mid", "post"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("order", [("plan", "shard"), ("shard", "plan")], ids=" ".join)
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_one_process(mesh, name, order, checkpointing, placement, budget):
    path, weight = MODELS[name]
    stage = Stage(saint.Saint(threshold=0.3, budget=budget), layers=[0, 1], placement=placement)
    model = build(name)
    saint.apply(model, stage)
    expected = gradient(model, path, weight)

    model = build(name)
    if checkpointing:
        checkpointed(model)
    for step in order:
        if step == "plan":
            saint.apply(model, stage)
        else:
            shard(model, path, mesh)
    torch.testing.assert_close(gradient(model, path, weight), expected, rtol=0, atol=0)
    saint.remove(model)
    assert saint.status(model) is None


def test_parameters_that_a_module_around_the_blocks_shards(mesh):
    model = build("timm/vit-augreg")
    fully_shard(model, mesh=mesh)
    with pytest.raises(
        UnsupportedModelError, match=r'blocks.0 are sharded .* before the model is sharded, .* or use placement="post"'
    ):
        saint.apply(model, Stage(saint.Saint(keep=0.6), layers=[0, 1]))
    assert saint.status(model) is None
    with saint.apply(model, Stage(saint.Saint(keep=0.6), layers=[0, 1], placement="post")) as session:
        model(torch.randn(2, 3, 96, 96))
        assert session.trace[-1].tokens_out.tolist() == [22, 22]


def test_a_language_model_that_is_sharded_already(mesh):
    family = FAMILIES["llava-llama"]
    model = family.build()
    inputs = prompts(family, model, [[3, "0", 4], [2, "0", 6]])
    plan = Plan(language=Stage(saint.Saint(keep=0.6), layers=[1], placement="mid"))
    with torch.no_grad():
        with saint.apply(model, plan):
            expected = model(**inputs).logits
        shard(model, "model.language_model.layers", mesh)
        with saint.apply(model, plan):
            torch.testing.assert_close(model(**inputs).logits, expected, rtol=0, atol=0)


def test_mixed_precision_with_checkpointing(mesh):
    def run(checkpointing):
        model = build("timm/vit-augreg")
        if checkpointing:
            checkpointed(model)
        shard(model, "blocks", mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
        saint.apply(model, Stage(saint.Saint(threshold=0.3), layers=[0, 1], placement="post"))
        return gradient(model, *MODELS["timm/vit-augreg"])

    torch.testing.assert_close(run(True), run(False), rtol=0, atol=0)


def test_several_forwards_in_front_of_one_backward_pass(mesh):
    """Each layer that is run again finds the forward of its own pictures."""
    stage = Stage(saint.Saint(threshold=0.3), layers=[0, 1])
    pictures = torch.randn(3, 2, 3, 96, 96)

    def gradients(checkpointing, sharded):
        model = build("timm/vit-augreg")
        if checkpointing:
            checkpointed(model)
        saint.apply(model, stage)
        if sharded:
            shard(model, "blocks", mesh)
        sum(model(x).pow(2).sum() * (i + 1) for i, x in enumerate(pictures)).backward()
        grad = model.blocks[0].attn.qkv.weight.grad
        return grad.full_tensor() if sharded else grad

    torch.testing.assert_close(gradients(True, True), gradients(False, False))
