"""`saint eval images`: data where people keep it, scores by hand, failures told, runs that continue."""

import io
import json
import os
import re
import sqlite3
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

import saint
from saint.lab.eval import compare, evaluate_images, find_samples
from saint.lab.eval import scores as score_
from saint.lab.kinds import Encoder
from saint.lab.kinds.features import Features
from saint.methods import Random
from saint.plans import Plan, Stage
from saint.session import status
from support.command_line import one_line

TINY = ["timm:test_vit", "--no-pretrained", "--threads", 1, "--device", "cpu"]
HALF = Plan(vision=saint.Saint(keep=0.5))
PLAN = json.dumps(HALF.to_dict())


def picture(kind, seed):
    noise = np.random.default_rng(seed).normal(128, 20 + 10 * seed, (36, 40 + seed, 3)).clip(0, 255).astype(np.uint8)
    slope = Image.linear_gradient("L").rotate(20 * seed).convert("RGB")
    return Image.fromarray(noise) if kind == "noise" else slope


@pytest.fixture
def folder(tmp_path):
    """Two classes of five pictures."""
    for kind in ("noise", "slope"):
        (tmp_path / "data" / kind).mkdir(parents=True)
        for i in range(5):
            picture(kind, i).save(tmp_path / "data" / kind / f"{i}.png")
    return tmp_path / "data"


@pytest.fixture(scope="module")
def loaded():
    return Encoder.load("timm:test_vit", pretrained=False)


# -- scores -----------------------------------------------------------------------------------------------------------


def test_in_top():
    logits = torch.tensor([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0]])
    assert score_.in_top(logits, torch.tensor([1, 1]), 1).tolist() == [False, False]
    assert score_.in_top(logits, torch.tensor([1, 0]), 2).tolist() == [True, False]
    assert score_.in_top(logits, torch.tensor([2, 0]), 5).tolist() == [True, True]


def test_knn_leaves_the_sample_itself_out_and_breaks_ties_by_nearness():
    angles = torch.tensor([0.0, 1.0, 2.0, 40.0, 41.0, 80.0]).deg2rad()
    features = torch.stack([angles.cos(), angles.sin()], 1) * torch.tensor([1, 5, 1, 3, 1, 2.0])[:, None]  # cosine
    labels = torch.tensor([0, 0, 0, 1, 1, 0])
    assert score_.knn(features, labels, 1).tolist() == [True, True, True, True, True, False]
    # of 80 degrees: neighbours 41 (1), 40 (1), 2 (0); of 40: 41 (1) and then 2 (0): a tie for the nearer one
    assert score_.knn(features, labels, 3).tolist() == [True, True, True, False, False, False]
    assert score_.knn(features, labels, 2).tolist() == [True, True, True, True, True, False]


def test_knn_in_chunks_is_knn():
    g = torch.Generator().manual_seed(0)
    features, labels = torch.randn(1100, 4, generator=g), torch.randint(0, 3, (1100,), generator=g)
    unit = torch.nn.functional.normalize(features, dim=-1)
    similarity = (unit @ unit.T).fill_diagonal_(-2)
    near = labels[similarity.topk(3).indices]
    clear = [i for i in range(1100) if len(near[i].unique()) < 3]
    expected = torch.tensor([near[i].mode().values == labels[i] for i in clear])
    assert torch.equal(score_.knn(features, labels, 3)[clear], expected)


def test_linear_probe_learns_and_is_tested_on_others():
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(3).repeat(20)
    test = score_.split(labels)
    assert test.sum() == 30
    assert labels[test].bincount().tolist() == [10, 10, 10]
    features = torch.nn.functional.one_hot(labels).float() * 5 + torch.randn(60, 3, generator=g)
    assert score_.linear_probe(features, labels, test).float().mean() > 0.9
    shuffled = labels[torch.randperm(60, generator=g)]
    assert score_.linear_probe(features, shuffled, score_.split(shuffled)).float().mean() < 0.7
    with pytest.raises(ValueError, match="two samples each"):
        score_.split(torch.tensor([0, 0, 1]))


# -- data -------------------------------------------------------------------------------------------------------------


