"""`saint ui` over HTTP, without a browser: answers, and what is refused before or instead of one."""

import base64
import io
import json
import re
import threading
import time
import tracemalloc
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import saint
from saint import extras
from saint.lab.cli import main
from support.pictures import png

pytest.importorskip("starlette")
from starlette.testclient import TestClient

from saint.lab.kinds import Encoder
from saint.lab.ui import Desk, make_app, offered
from saint.lab.ui.desk import Offer, Told
from saint.lab.ui.guard import LARGEST, hosts_of

HOST = "127.0.0.1:8765"
MODEL = "timm:test_vit"


@pytest.fixture
def desk():
    return Desk(
        {MODEL: Offer(MODEL, Encoder, False), "timm:test_vit2": Offer("timm:test_vit2", Encoder, False)}, repeats=1
    )


@pytest.fixture
def client(desk):
    return TestClient(
        make_app(desk, hosts_of("127.0.0.1", 8765)), base_url=f"http://{HOST}", raise_server_exceptions=False
    )


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def encoded(image: Image.Image | None = None, kind: str = "PNG") -> str:
    image = image or Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return base64.b64encode(buffer.getvalue()).decode()


def post(client: TestClient, headers: dict | None = None, **fields: object):
    asked = {"image": encoded(), "model": MODEL, **fields}
    given = {"Origin": f"http://{HOST}", "Content-Type": "application/json", **(headers or {})}
    return client.post("/run", content=json.dumps(asked), headers=given)


def refused(response, status: int, *words: str) -> None:
    assert response.status_code == status, response.text
    said = response.json()["error"]
    assert all(word in said for word in words), said
    assert "Traceback" not in response.text


# -- answers ----------------------------------------------------------------------------------------------------------


def test_a_picture_gets_survivors_outputs_times_and_a_plan(client):
    response = post(client, method="saint", stage="vision", tokens="0.5", layers="0-2", name="cat.png")
    assert response.status_code == 200, response.text
    html = response.json()["html"]
    assert "50 of 100 tokens are kept to the end (50%)" in html
    assert "measured on this machine" in html
    assert "after layer 2: 50 of 100 kept (50%)" in html
    assert "before the first drop point: 100 of 100 kept" in html
    assert "1 interleaved pairs" in html
    assert "One picture on this machine" in html
    assert "saint demo timm:test_vit --plan" in html
    assert "&quot;budget&quot;:0.5" in html
    assert "<script" not in html
    assert "probability" in html


def test_an_empty_plan_field_means_the_models_own_and_a_recipe_or_json_is_taken(client):
    own = post(client)
    assert own.status_code == 200
    assert "threshold 0.75" in own.json()["html"]
    named = post(client, plan="vit/tome")
    assert "tome" in named.json()["html"]
    text = json.dumps({"version": 1, "vision": {"method": {"method": "grid", "keep": 0.25}, "layers": [1]}})
    assert "25 of 100 tokens are kept to the end" in post(client, plan=text).json()["html"]


def test_the_slider_asks_for_a_share_of_the_work(client, desk):
    """The plan is the one that saint makes of the model and its inputs; all of the work is no plan at all."""
    told = post(client, keep="0.6").json()
    subject = desk._held[1]
    plan = saint.plan_for(subject.model, 0.6, subject.pixels([Image.new("RGB", (8, 8))]))
    assert saint.Plan.from_dict(told["plan"]) == plan
    assert plan.vision
    assert "60 % of the FLOPs are used" in told["html"]
    assert "saint.apply(model, keep=0.6)" in told["html"]
    assert told["name"] == "keep 0.6"
    whole = post(client, keep="1").json()
    assert "every token is kept" in whole["html"]
    assert whole["plan"] == saint.Plan().to_dict()
    for wrong in ("0.1", "1.01", "nan", "some"):
        refused(post(client, keep=wrong), 400, "keep", wrong)


