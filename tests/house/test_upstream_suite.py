"""`tools/upstream_suite.py`, on a folder of tests that stands for a checkout of transformers."""

import csv
import importlib.util
import sys
from pathlib import Path

import pytest
import transformers as hf

from saint.upstream.tiny import make, text_config
from support.families import FAMILIES
from support.models import build

TOOL = Path(__file__).parents[2] / "tools" / "upstream_suite.py"
# a class of tests as transformers writes them; each assertion about a plan says where the plan is
FAKE = """
import pytest
import saint
import torch
import transformers as hf

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
CONFIG = hf.ViTConfig(**SIZES, image_size=32, patch_size=8)
PIXELS = torch.zeros(2, 3, 32, 32)


def no_plan(model):
    found = saint.status(model)
    assert found is None, f"{type(model).__name__} has a plan in {found.stages['vision'][0].module!r}"


class ViTModelTest:
    def test_shape(self):
        assert hf.ViTModel(CONFIG).eval()(PIXELS).pooler_output.shape == (2, 16)

    def test_length(self):
        assert hf.ViTModel(CONFIG).eval()(PIXELS).last_hidden_state.shape[1] == 17

    def test_outermost(self):
        model = hf.ViTForImageClassification(CONFIG)
        assert not vars(model.vit.embeddings).get("_saint_session")
        no_plan(model)

    def test_loaded(self, tmp_path):
        hf.ViTModel(CONFIG).save_pretrained(tmp_path)
        no_plan(hf.ViTModel.from_pretrained(tmp_path))

    def test_unknown(self):
        no_plan(hf.BertModel(hf.BertConfig(**SIZES)))

    def test_red(self):
        assert hf.ViTModel(CONFIG) is None

    @pytest.mark.skip
    def test_skipped(self):
        pass

    def test_teardown(self, request):
        request.addfinalizer(lambda: 1 / 0)


TestViT = ViTModelTest
"""


@pytest.fixture
def suite(monkeypatch):
    spec = importlib.util.spec_from_file_location("upstream_suite", TOOL)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "upstream_suite", module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def checkout(tmp_path):
    folder = tmp_path / "tests" / "models" / "vit"
    folder.mkdir(parents=True)
    (folder / "test_modeling_vit.py").write_text(FAKE)
    return tmp_path


def test_what_a_plan_breaks_is_counted_by_message(suite, checkout, tmp_path, capsys):
    assert suite.main([str(checkout), "--keep", "0.5", "--csv", str(tmp_path / "table.csv")]) == 0
    told = capsys.readouterr().out
    assert "vit: 2 of 5 pass; 6 models with a plan, 1 refused" in told
    assert "  1 x AssertionError: ViTForImageClassification has a plan in 'vit'" in told
    assert "  1 x AssertionError: ViTModel has a plan in ''" in told
    assert "all: 2 of 5 pass" in told
    rows = list(csv.DictReader((tmp_path / "table.csv").open()))
    assert (rows[0]["passed_without"], rows[0]["passed_with"], rows[0]["models_with_plan"]) == ("5", "2", "6")
    assert {row["names"] for row in rows[1:]} == {"test_length", "test_outermost", "test_loaded"}
    assert {row["message"].partition(":")[0] for row in rows[1:]} == {"AssertionError", "assert 9 == 17"}


@pytest.mark.parametrize(
    ("build", "slots"),
    [
        (lambda: build("transformers/clip"), [["vision"]]),
        (FAMILIES["llava-llama"].build, [["vision", "connector", "language"], ["connector", "language"]]),
        (FAMILIES["llava-onevision"].build, [["connector", "language"]]),  # has no vision stage
        (lambda: make(hf.LlamaForCausalLM, hf.LlamaConfig(**text_config())), [["language"]]),
    ],
)
def test_the_plan_is_of_all_stages_that_a_model_has(suite, build, slots):
    tried = suite.plans(build(), 0.5)
    assert [list(plan.slots) for plan in tried] == slots
    assert {stage.method.keep for plan in tried for (stage,) in plan.slots.values()} == {0.5}


def test_a_family_whose_tests_cannot_run_says_how_pytest_ended(suite, checkout, capsys):
    (checkout / suite.test_file("vit")).write_text("import nothing_of_this_name")
    assert suite.main([str(checkout)]) == 1
    assert "vit: pytest ended with 2: " in capsys.readouterr().out


def test_a_test_passes_if_nothing_of_it_failed(suite, tmp_path):
    record = tmp_path / "reports.jsonl"
    assert suite.read(record, "ended").ended == "ended"
    lines = [
        '{"test": "a", "when": "setup", "outcome": "passed", "message": ""}',
        '{"test": "a", "when": "call", "outcome": "passed", "message": ""}',
        '{"test": "b", "when": "call", "outcome": "failed", "message": "of a subtest"}',
        '{"test": "b", "when": "call", "outcome": "passed", "message": ""}',
        '{"test": "c", "when": "call", "outcome": "passed", "message": ""}',
        '{"test": "c", "when": "teardown", "outcome": "failed", "message": "late"}',
        '{"test": "d", "when": "setup", "outcome": "skipped", "message": ""}',
    ]
    record.write_text("\n".join(lines))
    found = suite.read(record, "ended")
    assert (found.passed, found.failed, found.ended) == ({"a"}, {"b": "of a subtest", "c": "late"}, "")
    row = suite.compare("x", found, suite.Run(set(), {}, found.models, "pytest ended with -9: "))
    assert row.broken == {"pytest ended with -9:": ["a"]}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--keep", "0"], "--keep must be a share"),
        (["--keep", "1.5"], "--keep must be a share"),
        (["clip"], "has no tests/models/clip/test_modeling_clip.py"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_runs(suite, checkout, capsys, arguments, told):
    with pytest.raises(SystemExit):
        suite.main([str(checkout), *arguments])
    assert told in capsys.readouterr().err


def test_a_folder_without_tests_is_no_checkout(suite, tmp_path, capsys):
    with pytest.raises(SystemExit):
        suite.main([str(tmp_path)])
    assert "give a checkout of transformers" in capsys.readouterr().err


def test_the_supported_families_are_those_of_the_tables(suite):
    assert {"clip", "vit", "llava", "qwen2_vl", "llama", "gemma3"} <= set(suite.supported())