def test_a_folder_per_class(folder):
    (folder / "empty").mkdir()
    (folder / "noise" / "notes.txt").write_text("not a picture")
    (folder / "stray.png").write_bytes((folder / "noise" / "0.png").read_bytes())
    samples = find_samples(str(folder))
    assert samples.classes == ["noise", "slope"]
    assert [s.id for s in samples.items[:2]] == ["noise/0.png", "noise/1.png"]
    assert [s.label for s in samples.items] == [0] * 5 + [1] * 5
    assert [f.where for f in samples.unreadable] == ["stray.png"]
    assert samples.items[1].load().size == (41, 36)
    named = find_samples(str(folder), classes=["x", "slope", "noise"])
    assert [s.label for s in named.items] == [2] * 5 + [1] * 5
    with pytest.raises(ValueError, match="'noise'.*none of the 1 given"):
        find_samples(str(folder), classes=["slope"])
    assert [s.id for s in find_samples(str(folder), limit=2).items] == ["noise/0.png", "slope/0.png"]
    flat = find_samples(str(folder / "noise"))
    assert not flat.labelled
    assert flat.classes is None


def test_webdataset_shards(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    for shard in range(2):
        with webdataset.TarWriter(str(tmp_path / f"part-{shard}.tar")) as sink:
            for i in range(3):
                sink.write({"__key__": f"{shard}{i}", "png": picture("noise", i), "cls": 2 * shard + i % 2})
    samples = find_samples(str(tmp_path))
    assert [s.label for s in samples.items] == [0, 1, 0, 2, 3, 2]
    assert samples.items[0].id == "part-0.tar/00"
    assert samples.items[1].load().tobytes() == picture("noise", 1).tobytes()
    assert len(find_samples(str(tmp_path / "part-1.tar")).items) == 3


def test_bad_members_of_shards(tmp_path):
    def add(tar, name, data):
        info = tarfile.TarInfo(name)
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))

    good = io.BytesIO()
    picture("noise", 0).save(good, "JPEG")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "./x/0.jpg", good.getvalue())
        add(tar, "./x/0.json", b'{"label": 3}')
        add(tar, "1.txt", b"no picture")
        add(tar, "2.jpg", b"broken")
        add(tar, "2.cls", b"1")
        add(tar, "3.jpg", good.getvalue())
        add(tar, "3.cls", b"cat")
    (tmp_path / "b.tar").write_bytes(b"\x1f\x8b not a plain tar")
    samples = find_samples(str(tmp_path))
    assert [(s.id, s.label) for s in samples.items] == [("a.tar/x/0", 3), ("a.tar/2", 1)]
    assert [f.where for f in samples.unreadable] == ["a.tar: 1", "a.tar: 3", "b.tar"]
    assert "'cat'" in samples.unreadable[1].reason
    with pytest.raises(ValueError, match="Pillow"):
        samples.items[1].load()


def test_hugging_face_data_on_disk(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["cat", "dog"]))
    rows = {"image": [picture("noise", i) for i in range(3)], "label": [0, 1, 1]}
    data = datasets.Dataset.from_dict(rows, features=features)
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=data, test=data.select([2])).save_to_disk(tmp_path / "two")

    samples = find_samples(str(tmp_path / "one"))
    assert samples.classes == ["cat", "dog"]
    assert [s.label for s in samples.items] == [0, 1, 1]
    assert samples.items[1].load().tobytes() == picture("noise", 1).tobytes()
    assert len(find_samples(str(tmp_path / "two"), split="test").items) == 1
    with pytest.raises(ValueError, match="splits train, test: choose one with --split"):
        find_samples(str(tmp_path / "two"))
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "three")
    with pytest.raises(ValueError, match="no image column among text"):
        find_samples(str(tmp_path / "three"))