def test_two_plans_are_compared_on_one_picture(client):
    first = {"version": 1, "vision": {"method": {"method": "grid", "keep": 0.25}, "layers": [1]}}
    other = {"version": 1, "vision": {"method": {"method": "random", "keep": 0.5}, "layers": [1]}}
    html = post(client, plan=json.dumps(first), against=json.dumps(other)).json()["html"]
    rows = re.findall(r"<tr><th[^>]*>the plan given</th><td[^>]*>(.*?)</td>", html)
    assert rows == ["25 of 100", "50 of 100"]
    named = post(client, plan="vit/tome", against=json.dumps(other), against_name="<keep> 0.5").json()["html"]
    assert '<th scope="row">&lt;keep&gt; 0.5</th>' in named
    assert html.count('class="seen"') == 2
    assert "after layer 1: 25 of 100 kept (25%)" in html
    assert "after layer 1: 50 of 100 kept (50%)" in html
    assert html.count('class="highlights"') == 1


def test_a_plan_has_a_line_of_python_a_command_and_a_file(client):
    told = post(client, plan="vit/tome").json()
    assert "saint.apply(model, &quot;vit/tome&quot;)" in told["html"]
    assert "saint demo timm:test_vit --plan vit/tome" in told["html"]
    spelled = post(client, method="random", tokens="0.25", layers="1").json()["html"]
    assert "saint.apply(model, saint.Plan(vision=saint.Stage(saint.methods.Random(keep=0.25), layers=[1])))" in spelled
    stages = [saint.Stage(saint.methods.Match(keep=0.9, fate="weigh"), layers=[layer]) for layer in range(6)]
    long = saint.Plan(vision=stages)
    html = post(client, plan=json.dumps(long.to_dict())).json()["html"]
    assert "saint.apply(model, &quot;plan.json&quot;)" in html
    assert "--plan plan.json" in html
    assert "vision: match at layers 0, 1, 2, 3, 4, 5" in html
    (file,) = re.findall(r'href="data:application/json;base64,([^"]*)" download="plan.json"', html)
    assert saint.Plan.from_dict(json.loads(base64.b64decode(file))) == long


def test_what_is_offered_fits_one_picture(client):
    told = client.get("/facts").json()
    where = {method["name"]: method["stages"] for method in told["methods"]}
    assert where["fastv"] == ["language"]
    assert where["tome"] == ["vision", "language"]  # it merges, which the connector stage does not
    assert not {"evs", "saint_video"} & where.keys()  # of videos
    assert all(where.values())
    assert told["models"][0]["stages"] == ["vision"]
    stages = {recipe["name"]: recipe["stages"] for recipe in told["recipes"]}
    assert stages["llava-1.5/hybrid"] == ["vision", "language"]


def test_samples_are_pictures_by_name_and_nothing_else(client):
    named = [sample["name"] for sample in client.get("/facts").json()["samples"]]
    assert "scene" in named
    for name in named:
        response = client.get(f"/sample/{name}")
        assert response.headers["content-type"] == "image/jpeg"
        assert max(Image.open(io.BytesIO(response.content)).size) <= 640
    for name in ("nothing", "..%2f..%2fguard.py", "%2fetc%2fpasswd", "chelsea.png"):
        assert client.get(f"/sample/{name}").status_code == 404


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
def test_four_formats_are_decoded(client, kind):
    assert post(client, image=encoded(kind=kind), method="random", tokens="0.5", layers="1").status_code == 200


