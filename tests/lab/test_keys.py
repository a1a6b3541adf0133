"""What journals and finished folders are told apart by: every setting, input and piece of data that changes a result.

Settings are read from signatures and dataclasses: one that is new has to be named here, as what changes results or as what does
not.
"""

import dataclasses
import inspect
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import saint
from saint.lab import embed as embed_
from saint.lab.analysis import run as analysis
from saint.lab.embed import OutputError
from saint.lab.embed.work import Job
from saint.lab.eval import JournalError, Question, evaluate_images, evaluate_vqa
from saint.lab.kinds import VLM, Encoder, around
from saint.lab.records import differences
from saint.lab.sources.items import Item
from saint.lab.sources.questions import default_prompt
from saint.lab.sources.samples import Samples, find_samples
from saint.lab.tuning import run as tuning
from saint.lab.tuning.trials import Trials
from saint.methods import Random
from saint.plans import Plan
from saint.samples import read_samples
from support.checkpoints import PLAN, TEMPLATE, save
from support.models import build

HALF, THIRD = (Plan(vision=saint.Stage(Random(keep=keep), layers=[1])) for keep in (0.5, 0.3))


def names_of(function) -> set[str]:
    return set(inspect.signature(function).parameters)


def fields_of(kind) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)}


def noise(seed: int, size: tuple[int, int] = (40, 60)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8))


