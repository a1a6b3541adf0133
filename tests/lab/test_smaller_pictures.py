"""`--pixels` where the tower of a vision-language model cannot be shown smaller pictures: its processor makes them."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import saint
from saint.errors import UnsupportedModelError
from saint.lab.embed import embed
from saint.lab.eval import Question, evaluate_vqa
from saint.lab.kinds import VLM
from saint.plans import Plan, Stage
from saint.vlm.smaller import smaller_pictures
from support import checkpoints
from support.families import cache_of
from support.pictures import saved

SHRINK = Plan(pixels=0.6)
BEHIND = Plan(language=Stage(saint.Saint(keep=0.5), layers=[1]))
SHAPES = (90, 70), (70, 90), (120, 64)  # of the last nothing makes less


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    return checkpoints.save_tiles(tmp_path_factory.mktemp("tiles"))


@pytest.fixture(scope="module")
def loaded(spec):
    return VLM.load(spec)


def photo(i):
    width, height = SHAPES[i]
    return Image.fromarray(np.random.default_rng(i).integers(0, 255, (height, width, 3), dtype=np.uint8))


@pytest.fixture
def photos(tmp_path):
    return saved(tmp_path / "photos", map(photo, range(2)))


def given(loaded, i, share=0.6):
    """What the model is given of a picture, whole and smaller, made here."""
    whole = loaded.prompted(["what is"], [photo(i)])
    found = smaller_pictures(loaded.processor, [photo(i)], share)
    text = f"{loaded.processor.image_token}\nwhat is"
    return whole, loaded.processor(text=[text], images=[found.images], return_tensors="pt", **found.options)


def counted(loaded, inputs):
    return int((inputs["input_ids"] == loaded.processor.image_token_id).sum())


# -- which route ------------------------------------------------------------------------------------------------------


def test_a_model_that_can_be_shown_smaller_pictures_is(tmp_path):
    llava = VLM.load(checkpoints.save(tmp_path, checkpoints.TEMPLATE))
    plan, subject = llava.fitted(SHRINK)
    assert plan is SHRINK
    assert subject is llava
    assert subject.shrinks is None


def test_others_leave_them_to_the_processor(loaded):
    plan, subject = loaded.fitted(BEHIND.resized(0.6))
    assert plan == BEHIND
    assert subject.pixels == 0.6
    assert subject.model is loaded.model
    assert loaded.fitted(BEHIND) == (BEHIND, loaded)
    alone = VLM.around(loaded.model)  # and without one the model says why it cannot
    assert alone.fitted(SHRINK) == (SHRINK, alone)
    with (
        pytest.raises(
            UnsupportedModelError, match=r"cannot do the vision stage.*saint\.smaller_pictures\(processor, images, "
        ),
        saint.pruned(alone.model, SHRINK),
    ):
        pass


def test_its_inputs_are_of_smaller_pictures(loaded):
    _, subject = loaded.fitted(SHRINK)
    whole, smaller = given(loaded, 0)
    made = subject.prompted(["what is"], [photo(0)])
    assert set(made) == set(smaller)
    assert all(torch.equal(made[name], smaller[name]) for name in made)
    assert made["input_ids"].shape[1] < whole["input_ids"].shape[1]


# -- bench ------------------------------------------------------------------------------------------------------------


def test_bench_times_whole_pictures_against_smaller_ones(loaded):
    plans = {"shrunk": SHRINK, "both": BEHIND.resized(0.6), "behind": BEHIND}
    result = loaded.bench(plans, [photo(0)], prompt="what is", new_tokens=2, repeats=1, warmup=0)
    whole, smaller = (counted(loaded, inputs) for inputs in given(loaded, 0))
    assert smaller <= 0.6 * whole
    stages = {name: [(s.stage, s.tokens_in, s.tokens_out) for s in found] for name, found in result.tokens.items()}
    assert stages["shrunk"] == [("processor", whole, smaller)]
    assert stages["both"][0] == ("processor", whole, smaller)
    assert stages["both"][1] == ("language", smaller, smaller // 2)
    assert stages["behind"] == [("language", whole, whole // 2)]
    bytes_of = {name: times.kv_bytes for name, times in result.times.items()}
    for name, inputs in zip(("base", "shrunk"), given(loaded, 0), strict=True):
        with torch.no_grad():
            layers = cache_of(loaded.model(**inputs, use_cache=True)).layers
        assert bytes_of[name] == sum(t.numel() * t.element_size() for one in layers for t in (one.keys, one.values))
    assert bytes_of["both"] < bytes_of["shrunk"]
    assert result.gains["shrunk"].kv == bytes_of["shrunk"] / bytes_of["base"]
    assert result.gains["both"].bound > result.gains["shrunk"].bound > 1.5
    assert result.plans == plans
    own = {"shrunk": "by the processor", "pixels": 0.6}
    assert result.conditions["pictures"] == {"shrunk": own, "both": own}


def test_bench_from_the_command_line(spec, photos, run, tmp_path):
    record = tmp_path / "bench.json"
    common = ["--images", photos, "--repeats", 1, "--warmup", 0, "--new-tokens", 2, "--device", "cpu", "--threads", 1]
    code, out, err = run("bench", spec, "--pixels", 0.6, *common, "--json", record)
    assert code == 0, err
    assert "pictures were shrunk by the processor" in " ".join(out.split())
    assert json.loads(record.read_text())["tokens"]["pixels 0.6"][0]["stage"] == "processor"


# -- eval -------------------------------------------------------------------------------------------------------------


def test_eval_compares_whole_pictures_with_smaller_ones(loaded, tmp_path):
    plans = {"shrunk": SHRINK, "both": BEHIND.resized(0.6), "behind": BEHIND}
    questions = [Question(photo(i), "what is", (), id=str(i)) for i in range(2)]

    def evaluated():
        return evaluate_vqa(
            loaded.model, loaded.processor, questions, plans, prompt=lambda q: q.question, max_new_tokens=3,
            journal=tmp_path / "journal.sqlite",
        )  # fmt: skip

    report = evaluated()
    first, shares, work, lengths = [], [], [], []
    for i in range(2):
        inputs = given(loaded, i)
        counts = [counted(loaded, one) for one in inputs]
        shares.append(counts[1] / counts[0])
        lengths.append(counts)
        with torch.no_grad():
            whole, small = (torch.log_softmax(loaded.model(**one).logits[0, -1].double(), -1) for one in inputs)
        first.append(float((whole.exp() * (whole - small)).sum()))
        work.append(loaded.cost(inputs[1])[1] / loaded.cost(inputs[0])[1])
    found = report.agreement["shrunk"]
    assert found["kl"].mean == pytest.approx(np.mean(first), rel=1e-3)
    assert found["kept"].mean == pytest.approx(np.mean(shares))
    assert found["flops"].mean == pytest.approx(np.mean(work))
    assert found["visual_tokens_unpruned"].mean == np.mean([whole for whole, _ in lengths])
    assert found["visual_tokens"].mean == np.mean([small for _, small in lengths])
    both, behind = report.agreement["both"], report.agreement["behind"]
    assert both["kept"].mean == pytest.approx(0.5 * np.mean(shares))
    assert behind["kept"].mean == 0.5
    assert "visual_tokens" not in behind
    assert both["flops"].mean < found["flops"].mean
    assert report.plans == plans
    assert set(report.conditions["pictures"]) == {"shrunk", "both"}
    assert evaluated().conditions["resumed"] == 2


def test_the_work_of_a_prompt_is_that_of_its_layers(loaded):
    inputs = loaded.prompted(["what is", "what"], [photo(0), photo(1)])
    tokens, work = loaded.cost(inputs)
    assert tokens == [counted(loaded, loaded.prompted(["what"], [photo(i)])) for i in range(2)]
    alone = [loaded.cost(loaded.prompted([q], [photo(i)]))[1] for i, q in enumerate(("what is", "what"))]
    assert work == pytest.approx(sum(alone))  # padding is no work
    layer = loaded.model.model.language_model.layers[0]
    weights = sum(p.numel() for name, p in layer.named_parameters() if p.ndim == 2)
    length, depth = int(inputs["attention_mask"].sum(1)[0]), len(loaded.model.model.language_model.layers)
    channels = layer.self_attn.o_proj.in_features
    assert alone[0] == pytest.approx(depth * (2 * weights * length + 4 * channels * length**2))


def test_a_picture_that_cannot_be_smaller_is_left_out(spec, tmp_path, run):
    for i in range(3):
        photo(i).save(tmp_path / f"{i}.png")
    lines = [json.dumps({"image": f"{i}.png", "question": "what is", "answer": "what"}) for i in range(3)]
    (tmp_path / "asked.jsonl").write_text("\n".join(lines))
    code, out, err = run(
        "eval", "vqa", spec, tmp_path / "asked.jsonl", "--images", tmp_path, "--pixels", 0.6, "--device", "cpu",
        "--threads", 1, "--max-new-tokens", 2,
    )  # fmt: skip
    assert code == 1
    assert "2 of 3 evaluated" in out
    assert "of a picture of 120 x 64 whatever is turned down" in " ".join(err.split())


# -- view, embed, chat ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("more", "stages"), [([], []), (["--keep", 0.5], ["connector"])])
def test_view_draws_the_smaller_pictures(spec, loaded, photos, run, tmp_path, more, stages):
    common = ["--images", photos, "--device", "cpu", "--threads", 1, "--prompt", "what is", "-o", tmp_path / "out"]
    code, out, err = run("view", spec, "--pixels", 0.6, *more, *common, "--json", tmp_path / "view.json")
    assert code == 0, err
    record = json.loads((tmp_path / "view.json").read_text())
    for i, one in enumerate(record["photos"]):
        whole, smaller = (counted(loaded, inputs) for inputs in given(loaded, i))
        assert (one["visual_tokens_unpruned"], one["visual_tokens"]) == (whole, smaller)
        assert [step["stage"] for step in one["layers"]] == stages
        assert f"smaller picture: kept {smaller} of {whole}" in out
    assert [own["shrunk"] for own in record["pictures"].values()] == ["by the processor"]
    assert (tmp_path / "out" / "kept_0.png").is_file()
    code, out, err = run("report", tmp_path / "view.json", "-o", tmp_path / "page.html")
    assert code == 0, err
    assert "Pictures were shrunk by the processor" in (tmp_path / "page.html").read_text()


def test_rows_of_answers_are_about_smaller_pictures(loaded, photos):
    rows = list(embed(photos, loaded, BEHIND.resized(0.6), question="what is", max_new_tokens=3))
    for i, row in enumerate(rows):
        whole, smaller = given(loaded, i)
        with saint.pruned(loaded.model, BEHIND), torch.no_grad():
            tokens = loaded.model.generate(**smaller, max_new_tokens=3, do_sample=False)
        assert row["answer"] == loaded.decode(tokens[0, smaller["input_ids"].shape[1] :])
        assert row["tokens"] == counted(loaded, whole)
        left = counted(loaded, smaller)
        assert [(k["stage"], k["tokens"]) for k in row["kept"]] == [("processor", left), ("language", left // 2)]
    (alone, _) = embed(photos, loaded, SHRINK, question="what is", max_new_tokens=3)
    assert [k["stage"] for k in alone["kept"]] == ["processor"]


def test_chat_says_why_it_does_not(spec, photos, run):
    code, _, err = run(
        "chat", spec, "--images", photos / "0.png", "--prompt", "what", "--pixels", 0.6, "--device", "cpu"
    )
    assert code != 0
    assert "cannot do the vision stage" in " ".join(err.split())


def test_a_share_of_the_work_and_smaller_pictures(loaded):
    from saint.lab.loading.plans import Choice

    plan = loaded.planned(Choice.share(0.5).smaller(0.6))
    inside, subject = loaded.fitted(plan)
    assert inside == replace(plan, vision=())
    assert inside.connector
    assert subject.shrinks == {"shrunk": "by the processor", "pixels": 0.6}


def test_work_that_is_unknown_stays_unknown(loaded, monkeypatch):
    monkeypatch.setattr("saint.lab.eval.paired.work_left", lambda session: None)
    plans = {"shrunk": SHRINK, "both": BEHIND.resized(0.6)}
    report = evaluate_vqa(loaded.model, loaded.processor, [Question(photo(0), "what is")], plans, max_new_tokens=1)
    assert "flops" in report.agreement["shrunk"]  # of prompts alone
    assert "flops" not in report.agreement["both"]
