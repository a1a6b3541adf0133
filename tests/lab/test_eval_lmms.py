"""The model for lmms-eval, in the real lmms-eval, on a local task."""

import importlib.metadata
import json
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import saint
from saint.lab import demo
from saint.lab.demo import scenes
from saint.lab.eval import read_questions
from saint.lab.kinds import VLM
from saint.plans import Plan
from support.checkpoints import PLAN, TEMPLATE, save

ROOT = Path(__file__).parents[2]

TASK = """
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
task: local_questions
test_split: test
output_type: generate_until
doc_to_visual: !function local_utils.visual
doc_to_text: !function local_utils.text
doc_to_target: "answer"
generation_kwargs:
  max_new_tokens: 3
  temperature: 0
process_results: !function local_utils.results
metric_list:
  - metric: same
    aggregation: !function local_utils.mean
    higher_is_better: true
metadata:
  - version: 0.0
"""

UTILS = """
from PIL import Image

def visual(doc):
    return [Image.open(doc["image"]).convert("RGB")] if doc["image"] else []

def text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]

def results(doc, results):
    return {"same": float(results[0] == doc["answer"])}

def mean(values):
    return sum(values) / len(values)
"""


@pytest.fixture(scope="module", autouse=True)
def lmms_eval():
    return pytest.importorskip("lmms_eval.evaluator", reason="lmms-eval is not installed", exc_type=ImportError)


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    return save(tmp_path_factory.mktemp("judged"), TEMPLATE)


def answer(spec, prompt, image, plan=None):
    loaded = VLM.load(spec)
    if plan is not None:
        saint.apply(loaded.model, plan)
    if image is None:
        inputs = loaded.processor(text=[f"USER: {prompt} ASSISTANT:"], return_tensors="pt")
    else:
        inputs = loaded.prompted([prompt], [image])
    with torch.no_grad():
        ids = loaded.model.generate(**inputs, max_new_tokens=3, do_sample=False)
    return loaded.decode(ids[0, inputs["input_ids"].shape[1] :])


@pytest.fixture(scope="module")
def task(tmp_path_factory, spec):
    """Four questions, one without an image; the reference answers are those of the unpruned model."""
    folder = tmp_path_factory.mktemp("task")
    lines = []
    for i in range(4):
        pixels = np.random.default_rng(i).integers(0, 255, (40, 60, 3), dtype=np.uint8)
        image = Image.fromarray(pixels) if i < 3 else None
        if image is not None:
            image.save(folder / f"{i}.png")
        prompt = " ".join(["what"] * (i + 1))
        name = str(folder / f"{i}.png") if image is not None else ""
        lines.append({"image": name, "question": prompt, "answer": answer(spec, prompt, image)})
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    (folder / "local.yaml").write_text(TASK.format(data=folder / "data.jsonl"))
    (folder / "local_utils.py").write_text(UTILS)
    return folder, lines