def test_a_missing_library_names_the_extra(tmp_path, monkeypatch):
    (tmp_path / "dataset_info.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r'pip install "\.\[eval\]"'):
        find_samples(str(tmp_path))


# -- evaluation -------------------------------------------------------------------------------------------------------


def test_base_and_pruned_by_hand(folder, loaded):
    samples = find_samples(str(folder))
    before = {name: (len(m._forward_pre_hooks), sorted(vars(m))) for name, m in loaded.model.named_modules()}
    report = evaluate_images(
        loaded.model, samples, {"half": HALF}, inputs=loaded.pixels, scores=["knn", "linear"], batch=4
    )

    labels = torch.tensor([s.label for s in samples.items])
    made = loaded.pixels([s.load() for s in samples.items])
    expected = {}
    with torch.inference_mode():
        expected["base"] = loaded.model.forward_head(loaded.model.forward_features(made["x"]), pre_logits=True)
        base_logits = loaded.model(**made)
        with saint.pruned(loaded.model, HALF):
            expected["pruned"] = loaded.model.forward_head(loaded.model.forward_features(made["x"]), pre_logits=True)
            logits = loaded.model(**made)
    knn = {key: score_.knn(value, labels).double().mean().item() for key, value in expected.items()}
    result = report.scores["half"]
    assert (result["knn"].base, result["knn"].pruned) == pytest.approx((knn["base"], knn["pruned"]))
    assert result["linear"].n == 4
    cosine = torch.nn.functional.cosine_similarity(expected["base"], expected["pruned"]).mean().item()
    agreement = report.agreement["half"]
    assert agreement["cosine"].mean == pytest.approx(cosine, abs=1e-5)
    assert cosine < 0.9999
    same = (logits.argmax(1) == base_logits.argmax(1)).double().mean().item()
    assert agreement["same_top1"].mean == pytest.approx(same)
    assert 0 < agreement["kept"].mean <= 0.5
    assert (report.given, report.evaluated, report.failures) == (10, 10, [])
    assert status(loaded.model) is None
    assert before == {name: (len(m._forward_pre_hooks), sorted(vars(m))) for name, m in loaded.model.named_modules()}


def test_plans_against_each_other(folder, loaded):
    plans = {"half": HALF, "nothing": Plan(), "random": Plan(vision=Stage(Random(keep=0.1), layers=[0]))}
    report = evaluate_images(
        loaded.model, find_samples(str(folder)), plans, inputs=loaded.pixels, scores=["knn", "linear"], batch=4
    )
    hits = {name: scores["knn"] for name, scores in report.samples.items()}
    assert set(hits) == {"base", *plans}
    assert set(hits["half"]) == {sample.id for sample in find_samples(str(folder)).items}
    assert len(report.samples["half"]["linear"]) == 4
    versus = report.between("half", "random")["knn"]
    expected = compare(list(hits["half"].values()), [hits["random"][name] for name in hits["half"]])
    assert versus == expected
    assert (versus.base, versus.pruned) == (report.scores["half"]["knn"].pruned, report.scores["random"]["knn"].pruned)
    assert report.against_first() == {name: report.between("half", name) for name in ("nothing", "random")}
    assert report.between("base", "nothing")["knn"].better == report.between("base", "nothing")["knn"].worse == 0
    record = report.to_dict()
    assert "samples" not in record
    assert record["against_first"]["random"]["knn"]["difference"] == versus.difference
    with pytest.raises(ValueError, match="no plan 'other'.*half, nothing, random"):
        report.between("half", "other")


def test_classifier_scores(folder):
    import timm

    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=2).eval()
    loaded = Encoder.load("timm:test_vit", pretrained=False)
    samples = find_samples(str(folder))
    report = evaluate_images(model, samples, {"half": HALF}, inputs=loaded.pixels)
    made = loaded.pixels([s.load() for s in samples.items])
    labels = torch.tensor([s.label for s in samples.items])
    with torch.inference_mode():
        hits = (model(**made).argmax(1) == labels).double().mean().item()
        with saint.pruned(model, HALF):
            pruned = (model(**made).argmax(1) == labels).double().mean().item()
    assert report.scores["half"]["top1"].base == pytest.approx(hits)
    assert report.scores["half"]["top1"].pruned == pytest.approx(pruned)
    assert report.scores["half"]["top5"].base == 1  # of two classes

    with pytest.raises(ValueError, match="1000 outputs and the data 2 classes.*--classes"):
        evaluate_images(loaded.model, samples, {"half": HALF}, inputs=loaded.pixels, scores=["top1"])
    assert list(evaluate_images(loaded.model, samples, {"half": HALF}, inputs=loaded.pixels).scores["half"]) == ["knn"]


def test_transformers_features_are_the_classifiers_input(tmp_path):
    from support.models import build

    model = build("transformers/vit")
    model.num_labels  # noqa: B018  (a classifier)
    pixels = torch.randn(2, 3, 96, 96)
    features, logits = Features(model)({"pixel_values": pixels})
    with torch.no_grad():
        assert torch.allclose(model.classifier(features), logits, atol=1e-5)
        assert torch.allclose(model(pixels).logits, logits, atol=1e-5)