def test_one_model_is_held_and_requests_wait_for_each_other(client, desk, monkeypatch):
    running, most, loads = 0, 0, []
    real_load, real_shown = Encoder.load, Desk._shown

    def load(spec, *rest):
        loads.append(spec)
        return real_load("timm:test_vit", *rest)

    def shown(self, *rest):
        nonlocal running, most
        running += 1
        most = max(most, running)
        time.sleep(0.05)
        found = real_shown(self, *rest)
        running -= 1
        return found

    monkeypatch.setattr(Encoder, "load", load)
    monkeypatch.setattr(Desk, "_shown", shown)
    statuses = []
    threads = [threading.Thread(target=lambda: statuses.append(post(client).status_code)) for _ in range(3)]
    with client:  # one event loop for all, as in a server
        [thread.start() for thread in threads]
        [thread.join(60) for thread in threads]
    assert statuses == [200] * 3
    assert most == 1
    assert loads == [MODEL]
    assert post(client, model="timm:test_vit2").status_code == 200
    assert post(client).status_code == 200
    assert loads == [MODEL, "timm:test_vit2", MODEL]
    assert desk._held[0] == MODEL


def test_too_many_waiting_requests_are_sent_away(client, desk, monkeypatch):
    release, begun = threading.Event(), threading.Semaphore(0)

    def run(self, asked):
        begun.release()
        release.wait(20)
        return Told("<p>done</p>", "", {})

    monkeypatch.setattr(Desk, "run", run)
    with client:  # one event loop for all
        statuses = []
        threads = [threading.Thread(target=lambda: statuses.append(post(client).status_code)) for _ in range(4)]
        [thread.start() for thread in threads]
        for _ in range(4):
            assert begun.acquire(timeout=20)
        refused(post(client), 503, "4 requests", "try again")
        release.set()
        [thread.join(60) for thread in threads]
    assert statuses == [200] * 4
    with client:
        assert post(client).status_code == 200


def test_nothing_is_written_to_disk(client, tmp_path, monkeypatch):
    import tempfile

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    large = Image.fromarray(np.random.default_rng(0).integers(0, 255, (900, 900, 3), dtype=np.uint8))
    assert post(client, image=encoded(large), name="x.png").status_code == 200
    assert list(tmp_path.iterdir()) == []


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8765", "127.0.0.1:1", "127.0.0.1", "localhost", ""])
def test_other_hosts_are_refused(client, host):
    for path in ("/", "/facts", "/ui.js"):
        refused(client.get(path, headers={"Host": host}), 421, HOST)
    refused(post(client, headers={"Host": host}), 421)
    assert client.get("/", headers={"Host": "LOCALHOST:8765"}).status_code == 200


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "https://127.0.0.1:8765", "http://127.0.0.1:9", ""])
def test_posts_from_other_pages_are_refused(client, origin):
    refused(post(client, headers={"Origin": origin}), 403, "own page")
    assert (
        client.post("/run", content="{}", headers={"Content-Type": "application/json"}).status_code == 403
    )  # no Origin
    assert client.options("/run", headers={"Origin": origin}).status_code == 403


def test_every_answer_has_the_headers_and_posts_need_json(client):
    for response in (client.get("/"), client.get("/nowhere"), client.get("/", headers={"Host": "evil"})):
        policy = response.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "script-src 'self';" in policy
        assert response.headers["x-content-type-options"] == "nosniff"
    refused(post(client, headers={"Content-Type": "text/plain"}), 415, "application/json")
    assert client.get("/run").status_code == 405
    assert client.get("/../../etc/passwd").status_code == 404
    assert client.get("/ui/guard.py").status_code == 404
    for path in ("/", "/ui.js", "/ui.css", "/report.js", "/report.css"):
        assert client.get(path).status_code == 200
        assert "http://" not in client.get(path).text


