"""The pages of `saint report` and `saint ui` in a headless Chromium; skipped by name where there is none."""

import json
import shutil
import socket
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import saint
from saint.lab.report import make_report, read_records
from support import records as report_records
from support.pictures import png

pytest.importorskip("selenium", reason="selenium is not installed")
pytest.importorskip("uvicorn", reason="uvicorn is not installed")
import uvicorn
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

from saint.lab.kinds import Encoder
from saint.lab.ui import Desk, make_app
from saint.lab.ui.desk import Offer
from saint.lab.ui.guard import hosts_of

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (BROWSER and DRIVER), reason="chromium and chromedriver are not installed")
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
WIDTHS = (420, 1280)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in FLAGS.split():
        options.add_argument(flag)
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('browser')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    driver.execute_cdp_cmd("Network.enable", {})
    yield driver
    driver.quit()


@pytest.fixture
def shown(browser):
    """Sets width and colours; nothing may be in the console afterwards, and nothing stick out of the page."""

    def show(url: str, width: int = 1280, dark: bool = False, offline: bool = False):
        browser.get_log("browser")
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
        speed = {"offline": offline, "latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
        browser.execute_cdp_cmd("Network.emulateNetworkConditions", speed)
        browser.get(url)
        return browser

    yield show
    assert browser.get_log("browser") == []


def fits(browser) -> None:
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    files = []
    for kind, make in report_records.MAKERS.items():
        files.append(folder / f"{kind.replace('/', '-')}.json")
        record = make()
        if kind in ("bench/encoder", "demo"):
            record["model"] = "<script>document.title = 'run'</script>"
        files[-1].write_text(json.dumps(record))
    page = folder / "report.html"
    page.write_text(make_report(read_records(files)))
    return page.as_uri()


# -- report -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", WIDTHS)
def test_report_loads_without_a_network_and_fits(shown, report, width, dark):
    page = shown(report, width, dark, offline=True)
    fits(page)
    assert page.title.startswith("saint report")
    paper, ink = page.execute_script("const s = getComputedStyle(document.body); return [s.backgroundColor, s.color]")
    assert contrast(paper, ink) > 7
    for name in ("--faint", "--link", "--warn", *(f"--s{i}" for i in range(7))):
        colour = page.execute_script(
            "const p = document.createElement('p'); p.style.color = `var(${arguments[0]})`; document.body.append(p);"
            "const c = getComputedStyle(p).color; p.remove(); return c",
            name,
        )
        assert contrast(paper, colour) > (3 if name.startswith("--s") else 4.5), name  # WCAG: graphics, text
    if width == 1280:  # the last column of no table of plans is cut
        cut = "return [...document.querySelectorAll('#trade .scroll')].filter((t) => t.scrollWidth > t.clientWidth).length"
        assert page.execute_script(cut) == 0
    requests = page.execute_script("return performance.getEntriesByType('resource').map((e) => e.name)")
    assert [name for name in requests if not name.startswith("data:")] == []


def contrast(one: str, other: str) -> float:
    """WCAG's ratio of two colours "rgb(r, g, b)"."""

    def light(colour: str) -> float:
        parts = [int(x) / 255 for x in colour[4:-1].split(",")]
        linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
        return sum(w * x for w, x in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    high, low = sorted((light(one), light(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_tables_sort_by_keyboard_and_click(shown, report):
    page = shown(report)
    table = next(t for t in page.find_elements(By.CSS_SELECTOR, "table.sortable") if "Generation" in t.text)

    def column(i: int) -> list[str]:
        cells = "[...arguments[0].tBodies[0].rows].map((r) => r.cells[arguments[1]])"
        script = f"return {cells}.map((c) => c.dataset.key || c.textContent)"
        return page.execute_script(script, table, i)

    head = table.find_elements(By.CSS_SELECTOR, "thead button")[0]
    head.send_keys(Keys.ENTER)
    assert column(0) == ["half", "unpruned"]
    assert head.find_element(By.XPATH, "..").get_attribute("aria-sort") == "ascending"
    head.send_keys(Keys.SPACE)
    assert column(0) == ["unpruned", "half"]
    second = table.find_elements(By.CSS_SELECTOR, "thead button")[1]
    page.execute_script("arguments[0].click()", second)
    assert head.find_element(By.XPATH, "..").get_attribute("aria-sort") is None
    table = next(t for t in page.find_elements(By.CSS_SELECTOR, "table.sortable") if "held back" in t.text)
    apart = table.find_elements(By.CSS_SELECTOR, "thead button")[3]
    for _ in range(2):
        page.execute_script("arguments[0].click()", apart)
        assert column(3)[-1] == "-"  # what is no number comes last, either way


def test_sliders_change_what_is_shown(shown, report):
    page = shown(report)
    figure = next(f for f in page.find_elements(By.CSS_SELECTOR, "figure.kept") if "of 6 kept (17%)" in f.text)
    slider, said = figure.find_element(By.TAG_NAME, "input"), figure.find_element(By.TAG_NAME, "output")

    def visible() -> list[str]:
        return [g.get_attribute("data-label") for g in figure.find_elements(By.CSS_SELECTOR, "g.step:not(.off)")]

    assert said.text == "after layer 2: 1 of 6 kept (17%)"
    assert visible() == [said.text]
    slider.send_keys(Keys.ARROW_LEFT)
    assert said.text == "after layer 0: 4 of 6 kept (67%)"
    assert visible() == [said.text] == [slider.get_attribute("aria-valuetext")]
    slider.send_keys(Keys.HOME)
    assert visible() == ["before the first drop point: 6 of 6 kept (100%)"]


def test_the_slider_changes_the_heat_map_and_who_stands_for_whom(shown, report):
    page = shown(report)
    figure = page.find_element(By.CSS_SELECTOR, "figure.why")
    opened(figure.find_element(By.TAG_NAME, "details"))
    slider, counted = figure.find_element(By.TAG_NAME, "input"), figure.find_element(By.CLASS_NAME, "counted")

    def heat() -> list[str]:
        fills = "[...arguments[0].querySelectorAll('g.heat:not(.off) path[fill]')].map((p) => p.getAttribute('d'))"
        return page.execute_script(f"return {fills}", figure)

    def now() -> list[str]:
        shown = [g for g in figure.find_elements(By.CSS_SELECTOR, "g.gone:not(.off)") if g.is_displayed()]
        return [g.get_attribute("data-from") for g in shown], [
            path.get_attribute("d")
            for path in figure.find_elements(By.CSS_SELECTOR, "path.to:not(.shade):not(.dot)")
            if page.execute_script("return getComputedStyle(arguments[0]).display !== 'none'", path)
        ]

    assert heat() == ["M0 10h10v10h-10z", "M0 0h10v10h-10z"]  # sources 3 and 0, the lower degree first
    assert now() == (["1", "2"], ["M15 5L25 15"])
    assert counted.text == "after layer 3: 1 of 2 sources have 2 or more, a vote to go"
    slider.send_keys(Keys.ARROW_LEFT)
    assert heat() == ["M0 0h10v10h-10z", "M10 10h10v10h-10z", "M20 0h10v10h-10z"]
    assert now() == (["1"], ["M25 5L15 5M15 15L15 5"])
    assert counted.text == "after layer 0: 2 of 3 sources have 2 or more, a vote to go"
    slider.send_keys(Keys.HOME)
    assert (heat(), now()) == ([], ([], []))
    assert counted.text == "before the first drop point: no vote"


def test_patches_are_walked_by_keyboard_and_pinned_by_a_click(shown, report):
    page = shown(report)
    figure = page.find_element(By.CSS_SELECTOR, "figure.why")
    opened(figure.find_element(By.TAG_NAME, "details"))
    slider, said = figure.find_element(By.TAG_NAME, "input"), figure.find_element(By.CSS_SELECTOR, "output.patch")

    def lines() -> list[str]:
        cursors = figure.find_elements(By.CSS_SELECTOR, "svg.map .cursor .line")
        assert len(cursors) == len(figure.find_elements(By.CSS_SELECTOR, "svg.field .cursor .line"))  # on both pictures
        return [line.get_attribute("d") for line in cursors]

    assert said.text.startswith("Point at a patch")
    slider.send_keys(Keys.ARROW_LEFT)  # behind layer 0, where patches 2 and 4 were dropped, and 1 stands for them
    slider.send_keys(Keys.TAB)
    page.switch_to.active_element.send_keys(Keys.TAB)  # behind the words that open the details
    assert page.switch_to.active_element.get_attribute("class") == "map"
    assert said.text == (
        "row 1, column 3; dropped after layer 0; its most similar survivor: row 1, column 2; 3 neighbours: votes to go"
    )
    assert lines() == ["M25 5L15 5", "M20 0h10v10h-10z"]
    page.switch_to.active_element.send_keys(Keys.ARROW_LEFT)
    assert said.text == "row 1, column 2; kept here, dropped after layer 3"
    assert lines() == ["M10 0h10v10h-10z"]
    page.switch_to.active_element.send_keys(Keys.ARROW_LEFT, Keys.ARROW_LEFT, Keys.ARROW_UP)  # the edge
    assert said.text == "row 1, column 1; kept; 1 neighbour: no vote"
    page.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert said.text.startswith("Point at a patch")
    assert lines() == []

    picture = figure.find_element(By.CSS_SELECTOR, "svg.map")
    wide, high = picture.size["width"], picture.size["height"]
    hand = ActionChains(page)
    hand.move_to_element_with_offset(picture, round(wide / 3), round(-high / 4)).perform()  # from the middle: patch 2
    assert said.text.startswith("row 1, column 3; dropped after layer 0")
    hand.click().move_to_element(slider).perform()
    assert said.text.startswith("row 1, column 3; dropped after layer 0")  # stays
    slider.send_keys(Keys.END)
    through = "its most similar survivor: row 2, column 3 (through 1 dropped since)"
    assert said.text == f"row 1, column 3; dropped after layer 0; {through}"
    assert lines() == ["M25 5L15 5L25 15", "M20 0h10v10h-10z"]


def test_points_tell_at_focus_and_hostile_names_do_not_run(shown, report):
    page = shown(report)
    assert page.title.startswith("saint report")
    point = page.find_element(By.CSS_SELECTOR, "#trade .point")
    page.execute_script("arguments[0].focus()", point)
    tip = page.find_element(By.ID, "tip")
    assert "unpruned" in tip.text
    page.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert not tip.is_displayed()


def test_report_without_javascript_shows_the_last_layer_and_no_dead_control(shown, browser, report):
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        page = shown(report)
        steps = page.find_elements(By.CSS_SELECTOR, "figure.kept g.step:not(.off)")
        assert len(steps) == len(page.find_elements(By.CSS_SELECTOR, "figure.kept")) > 0
        assert not any(s.is_displayed() for s in page.find_elements(By.CSS_SELECTOR, ".slider"))
        assert page.find_elements(By.CSS_SELECTOR, "th button") == []
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


# -- ui ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server():
    """The application at a free port, with a tiny model; its address."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    desk = Desk({"timm:test_vit": Offer("timm:test_vit", Encoder, False)}, repeats=1)
    running = uvicorn.Server(uvicorn.Config(make_app(desk, hosts_of("127.0.0.1", port)), log_level="error", ws="none"))
    thread = threading.Thread(target=lambda: running.run(sockets=[listening]), daemon=True)
    thread.start()
    while not running.started:
        time.sleep(0.05)
    yield f"http://127.0.0.1:{port}/"
    running.should_exit = True
    thread.join(10)
    torch.set_num_threads(threads)


@pytest.fixture
def picture(tmp_path) -> Path:
    path = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 120, 3), dtype=np.uint8)).save(path)
    return path


def ready(page):
    """The page with the answer that it opens with, and all that it holds."""
    WebDriverWait(page, 20).until(lambda p: p.execute_script("return document.body.dataset.ready"))
    assert answered(page) == ""
    opened(page.find_element(By.ID, "more"))
    return page


def opened(details):
    details.parent.execute_script("arguments[0].open = true", details)
    return details


def answered(page) -> str:
    """What the status says in the end, empty for an answer."""
    status, go = page.find_element(By.ID, "status"), page.find_element(By.ID, "go")
    WebDriverWait(page, 120).until(lambda _: go.is_enabled() and not status.text.startswith("running"))
    return status.text


def prune(page) -> str:
    """Presses the button; what the status says in the end, empty for an answer."""
    page.find_element(By.ID, "go").send_keys(Keys.ENTER)
    return answered(page)


def set_keep(page, share: str) -> None:
    """Moves the slider as a hand does: it tells the page while it moves, and when it is let go."""
    page.execute_script(
        "const s = document.getElementById('keep'); s.value = arguments[0];"
        "s.dispatchEvent(new Event('input')); s.dispatchEvent(new Event('change'))",
        share,
    )


@pytest.mark.parametrize(("width", "dark"), [(420, True), (1280, False)])
def test_the_page_opens_with_a_sample_and_its_result(shown, server, width, dark):
    page = ready(shown(server, width, dark))
    fits(page)
    answer = page.find_element(By.ID, "answer")
    kept, faster, agreement = answer.find_elements(By.CSS_SELECTOR, ".highlights .large")
    assert kept.text.endswith("%")
    assert faster.text.endswith("x")
    assert 0 < float(agreement.text) <= 1
    before = answer.find_element(By.CSS_SELECTOR, ".gallery img")
    after = answer.find_element(By.CSS_SELECTOR, "figure.kept svg.seen")
    beside = abs(before.location["y"] - after.location["y"]) < 40
    assert beside == (width == 1280)  # side by side, or one column
    assert answer.find_elements(By.CSS_SELECTOR, "svg.map")[0].is_displayed() is False  # reasons on demand
    assert "chelsea" in page.find_element(By.ID, "hint").text
    if width == 1280:
        right = page.execute_script("return document.querySelector('#answer').getBoundingClientRect().right")
        assert right > 1240  # the whole width


def test_the_slider_prunes_again_and_two_plans_stand_beside_each_other(shown, server):
    page = ready(shown(server))
    answer = page.find_element(By.ID, "answer")
    assert "saint.apply(model, keep=0.5)" in answer.text
    page.find_element(By.ID, "pin").send_keys(Keys.ENTER)
    assert "keep 0.5" in page.find_element(By.ID, "pinned").text
    set_keep(page, "0.8")
    assert page.find_element(By.ID, "share").text == "80 %"
    assert answered(page) == ""
    assert "saint.apply(model, keep=0.8)" in answer.text
    rows = answer.find_elements(By.CSS_SELECTOR, "table tbody tr")[:2]
    assert [row.text.startswith(name) for row, name in zip(rows, ("keep 0.8", "keep 0.5"), strict=True)] == [True] * 2
    assert len(answer.find_elements(By.CSS_SELECTOR, "figure.kept")) == 2
    page.find_element(By.ID, "unpin").send_keys(Keys.ENTER)
    assert prune(page) == ""
    assert len(answer.find_elements(By.CSS_SELECTOR, "figure.kept")) == 1


def test_a_long_plan_is_pasted_chosen_as_a_file_or_named(shown, server, tmp_path):
    page = ready(shown(server))
    stages = [saint.Stage(saint.methods.Match(keep=0.95, fate="weigh"), layers=[layer]) for layer in range(6)]
    text = json.dumps(saint.Plan(vision=stages).to_dict(), indent=4).replace(": ", ":" + " " * 300)
    assert len(text) > 20_000
    plan = page.find_element(By.ID, "plan")
    page.execute_script("arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input'))", plan, text)
    assert not page.find_element(By.ID, "keep").is_enabled()
    assert "the plan below decides" in page.find_element(By.ID, "decides").text
    assert prune(page) == ""
    assert "match at layers 0, 1, 2, 3, 4, 5" in page.find_element(By.ID, "answer").text
    assert page.find_element(By.CSS_SELECTOR, "a.file").get_attribute("download") == "plan.json"
    (tmp_path / "mine.json").write_text(json.dumps(saint.plan("vit/tome").to_dict()))
    page.find_element(By.ID, "planfile").send_keys(str(tmp_path / "mine.json"))
    WebDriverWait(page, 5).until(lambda _: '"tome"' in plan.get_attribute("value"))
    assert prune(page) == ""
    assert "vit/tome" in page.find_element(By.ID, "answer").text
    Select(page.find_element(By.ID, "recipe")).select_by_value("vit/match")
    assert plan.get_attribute("value") == "vit/match"
    plan.clear()
    plan.send_keys(" ")
    assert page.find_element(By.ID, "keep").is_enabled()


def test_only_methods_that_the_model_takes_are_offered(shown, server):
    page = ready(shown(server))
    offered = [option.get_attribute("value") for option in Select(page.find_element(By.ID, "method")).options]
    assert "saint" in offered
    assert not {"evs", "fastv"} & set(offered)
    for name in offered[2:]:
        Select(page.find_element(By.ID, "method")).select_by_value(name)
        assert page.find_element(By.ID, "stage").get_attribute("value") == "vision"
    named = [option.get_attribute("value") for option in Select(page.find_element(By.ID, "recipe")).options]
    assert "vit/match" in named
    assert "llava-1.5/hybrid" not in named


@pytest.mark.parametrize(("width", "dark"), [(420, True), (1280, False)])
def test_a_picture_gets_an_answer_and_the_slider_works(shown, server, picture, width, dark):
    page = ready(shown(server, width, dark))
    page.find_element(By.ID, "file").send_keys(str(picture))
    Select(page.find_element(By.ID, "method")).select_by_value("random")
    page.find_element(By.ID, "tokens").send_keys("0.5")
    page.find_element(By.ID, "layers").send_keys("0,1")
    assert prune(page) == ""
    answer = page.find_element(By.ID, "answer")
    assert "50 of 100 tokens are kept to the end (50%)" in answer.text
    fits(page)
    said = answer.find_element(By.CSS_SELECTOR, "figure.kept output")
    before = said.text
    answer.find_element(By.CSS_SELECTOR, "figure.kept input").send_keys(Keys.HOME)
    assert before == "after layer 1: 50 of 100 kept (50%)"
    assert said.text == "before the first drop point: 100 of 100 kept (100%)"
    assert "saint demo timm:test_vit --plan" in answer.find_elements(By.CSS_SELECTOR, "pre.line")[1].text


def test_a_dropped_file_is_taken(shown, server):
    page = ready(shown(server))
    page.execute_script(
        "const data = new DataTransfer(); data.items.add(new File([new Uint8Array([1, 2])], 'dropped.png', {type: 'image/png'}));"
        "const event = new DragEvent('drop', {dataTransfer: data, bubbles: true, cancelable: true});"
        "document.getElementById('drop').dispatchEvent(event)"
    )
    assert "dropped.png" in page.find_element(By.ID, "hint").text


def test_hostile_files_are_refused_in_the_page(shown, browser, server, tmp_path, picture):
    import base64
    import zlib

    page = ready(shown(server))
    (tmp_path / "text.png").write_text("no picture at all")
    (tmp_path / "huge.png").write_bytes(base64.b64decode(png(50_000, 50_000, zlib.compress(bytes(1000)))))
    (tmp_path / ".hidden.png").write_bytes(picture.read_bytes())
    for name, words in (
        ("text.png", "PNG, JPEG, WEBP or GIF image is expected"),
        ("huge.png", "too large"),
        (".hidden.png", "plain file name"),
    ):
        page.find_element(By.ID, "file").send_keys(str(tmp_path / name))
        assert words in prune(page), name
    (tmp_path / "big.png").write_bytes(bytes(10_000_001))
    page.find_element(By.ID, "file").send_keys(str(tmp_path / "big.png"))
    assert "at most 10 MB" in page.find_element(By.ID, "status").text
    # the console names each refused request, and nothing else is in it
    said = [entry["message"] for entry in browser.get_log("browser")]
    assert len(said) == 3
    assert all("/run - Failed to load resource: the server responded with a status of 400" in line for line in said)
    page.find_element(By.ID, "file").send_keys(str(picture))
    assert prune(page) == ""