@pytest.fixture
def registered(tmp_path, monkeypatch):
    """The entry point as an installation would write it, from pyproject.toml."""
    from lmms_eval import models

    entry = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["lmms_eval.models"]
    info = tmp_path / "saint_plugin_test-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: saint-plugin-test\nVersion: 0\n")
    written = "\n".join(f"{name} = {target}" for name, target in entry.items())
    (info / "entry_points.txt").write_text(f"[lmms_eval.models]\n{written}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert any(e.value == entry["saint"] for e in importlib.metadata.entry_points(group="lmms_eval.models"))
    registry = models.registry_v2.ModelRegistryV2()
    registry.load_entrypoint_manifests()
    monkeypatch.setattr(models, "MODEL_REGISTRY_V2", registry)
    return registry


def test_lmms_eval_finds_the_model(registered):
    from saint.lab.eval.lmms import SaintHF

    assert registered.list_canonical_model_ids() == ["saint_hf"]
    assert registered.get_model_class("saint_hf") is SaintHF


def judged(lmms_eval, task, arguments, batch=1):
    from lmms_eval.tasks import TaskManager

    folder, lines = task
    manager = TaskManager(include_path=str(folder), include_defaults=False, model_name="saint_hf")
    found = lmms_eval.simple_evaluate(
        model="saint_hf", model_args=arguments, tasks=["local_questions"], batch_size=batch, device="cpu",
        task_manager=manager, log_samples=True, bootstrap_iters=0,
    )  # fmt: skip
    said = {sample["doc_id"]: sample["filtered_resps"][0] for sample in found["samples"]["local_questions"]}
    return found["results"]["local_questions"]["same,none"], [said[i] for i in range(len(lines))]


@pytest.mark.parametrize("batch", [1, 2])
def test_unpruned_and_pruned_in_the_real_evaluator(lmms_eval, registered, task, spec, batch):
    name = spec.removeprefix("hf:")
    score, said = judged(lmms_eval, task, f"pretrained={name}", batch)
    assert score == 1  # the references are its own answers
    assert said == [line["answer"] for line in task[1]]

    plan = Plan.from_json(PLAN)
    score, said = judged(lmms_eval, task, f"pretrained={name},plan={PLAN}", batch)
    expected = [
        answer(spec, line["question"], Image.open(line["image"]).convert("RGB") if line["image"] else None, plan)
        for line in task[1]
    ]
    assert said == expected
    assert score == pytest.approx(np.mean([e == line["answer"] for e, line in zip(expected, task[1], strict=True)]))
    assert said != [line["answer"] for line in task[1]]  # it is really on


def test_options(spec, tmp_path):
    from saint.lab.eval.lmms import SaintHF

    (tmp_path / "plan.json").write_text(PLAN)
    lm = SaintHF(spec, plan=str(tmp_path / "plan.json"), device="cpu", dtype="bfloat16")
    assert saint.status(lm.model).plan == Plan.from_json(PLAN)
    assert next(lm.model.parameters()).dtype == torch.bfloat16
    assert SaintHF(spec, device="cpu").session is None
    for more, words in (
        ({"plan": "llava-1.5/vti"}, "unknown recipe"),
        ({"dtype": "int8"}, "float32"),
        ({"conv_template": "x"}, "no option conv_template"),
        ({"batch_size": "auto"}, "batch_size"),
    ):
        with pytest.raises(ValueError, match=words):
            SaintHF(spec, device="cpu", **more)
    with pytest.raises(NotImplementedError, match="likelihood"):
        lm.loglikelihood([])


def test_what_the_model_cannot_do_raises(spec):
    from lmms_eval.api.instance import Instance

    from saint.lab.eval.lmms import SaintHF

    lm = SaintHF(spec, device="cpu")
    lm.task_dict = {"t": {"test": [None]}}

    def ask(content, **settings):
        arguments = ("", lambda doc: [{"role": "user", "content": content}], settings, 0, "t", "test")
        metadata = {"task": "t", "doc_id": 0, "repeats": 1}
        return lm.generate_until([Instance("generate_until", arguments, 0, metadata)])

    with pytest.raises(ValueError, match="takes images"):
        ask([{"type": "video", "url": "x.mp4"}, {"type": "text", "text": "what"}])
    said = ask([{"type": "text", "text": "what"}], max_new_tokens=3)[0]
    stop = said.split()[1]
    assert ask([{"type": "text", "text": "what"}], max_new_tokens=3, until=[stop])[0] == said.split(stop)[0]


def test_the_small_llava_answers_about_scenes(lmms_eval, registered, tmp_path):
    pytest.importorskip("skimage", reason="needs .[demo]")
    try:
        VLM.load("demo:small-llava")
    except demo.DemoUnavailableError as error:
        pytest.skip(str(error))
    questions, _ = read_questions(scenes.save(tmp_path, 4), tmp_path)
    lines = [{"image": str(q.image), "question": q.question, "answer": q.answers[0]} for q in questions]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    (tmp_path / "local.yaml").write_text(TASK.format(data=tmp_path / "data.jsonl"))
    (tmp_path / "local_utils.py").write_text(UTILS)
    score, _ = judged(lmms_eval, (tmp_path, lines), "pretrained=demo:small-llava", 8)
    assert score >= 0.85  # of 27 questions
    plan = Plan(connector=saint.SaintFullGraph(keep=0.5))
    kept, said = judged(
        lmms_eval, (tmp_path, lines), f"pretrained=demo:small-llava,plan={json.dumps(plan.to_dict())}", 8
    )
    assert kept >= score - 0.15
    assert len(said) == len(lines)