def changed(model):
    """The model with one weight of the middle changed, under a context that gives it back."""
    return Changed(list(model.parameters())[len(list(model.parameters())) // 2])


def each_is_another_run(run, others, model) -> None:
    """A journal refuses each other value of each argument of a run, and the same model with another weight."""
    for name, values in others.items():
        for value in values:
            with pytest.raises(JournalError, match="holds the result"):
                run(**{name: value})
    with changed(model), pytest.raises(JournalError, match="weights"):
        run()


class Changed:
    def __init__(self, weight):
        self.weight, self.was = weight, weight.detach().clone()

    def __enter__(self):
        with torch.no_grad():
            self.weight.flatten()[0].add_(1)

    def __exit__(self, *_):
        with torch.no_grad():
            self.weight.copy_(self.was)


# -- how two keys are compared --------------------------------------------------------------------------------------------

VALUES = [
    None,
    0,
    1,
    1.0,
    0.0,
    True,
    False,
    "1",
    "",
    [],
    [1],
    [1.0],
    ["1"],
    {},
    {"a": 1},
    {"a": 1.0},
    [{"a": 1}],
    [[1]],
    1.5,
]
VALUES += [[1, 2], [2, 1], "true", 2**40, [{"a": 1}, {"a": 2}], {"a": {"b": 1}}]


@pytest.mark.parametrize("there", VALUES, ids=repr)
@pytest.mark.parametrize("now", VALUES, ids=repr)
def test_two_values_of_a_setting_are_the_same_where_their_json_is(there, now):
    shown = differences({"x": there, "y": 1}, {"x": now, "y": 1})
    assert bool(shown) == (repr(there) != repr(now)), shown  # 1, 1.0 and True are three values
    assert "y" not in shown


# -- finished folders of embeddings and answers ---------------------------------------------------------------------------


@pytest.fixture
def worker(monkeypatch):
    """Rows without a model."""

    class Worker:
        weights = "w"

        def __init__(self, *_):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    def stream(_, units, batch):
        for unit in units:
            yield [{"key": item.key, "path": item.path} for item in unit]

    run = sys.modules["saint.lab.embed.run"]
    monkeypatch.setattr(run, "Worker", Worker)
    monkeypatch.setattr(run, "stream", stream)


EMBED = {
    "source": None,  # below
    "model": ("timm:a", "timm:b"),
    "plan": (HALF, THIRD),
    "batch": (4, 8),
    "pretrained": (False, True),
    "size": (None, 96),
    "dtype": ("auto", "float16"),
    "column": None,  # below
    "question": (None, "which"),
    "max_new_tokens": None,  # of an answer
}
ANSWER = EMBED | {"question": ("what", "which"), "max_new_tokens": (3, 4), "size": None}
FREE = {"output", "device", "rows", "tick"}  # where, and in how many files; results do not depend on it


@pytest.mark.parametrize("settings", [EMBED, ANSWER], ids=["embeddings", "answers"])
def test_a_finished_folder_is_of_every_setting(worker, tmp_path, settings):
    pytest.importorskip("pyarrow")
    make = embed_.embed
    assert names_of(make) == set(settings) | FREE
    (tmp_path / "in").mkdir()
    noise(0).save(tmp_path / "in" / "0.png")
    usual = {name: pair[0] for name, pair in settings.items() if pair is not None}
    made = make(tmp_path / "in", output=tmp_path / "out", **usual)
    assert made.count == 1
    assert make(tmp_path / "in", output=tmp_path / "out", **usual).resumed == 1
    for name, pair in settings.items():
        if pair is not None:
            with pytest.raises(OutputError, match=name):
                make(tmp_path / "in", output=tmp_path / "out", **(usual | {name: pair[1]}))


def test_every_field_of_a_job_is_among_its_facts():
    usual = Job("m", HALF, question="what")
    others = {
        "model": "n", "plan": THIRD, "question": "which", "max_new_tokens": 17, "pretrained": False, "dtype": "float16",
    }  # fmt: skip
    assert set(others) | {"size"} == fields_of(Job)  # a size is of embeddings alone
    for name, value in others.items():
        assert dataclasses.replace(usual, **{name: value}).facts() != usual.facts(), name
    assert Job("m", HALF).facts() != Job("m", HALF, size=96).facts()
    assert Job("m", HALF).facts() != usual.facts()


def pictures(folder: Path, *seeds: int) -> Path:
    folder.mkdir(exist_ok=True)
    for place, seed in enumerate(seeds):
        noise(seed, (40, 60 + seed)).save(folder / f"{place}.png")
    return folder


def rows_of(folder: Path, **columns) -> Path:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    folder.mkdir(exist_ok=True)
    parquet.write_table(arrow.table(columns), folder / "0.parquet")
    return folder


def encoded(seed: int) -> bytes:
    import io

    buffer = io.BytesIO()
    noise(seed, (40, 60 + seed)).save(buffer, "PNG")
    return buffer.getvalue()


def tarred(folder: Path, *seeds: int) -> Path:
    import io
    import tarfile

    folder.mkdir(exist_ok=True)
    with tarfile.open(folder / "0.tar", "w") as tar:
        for place, seed in enumerate(seeds):
            info = tarfile.TarInfo(f"{place}.png")
            info.size = len(encoded(seed))
            tar.addfile(info, io.BytesIO(encoded(seed)))
    return folder


def links(folder: Path, *seeds: int) -> Path:
    """A column of paths; the pictures lie elsewhere."""
    pictures(folder.parent / "beside", *seeds)
    return rows_of(folder, path=[f"../beside/{place}.png" for place in range(len(seeds))])


SOURCES = {
    "folder": pictures,
    "bytes": lambda folder, *seeds: rows_of(folder, jpeg=[encoded(seed) for seed in seeds]),
    "structs": lambda folder, *seeds: rows_of(folder, image=[{"bytes": encoded(s), "path": None} for s in seeds]),
    "paths": links,
    "shards": tarred,
}


@pytest.mark.parametrize("kind", SOURCES)
def test_a_finished_folder_is_of_its_pictures(worker, tmp_path, kind):
    """Not of their names alone: one is replaced by another under the same name; one is broken; one more comes."""
    pytest.importorskip("pyarrow")
    make = SOURCES[kind]

    def run():
        return embed_.embed(tmp_path / "in", "timm:a", HALF, pretrained=False, output=tmp_path / "out")

    make(tmp_path / "in", 1, 2)
    run()
    assert run().resumed == 2
    for seeds in ((1, 7), (7, 2), (1, 2, 3), (1,)):
        make(tmp_path / "in", *seeds)
        with pytest.raises(OutputError, match=r"source\.(listing|images)"):
            run()
        make(tmp_path / "in", 1, 2)
    if kind in ("folder", "paths"):
        for file in sorted(tmp_path.glob("*/2.png")):
            file.unlink()
    assert run().resumed == 2


def test_a_finished_folder_is_of_its_column(worker, tmp_path):
    source = rows_of(tmp_path / "in", one=[encoded(1)], two=[encoded(2)])
    usual = {"pretrained": False, "output": tmp_path / "out"}
    embed_.embed(source, "timm:a", HALF, column="one", **usual)
    with pytest.raises(OutputError, match=r"source\.listing"):
        embed_.embed(source, "timm:a", HALF, column="two", **usual)


# -- evaluations ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def generator(tmp_path_factory):
    return VLM.load(save(tmp_path_factory.mktemp("asked"), TEMPLATE))


def test_a_journal_of_questions_is_of_every_setting_and_of_every_question(generator, tmp_path):
    connector = Plan.from_json(PLAN)
    question = Question(noise(0), "what", ("w5", "w6"), "a", ("w5", "w6", "w7"), "q", "here")
    usual = {
        "model": generator.model, "processor": generator.processor, "questions": [question], "plans": {"c": connector},
        "batch": 1, "max_new_tokens": 2, "facts": {"model": "m"},
        "prompt": lambda q: q.question,  # no choices in it
    }  # fmt: skip

    def run(**more):
        return evaluate_vqa(**(usual | more), journal=tmp_path / "j.sqlite").conditions["resumed"]

    assert run() == 0
    assert run() == 1
    file = tmp_path / "q.png"
    noise(0).save(file)
    fields = {"image": noise(1), "question": "which", "answers": ("w7",), "choices": ("w5", "w6", "w8"), "id": "r"}
    assert set(fields) | {"category", "where"} == fields_of(Question)  # these are read anew
    others = {
        "plans": [
            {"c": Plan(connector=saint.SaintFullGraph(keep=3))}, {"d": connector}, {"c": connector, "d": connector}, 
        ],
        "batch": [2], "max_new_tokens": [3], "facts": [{"model": "n"}, {}], "prompt": [default_prompt],
        "questions": [[dataclasses.replace(question, **{name: value})] for name, value in fields.items()],
    }  # fmt: skip
    others["questions"] += [
        [dataclasses.replace(question, image=file)],
        [question, dataclasses.replace(question, id="r")],
    ]
    # functions cannot be compared: who gives other ones says so in facts; the last two change no result
    free = {"processor", "inputs", "unreadable", "journal", "tick"}
    assert names_of(evaluate_vqa) == set(others) | {"model"} | free
    each_is_another_run(run, others, generator.model)
    assert run() == 1


def test_a_journal_of_questions_is_of_the_pictures_on_disk_and_a_mended_one_is_done(generator, tmp_path):
    files = [tmp_path / "0.png", tmp_path / "1.png"]
    noise(0).save(files[0])
    files[1].write_bytes(b"broken")

    def run():
        questions = [Question(file, "what", id=file.name) for file in files]
        report = evaluate_vqa(
            generator.model, generator.processor, questions, {"c": Plan.from_json(PLAN)}, max_new_tokens=2,
            journal=tmp_path / "j.sqlite",
        )  # fmt: skip
        return report.conditions["resumed"], report.evaluated

    assert run() == (0, 1)
    noise(1).save(files[1])
    assert run() == (1, 2)
    noise(2, (30, 30)).save(files[0])
    with pytest.raises(JournalError, match=r"0\.png|question 0"):
        run()


@pytest.fixture(scope="module")
def vit():
    return Encoder.load("timm:test_vit", pretrained=False)


def test_a_journal_of_images_is_of_every_setting_and_of_every_sample(vit, tmp_path):
    items = [Item(str(n), "here", lambda n=n: noise(n), label=n % 2, mark=100 + n) for n in range(4)]
    samples = Samples(items, ["a", "b"])
    text = torch.eye(2, 64)
    usual = {
        "model": vit.model, "samples": samples, "plans": {"half": HALF}, "inputs": vit.pixels, "scores": ["knn"],
        "text": None, "batch": 4, "facts": {"model": "m"},
    }  # fmt: skip

    def run(**more):
        return evaluate_images(**(usual | more), journal=tmp_path / "j.sqlite").conditions["resumed"]

    assert run() == 0
    assert run() == 4
    fields = {"id": "9", "label": 0, "mark": 5}
    assert set(fields) | {"where", "load", "prompt"} == fields_of(Item)
    other = [dataclasses.replace(samples, items=[*items[:3], dataclasses.replace(items[3], **{name: value})])
             for name, value in fields.items()]  # fmt: skip
    other += [dataclasses.replace(samples, classes=["a", "b", "c"]), dataclasses.replace(samples, origin="another")]
    other += [dataclasses.replace(samples, items=items[:3])]
    assert fields_of(Samples) == {"items", "classes", "origin", "unreadable", "left_out"}
    others = {
        "samples": other, "plans": [{"half": THIRD}, {"other": HALF}], "scores": [["linear"], ["knn", "linear"]],
        "text": [text], "batch": [2], "facts": [{"model": "n"}, {}],
    }  # fmt: skip
    assert names_of(evaluate_images) == set(others) | {"model", "inputs", "journal", "tick"}
    each_is_another_run(run, others, vit.model)
    assert run() == 4


def test_other_class_names_are_another_run(vit, tmp_path):
    """By their embeddings, which is all that is seen of them."""
    items = [Item(str(n), "here", lambda n=n: noise(n), label=n % 2) for n in range(2)]

    def run(seed):
        text = torch.randn(2, 64, generator=torch.Generator().manual_seed(seed))
        evaluate_images(
            vit.model, Samples(items), {"h": HALF}, inputs=vit.pixels, text=text, journal=tmp_path / "j.sqlite"
        )

    run(0)
    run(0)
    with pytest.raises(JournalError, match="text"):
        run(1)


def test_samples_say_what_they_are(tmp_path):
    """Files by their size; splits of a data set, whose rows are numbered alike, by what the library says."""
    (sample,) = find_samples(str(pictures(tmp_path / "a", 1))).items
    assert sample.mark == (tmp_path / "a" / "0.png").stat().st_size
    (member,) = find_samples(str(tarred(tmp_path / "b", 1))).items
    assert member.mark == len(encoded(1))
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image()})
    both = {name: datasets.Dataset.from_dict({"image": [{"bytes": encoded(seed), "path": None}]}, features=features)
            for name, seed in (("one", 1), ("two", 2))}  # fmt: skip
    datasets.DatasetDict(both).save_to_disk(tmp_path / "saved")
    one, two, again = (find_samples(str(tmp_path / "saved"), split=split) for split in ("one", "two", "one"))
    assert one.origin == again.origin != two.origin
    assert [sample.id for sample in one.items] == [sample.id for sample in two.items]