HEADERS = {
    "content-security-policy": {
        "default-src": "'none'",
        "script-src": "'self'",
        "style-src": "'self'",
        "img-src": "'self' data: blob:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    },
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


def test_every_answer_has_every_header_once(client, monkeypatch):
    """Pages, answers, refusals of the guard and of what is behind it: the whole policy, nothing more, nothing twice."""
    monkeypatch.setattr(Desk, "run", lambda self, asked: Told("<p>done</p>", "", {}))
    foreign = {"Origin": "http://evil.example"}
    answers = {
        200: [client.get(path) for path in ("/", "/ui.css", "/ui.js", "/report.css", "/report.js", "/facts")]
        + [post(client), client.head("/")],
        400: [post(client, image="")],
        403: [post(client, headers=foreign)],
        404: [client.get("/nowhere")],
        405: [client.get("/run")],
        413: [post(client, headers={"Content-Length": "99999999999"})],
        415: [post(client, headers={"Content-Type": "text/plain"})],
        421: [client.get("/", headers={"Host": "evil"})],
    }
    for status, responses in answers.items():
        for response in responses:
            assert response.status_code == status, response.text
            for name, value in HEADERS.items():
                (given,) = response.headers.get_list(name)
                if name == "content-security-policy":
                    parts = [part.strip().split(" ", 1) for part in given.split(";")]
                    assert len(parts) == len(value)
                    given = dict(parts)
                assert given == value, (status, name)


@pytest.mark.parametrize(
    ("address", "port", "hosts"),
    [
        ("127.0.0.1", 8000, {"127.0.0.1:8000", "localhost:8000"}),
        ("localhost", 8000, {"127.0.0.1:8000", "localhost:8000"}),
        ("::1", 8000, {"[::1]:8000", "127.0.0.1:8000", "localhost:8000"}),
        ("192.168.1.5", 8000, {"192.168.1.5:8000"}),
        ("fe80::2", 8000, {"[fe80::2]:8000"}),
        ("box.local", 8000, {"box.local:8000"}),
        ("127.0.0.1", 80, {"127.0.0.1:80", "localhost:80", "127.0.0.1", "localhost"}),
        ("192.168.1.5", 80, {"192.168.1.5:80", "192.168.1.5"}),  # browsers leave this port out
        ("::1", 80, {"[::1]:80", "127.0.0.1:80", "localhost:80", "[::1]", "127.0.0.1", "localhost"}),
    ],
)
def test_the_hosts_of_an_address(address, port, hosts):
    assert hosts_of(address, port) == hosts


@pytest.mark.parametrize("address", ["0.0.0.0", "::", "", "*"])
def test_an_address_of_every_name_is_refused(address):
    with pytest.raises(ValueError, match="one address"):
        hosts_of(address, 80)


def asgi(scope_type="http", method="GET", headers=(), messages=None):
    """What the guard sends, and what the application behind it was given: its requests, and the body of each."""
    import anyio

    from saint.lab.ui.guard import Guard

    seen, sent = [], []

    async def behind(scope, receive, send):
        if scope["type"] != "http":
            seen.append(scope["type"])
            return
        message = await receive()
        seen.append(message["body"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    queue = list(messages or [{"type": "http.request", "body": b"", "more_body": False}])

    async def receive():
        return queue.pop(0)

    async def send(message):
        sent.append(message)

    scope = {"type": scope_type, "method": method, "headers": [(n.encode(), v.encode()) for n, v in headers]}
    anyio.run(Guard(behind, {HOST, "localhost:8765"}), scope, receive, send)
    return [message["status"] for message in sent if "status" in message], seen


OWN = ("origin", f"http://{HOST}")


@pytest.mark.parametrize(
    ("method", "headers", "status"),
    [
        ("GET", [("host", HOST)], 200),
        ("HEAD", [("host", HOST)], 200),
        ("GET", [("Host", "LocalHost:8765")], 200),
        ("GET", [("host", HOST), ("origin", "http://evil.example")], 200),  # reads are kept apart by the browser
        ("GET", [], 421),
        ("GET", [("host", HOST), ("host", HOST)], 421),
        ("GET", [("host", HOST), ("Host", "evil.example")], 421),
        ("GET", [("host", f"{HOST}.evil.example")], 421),
        ("GET", [("host", f"evil.example:{HOST}")], 421),
        ("GET", [("host", f" {HOST}")], 421),
        ("POST", [("host", HOST)], 403),
        ("POST", [("host", HOST), OWN], 200),
        ("POST", [("host", HOST), ("origin", "HTTP://LOCALHOST:8765")], 200),
        ("POST", [("host", HOST), OWN, OWN], 403),
        ("POST", [("host", HOST), OWN, ("Origin", "http://evil.example")], 403),
        ("POST", [("host", HOST), ("origin", "null")], 403),
        ("POST", [("host", HOST), ("origin", HOST)], 403),
        ("POST", [("host", HOST), ("origin", f"https://{HOST}")], 403),
        ("POST", [("host", HOST), ("origin", f"http://{HOST}.evil.example")], 403),
        ("POST", [("host", "evil.example"), OWN], 421),
        *[(method, [("host", HOST)], 403) for method in ("PUT", "DELETE", "PATCH", "OPTIONS", "TRACE")],
        ("PUT", [("host", HOST), OWN], 200),
    ],
)
def test_who_gets_behind_the_guard(method, headers, status):
    statuses, seen = asgi(method=method, headers=headers)
    assert statuses == [status]
    assert len(seen) == (status == 200)


def test_only_requests_get_behind_the_guard():
    assert asgi("websocket", headers=[("host", HOST)]) == ([], [])
    assert asgi("lifespan") == ([], ["lifespan"])


def test_a_body_comes_whole_and_none_over_the_limit():
    from saint.lab.ui import guard

    own = [("host", HOST), OWN]

    def sent(*sizes, length=None):
        pieces = [
            {"type": "http.request", "body": b"x" * n, "more_body": i + 1 < len(sizes)} for i, n in enumerate(sizes)
        ]
        statuses, seen = asgi(
            method="POST", headers=own + ([("content-length", length)] if length else []), messages=pieces
        )
        return statuses, [len(body) for body in seen]

    most = LARGEST * 4 // 3 + 60_000  # base64 of the largest image, and settings
    assert most == guard._BODY
    assert sent(3, 4, 5) == ([200], [12])
    assert sent(most) == ([200], [most])
    assert sent(most - 5, 5) == ([200], [most])
    assert sent(most + 1) == ([413], [])
    assert sent(most, 1, 0) == ([413], [])
    assert sent(most + 5, 0, 3) == ([413], [])  # what comes behind it is not taken for a body
    assert sent(5, length=str(4 * most + 1)) == ([413], [])
    assert sent(5, length=str(4 * most)) == ([200], [5])
    assert sent(5, length="lies") == ([200], [5])


def test_text_called_png_is_refused(client):
    svg = b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>"
    for data in (b"just text", svg, b"%!PS-Adobe-3.0 EPSF\n", b"BM" + bytes(60)):
        said = "PNG, JPEG, WEBP or GIF", "whatever the file is called"
        refused(post(client, image=base64.b64encode(data).decode(), name="photo.png"), 400, *said)
    tiff = encoded(kind="TIFF")
    refused(post(client, image=tiff, name="photo.png"), 400, "PNG, JPEG, WEBP or GIF")


def test_a_huge_picture_is_refused_by_its_header(client):
    tracemalloc.start()
    refused(
        post(client, image=png(50_000, 50_000, zlib.compress(bytes(1000)))), 400, "2500000000 pixels", "scale it down"
    )
    refused(post(client, image=png(10_000, 4_001, zlib.compress(bytes(1000)))), 400, "10000 x 4001", "40 million")
    assert tracemalloc.get_traced_memory()[1] < 50_000_000
    tracemalloc.stop()


def test_what_decompresses_to_much_more_than_it_is_stays_small(client):
    squeezer = zlib.compressobj(9)
    bomb = b"".join(squeezer.compress(bytes(1_000_000)) for _ in range(300)) + squeezer.flush()  # 300 MB of zeros
    tracemalloc.start()
    text = png(8, 8, zlib.compress(bytes(8 * 25)), (b"zTXt", b"note\0\0" + bomb))
    refused(post(client, image=text), 400, "PNG")
    pixels = post(client, image=png(8, 8, bomb), method="random", tokens="0.5", layers="1")
    assert pixels.status_code in (200, 400)  # the decoder stops behind the last line
    assert tracemalloc.get_traced_memory()[1] < 60_000_000
    tracemalloc.stop()


def test_damaged_and_empty_pictures_are_refused(client):
    whole = base64.b64decode(encoded(kind="JPEG"))
    refused(post(client, image=base64.b64encode(whole[:300]).decode()), 400, "damaged")
    refused(post(client, image=""), 400, "choose a picture")
    refused(post(client, image="no base64!"), 400, "base64")


def test_more_than_the_limit_is_refused(client):
    noise = base64.b64encode(bytes(LARGEST + 1)).decode()
    refused(post(client, image=noise), 400, "at most 10 MB")
    refused(post(client, image=base64.b64encode(bytes(LARGEST + 100_000)).decode()), 413, "at most 10 MB")

    def chunks():  # no Content-Length
        for _ in range(16):
            yield b"x" * 1_000_000

    given = {"Origin": f"http://{HOST}", "Content-Type": "application/json"}
    refused(client.post("/run", content=chunks(), headers=given), 413, "at most 10 MB")
    refused(client.post("/run", content=b"{}", headers={**given, "Content-Length": "99999999999"}), 413)


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "a\\b.png", "a\0.png", ".bashrc"])
def test_paths_as_names_are_refused(client, name):
    refused(post(client, name=name), 400, "plain file name")


def test_a_plan_is_never_read_from_a_file(client, tmp_path):
    saint.Plan(vision=saint.Saint()).save(tmp_path / "mine.json")
    refused(
        post(client, plan=str(tmp_path / "mine.json")),
        400,
        "files of this machine are not read",
        "choose the file in the page",
    )
    refused(post(client, plan="/etc/passwd"), 400, "unknown recipe")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model": "hf:somebody/else"}, ["one of timm:test_vit", "--model"]),
        ({"method": "nonsense"}, ["nonsense"]),
        ({"method": "saint", "threshold": "x"}, ["threshold must be a number", "'x'"]),
        ({"method": "saint", "threshold": "7"}, ["(-1, 1]"]),
        ({"method": "grid", "threshold": "0.5"}, ["no threshold"]),
        ({"method": "saint", "layers": "0-99"}, ["99"]),
        ({"method": "saint", "layers": "9" * 1900}, ["layers"]),
        ({"method": "saint", "stage": "attic"}, ["vision, connector, language"]),
        ({"method": "divprune", "stage": "connector", "tokens": "0.5"}, ["connector"]),
        ({"plan": "{oops"}, ["JSON"]),
        ({"plan": "x" * 30_001}, ["30000"]),
        ({"question": ["a"]}, ["must be text"]),
        ({"evil": "x"}, ["evil"]),
    ],
)
def test_what_makes_no_sense_is_told(client, fields, words):
    refused(post(client, **fields), 400, *words)


