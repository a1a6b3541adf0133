"""The page of `saint report`: what it says, what it escapes, what it refuses. In a browser: tests/lab/test_browser.py."""

import copy
import io
import itertools
import json
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

import saint
from saint.lab.cli import main
from saint.lab.images import data_uri
from saint.lab.report import KINDS, Record, make_report, markdown, terminal
from saint.lab.report.blocks import Cell, Charts, Curves, Group, Line, Point, Sheet, Table, front
from saint.lab.report.charts import cividis, line_chart, ticks
from saint.lab.report.markup import Markup, tag
from saint.lab.report.sheets import sheet_of
from saint.lab.report.words import number
from support import records as report_records
from support.records import read


@pytest.fixture
def run(capsys):
    def call(*args: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(["report", *map(str, args)])
        said = capsys.readouterr()
        return ended.value.code or 0, said.out, said.err

    return call


@pytest.mark.parametrize("kind", report_records.MAKERS)
def test_every_kind_gives_a_page_with_verdict_conditions_and_no_address(kind, written):
    record = report_records.MAKERS[kind]()
    page = make_report(written(record))
    seen = read(page)
    model = record.get("model", record.get("conditions", {}).get("model"))
    assert model in seen.text
    assert "2026-11-25" in seen.text
    assert "torch 2.99" in seen.text
    order = [entry.get("class") for _, entry in seen.found if entry.get("class") in ("verdict", "asked", "facts")]
    assert order[:3] == ["verdict", "asked", "facts"]  # the verdict first
    assert not re.search(r"https?://", page)
    assert all(
        not re.match(r"(?!data:|#)", entry[key] or "")
        for _, entry in seen.found
        for key in ("src", "href")
        if key in entry
    )
    assert len(page.encode()) < 5_000_000


def test_verdicts_say_what_the_numbers_say(written):
    bench = report_records.bench()
    assert "1.30 [1.20, 1.40] times as fast" in read(make_report(written(bench))).text
    bench["speedup"] = {"median": 1.01, "p20": 0.95, "p80": 1.05, "n": 5}
    assert "No speed-up shows: 1.01 [0.950, 1.05]" in read(make_report(written(bench))).text.replace("0.95,", "0.950,")
    bench["speedup"] = {"median": 0.8, "p20": 0.7, "p80": 0.9, "n": 5}
    assert "the model is slower" in read(make_report(written(bench))).text

    scored = report_records.eval_images()
    assert (
        "no difference shown (difference -1.0 points [-3.0, +1.0]; 100 samples could have shown 4"
        in read(make_report(written(scored))).text
    )
    scored["scores"]["half"]["top1"]["high"] = -0.005
    assert "no difference shown" not in read(make_report(written(scored))).text

    analyze = report_records.analyze()
    text = read(make_report(written(analyze))).text
    assert "Three stages, boundaries in front of layers 2 and 4" in text
    assert "Stages: not shown (20 images are too few)" in text
    assert "no stages of layers show" in text
    assert text.index("Proposed plan") < text.index("Three stages")
    assert "saint.Plan(vision=saint.Saint(threshold=0.7))" in text
    assert json.dumps(analyze["plan"], separators=(",", ":")) in text


def test_text_of_records_is_text(written):
    """A hostile string in every place that holds one runs nowhere and becomes no element."""
    evil = "</title></style></script><script>alert(1)</script><img src=x onerror=alert(1)>\" onload='alert(1)"

    def poison(value, key=""):
        if isinstance(value, dict):
            fixed = key in ("times", "costs", "gains")  # names that are looked up
            return {k if fixed or k in report_records.FIELDS else k + evil: poison(v, k) for k, v in value.items()}
        if isinstance(value, list):
            return [poison(v, key) for v in value]
        return (
            evil
            if isinstance(value, str) and key not in ("kind", "picture", "pictures", "place", "stage", "version")
            else value
        )

    for kind, make in report_records.MAKERS.items():
        record = {**poison(make()), "files": []}
        for name in ("plans", "gains", "scores", "agreement", "categories", "against_first", "times", "speeds"):
            if name in record:
                record[name] = make()[name]
        page = make_report(written(record))
        seen = read(page)
        assert [entry for name, entry in seen.found if name == "script"] == [{}], kind  # ours
        assert not [entry for _, entry in seen.found if any(key.startswith("on") for key in entry)], kind
        assert evil in seen.text, kind
        policy = next(e["content"] for _, e in seen.found if e.get("http-equiv") == "Content-Security-Policy")
        assert "default-src 'none'" in policy
        assert "script-src 'sha256-" in policy


def test_points_of_accuracy_against_speed_are_matched_by_the_whole_plan(written):
    fast, other = report_records.bench(), report_records.bench()
    other["plan"]["vision"][0]["method"]["threshold"] = 0.5
    page = make_report(written(fast, other, report_records.eval_images()))
    seen = read(page)
    points = [entry["aria-label"] for _, entry in seen.found if entry.get("class") == "point"]
    assert [p.partition(";")[0] for p in points] == ["1: unpruned", "2: half (batch 1, float32)"] * 2
    assert "measured speed-up 1.300 [1.200, 1.400]; top1, 0 to 1 0.790 [0.770, 0.810]" in points[1]
    assert all(e.get("tabindex") == "0" for _, e in seen.found if e.get("class") == "point")
    alone = make_report(written(other, report_records.eval_images()))
    assert "Accuracy against speed" not in alone


def test_the_front_holds_what_nothing_beats():
    places = {"a": (1, 0.9), "b": (1.2, 0.8), "c": (1.1, 0.7), "d": (1.2, 0.7), "e": (1.1, 0.8), "f": (1, 0.8)}
    made = [Point(name, "g", x, y) for name, (x, y) in places.items()]
    assert [p.name for p in front(made)] == ["a", "b"]


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.2, 0.8), (-3, 17), (0, 1e-5), (1000, 250_000)])
def test_ticks_are_few_round_and_inside(low, high):
    found = ticks(low, high)
    assert 2 <= len(found) <= 8
    assert all(low - 1e-12 <= t <= high * (1 + 1e-12) for t in found)
    assert len({round(b - a, 12) for a, b in itertools.pairwise(found)}) <= 2


