"""What is printed at 80 columns, as pipes and notebooks have it: no name and no number is cut or broken."""

import io

import pytest
from rich.console import Console

from saint.lab.cli import common
from saint.lab.report.blocks import Group, Table, text_of
from saint.lab.report.sheets import sheet_of
from saint.lab.report.terminal import print_table, show
from support import records as made

LONG = "a_folder/of_a_tuned_plan_with_a_long_name.json"


def printed(draw, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    draw(console)
    return console.file.getvalue()


def tables(blocks):
    for block in blocks:
        if isinstance(block, Table):
            yield block
        elif isinstance(block, Group):
            yield from tables(block.blocks)


@pytest.mark.parametrize("kind", made.MAKERS)
def test_every_cell_of_a_record_is_whole(kind, written):
    (record,) = written(made.MAKERS[kind]())
    sheet = sheet_of(record)
    text = printed(lambda console: show(console, sheet))
    assert "\u2026" not in text
    assert all(len(line) <= 80 for line in text.splitlines())
    for table in tables(sheet.blocks):
        for row in table.rows:
            for cell in row:
                if len(text_of(cell)) <= 24:
                    assert text_of(cell) in text, f"{kind}: {text_of(cell)!r} of {table.caption}"


def test_columns_that_do_not_fit_follow_below_with_the_first_again():
    head = ["plan", *(f"measure {i} [95 %]" for i in range(6))]
    rows = [[LONG, *(f"0.{i}{j}23 [0.1000, 0.2000]" for j in range(6))] for i in range(2)]
    text = printed(lambda console: print_table(console, "Plans", head, rows))
    assert all(cell in text for row in rows for cell in row[1:])
    assert text.count(LONG) == 2 * text.count("Plans") > 2
    assert "Plans, continued" in text
    wide = printed(lambda console: print_table(console, "Plans", head, rows), 300)
    assert wide.count("Plans") == 1


def test_texts_are_broken_between_words_before_columns_are_parted():
    rows = [["demo:small-llava", "word " * 40, "llava-1.5/divprune-192"]]
    text = printed(lambda console: print_table(console, "", ["name", "what", "recipe"], rows, numbers=False))
    assert text.count("demo:small-llava") == text.count("llava-1.5/divprune-192") == 1
    assert text.count("word") == 40


def test_the_list_is_whole(run, monkeypatch):
    import saint
    from saint.lab import demo

    monkeypatch.setattr(common.out, "_width", 80)
    code, text, _ = run("list")
    assert code == 0
    assert "\u2026" not in text
    assert all(
        name in text for name in (*saint.recipes(), *(f"demo:{name}" for name in demo.MODELS), "demo:smollm2-135m")
    )
    assert ":class:" not in text
    assert "`" not in text