def test_without_labels_there_is_agreement(folder, loaded):
    report = evaluate_images(loaded.model, find_samples(str(folder / "noise")), {"half": HALF}, inputs=loaded.pixels)
    assert report.scores == {"half": {}}
    assert set(report.agreement["half"]) == {"cosine", "same_top1", "kept", "flops"}
    with pytest.raises(ValueError, match="labels"):
        evaluate_images(
            loaded.model, find_samples(str(folder / "noise")), {"half": HALF}, inputs=loaded.pixels, scores=["knn"]
        )


def test_not_finite_features_fail_the_sample(folder, loaded):
    samples = find_samples(str(folder))

    def inputs(images):
        made = loaded.pixels(images)
        for row, image in enumerate(images):
            if image.width == 43:
                made["x"][row] = torch.nan
        return made

    report = evaluate_images(loaded.model, samples, {"half": HALF}, inputs=inputs)
    assert report.evaluated == 9
    assert "not finite" in report.failures[0].reason


# -- zero-shot --------------------------------------------------------------------------------------------------------


def test_zero_shot_with_open_clip():
    from saint.lab.eval.zeroshot import class_embeddings, load_both_towers

    open_clip = pytest.importorskip("open_clip")
    loaded, embed = load_both_towers("open_clip:ViT-S-32/none")
    text = class_embeddings(embed, ["red_fox", "dog"], ["a {}.", "the {}!"])
    torch.manual_seed(0)
    both = open_clip.create_model("ViT-S-32").eval()
    tokens = open_clip.get_tokenizer("ViT-S-32")(["a red fox.", "the red fox!"])
    with torch.no_grad():
        rows = torch.nn.functional.normalize(both.encode_text(tokens), dim=-1).mean(0)
        image = both.encode_image(loaded.pixels([picture("noise", 0)])["x"])
        assert torch.allclose(text[0], torch.nn.functional.normalize(rows, dim=-1), atol=1e-5)
        assert torch.allclose(loaded.model(**loaded.pixels([picture("noise", 0)])), image, atol=1e-5)
    sets = open_clip.SIMPLE_IMAGENET_TEMPLATES
    whole = open_clip.build_zero_shot_classifier(both, open_clip.get_tokenizer("ViT-S-32"), ["red fox", "dog"], sets)
    assert torch.allclose(class_embeddings(embed, ["red_fox", "dog"], ["openai-7"]), whole.T, atol=1e-5)
    with pytest.raises(ValueError, match=r"class name goes, or is one of openai-80, openai-7; got 'a photo'"):
        class_embeddings(embed, ["a"], ["a {}", "a photo"])
    with pytest.raises(ValueError, match="got 'none'"):
        class_embeddings(embed, ["a"], [])
    with pytest.raises(ValueError, match="text tower"):
        load_both_towers("timm:test_vit")


@pytest.fixture
def clip(tmp_path):
    """A tiny CLIP of transformers on disk, with its tokenizer."""
    import transformers as hf
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<pad>": 0, "<bos>": 1, "<eos>": 2, "noise": 3, "slope": 4, "photo": 5, "<unk>": 6}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = hf.CLIPConfig(
        vision_config={**small, "image_size": 24, "patch_size": 4}, projection_dim=16,
        text_config={**small, "vocab_size": 8, "max_position_embeddings": 16, "eos_token_id": 2, "bos_token_id": 1},
    )  # fmt: skip
    model = hf.CLIPModel(config).eval()
    model.save_pretrained(tmp_path / "clip")
    fast.save_pretrained(tmp_path / "clip")
    hf.CLIPImageProcessor(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}).save_pretrained(
        tmp_path / "clip"
    )
    return f"hf:{tmp_path / 'clip'}"