def test_a_curve_has_gaps_bands_markers_and_its_numbers():
    lines = [Line("a", [0.1, None, 0.3, 0.4], [0.0, None, 0.2, 0.3], [0.2, None, 0.4, 0.5]), Line("b", [1, 2, 3, 4])]
    picture = line_chart(Curves("t", lines))
    seen = read(picture)
    curves = [
        entry for _, entry in seen.found if (entry.get("class") or "").startswith("curve") and entry["d"] != "M1 7L35 7"
    ]
    assert [entry.get("stroke-dasharray") for entry in curves] == [None, None, "6 3"]  # a gap; then the second, dashed
    assert len([1 for _, entry in seen.found if (entry.get("class") or "").startswith("band")]) == 2
    assert "0.300 [0.200, 0.400]" in seen.text
    assert "no value" in line_chart(Curves("t", [Line("a", [None, None])]))


def test_colours_of_a_heat_map_grow_lighter():
    lights = [
        sum(int(cividis(s)[i : i + 2], 16) * w for i, w in ((1, 0.299), (3, 0.587), (5, 0.114)))
        for s in np.linspace(0, 1, 50)
    ]
    assert np.all(np.diff(lights) > 0)


def test_kept_patches_show_as_kept(written):
    record = report_records.view()
    seen = read(make_report(written(record)))
    steps = [entry for _, entry in seen.found if (entry.get("class") or "").startswith("step")]
    assert [entry["data-label"] for entry in steps] == [
        "before the first drop point: 6 of 6 kept (100%)",
        "after layer 0: 4 of 6 kept (67%)",
        "after layer 2: 1 of 6 kept (17%)",
    ]
    assert [entry["class"] for entry in steps] == ["step off", "step off", "step"]  # the last shows without JavaScript
    dark = [entry["d"] for _, entry in seen.found if entry.get("class") == "dark"]
    assert dark == ["M20 0h10v10h-10zM20 10h10v10h-10z", "M10 0h20v10h-20zM0 10h30v10h-30z"]
    rims = [entry["d"] for _, entry in seen.found if entry.get("class") == "rim"]
    assert rims == ["M20 0v10M20 10v10", "M10 0v10M0 10h10"]


