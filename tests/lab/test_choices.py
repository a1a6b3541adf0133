"""Plans as commands take them: a share of the work, a recipe, a file or JSON; their names; progress in lines."""

import json

import pytest

import saint
from saint.lab.cli import common
from saint.lab.kinds import Encoder
from saint.lab.loading.plans import Choice, choose, choose_several
from support.command_line import TINY, one_line

TINY_MODEL = Encoder.load("timm:test_vit", pretrained=False)


def test_what_a_text_asks_for(tmp_path):
    file = tmp_path / "tuned.json"
    saint.plan("vit/match").save(file)
    assert Choice.read("0.5") == Choice("keep 0.5", keep=0.5)
    assert Choice.read("vit/match") == Choice("vit/match", saint.plan("vit/match"))
    assert Choice.read(str(file)) == Choice("tuned.json", saint.plan("vit/match"))
    assert Choice.read(file.read_text()).name == "plan"
    names = [choice.name for choice in choose_several([file.read_text(), "0.25", file.read_text()])]
    assert names == ["plan1", "keep 0.25", "plan2"]


@pytest.mark.parametrize("share", ["0", "1.5", "-1", "nan", "5"])
def test_a_share_lies_between_nothing_and_all(share):
    with pytest.raises(ValueError, match=r"in \(0, 1\]"):
        Choice.read(share)


def test_plan_and_keep_exclude_each_other():
    with pytest.raises(ValueError, match="give one of them"):
        choose("vit/match", 0.5)
    with pytest.raises(ValueError, match="given twice"):
        choose_several(["0.5", "0.5"])
    assert choose(None, None) is None


def test_a_share_becomes_a_plan_when_a_model_is_there():
    assert TINY_MODEL.planned(Choice.share(0.6)) == saint.plan_for(TINY_MODEL.model, 0.6)
    assert TINY_MODEL.planned(Choice.read("vit/match")) == saint.plan("vit/match")
    name, plan = common.Asked.read(None, None).of(TINY_MODEL)
    assert (name, plan) == ("keep 0.5", saint.plan_for(TINY_MODEL.model, 0.5))
    name, plan = common.Asked.read(None, None, threshold=0.6).of(TINY_MODEL)
    assert name == "the usual plan, threshold 0.6"
    assert plan.vision[0].method.threshold == 0.6


@pytest.mark.parametrize(
    "command",
    [["bench", *TINY], ["view", *TINY], ["demo", *TINY], ["export", *TINY[:2], "-o", "x.onnx"],
     ["embed", ".", "-o", "x", "--model", *TINY], ["eval", "images", *TINY, "."]],
    ids=lambda command: command[0],
)  # fmt: skip
def test_every_command_refuses_both(run, command):
    code, _, err = run(*command, "--plan", "vit/match", "--keep", 0.5)
    assert code == 2
    one_line(err, "--keep 0.5", "--plan", "give one of them")


def test_bench_under_a_share_of_the_work(run, folder, tmp_path):
    code, said, err = run(
        "bench", *TINY, "--images", folder, "--keep", 0.6, "--repeats", 1, "--json", tmp_path / "b.json"
    )
    assert code == 0, err
    record = json.loads((tmp_path / "b.json").read_text())
    assert record["plan_name"] == "keep 0.6"
    assert record["pictures"]["flops"]["mean"] == pytest.approx(0.6, abs=0.05)
    assert "keep 0.6: vision: match" in said


def test_version_and_the_short_help(run):
    assert run("--version") == (0, f"saint {saint.__version__}\n", "")
    code, said, _ = run("bench", "-h")
    assert code == 0
    assert "--keep" in said


def test_progress_without_a_terminal_is_a_line_per_tenth_with_what_is_to_come(capsys):
    now = [0.0]
    advance = common.lines("tuning", 40, clock=lambda: now[0])
    advance(8)  # from a journal, at once
    for _ in range(32):
        now[0] += 10.0
        advance()
    told = capsys.readouterr().err.splitlines()
    assert told[0] == "tuning: 9 of 40, about 5 min to go"  # 31 steps of 10 s
    assert 7 <= len(told) <= 10
    assert told[-1].startswith("tuning: 36 of 40, about 40 s")


def test_quick_steps_say_nothing(capsys):
    advance = common.lines("drawing", 10, clock=lambda: 0.1)
    for _ in range(10):
        advance()
    assert capsys.readouterr().err == ""


def test_steps_that_did_nothing_say_nothing(capsys):
    now = [0.0]
    advance = common.lines("scoring", 10, clock=lambda: now[0])
    advance(2)  # from a journal, at once
    now[0] = 60.0
    advance(0)  # the first batch held nothing that was new
    assert capsys.readouterr().err == ""
    advance(4)
    assert capsys.readouterr().err == "scoring: 6 of 10, about 60 s to go\n"


def test_tune_without_a_target_names_the_options(run, folder):
    code, _, err = run("tune", *TINY, "--images", folder)
    assert code == 2
    one_line(err, "--target-flops", "--target-speed", "--target-agreement")
