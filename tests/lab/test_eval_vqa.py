"""`saint eval vqa`: scores by hand, base and pruned answers, and the next-token divergence."""

import json
import math
import sqlite3

import numpy as np
import pytest
import torch
from PIL import Image

import saint
from saint.lab import answers as texts
from saint.lab.eval import Question, evaluate_vqa, read_questions
from saint.lab.eval import scores as score_
from saint.lab.kinds import VLM
from saint.lab.sources.questions import default_prompt, fill
from saint.plans import Plan
from saint.session import status
from support.checkpoints import PLAN, TEMPLATE, save
from support.command_line import one_line
from support.pictures import saved

CONNECTOR = Plan.from_json(PLAN)


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    return save(tmp_path_factory.mktemp("asked"), TEMPLATE)


@pytest.fixture(scope="module")
def loaded(spec):
    return VLM.load(spec)


def noise(seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (40, 60, 3), dtype=np.uint8))


@pytest.fixture
def images(tmp_path):
    return saved(tmp_path / "images", map(noise, range(4)))


def asked(tmp_path, *lines):
    path = tmp_path / "questions.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


# -- scores -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "answers", "right"),
    [
        ("Red.", ["red"], 1),
        ("The  red bus", ["a red bus"], 1),
        ("3.5", ["35"], 0),
        ("1,000.", ["1,000"], 1),
        ("theatre", ["atre"], 0),  # an article is a word
        ("no", ["yes", "NO!"], 1),
        ("don't", ["dont"], 0),
        ("", ["red"], 0),
    ],
)
def test_exact(said, answers, right):
    assert texts.exact(said, answers) == right


@pytest.mark.parametrize(
    ("said", "answers", "value"),
    [
        ("kitten", ["sitting"], 1 - 3 / 7),
        ("Kitten ", ["kitten"], 1),
        ("abc", ["xyz", "abd"], 1 - 1 / 3),
        ("ab", ["ax"], 0),  # half of it wrong
        ("", ["a"], 0),
    ],
)
def test_anls(said, answers, value):
    assert texts.anls(said, answers) == pytest.approx(value)


COLOURS = ["blue", "red", "dark red"]


@pytest.mark.parametrize(
    ("said", "index"),
    [
        ("B", 1), ("b.", 1), ("(C)", 2), ("A: blue", 0), ("red", 1), ("Dark red.", 2), ("The answer is (B)", 1),
        ("Option C", 2), ("I think blue", 0), ("it is dark red", None), ("D", None), ("Because", None), ("A cat", None),
        ("blue or red", None), ("", None),
    ],
)  # fmt: skip
def test_chosen(said, index):
    assert texts.chosen(said, COLOURS) == index


def test_choice():
    assert texts.choice("B", ["red"], COLOURS) == texts.choice("red", ["b"], COLOURS) == 1
    assert texts.choice("A", ["red"], COLOURS) == texts.choice("?", ["red"], COLOURS) == 0
    with pytest.raises(ValueError, match="none of the choices"):
        texts.right_choices(["green"], COLOURS)


def test_kl_divergence():
    p, q = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.25, 0.25, 0.5]])
    expected = 0.5 * math.log(2) - 0.25 * math.log(2)
    assert score_.kl_divergence(p.log(), q.log() + 3).item() == pytest.approx(expected)
    assert score_.kl_divergence(p.log(), p.log()).item() == 0
    never = torch.tensor([[0.5, 0.5, 0.0]]).log()
    assert score_.kl_divergence(never, p.log()).item() == pytest.approx(0.5 * math.log(2))
    assert score_.kl_divergence(p.log(), never).item() == math.inf


# -- questions --------------------------------------------------------------------------------------------------------


def test_questions_and_what_is_none(tmp_path, images):
    path = asked(
        tmp_path,
        {"image": "0.png", "question": "what", "answer": "red", "category": "colour", "id": 7},
        "",
        {"image": "1.png", "question": "how many", "answer": [2, "two"]},
        {"image": "1.png", "question": "which", "answer": "b", "choices": ["blue", "red"]},
        '{"image": "1.png", "question"',
        {"question": "what"},
        {"image": "1.png"},
        {"image": "1.png", "question": "which", "answer": "green", "choices": ["blue", "red"]},
        {"image": "1.png", "question": "again", "id": "7"},
        "[1]",
        {"image": "1.png", "question": "what", "answer": {"a": 1}},
        {"image": "1.png", "question": "which", "choices": ["one"]},
    )
    good, bad = read_questions(path, images)
    assert [(q.id, q.answers, q.category, q.choices) for q in good] == [
        ("7", ("red",), "colour", ()),
        ("line 3", ("2", "two"), "", ()),
        ("line 4", ("b",), "", ("blue", "red")),
    ]
    assert good[0].image == images / "0.png"
    told = {f.where: f.reason for f in bad}
    expected = {5: "not JSON", 6: '"image" is missing', 7: '"question" is missing', 8: "none of the choices",
                9: "taken by line 1", 10: "an object", 11: '"answer" must be', 12: "choices, got 1"}  # fmt: skip
    assert set(told) == {f"questions.jsonl, line {n}" for n in expected}
    for number, words in expected.items():
        assert words in told[f"questions.jsonl, line {number}"]