def test_long_ranges_of_layers_are_refused_at_once(client):
    start = time.perf_counter()
    refused(post(client, method="saint", layers="0-99999999999"), 400, "layers")
    assert time.perf_counter() - start < 5


def test_bodies_that_are_no_object(client):
    given = {"Origin": f"http://{HOST}", "Content-Type": "application/json"}
    for body in (b"", b"[1]", b"{", b"\xff", b"[" * 100_000, b'{"image": 1, "model": "x"}'):
        assert client.post("/run", content=body, headers=given).status_code == 400


def test_an_unforeseen_error_is_told_without_its_trace(client, monkeypatch, caplog):
    def fail(self, asked):
        raise RuntimeError("out of luck\nat line 3")

    monkeypatch.setattr(Desk, "run", fail)
    refused(post(client), 500, "RuntimeError: out of luck at line 3")
    assert "Traceback" in caplog.text


def test_text_of_a_question_is_text():
    from saint.lab.bench.timing import Line, Spread
    from saint.lab.kinds.subject import Answered
    from saint.lab.report.html import Renderer
    from saint.lab.ui.pages import Run, Shown, page

    spread = Spread(1.0, 0.9, 1.1, 3)
    conditions = {"device": "cpu", "threads": 1, "dtype": "x", "load_average": 99.0}
    bench = SimpleNamespace(
        gain=spread, flops_bound=1.0, lines=[Line("unpruned", spread, 1.0, 1)], heads=("a", "b", "c"), caption="t",
        conditions=conditions, spreads={"unpruned": spread},
    )  # fmt: skip
    plan = saint.Plan(connector=saint.SaintFullGraph(keep=0.5))
    facts = {"name": "p", "visual_tokens": 4, "tiles": [], "layers": []}
    said = [Answered(text, None) for text in ("<em>", "<i>")]
    run = Run("<u>", plan, facts, said[1], bench)
    made = Renderer("ui", 100).alone(page(Shown("m", "m", "<script>1</script>", None, said[0], [run, run])))
    assert "<script" not in made
    assert "<em>" not in made
    assert "&lt;em&gt;" in made
    assert "<u>" not in made
    assert "the answer changes" in made
    assert "load average 99.0" in made  # times of a busy machine


