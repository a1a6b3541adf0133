"""The probe against loops, what a run may hold in memory, and how it continues; then the command."""

import dataclasses
import gc
import json
import math
import weakref

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import saint
from saint import testing
from saint.lab.analysis import geometry, propose, record, run, similarity
from saint.lab.analysis.attention import received_entropy
from saint.lab.analysis.causal import METHODS, Causal, Looks
from saint.lab.analysis.probe import Probe
from saint.lab.describe import as_python
from saint.lab.eval.journal import JournalError
from saint.lab.kinds.generating import next_token_kl
from saint.lab.report import make_report, read_records
from saint.lab.sources.items import Item
from support.command_line import TINY
from support.families import FAMILIES, prompts
from support.models import BUILDERS, build
from support.pictures import saved
from support.probing import Raw, entropy, observed, weights
from support.subjects import fixed


def test_the_probe_measures_an_encoder():
    model = build("transformers/dinov2-registers")
    inputs = testing.example_inputs(model)
    raw, taken = observed(model, inputs)
    found = taken["vision"]
    depth, prefix = len(found["quantities"]["key_similarity"]), raw.passed["vision", 0].prefix
    assert prefix == 4
    assert found["tokens"] == (raw.keys["vision", 0].shape[1], prefix)
    for layer in range(depth):
        keys, call, passed = raw.keys["vision", layer], raw.calls["vision", layer], raw.passed["vision", layer]
        rows = [weights(call, sample) for sample in range(len(keys))]
        after = passed.after[:, prefix:]
        want = {
            "key_similarity": [similarity.key_similarity(k) for k in keys],
            "key_similarity_centred": [similarity.key_similarity(k, center=True) for k in keys],
            "cls_entropy": [entropy(p[0]) for p in rows],
            "cls_share": [float(p[prefix:, 0].mean()) for p in rows],
            "token_entropy": [entropy(p[prefix:]) for p in rows],
            "received_entropy": [received_entropy(p[prefix:].sum(0)) for p in rows],
            "received_entropy_max": [entropy(p[prefix:].sum(0) / p[prefix:].sum(0).max()) for p in rows],
            "effective_rank": [geometry.effective_rank(x) for x in after],
            "residual_update": [
                geometry.residual_update(a, b) for a, b in zip(passed.before[:, prefix:], after, strict=True)
            ],
            "outliers": [geometry.outliers(x) for x in after],
        }
        for name, values in want.items():
            assert found["quantities"][name][layer] == pytest.approx(sum(values) / len(values), rel=1e-4, abs=1e-5), (
                name
            )
        shares = [similarity.droppable(k, [0.5, 0.8], 2) for k in keys]
        for place in range(2):
            assert found["droppable"][place][layer] == pytest.approx(sum(s[place] for s in shares) / len(shares))
    points = [raw.passed["vision", 0].before, *(raw.passed["vision", i].after for i in range(depth))]
    hsic = sum(
        geometry.hsic(torch.stack([geometry.gram(p[sample, prefix:]) for p in points])) for sample in range(len(keys))
    ) / len(keys)
    assert torch.allclose(torch.tensor(found["hsic"]), hsic.float(), atol=1e-7)
    assert found["quantities"]["cka_adjacent"] == pytest.approx(geometry.cka(hsic).diagonal(1).tolist(), abs=1e-6)


def test_an_encoder_without_a_class_token_has_no_numbers_of_one():
    model = build("transformers/siglip")
    _, taken = observed(model, testing.example_inputs(model))
    assert not {"cls_entropy", "cls_share", "last_entropy"} & set(taken["vision"]["quantities"])