def test_named_sets_of_templates_stand_for_their_templates(monkeypatch):
    from saint.lab.eval.zeroshot import read_templates

    pytest.importorskip("open_clip")
    made = read_templates(["one {}", "openai-80", "openai-7"])
    assert len(made) == 88
    assert all(template.count("{}") == 1 for template in made)
    assert made[:2] == ["one {}", "a bad photo of a {}."]
    assert "itap of a {}." in made[81:]
    monkeypatch.setitem(sys.modules, "open_clip", None)
    assert read_templates(["a {}"]) == ["a {}"]
    with pytest.raises(ImportError, match=r'open_clip is not installed: pip install "\.\[open-clip\]"'):
        read_templates(["openai-7"])


def test_zero_shot_with_transformers(run, clip, folder, tmp_path):
    import transformers as hf

    code, out, err = run(
        "eval", "images", clip, folder, "--score", "zeroshot", "--template", "photo {}", "--plan", PLAN, "--device", "cpu",
        "--json", tmp_path / "r.json",
    )  # fmt: skip
    assert code == 0, err
    assert "zeroshot" in out
    record = json.loads((tmp_path / "r.json").read_text())
    result = record["scores"]["plan1"]["zeroshot"]

    model = hf.CLIPModel.from_pretrained(clip[3:]).eval()
    tokenizer = hf.AutoTokenizer.from_pretrained(clip[3:])
    process = hf.AutoImageProcessor.from_pretrained(clip[3:])
    samples = find_samples(str(folder)).items
    with torch.no_grad():
        made = model(
            **tokenizer(["photo noise", "photo slope"], return_tensors="pt"),
            pixel_values=process(images=[s.load() for s in samples], return_tensors="pt")["pixel_values"],
        )
    right = made.logits_per_image.argmax(1) == torch.tensor([s.label for s in samples])
    assert result["base"] == pytest.approx(right.double().mean().item())
    assert record["agreement"]["plan1"]["kept"]["mean"] < 1
    one_line(run("eval", "images", clip, folder / "noise", "--score", "zeroshot")[2], "--classes")


# -- command ----------------------------------------------------------------------------------------------------------


def test_record_resume_and_refusal(run, folder, tmp_path):
    file = tmp_path / "r.json"
    args = ["eval", "images", *TINY, "--score", "knn", "--plan", PLAN, "--json", file]
    code, out, err = run(*args[:3], folder, *args[3:])
    assert code == 0, err
    assert "10 of 10 evaluated" in out
    row = next(line for line in out.splitlines() if line.startswith(" plan1 "))
    assert re.match(r" plan1 +[\d.]+ % +[\d.]+ % ", row)  # tokens kept, FLOPs left
    record = json.loads(file.read_text())
    assert (record["kind"], record["given"], record["evaluated"]) == ("eval/images", 10, 10)
    assert record["environment"]["torch"]
    assert Plan.from_dict(record["plans"]["plan1"]) == HALF
    assert record["conditions"]["image_size"] == [160, 160]
    assert str(tmp_path) not in file.read_text()

    journal = sqlite3.connect(tmp_path / "r.journal.sqlite", isolation_level=None)
    journal.execute("DELETE FROM results WHERE rowid > 4")  # killed behind the fourth result
    code, out, err = run(*args[:3], folder, *args[3:])
    assert code == 0, err
    assert "4 of them from" in out
    again = json.loads(file.read_text())
    assert again["scores"] == record["scores"]
    for measure, values in again["agreement"]["plan1"].items():
        assert values == pytest.approx(record["agreement"]["plan1"][measure], abs=1e-5)
    assert journal.execute("SELECT count(*) FROM results").fetchone() == (10,)
    journal.close()

    code, _, err = run(*args[:3], folder, *args[3:], "--plan", "vit/published")
    assert code == 2
    one_line(err, "another run", "plans")
    code, out, err = run(*args[:3], folder, *args[3:-1], tmp_path / "two.json", "--plan", "vit/published")
    assert code == 0, err
    assert "Against the first plan, plan1" in out
    assert set(json.loads((tmp_path / "two.json").read_text())["against_first"]) == {"vit/published"}
    picture("noise", 7).save(folder / "noise" / "new.png")
    one_line(run(*args[:3], folder, *args[3:])[2], "another run", "data")