def test_no_questions(tmp_path, images):
    with pytest.raises(ValueError, match=r"no question in .*line 1: not JSON"):
        read_questions(asked(tmp_path, "{"), images)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        read_questions(asked(tmp_path, "{"), tmp_path / "nowhere")


def test_prompts():
    plain, choice = Question("x", "what {choices}?"), Question("x", "which", choices=("blue", "red"))
    assert default_prompt(plain).startswith("what {choices}?\n")
    assert default_prompt(choice).startswith("which\nA. blue\nB. red\nAnswer with the option's letter")
    assert fill("Q: {question} A:", plain) == "Q: what {choices}? A:"
    with pytest.raises(ValueError, match="question"):
        fill("what?", plain)


# -- evaluation -------------------------------------------------------------------------------------------------------


def first_logits(loaded, prompt, image, plan=None):
    inputs = loaded.prompted([prompt], [image])

    def answer():
        with torch.no_grad():
            ids = loaded.model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
            return loaded.model(**inputs).logits[0, -1], loaded.decode(ids)

    if plan is None:
        return answer()
    with saint.pruned(loaded.model, plan):
        return answer()


@pytest.mark.parametrize("batch", [1, 3])
def test_base_and_pruned_by_hand(loaded, batch):
    prompts = [" ".join(["what"] * (1 + i)) for i in range(4)]
    truth = [first_logits(loaded, prompt, noise(i)) for i, prompt in enumerate(prompts)]
    pruned = [first_logits(loaded, prompt, noise(i), CONNECTOR) for i, prompt in enumerate(prompts)]
    questions = [
        Question(noise(i), prompt, (truth[i][1] if i != 2 else "something else",), "even" if i % 2 == 0 else "odd")
        for i, prompt in enumerate(prompts)
    ]
    report = evaluate_vqa(
        loaded.model, loaded.processor, questions, {"c": CONNECTOR}, prompt=lambda q: q.question, batch=batch,
        max_new_tokens=4,
    )  # fmt: skip

    exact = report.scores["c"]["exact"]
    assert exact.base == 0.75
    expected = [texts.exact(pruned[i][1], questions[i].answers) for i in range(4)]
    assert exact.pruned == pytest.approx(np.mean(expected))
    divergence = [score_.kl_divergence(a[None], b[None]).item() for (a, _), (b, _) in zip(truth, pruned, strict=True)]
    agreement = report.agreement["c"]
    assert agreement["kl"].mean == pytest.approx(np.mean(divergence), rel=1e-3)
    assert agreement["kl"].mean > 0
    same = [texts.normalise(a) == texts.normalise(b) for (_, a), (_, b) in zip(truth, pruned, strict=True)]
    assert agreement["same_answer"].mean == pytest.approx(np.mean(same))
    assert agreement["kept"].mean == pytest.approx(9 / 36)
    assert report.categories["even"]["c"]["exact"].base == 0.5
    assert report.categories["odd"]["c"]["exact"].n == 2
    assert status(loaded.model) is None


def test_a_plan_that_drops_nothing_agrees(loaded):
    whole = Plan(connector=saint.SaintFullGraph(keep=1.0))
    report = evaluate_vqa(loaded.model, loaded.processor, [Question(noise(0), "what")], {"all": whole})
    agreement = report.agreement["all"]
    assert agreement["same_answer"].mean == agreement["same_first_token"].mean == 1
    assert agreement["kl"].mean < 1e-9
    assert report.scores == {"all": {}}  # no answers given
    assert report.categories == {}


def test_inputs_of_your_own(loaded):
    """A model whose prompts are put together by hand."""
    seen = []

    def inputs(prompts, images):
        seen.append((list(prompts), [image.size for image in images]))
        return loaded.prompted(prompts, images)

    class Decoder:
        def decode(self, tokens, skip_special_tokens):
            return f"{len(tokens)} tokens"

    report = evaluate_vqa(
        loaded.model, Decoder(), [Question(noise(0), "what", ("3 tokens",))], {"c": CONNECTOR}, inputs=inputs,
        prompt=lambda q: f"<{q.question}>", max_new_tokens=3,
    )  # fmt: skip
    assert seen == [(["<what>"], [(60, 40)])]
    assert report.scores["c"]["exact"].pruned == 1