def test_the_probe_measures_a_language_model():
    family = FAMILIES["llava-llama"]
    model = family.build()
    inputs = prompts(family, model, [[3, "0", 4]])
    raw, taken = observed(model, inputs)
    assert list(taken) == ["vision", "language"]
    found = taken["language"]["quantities"]
    visual = inputs["input_ids"][0] == 100
    first = int(visual.nonzero()[0])
    assert taken["language"]["tokens"] == (int(visual.sum()), int((~visual).sum()))
    for layer in range(len(found["key_similarity"])):
        call = raw.calls["language", layer]
        p = weights(call, 0, causal=True)
        keys = call.key[0].mean(0)
        behind = ~visual & (torch.arange(len(visual)) > first)
        want = {
            "text_similarity": similarity.cross_similarity(keys[visual], keys[~visual]),
            "last_entropy": entropy(p[-1]),
            "last_share": float(p[-1, visual].sum()),
            "visual_share": float(p[visual][:, visual].sum(1).mean()),
            "text_share": float(p[behind][:, visual].sum(1).mean()),
            "token_entropy": entropy(p[visual]),
            "received_entropy": received_entropy(p[visual].sum(0)),
        }
        for name, value in want.items():
            assert found[name][layer] == pytest.approx(value, rel=1e-4, abs=1e-5), name
        passed = raw.passed["language", layer]
        assert found["effective_rank"][layer] == pytest.approx(geometry.effective_rank(passed.after[0, visual]))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_gives_numbers(name):
    """Groups of patches, tiles, windows, padding: whatever a family has."""
    family = FAMILIES[name]
    model = family.build()
    inputs = prompts(family, model, [[3, "0", 4]])
    items = [Item("a", "a", lambda: picture(1))]
    settings = run.Settings(bootstrap=10, simulations=9, causal=1)
    (entry,) = run.analyze(fixed(model, inputs), items, settings=settings).entries
    assert {"vision", "language"} <= set(entry["stages"])
    for stage, found in entry["stages"].items():
        assert {"key_similarity", "token_entropy", "effective_rank", "cka_adjacent"} <= set(found["quantities"])
        for quantity, row in found["quantities"].items():
            assert all(value is not None and math.isfinite(value) for value in row), (stage, quantity)
    layers = entry["causal"]["language"]["saint"]
    assert all(value is not None and value >= 0 for value in layers)
    assert ("vision" in entry["causal"]) == (family.tower is not None)


@pytest.mark.parametrize("name", BUILDERS)
def test_every_encoder_gives_numbers(name):
    model = build(name)
    inputs = testing.example_inputs(model)
    probe = Probe([0.5])
    with saint.pruned(model, saint.Plan(), observers=[probe]):
        testing.run(model, inputs)
    (found,) = probe.take().values()
    for quantity, row in found["quantities"].items():
        assert all(value is not None and math.isfinite(value) for value in row), quantity
    assert {"key_similarity", "token_entropy", "received_entropy", "effective_rank", "cka_adjacent"} <= set(
        found["quantities"]
    )
    assert not probe.take()


def test_attention_that_torch_does_not_see_is_said_to_be_missing():
    model = build("transformers/vit")
    model.set_attn_implementation("eager")
    inputs = testing.example_inputs(model)
    items = [Item("a", "a", lambda: picture(1))]
    settings = run.Settings(causal=0, bootstrap=10)
    (part,) = record.make_record(run.analyze(fixed(model, inputs), items, settings=settings))["parts"]
    names = {quantity["name"] for quantity in part["quantities"]}
    assert {"key_similarity", "effective_rank"} <= names
    assert not {"token_entropy", "cls_entropy"} & names
    assert part["missing"][0][0] == "attention"
    assert "sdpa" in part["missing"][0][1]


# -- memory and streaming -----------------------------------------------------------------------------------------------