# -- analyses -------------------------------------------------------------------------------------------------------------


def test_a_journal_of_an_analysis_is_of_every_setting_and_of_every_item(vit, tmp_path):
    items = [Item(str(n), "here", lambda n=n: noise(n), "what", 100 + n) for n in range(3)]
    settings = analysis.Settings(thresholds=(0.7,), causal=2, choices=("saint",))
    usual = {
        "subject": vit, "items": items, "settings": settings, "facts": {"model": "m"},
    }  # fmt: skip

    def run(**more):
        return analysis.analyze(**(usual | more), journal=tmp_path / "j.sqlite").outcome.resumed

    assert run() == 0
    assert run() == 3
    measured = {
        "thresholds": (0.8,), "neighbors": 4, "share": 0.3, "causal": 1, "seed": 1, "choices": ("random", "saint"),
    }  # fmt: skip
    assert set(measured) | {"bootstrap", "simulations"} == fields_of(analysis.Settings)  # these are drawn anew
    asked = {"prompt": "which", "mark": 7}
    assert set(asked) | {"id", "where", "load", "label"} == fields_of(Item)
    others = {
        "settings": [dataclasses.replace(settings, **{name: value}) for name, value in measured.items()],
        # of four items others than of three have a causal column
        "items": [[dataclasses.replace(items[0], **{name: value}), *items[1:]] for name, value in asked.items()]
        + [[*items, Item("9", "here", lambda: noise(9))]],
        "subject": [dataclasses.replace(vit, usual=Plan(vision=saint.Saint(threshold=0.6, center=True)))],
        "facts": [{}, {"model": "n"}],
    }  # fmt: skip
    assert names_of(analysis.analyze) == set(others) | {"journal", "tick"}
    each_is_another_run(run, others, vit.model)
    assert run() == 3