def test_tokens_of_a_prompt_are_laid_on_their_tiles(written):
    record = report_records.view()
    picture = record["photos"][0].pop("picture")
    layers = [
        {"stage": "vision", "layer": 3, "sample": 0, "tokens_in": 4, "tokens_out": 3, "kept": [0, 1, 2]},
        {"stage": "vision", "layer": 3, "sample": 1, "tokens_in": 2, "tokens_out": 1, "kept": [1]},
        {"stage": "language", "layer": 1, "sample": 0, "tokens_in": 4, "tokens_out": 2, "kept": [0, 4]},
    ]
    record["photos"][0] |= {
        "tiles": [[2, 2], [1, 2]],
        "visual_tokens": 6,
        "pictures": [picture, picture],
        "layers": layers,
    }
    seen = read(make_report(written({**record, "prompt": "what"})))
    labels = [entry["data-label"] for _, entry in seen.found if (entry.get("class") or "").startswith("step")]
    assert labels[1:3] == ["vision, after layer 3: 3 of 4 kept (75%)", "language, after layer 1: 1 of 4 kept (25%)"]
    assert labels[4:] == ["vision, after layer 3: 1 of 2 kept (50%)", "language, after layer 1: 1 of 2 kept (50%)"]
    assert "33.3 % of the tokens are kept" in seen.text


def test_sheets_beside_an_older_record_are_shown_and_nothing_elsewhere(written, tmp_path):
    record = report_records.view()
    del record["photos"][0]["picture"]
    Image.new("RGB", (50, 40), "red").save(tmp_path / "kept_a.png")
    page = make_report(written({**record, "files": ["kept_a.png", "gone.png"]}))
    assert [e["alt"] for name, e in read(page).found if name == "img"] == ["sheet kept_a.png"]
    for name in ("../secret.png", "/etc/passwd", "a/../../b.png", "..\\x.png", ".hidden"):
        with pytest.raises(ValueError, match=r"record0\.json.*file name alone"):
            make_report(written({**record, "files": [name]}))


def test_pictures_that_are_none_are_refused(written):
    record = report_records.view()
    for uri in (
        "https://x.example/a.png",
        "data:text/html;base64,PHNjcmlwdD4=",
        "data:image/png;base64,????",
        "data:image/png;base64,aGVsbG8=",
    ):
        broken = copy.deepcopy(record)
        broken["photos"][0]["picture"] = uri
        with pytest.raises(ValueError, match=r"record0\.json"):
            make_report(written(broken))


def test_a_page_that_would_be_too_large_gets_smaller_pictures_or_is_refused(written):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (300, 300, 3), dtype=np.uint8))
    record = report_records.view()
    record["photos"] = [
        {**record["photos"][0], "name": f"p{i}", "picture": data_uri(noise, limit=200_000)} for i in range(8)
    ]
    records = written(record)
    whole = len(make_report(records).encode())
    assert len(make_report(records, limit=whole - 1).encode()) < whole - 20_000
    with pytest.raises(ValueError, match=r"smallest pictures.*fewer records"):
        make_report(records, limit=20_000)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{oops", ["is no JSON", "saint view"]),
        ("[1, 2]", ["holds a list", "saint bench"]),
        ('{"version": 1}', ["no kind", "version"]),
        ('{"version": 1, "kind": "chat"}', ["'chat'", *KINDS]),
        ('{"version": 1, "kind": "evidence/saliency"}', ["evidence/saliency", "a script of evidence/"]),
        ('{"version": 3, "vision": null, "tuned": {}}', ["a plan", "saint tune --json"]),
        ('{"version": 2, "kind": "view"}', ["format 1", "2"]),
        ('{"version": 1, "kind": "view"}', ["kind view", "'photos'"]),
        ('{"version": 1, "kind": "bench/encoder", "speedup": 3}', ["kind bench/encoder"]),
        ('{"version": 1, "kind": "view", "grid": [NaN, 1]}', ["is no JSON", "NaN"]),
        ('{"version": 1, "kind": "view", "photos": [{"name": 1}], "model": 2, "plan": {}}', ["kind view", "'layers'"]),
        ("[" * 100_000, ["is no JSON", "nested"]),
        (b"\xff\xfe\x00", ["is no JSON"]),
    ],
)
def test_what_is_no_record_is_refused_by_name_and_nothing_is_written(run, tmp_path, content, words):
    file, page = tmp_path / "broken.json", tmp_path / "page.html"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    page.write_text("what was there")
    code, _, err = run(file, "-o", page)
    assert code == 2
    assert "broken.json" in err
    assert all(word in err for word in words), err
    assert "Traceback" not in err
    assert page.read_text() == "what was there"