def test_broken_images_are_told_and_the_status_says_so(run, folder, tmp_path):
    (folder / "noise" / "1.png").write_bytes(b"\x89PNG broken")
    whole = (folder / "slope" / "2.png").read_bytes()
    (folder / "slope" / "2.png").write_bytes(whole[: len(whole) // 2])
    file = tmp_path / "r.json"
    code, out, err = run("eval", "images", *TINY[:1], folder, *TINY[1:], "--plan", PLAN, "--batch", 3, "--json", file)
    assert code == 1
    assert "8 of 10 evaluated" in out
    assert "noise/1.png: not an image that Pillow can read" in err
    assert "top1 left out: the model has 1000 outputs and the data 2 classes" in err
    assert "slope/2.png: " in err
    record = json.loads(file.read_text())
    assert [f["where"] for f in record["failures"]] == ["noise/1.png", "slope/2.png"]
    assert record["scores"]["plan1"]["knn"]["n"] == record["evaluated"] == 8


def test_an_interruption_says_how_to_go_on(run, folder, tmp_path, monkeypatch):
    from saint.lab.eval import images

    real, calls = images.Features.__call__, []

    def interrupted(self, inputs):
        calls.append(1)
        if len(calls) > 4:  # base and pruned of two batches
            raise KeyboardInterrupt
        return real(self, inputs)

    monkeypatch.setattr(images.Features, "__call__", interrupted)
    args = ["eval", "images", *TINY[:1], folder, *TINY[1:], "--plan", PLAN, "--batch", 2, "--json", tmp_path / "r.json"]
    code, _, err = run(*args)
    assert code == 130
    assert "run the same command again" in err.replace("\n", " ")
    assert not (tmp_path / "r.json").exists()
    monkeypatch.undo()
    code, out, err = run(*args)
    assert code == 0, err
    assert "4 of them from" in out


def test_a_full_disk_is_one_line(run, folder, tmp_path, monkeypatch):
    from saint.lab.eval import Journal

    real, calls = Journal.append, []

    def full(self, entries):
        calls.append(1)
        if len(calls) == 2:
            pages = self._connection.execute("PRAGMA page_count").fetchone()[0]
            self._connection.execute(f"PRAGMA max_page_count = {pages}")
            entries = [{**entry, "much": "x" * 10_000} for entry in entries]
        return real(self, entries)

    monkeypatch.setattr(Journal, "append", full)
    code, _, err = run(
        "eval", "images", *TINY[:1], folder, *TINY[1:], "--plan", PLAN, "--batch", 5, "--json", tmp_path / "r.json"
    )
    assert code == 2
    one_line(err, "disk is full", "r.journal.sqlite", "5 result(s) are safe")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--score", "top3"], ["no such score: top3"]),
        (["--score", "top1"], ["1000 outputs", "2 classes"]),
        (["--score", "zeroshot"], ["text tower"]),
        (["--template", "a {}"], ["--score zeroshot"]),
        (["--plan", PLAN, "--plan", "vit/publishd"], ["vit/published"]),
        (["--plan", "vit/published", "--plan", "vit/published"], ["given twice"]),
        (["--classes", "nowhere.txt"], ["nowhere.txt"]),
        (["--journal", "."], ["file name"]),
    ],
)
def test_bad_options(run, folder, more, words):
    code, _, err = run("eval", "images", *TINY[:1], folder, *TINY[1:], *more)
    assert code == 2
    one_line(err, *words)


def test_nothing_there(run, tmp_path):
    one_line(run("eval", "images", "timm:test_vit", tmp_path / "nowhere")[2], "no such data", "hf:NAME")
    one_line(run("eval", "images", "timm:test_vit", tmp_path)[2], "no image")


def test_two_processes_make_the_same_record(folder, tmp_path):
    pytest.importorskip("accelerate")
    command = ["eval", "images", TINY[0], str(folder), *map(str, TINY[1:]), "--score", "knn", "--plan", PLAN, "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "saint",
         *command, str(tmp_path / "two.json")],
        capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("10 of 10 evaluated") == 1
    assert len(list(tmp_path.glob("two.journal.rank*of2.sqlite"))) == 2
    subprocess.run([sys.executable, "-m", "saint", *command, str(tmp_path / "one.json")], check=True, timeout=120)
    two, one = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("two", "one"))
    assert two["conditions"]["processes"] == 2
    assert two["scores"] == one["scores"]
    assert two["evaluated"] == one["evaluated"] == 10
    for measure, values in two["agreement"]["plan1"].items():
        assert values == pytest.approx(one["agreement"]["plan1"][measure], abs=1e-5)