class Live(TorchDispatchMode):
    """The most bytes that tensors made inside hold at once."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.known:
                    self.known.add(storage._cdata)
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        return out

    def _gone(self, key, size):
        self.known.discard(key)
        self.now -= size


def peak(call) -> int:
    gc.collect()
    with torch.inference_mode(), Live() as live:
        call()
    return live.peak


@pytest.mark.parametrize("side", [37, 64])
def test_the_analysis_of_a_vit_s_needs_at_most_twice_the_memory_of_its_forward(side):
    """1,369 and 4,096 tokens, at the width of a ViT-S; N x N would be 45 and 403 MB for its 6 heads."""
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(
        hidden_size=384, num_hidden_layers=3, num_attention_heads=6, image_size=14 * side, patch_size=14
    )
    model = Dinov2Model(config).eval()
    inputs = {"pixel_values": torch.randn(1, 3, 14 * side, 14 * side)}
    forward = peak(lambda: model(**inputs))
    assert forward > 4 * 384 * side**2 * 4  # the hidden layer of an MLP at least: the measurement measures
    probe = Probe(run.THRESHOLDS)

    def analysed():
        with saint.pruned(model, saint.Plan(), observers=[probe]):
            model(**inputs)
        probe.take()

    assert peak(analysed) <= 2 * forward


def test_pairs_of_a_long_sequence_are_never_all_held():
    keys = torch.randn(8192, 16)
    assert peak(lambda: similarity.droppable(keys, run.THRESHOLDS)) < 4096 * 4096 * 4 / 2
    assert peak(lambda: similarity.key_similarity(keys)) < 4096 * 4096 * 4 / 8


def picture(number: int) -> Image.Image:
    noise = np.random.default_rng(number).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((64, 48))


@pytest.fixture
def loaded():
    from saint.lab.kinds import Encoder

    return Encoder.load("timm:test_vit", pretrained=False)


def measure(loaded, items, **more):
    settings = more.pop("settings", run.Settings(bootstrap=50, simulations=49, causal=2))
    return run.analyze(loaded, items, settings=settings, **more)


def test_images_are_streamed(loaded):
    alive, most = [], 0

    def load(number):
        nonlocal most
        image = picture(number)
        alive.append(weakref.ref(image))
        most = max(most, sum(ref() is not None for ref in alive))
        return image

    items = [Item(str(n), f"{n}.png", lambda n=n: load(n)) for n in range(12)]
    done = []
    result = measure(loaded, items, tick=done.append, settings=run.Settings(causal=0))
    gc.collect()
    assert sum(done) == len(result.entries) == 12
    assert most <= 3  # one measured, one read, one about to go
    assert not [value for entry in result.entries for value in entry.values() if isinstance(value, torch.Tensor)]


def test_a_killed_run_continues_and_gives_the_same_record(loaded, tmp_path):
    count = 0

    def items(limit):
        def load(n):
            nonlocal count
            count += 1
            if count > limit:
                raise KeyboardInterrupt
            return picture(n)

        return [Item(str(n), f"{n}.png", lambda n=n: load(n)) for n in range(6)]

    whole = record.make_record(measure(loaded, items(99)))
    count = 0
    file = tmp_path / "an.journal.sqlite"
    with pytest.raises(KeyboardInterrupt):
        measure(loaded, items(4), journal=file)
    assert saint.status(loaded.model) is None
    count = 0
    again = measure(loaded, items(99), journal=file)
    assert 0 < again.outcome.resumed < 6
    assert count == 6 - again.outcome.resumed
    made = record.make_record(again)
    assert made.pop("resumed") == again.outcome.resumed
    whole.pop("resumed")
    assert json.dumps(made) == json.dumps(whole)
    with pytest.raises(JournalError, match="share"):
        measure(loaded, items(99), journal=file, settings=run.Settings(share=0.5, causal=2))


def test_an_image_that_cannot_be_read_is_told_and_the_others_count(loaded):
    def broken():
        raise OSError("truncated")

    items = [Item(str(n), f"{n}.png", lambda n=n: picture(n)) for n in range(3)]
    result = measure(loaded, [*items, Item("bad", "bad.png", broken)])
    made = record.make_record(result)
    assert made["skipped"] == [["bad.png", "truncated"]]
    assert made["parts"][0]["quantities"][0]["n"] == 3
    with pytest.raises(ValueError, match="no image"):
        measure(loaded, [])


def test_an_image_that_fails_half_way_leaves_nothing_to_the_next(loaded):
    good = [Item(str(n), f"{n}.png", lambda n=n: picture(n)) for n in range(2)]
    alone = measure(loaded, good, settings=run.Settings(causal=0)).entries
    black = Item("black", "black.png", lambda: Image.new("RGB", (64, 48)))
    seen = {}

    class Seen(type(loaded)):
        def inputs(self, items, images):
            seen["last"] = items[0].id
            return super().inputs(items, images)

    def late(_module, _args):
        if seen["last"] == "black":
            raise RuntimeError("no such luck")

    hook = loaded.model.blocks[3].register_forward_pre_hook(late)
    settings = run.Settings(causal=0)
    subject = Seen(**{field.name: getattr(loaded, field.name) for field in dataclasses.fields(loaded)})
    result = run.analyze(subject, [good[0], black, good[1]], settings=settings)
    hook.remove()
    assert [failure.id for failure in result.outcome.failures] == ["black"]
    assert result.entries == alone


def staged_vit(seed: int, bias: list[float], scale: list[float]):
    """A ViT whose residual stream never changes: each layer's keys share a component of size ``bias``, and its logits grow with
    ``scale``, so that similarity and entropy are what is planted, up to weights that differ from layer to layer."""
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(seed)
    config = ViTConfig(
        hidden_size=192, intermediate_size=48, num_hidden_layers=12, num_attention_heads=4, image_size=96, patch_size=16
    )
    model = ViTModel(config).eval()
    names = dict(model.named_parameters())
    with torch.no_grad():
        for layer in range(12):
            own = {name: p for name, p in names.items() if f".{layer}." in name or f"layers.{layer}." in name}
            for name, parameter in own.items():
                if "q_proj" in name or "k_proj" in name or "query" in name or "key" in name:
                    key = "k_proj" in name or "key" in name
                    if parameter.ndim == 2:
                        parameter.normal_(0, 0.15 * (1 if key else scale[layer]))
                    else:
                        parameter.fill_(bias[layer] if key else 0.0)
                elif "layernorm" not in name and "norm" not in name:
                    parameter.zero_()  # values, projections and MLPs add nothing
    return model


def found_in(model):
    items = [Item(str(n), str(n), lambda n=n: picture(n)) for n in range(10)]

    def inputs(image):
        pixels = torch.from_numpy(np.array(image.resize((96, 96)))).permute(2, 0, 1)[None] / 127.5 - 1
        return {"pixel_values": pixels}

    settings = run.Settings(causal=0, bootstrap=200, simulations=199)
    (found,) = record.make_record(run.analyze(fixed(model, inputs), items, settings=settings))["parts"]
    return found["stages"]


def test_stages_planted_in_models_are_found():
    """In 99 of 100 seeds, of which these are the first; weights that differ from layer to layer are a noise of their own."""
    bias = [0.0] * 4 + [1.5] * 5 + [0.5] * 3
    scale = [1.0] * 4 + [3.0] * 5 + [10.0] * 3
    stages = [found_in(staged_vit(seed, bias, scale)) for seed in range(20)]
    right = [s for s in stages if s["verdict"] == "three stages, boundaries in front of layers 4 and 9"]
    assert len(right) >= 19, [s["verdict"] for s in stages]
    for found in right:
        what = [segment["what"] for segment in found["segments"]]
        assert "similarity rising" in what[1]
        assert "attention concentrating" in what[1]
        assert "similarity falling" in what[2]
        assert "attention concentrating" in what[2]


def test_models_without_stages_show_none():
    """In 100 of 100 seeds, of which these are the first."""
    stages = [found_in(staged_vit(seed, [0.5] * 12, [1.0] * 12)) for seed in range(10)]
    assert [s["verdict"] for s in stages] == ["not shown"] * 10


# -- the causal column ----------------------------------------------------------------------------------------------------


def test_causal_losses_are_those_of_plans_of_one_layer(loaded):
    model, inputs = loaded.model, loaded.pixels([picture(3)])
    causal = Causal.of(loaded, 0.25, loaded.plan)
    base = model(**inputs).detach()
    with torch.no_grad():
        got = causal.losses(lambda: model(**inputs), base, "a", {"vision": 6})["vision"]
        for layer in range(6):
            method = saint.Saint(keep=0.75)
            with saint.pruned(model, saint.Plan(vision=saint.Stage(method, layers=[layer]))) as session:
                other = model(**inputs)
                left = int(session.trace[0].tokens_out[0])
            want = 1 - float(torch.nn.functional.cosine_similarity(base.double(), other.double()))
            assert left == 75
            assert got["saint"][layer] == pytest.approx(max(0, want), abs=1e-9)
    assert max(got["random"]) > 0
    assert causal.plan("vision", 1, "random", "a") != causal.plan("vision", 1, "random", "b")


def test_every_choice_of_the_causal_column_is_the_plan_it_names(loaded):
    model, inputs = loaded.model, loaded.pixels([picture(3)])
    looks, raw = Looks(), Raw()
    with torch.no_grad():
        with saint.pruned(model, saint.Plan(), observers=[looks, raw]):
            base = model(**inputs)
        causal = Causal.of(loaded, 0.25, loaded.plan, choices=METHODS)
        seen = looks.take()
        got = causal.losses(lambda: model(**inputs), base, "a", {"vision": 6}, seen)["vision"]
        for layer in range(6):
            row = weights(raw.calls["vision", layer], 0)[0, 1:]
            plan = causal.plan("vision", layer, "attention", "a", seen[layer])
            with saint.pruned(model, plan) as session:
                found = model(**inputs)
                assert session.trace[0].kept[0].tolist() == sorted(row.topk(75).indices.tolist())
            assert got["attention"][layer] == pytest.approx(causal.loss(base, found), abs=1e-9)
            for name, beta in (("tome", 1), ("tome_plain", 0)):
                method = saint.methods.ToMe(keep=0.75, beta=beta)
                with saint.pruned(model, saint.Plan(vision=saint.Stage(method, layers=[layer]))) as session:
                    found = model(**inputs)
                    assert int(session.trace[0].tokens_out[0]) == 75
                assert got[name][layer] == pytest.approx(causal.loss(base, found), abs=1e-9)
    assert looks.take() == {}
    assert saint.methods.FastV(keep=0.75) == causal_language_choice(loaded)


def causal_language_choice(loaded):
    causal = Causal(loaded, 0.25, {}, {}, choices=METHODS)
    return causal.plan("language", 1, "attention", "a").language[0].method


def test_without_cls_nothing_is_chosen_by_attention(loaded):
    model, inputs = loaded.model, loaded.pixels([picture(3)])
    causal = Causal.of(loaded, 0.25, loaded.plan, choices=("saint", "attention"))
    with torch.no_grad():
        found = causal.losses(lambda: model(**inputs), model(**inputs), "a", {"vision": 6})["vision"]
    assert found["attention"] == [None] * 6
    assert None not in found["saint"]


def test_differences_to_saint_are_paired(loaded):
    items = [Item(str(n), str(n), lambda n=n: picture(n)) for n in range(5)]
    settings = run.Settings(bootstrap=300, simulations=9, causal=4, choices=METHODS)
    result = measure(loaded, items, settings=settings)
    made = record.make_record(result)["parts"][0]["causal"]
    losses = {m: np.array([e["causal"]["vision"][m] for e in result.entries if "causal" in e]) for m in METHODS}
    assert set(made["more_than_saint"]) == set(METHODS) - {"saint"}
    for method, found in made["more_than_saint"].items():
        less = losses[method] - losses["saint"]
        assert found["n"] == 4
        assert found["mean"] == pytest.approx(less.mean(0))
        assert found["layers_early"] == 2
        for name, part in (("early", less[:, :2]), ("late", less[:, 2:]), ("all", less)):
            per_image = part.mean(1)
            assert found[name]["mean"] == pytest.approx(per_image.mean())
            assert per_image.min() - 1e-12 <= found[name]["low"] <= found[name]["mean"] <= found[name]["high"]
            assert found[name]["high"] <= per_image.max() + 1e-12


@pytest.mark.parametrize("choices", [("random",), ("saint", "best")])
def test_choices_that_cannot_be(choices, loaded):
    with pytest.raises(ValueError, match="saint among them"):
        Causal.of(loaded, 0.25, choices=choices)


def test_the_kl_of_the_next_token():
    base, found = torch.randn(1, 3, 7), torch.randn(1, 3, 7)
    p, q = base[0, -1].softmax(-1).tolist(), found[0, -1].softmax(-1).tolist()
    assert next_token_kl(base, found) == pytest.approx(
        sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)), rel=1e-5
    )
    assert next_token_kl(base, base) == 0


def test_a_vision_language_model_loses_at_its_tower_and_in_its_language_model():
    family = FAMILIES["llava-llama"]
    model = family.build()
    inputs = prompts(family, model, [[3, "0", 4]])
    items = [Item(str(n), str(n), lambda: picture(1)) for n in range(2)]
    settings = run.Settings(bootstrap=20, simulations=19, causal=1, choices=METHODS)
    result = run.analyze(fixed(model, inputs), items, settings=settings)
    made = record.make_record(result)
    tower, language = made["parts"]
    assert (tower["stage"], language["stage"]) == ("vision", "language")
    for part in made["parts"]:
        assert part["causal"]["measure"] == "KL of the next token"
        assert part["causal"]["methods"]["saint"]["n"] == 1
    losses = language["causal"]["methods"]["random"]["mean"]
    assert all(loss > 0 for loss in losses[:-1])
    assert losses[-1] == pytest.approx(0, abs=1e-9)  # behind the last layer nobody attends any more
    used = [not math.isnan(value) for value in tower["causal"]["methods"]["random"]["mean"]]
    assert used == [True] * 3 + [False]  # LLaVA reads the last layer but one
    assert saint.status(model) is None


@pytest.mark.parametrize("share", [0, 0.6, -1])
def test_shares_that_cannot_be(share, loaded):
    with pytest.raises(ValueError, match="SAINT drops at most half"):
        Causal.of(loaded, share)


def part(losses, shares, thresholds=(0.7, 0.8)):
    high = [value * 1.2 for value in losses]
    methods = {"saint": {"mean": losses, "low": losses, "high": high}}
    return {
        "stage": "vision",
        "layers": len(losses),
        "causal": {"measure": "1 - cosine", "methods": methods},
        "droppable": {"thresholds": list(thresholds), "neighbors": 5, "mean": shares},
    }


def test_a_proposed_plan_begins_at_the_first_harmless_redundant_layer():
    causal = Causal(loaded, 0.25, {"vision": [0, 1, 2, 3]}, {"vision": saint.Saint()})
    losses = [0.5, 0.01, 0.01, 0.01, 0.0]
    plan = propose.propose([part(losses, [[0.3, 0.3, 0.9, 0.4, 0.4], [0.0, 0.0, 0.3, 0.3, 0.4]])], causal, {})
    assert plan == saint.Plan(vision=saint.Stage(saint.Saint(threshold=0.7), layers=[1, 3]))
    assert eval(as_python(plan), {"saint": saint}) == plan
    assert propose.propose([part([0.5] * 4, [[0.3] * 4, [0.3] * 4])], causal, {}) is None
    assert propose.propose([part(losses, [[0.01] * 5, [0.01] * 5])], causal, {}) is None
    centred = propose.propose([part(losses, [[0.3] * 5, [0.0] * 5])], causal, {"vision": True})
    assert centred.vision[0].method.center


# -- the command ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    return saved(tmp_path / "my photos", map(picture, range(9)))


def test_the_command_writes_a_record(command, folder, tmp_path):
    file = tmp_path / "out" / "an.json"
    code, said, err = command("analyze", *TINY, "--images", folder, "--causal", "3", "--json", file)
    assert code == 0, err
    assert "Stages: not shown" in said
    assert "9 image(s)" in said
    made = json.loads(file.read_text())
    assert made["kind"] == "analyze"
    assert made["pretrained"] is False  # so that a page says that the weights were random
    assert made["images"] == {"count": 9, "set": "my photos"}
    assert str(tmp_path) not in file.read_text()
    assert made["questions"] is None
    assert made["skipped"] == []
    (found,) = made["parts"]
    depth = found["layers"]
    assert (found["stage"], depth, found["tokens"]) == ("vision", 6, {"candidates": 100, "protected": 1})
    names = [quantity["name"] for quantity in found["quantities"]]
    assert {"key_similarity", "cls_entropy", "token_entropy", "effective_rank", "cka_adjacent"} <= set(names)
    for quantity in found["quantities"]:
        assert quantity["n"] == 9
        assert quantity["title"]
        for low, mean, high in zip(quantity["low"], quantity["mean"], quantity["high"], strict=True):
            assert low <= mean + 1e-9
            assert mean <= high + 1e-9
    assert len(found["droppable"]["mean"]) == len(found["droppable"]["thresholds"]) == 6
    assert [len(row) for row in found["cka"]["mean"]] == [depth] * depth
    assert found["cka"]["mean"][2][2] == pytest.approx(1)
    assert found["causal"]["share"] == 0.25
    assert found["causal"]["methods"]["random"]["n"] == 3
    assert set(found["stages"]) >= {"verdict", "shown", "used", "segments", "boundaries", "criteria"}
    if made["plan"] is not None:
        assert saint.Plan.from_dict(made["plan"]) == eval(made["plan_line"], {"saint": saint})
    shown, of = made["survivors"], made["survivors_of"]
    assert [photo["name"] for photo in shown] == ["0.png", "1.png", "2.png"]
    assert (of["plan"] == made["plan"]) is (made["plan"] is not None)
    assert of["left_out"] == []
    for photo in shown:
        assert photo["grid"] == [10, 10]
        assert photo["picture"].startswith("data:image/jpeg;base64,")
        left = set(range(100))
        for step in photo["layers"]:
            assert sorted([*step["kept"], *step["why"]["gone"]]) == sorted(left)
            assert set(step["why"]["into"]) <= set(step["kept"])
            assert len(step["why"]["degree"]) == (len(left) + 1) // 2
            left = set(step["kept"])
    assert "What was kept" in make_report(read_records([file]))
    again, said, _ = command("analyze", *TINY, "--images", folder, "--causal", "3", "--json", file)
    assert again == 0
    assert "9 of them from the journal" in said
    resumed = json.loads(file.read_text())
    assert (resumed["survivors"], resumed["survivors_of"]) == (shown, of)


def test_without_a_proposed_plan_the_usual_one_is_shown_and_said(command, folder, tmp_path):
    file = tmp_path / "an.json"
    code, _, err = command("analyze", *TINY, "--images", folder, "--limit", "2", "--causal", "0", "--json", file)
    assert code == 0, err
    made = json.loads(file.read_text())
    assert made["plan"] is None
    assert made["survivors_of"]["why"] == (
        "no plan is proposed (what leaving costs was not measured, --causal 0): the usual setting for this model"
    )
    assert made["survivors_of"]["plan"]["vision"][0]["method"]["method"] == "saint"
    assert len(made["survivors"]) == 2
    assert "no plan is proposed (what leaving costs was not measured" in make_report(read_records([file]))


def test_questions_to_a_vision_language_model(command, spec, folder, tmp_path):
    lines = [{"image": f"{n}.png", "question": "what w5"} for n in range(3)] + [{"image": "0.png"}]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, lines)))
    file = tmp_path / "an.json"
    args = ["analyze", spec, "--images", folder, "--threads", "1", "--device", "cpu", "--causal", "1", "--json", file]
    code, said, err = command(*args, "--questions", tmp_path / "q.jsonl")
    assert code == 1  # the last line asks nothing
    assert "q.jsonl, line 4" in err
    made = json.loads(file.read_text())
    assert made["questions"] == {"count": 3}
    assert [part["stage"] for part in made["parts"]] == ["vision", "language"]
    assert made["parts"][1]["tokens"]["candidates"] == 36
    assert made["parts"][1]["causal"]["measure"] == "KL of the next token"
    assert {"last_entropy", "text_share", "visual_share", "text_similarity"} <= {
        quantity["name"] for quantity in made["parts"][1]["quantities"]
    }
    assert "5 layers, 36 tokens that may be dropped" in " ".join(said.split())
    assert made["plan"] is None or made["survivors_of"]["plan"] == made["plan"]
    assert [photo["name"] for photo in made["survivors"]] == list(dict.fromkeys(p["name"] for p in made["survivors"]))
    for photo in made["survivors"]:
        assert photo["pictures"][0].startswith("data:image/jpeg;base64,")
        assert sum(rows * columns for rows, columns in photo["tiles"]) == photo["visual_tokens"] == 36
        assert all("gone" in step["why"] for step in photo["layers"])
    assert len(made["survivors"]) == 3
    assert "What was kept" in make_report(read_records([file]))
    code, _, err = command(*args[:-2], "--prompt", "what", "--limit", "2")
    assert code == 0, err
    assert command(*args[:-2], "--prompt", "what", "--questions", tmp_path / "q.jsonl")[0] == 2


def test_one_image_and_no_causal_column(command, folder, tmp_path):
    code, said, err = command("analyze", *TINY, "--images", folder / "3.png", "--causal", "0")
    assert code == 0, err
    assert "1 image(s)" in said
    assert "-saint" not in said
    assert "No plan" not in said


def test_choices_of_the_command(command, folder, tmp_path):
    file = tmp_path / "an.json"
    args = [
        *TINY,
        "--images",
        folder,
        "--limit",
        "2",
        "--causal",
        "1",
        "--choices",
        "saint,attention,tome",
        "--json",
        file,
    ]
    code, said, err = command("analyze", *args)
    assert code == 0, err
    assert "-saint, -attention, -tome: 1 - cosine" in " ".join(said.split())
    causal = json.loads(file.read_text())["parts"][0]["causal"]
    assert list(causal["methods"]) == ["saint", "attention", "tome"]
    assert set(causal["more_than_saint"]) == {"attention", "tome"}


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--choices", "random"], "saint among them"),
        (["--questions", "q.jsonl"], "vision-language"),
        (["--prompt", "What?"], "vision-language"),
        (["--share", "0.9"], "(0, 0.5]"),
        (["--images", "nowhere"], "nowhere"),
    ],
)
def test_bad_options_end_in_one_line(command, folder, args, words):
    images = [] if "--images" in args else ["--images", folder]
    code, _, err = command("analyze", *TINY, *images, *args)
    assert code == 2
    assert words in err


def test_a_broken_image_ends_with_status_1(command, folder):
    (folder / "broken.jpg").write_bytes(b"\xff\xd8 no picture")
    code, said, err = command("analyze", *TINY, "--images", folder, "--causal", "0")
    assert code == 1
    assert "9 image(s)" in said
    assert "broken.jpg" in err