def test_the_command_writes_the_page_whole(run, tmp_path):
    files = []
    for name, make in report_records.MAKERS.items():
        files.append(tmp_path / f"{name.replace('/', '-')}.json")
        files[-1].write_text(json.dumps(make()))
    code, said, err = run(*files, "-o", tmp_path / "new" / "page.html")
    assert code == 0, err
    assert f"{len(files)} records" in " ".join(said.split())
    read((tmp_path / "new" / "page.html").read_text())
    code, _, err = run(files[0], "-o", files[0])
    assert code == 2
    assert "one of the records" in err
    code, _, err = run(files[0], "-o", tmp_path)
    assert "is a directory" in err
    code, _, err = run(tmp_path / "nowhere.json")
    assert code == 2
    assert "nowhere.json" in err


def test_records_of_the_commands_themselves_are_understood(run, tmp_path, capsys):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 120, 3), dtype=np.uint8)).save(
        tmp_path / "noise.png"
    )
    rest = ["timm:test_vit", "--no-pretrained", "--device", "cpu", "--images", str(tmp_path / "noise.png")]
    plan = ["--plan", json.dumps({"version": 1, "vision": {"method": {"method": "grid", "keep": 0.5}, "layers": [1]}})]
    folder = str(tmp_path / "out")
    for name, more in (
        ("view", ["--output", folder]),
        ("demo", ["--output", folder, "--repeats", "1"]),
        ("bench", ["--repeats", "2", "--warmup", "0"]),
    ):
        with pytest.raises(SystemExit):
            main([name, *rest, *plan, *more, "--json", str(tmp_path / f"{name}.json")])
    capsys.readouterr()
    for name in ("view", "demo"):
        assert json.loads((tmp_path / f"{name}.json").read_text())["pretrained"] is False
        photo = json.loads((tmp_path / f"{name}.json").read_text())["photos"][0]
        assert photo["picture"].startswith("data:image/jpeg;base64,")
        assert len(photo["picture"]) <= 30_000
    code, _, err = run(*(tmp_path / f"{name}.json" for name in ("view", "demo", "bench")), "-o", tmp_path / "page.html")
    assert code == 0, err
    seen = read((tmp_path / "page.html").read_text())
    labels = [entry["data-label"] for _, entry in seen.found if "data-label" in entry]
    assert labels == ["before the first drop point: 100 of 100 kept (100%)", "after layer 1: 50 of 100 kept (50%)"] * 2
    points = [entry for _, entry in seen.found if entry.get("class") == "point"]
    assert len(points) == 3  # unpruned; the demo's agreement at its own speed and at that of the bench


def test_a_report_loads_no_torch(tmp_path):
    (tmp_path / "r.json").write_text(json.dumps(report_records.view()))
    code = (
        "import sys, saint.lab.cli\n"
        f"try: saint.lab.cli.main(['report', {str(tmp_path / 'r.json')!r}, '-o', {str(tmp_path / 'r.html')!r}])\n"
        "except SystemExit as e: assert not e.code\n"
        "assert not {'torch', 'timm', 'transformers', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert (tmp_path / "r.html").exists()


def test_markup_is_escaped_once():
    assert tag("p", "<b>", Markup("<i></i>"), None, title='"&') == '<p title="&quot;&amp;">&lt;b&gt;<i></i></p>'
    assert tag("input", value=1, hidden=True, class_=None) == '<input value="1" hidden/>'
    assert [number(x) for x in (None, 0, 12, 0.12345, 12.345, 123456.7, 0.00001)] == [
        "-",
        "0",
        "12",
        "0.123",
        "12.35",
        "123,457",
        "1.0e-05",
    ]


def test_the_input_and_the_first_layer_are_two_points_of_one_picture(run, tmp_path):
    """From the commands to the page: a plan with a stage in front of the layers and one at layer 0."""
    stages = (
        saint.Stage(saint.methods.Random(keep=0.8), placement="input"),
        saint.Stage(saint.methods.Random(keep=0.5), layers=[0, 2]),
    )
    saint.Plan(vision=stages).save(tmp_path / "plan.json")
    Image.effect_noise((90, 70), 60).convert("RGB").save(tmp_path / "one.png")
    tiny = ["timm:test_vit", "--no-pretrained", "--device", "cpu", "--plan", tmp_path / "plan.json"]
    tiny += ["--images", tmp_path / "one.png"]
    quick = ["--repeats", 1, "--json", tmp_path / "bench.json"]
    for line in (["view", *tiny, "--output", tmp_path, "--json", tmp_path / "view.json"], ["bench", *tiny, *quick]):
        with pytest.raises(SystemExit, match="0"):
            main([*map(str, line)])
    (photo,) = json.loads((tmp_path / "view.json").read_text())["photos"]
    assert [(e["placement"], e["layer"], e["tokens_out"]) for e in photo["layers"]] == [
        ("input", 0, 80), ("mid", 0, 57), ("mid", 2, 40),
    ]  # fmt: skip
    code, _, err = run(tmp_path / "view.json", tmp_path / "bench.json", "-o", tmp_path / "r.html")
    assert code == 0, err
    text = read((tmp_path / "r.html").read_text()).text
    words = " ".join(text.split())
    assert "in front of the layers: 20 dropped" in words
    assert "after layer 0: 23 dropped" in words
    tables = read_tables((tmp_path / "r.html").read_text())
    assert tables["Tokens kept, vision"] == [["input", "80"], ["0", "57"], ["2", "40"]]
    assert tables["Tokens around each drop point"] == [["input", "100", "80"], ["0", "80", "57"], ["2", "57", "40"]]
    assert "band: lowest" not in words


def read_tables(page: str) -> dict[str, list[list[str]]]:
    """Rows of the body of each table, by its caption."""
    found = {}
    for body in re.findall(r"<table.*?</table>", page, re.S):
        caption = re.search(r"<caption[^>]*>(.*?)</caption>", body, re.S)
        rows = [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row, re.S) for row in re.findall(r"<tr.*?</tr>", body, re.S)]
        if caption:
            found[caption[1]] = [[re.sub("<[^>]+>", "", cell) for cell in row] for row in rows[1:]]
    return found