# -- the command ------------------------------------------------------------------------------------------------------


def test_wildcards_busy_ports_and_missing_extras_are_told(capsys, monkeypatch):
    import socket

    def fails(*args: str) -> str:
        with pytest.raises(SystemExit) as ended:
            main(["ui", *args])
        assert ended.value.code == 2
        return " ".join(capsys.readouterr().err.split())

    assert "one address" in fails("--host", "0.0.0.0")
    assert "has no model 'nope'" in fails("--model", "timm:nope", "--port", "0")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert "give another --port" in fails("--port", str(taken.getsockname()[1]))

    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(extras, "import_module", missing)
    assert 'pip install ".[ui]"' in fails()


def test_the_demo_models_are_offered_and_those_of_the_command_line():
    made = offered(["timm:test_vit", "demo:clip-b16"], pretrained=False)
    assert list(made) == [
        "timm:test_vit",
        "demo:clip-b16",
        "demo:dinov2-s",
        "demo:small-llava",
    ]  # what was asked for first
    assert [offer.asked for offer in made.values()] == [False, False, False, True]
    assert [offer.pretrained for offer in made.values()] == [False, True, True, True]


@pytest.mark.parametrize("spec", ["timm:nope", "open_clip:nope/none", "demo:nope", "nope:x", "nope"])
def test_a_model_that_there_is_none_of_is_refused_at_the_start(spec):
    with pytest.raises(ValueError, match="nope"):
        offered([spec])


# -- vision-language models -------------------------------------------------------------------------------------------


def test_a_question_gets_both_answers(vlm):
    client, spec = vlm
    response = post(client, model=spec, question="what <b>", method="saint_full_graph", stage="connector", tokens="9")
    assert response.status_code == 200, response.text
    html = response.json()["html"]
    assert "9 of 36 tokens are kept to the end (25%)" in html
    assert html.count("<blockquote>") == 2
    assert "connector: 9 of 36 kept (25%)" in html
    assert "First token of one question" in html
    assert "saint chat" in html
    assert "what &lt;b&gt;" in html
    refused(post(client, model=spec), 400, "answers questions")
    own = post(client, model=spec, question="what")
    assert own.status_code == 200
    assert "vision, after layer" in own.json()["html"]


@pytest.fixture(scope="module")
def vlm(tmp_path_factory):
    """A client of a desk with a tiny LLaVA on disk."""
    from support.checkpoints import TEMPLATE, save

    spec = save(tmp_path_factory.mktemp("llava"), TEMPLATE)
    made = make_app(Desk(offered([spec]), repeats=1), hosts_of("127.0.0.1", 8765))
    return TestClient(made, base_url=f"http://{HOST}", raise_server_exceptions=False), spec