def test_bad_calls(loaded):
    one = [Question(noise(0), "what", id="a")]

    def ask(model=loaded.model, questions=one, plans=None, **more):
        return evaluate_vqa(model, loaded.processor, questions, plans or {"c": CONNECTOR}, **more)

    with pytest.raises(ValueError, match='called "base"'):
        ask(plans={"base": CONNECTOR})
    with pytest.raises(ValueError, match="no question"):
        ask(questions=[])
    with pytest.raises(ValueError, match="'a' is used twice"):
        ask(questions=one * 2)
    with pytest.raises(ValueError, match="max_new_tokens"):
        ask(max_new_tokens=0)
    with pytest.raises(ValueError, match="batch"):
        ask(batch=0)
    with pytest.raises(ValueError, match="generate"):
        ask(model=torch.nn.Linear(1, 1))
    with saint.pruned(loaded.model, CONNECTOR), pytest.raises(RuntimeError, match="carries a plan"):
        ask()


# -- command ----------------------------------------------------------------------------------------------------------


def test_command(run, spec, images, tmp_path):
    (images / "broken.png").write_bytes(b"broken")
    questions = asked(
        tmp_path,
        {"image": "0.png", "question": "what", "answer": "w5", "category": "open"},
        {"image": "broken.png", "question": "what", "answer": "w5", "category": "open"},
        {"image": "gone.png", "question": "what"},
        "{oops",
        {"image": "1.png", "question": "what", "answer": "A", "choices": ["w5", "w6"], "category": "choice"},
        {"image": "2.png", "question": "what w5"},
    )
    file = tmp_path / "r.json"
    args = ["eval", "vqa", spec, questions, "--images", images, "--plan", PLAN, "--device", "cpu", "--json", file,
            "--max-new-tokens", 3]  # fmt: skip
    code, out, err = run(*args)
    assert code == 1
    assert "3 of 6 evaluated" in out
    for words in ("line 4: not JSON", "line 2: not an image", "line 3: no such image"):
        assert words in err
    record = json.loads(file.read_text())
    assert (record["kind"], record["given"], record["evaluated"]) == ("eval/vqa", 6, 3)
    assert len(record["failures"]) == 3
    scores = record["scores"]["plan1"]
    assert {name: s["n"] for name, s in scores.items()} == {"exact": 1, "anls": 1, "choice": 1}
    assert set(record["categories"]) == {"open", "choice", "(none)"}
    assert record["agreement"]["plan1"]["kl"]["n"] == 3
    assert record["conditions"]["with_answers"] == 2

    journal = sqlite3.connect(tmp_path / "r.journal.sqlite")
    assert [name for (name,) in journal.execute("SELECT id FROM results")] == ["line 1", "line 5", "line 6"]
    journal.close()
    noise(5).save(images / "broken.png")  # repaired: the next run does just this one
    code, out, err = run(*args)
    assert code == 1
    assert "4 of 6 evaluated, 3 of them from" in out
    one_line(run(*args[:-1], 4)[2], "another run", "max_new_tokens")


def test_command_compares_several_plans(run, spec, images, tmp_path):
    less = json.dumps({"version": 1, "connector": {"method": {"method": "saint_full_graph", "keep": 3, "step": 4}}})
    questions = asked(tmp_path, *({"image": f"{i}.png", "question": "what"} for i in range(4)))
    code, _, err = run(
        "eval", "vqa", spec, questions, "--images", images, "--plan", PLAN, "--plan", less, "--limit", 2, "--json",
        tmp_path / "r.json", "--prompt", "{question} w5", "--device", "cpu",
    )  # fmt: skip
    assert code == 0, err
    record = json.loads((tmp_path / "r.json").read_text())
    assert record["evaluated"] == 2
    assert [record["agreement"][f"plan{i}"]["kept"]["mean"] for i in (1, 2)] == pytest.approx([9 / 36, 3 / 36])
    assert record["conditions"]["example_prompt"] == "what w5"


def test_command_errors(run, spec, images, tmp_path):
    questions = asked(tmp_path, {"image": "0.png", "question": "what"})
    ask = ["eval", "vqa", spec, questions, "--images", images]
    one_line(run("eval", "vqa", spec, tmp_path / "none.jsonl", "--images", images)[2], "none.jsonl")
    one_line(run(*ask, "--prompt", "what?")[2], "{question}")
    one_line(run(*ask, "--plan", "llava-1.5/vti")[2], "unknown recipe")
    one_line(run("eval", "vqa", "timm:test_vit", *ask[3:])[2], "hf:NAME_OR_PATH")