def test_what_was_left_out_is_named_in_the_page(written):
    text = read(make_report(written(report_records.view()))).text
    assert "Not used: 10" in text
    assert "9 left out (the ending .csv is no picture's): a.csv, b.csv, ..." in text


# -- the same sheet elsewhere -----------------------------------------------------------------------------------------


def cells(blocks) -> set[str]:
    """Texts of all tables that are shown on a terminal."""
    found: set[str] = set()
    for block in blocks:
        if block is None or getattr(block, "page_only", False):
            continue
        if isinstance(block, Table):
            values = [value.text if isinstance(value, Cell) else value for row in block.rows for value in row]
            found |= {number(v) if isinstance(v, (int, float)) else str(v) for v in values}
        if isinstance(block, Group):
            found |= cells(block.blocks)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_terminal_and_markdown_show_the_figures_of_the_page(kind, tmp_path):
    sheet = sheet_of(Record("r.json", tmp_path, report_records.MAKERS[kind]()))
    console = Console(width=400, file=io.StringIO())
    terminal.show(console, sheet)
    shown, written_ = console.file.getvalue(), markdown.sheet(sheet)
    for text in (shown, written_):
        assert sheet.title in text
        assert sheet.verdict in text
        missing = {cell for cell in cells(sheet.blocks) if cell.replace("|", "\\|") not in text and cell not in text}
        assert not missing
    assert "<" not in written_.replace("<b", "")
    for line in written_.splitlines():
        if line.startswith("|"):
            assert line.endswith("|")


def test_a_report_may_be_markdown(run, written, tmp_path):
    files = [tmp_path / f"{place}.json" for place in range(2)]
    for file, kind in zip(files, ("bench/encoder", "eval/images"), strict=True):
        file.write_text(json.dumps(report_records.MAKERS[kind]()))
    assert run(*files, "-o", tmp_path / "r.md")[0] == 0
    text = (tmp_path / "r.md").read_text()
    assert text.count("\n## ") + text.startswith("## ") >= 2
    assert "<html" not in text


def test_curves_are_columns_of_one_table():
    """Narrow columns where lines have short names; a section in front of each boundary."""
    lines = [Line("similarity of keys", [0.5, None, 0.25], short="sim", digits=2), Line("left to the page", [1, 2, 3])]
    console = Console(width=80, file=io.StringIO())
    sheet = Sheet("t", "", "v", [], [Charts([Curves("a", lines[:1]), Curves("b", lines[1:])], "sim: similarity")])
    terminal.show(console, sheet)
    text = console.file.getvalue()
    assert [line.split() for line in text.splitlines() if line[1:2].isdigit()] == [
        ["0", "0.50"],
        ["1", "-"],
        ["2", "0.25"],
    ]
    assert "sim: similarity" in text
    assert "left to the page" not in text