def test_items_of_an_analysis_say_what_they_are(tmp_path):
    noise(0).save(tmp_path / "0.png")
    size = (tmp_path / "0.png").stat().st_size
    assert Question(tmp_path / "0.png", "what").item("p").mark == size
    one, other = (Question(noise(seed), "what").item("p").mark for seed in (0, 1))
    assert one != other


# -- trials of a tuning ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoder():
    return build("timm/vit-augreg")


def smooth(count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    coarse = torch.randn(count, 3, 4, 4, generator=generator)
    fine = torch.randn(count, 3, 96, 96, generator=generator)
    return torch.nn.functional.interpolate(coarse, size=(96, 96), mode="bilinear") + 0.1 * fine


def test_a_trial_is_of_its_plan_and_of_its_images(encoder, tmp_path):
    """What a second run finds is what a fresh one measures, for every other plan and every other choice of images."""
    samples = read_samples(smooth(6))
    plans = [Plan(vision=saint.Stage(Random(keep=keep, seed=seed), layers=layers, placement=placement, output=output))
             for keep, seed, layers, placement, output in (
                 (0.5, 0, (1,), "post", "survivors"), (0.3, 0, (1,), "post", "survivors"), (0.5, 1, (1,), "post", "survivors"),
                 (0.5, 0, (0,), "post", "survivors"), (0.5, 0, None, "input", "survivors"), (0.5, 0, (0, 1), "post", "survivors"),
             )]  # fmt: skip
    cases = [(plan, range(3)) for plan in plans]
    cases += [(plans[0], which) for which in (range(3, 6), [2, 1, 0], [0], [0, 1], range(6))]
    known = Trials(around(encoder), samples, facts={}, journal=tmp_path / "j.sqlite")
    found = [known.run(plan, which) for plan, which in cases]
    known.close()
    resumed = Trials(around(encoder), samples, facts={}, journal=tmp_path / "j.sqlite")
    assert resumed.resumed == len(cases)
    seen = []
    for (plan, which), trial in zip(cases, found, strict=True):
        fresh = Trials(around(encoder), samples, facts={}).run(plan, which)
        assert trial.losses.tolist() == pytest.approx(fresh.losses.tolist(), abs=1e-7)  # other batches, other rounding
        assert trial.losses.tolist() == resumed.run(plan, which).losses.tolist()
        assert trial.left.tolist() == fresh.left.tolist()
        seen.append(trial.losses.tolist())
    resumed.close()
    for place, losses in enumerate(seen):
        assert losses not in seen[:place], cases[place]
    assert found[7].losses.tolist() == pytest.approx(found[0].losses.tolist()[::-1], rel=1e-4)


def test_a_journal_of_trials_is_of_the_model_the_images_and_the_facts(encoder, tmp_path):
    images = smooth(3)
    mapped = [{"x": image[None]} for image in images]

    def run(model=encoder, samples=images, facts=None):
        usual = {"model": "m", "held_out": 0.3, "seed": 0}
        trials = Trials(
            around(model), read_samples(samples), facts=usual if facts is None else facts, journal=tmp_path / "j.sqlite"
        )
        try:
            trials.run(HALF, [0])
            return trials.resumed
        finally:
            trials.close()

    assert run() == 0
    assert run() == 1
    other = images.clone()
    other[2, 1, 5, 7] += 1
    more = [{**one, "flag": True} for one in mapped]
    for samples in (other, images[:2], images[[0, 2, 1]], images.transpose(2, 3), images.double(), mapped, more):
        with pytest.raises(JournalError, match="data"):
            run(samples=samples)
    for name, value in (("model", "n"), ("held_out", 0.4), ("seed", 1)):
        with pytest.raises(JournalError, match=name):
            run(facts={"model": "m", "held_out": 0.3, "seed": 0, name: value})
    with changed(encoder), pytest.raises(JournalError, match="weights"):
        run()
    assert run() == 1


def test_what_a_tuning_hands_to_its_trials(encoder, monkeypatch):
    """Its settings are in the trials' names, or among their facts; one that is new has to be either."""

    class SeenError(Exception):
        pass

    seen = {}

    def trials(subject, samples, **more):
        seen.update(more, samples=samples, model=subject.model)
        raise SeenError

    monkeypatch.setattr(tuning, "Trials", trials)
    images = smooth(12)
    with pytest.raises(SeenError):
        tuning.search(
            around(encoder), images, tuning.Target(flops=0.7), held_out=0.25, seed=3, facts={"model": "m"}, journal="j"
        )
    assert seen["facts"] == {"model": "m", "held_out": 0.25, "seed": 3}
    assert (seen["journal"], seen["model"], len(seen["samples"])) == ("j", encoder, 12)
    in_plans = {"target", "chosen", "plan", "frontier", "pixels"}  # what they change are the plans that are tried
    assert names_of(tuning.search) == {"subject", "images", "held_out", "seed", "facts", "journal", "tick"} | in_plans
