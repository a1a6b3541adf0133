"""``saint serve``: vLLM's own server over HTTP, with the plan of the engine and budgets of requests."""

import base64
import io
import json
import socket
import subprocess
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import checkpoints
import pytest
from drive_vllm import ENVIRONMENT, picture
from vllm_reference import PYTHON, SIDE, SPECIAL, Reference, environment, job, needs_vllm

import saint

pytestmark = needs_vllm
PLAN = saint.Plan(connector=saint.methods.DivPrune(keep=0.25))
OPTIONS = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "256", "--max-num-seqs", "16"]


def ask(port, path, body=None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=300) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def chat(port, request):
    before, _, behind = request["text"].rpartition("<image>")
    parts = [{"type": "text", "text": before.replace("<image>", "").strip()}] if request["images"] else []
    for seed in request["images"]:
        file = io.BytesIO()
        picture(seed, SIDE).save(file, "PNG")
        url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
        parts.append({"type": "image_url", "image_url": {"url": url}})
    parts.append({"type": "text", "text": behind})
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": parts}],
        "temperature": 0,
        "max_tokens": request["new"],
        "ignore_eos": True,
        "return_token_ids": True,
        "logit_bias": dict.fromkeys(map(str, SPECIAL), -100),
    }
    if request["saint"] is not None:
        body["mm_processor_kwargs"] = {"saint": request["saint"]}
    return ask(port, "/v1/chat/completions", body)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    where = tmp_path_factory.mktemp("served")
    checkpoints.llava(where / "model")
    PLAN.save(where / "plan.json")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    line = [PYTHON, "-m", "saint", "serve", "hf:model", "--plan", "plan.json", *OPTIONS]
    line += ["--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(port), "--trust-request-mm-kwargs"]
    own = {**ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_HOST_IP": "127.0.0.1"}
    log = (where / "log").open("w")
    server = subprocess.Popen(line, cwd=where, env={**environment(), **own}, stdout=log, stderr=log)
    try:
        for _ in range(300):
            assert server.poll() is None, (where / "log").read_text()[-3000:]
            try:
                if ask(port, "/health")[0] == 200:
                    break
            except OSError:
                time.sleep(1)
        else:
            raise AssertionError((where / "log").read_text()[-3000:])
        yield port, where / "model"
    finally:
        server.terminate()
        server.wait(60)


def test_clients_at_once_get_their_own_budgets(served):
    port, folder = served
    reference = Reference(folder)
    budgets = [None, {"keep": 0.5}, {"keep": 1.0}, {"method": "random", "keep": 5}]
    requests = [
        job(f"w5 {'<image> ' * len(seeds)}w{7 + number}", seeds, budgets[number % 4] if seeds else None)
        for number, seeds in enumerate([[0], [1], [2], [3], [0], [1], [], [0], [4, 5], [4, 5], []] * 3)
    ]
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda request: chat(port, request), requests))
    for request, (status, body) in zip(requests, answers, strict=True):
        assert status == 200, body
        asked = {**request, "saint": request["saint"] or {"keep": 0.25}}
        new = json.loads(body)["choices"][0]["token_ids"]
        places = sum(len(reference.kept(seed, asked["saint"])) for seed in request["images"])
        assert json.loads(body)["usage"]["prompt_tokens"] == 2 + places
        assert new == reference.greedy(asked, new), asked


def test_a_bad_budget_is_the_clients_error(served):
    port, _ = served
    status, body = chat(port, job("w5 <image> w7", [0], {"method": "fastv"}))
    assert 400 <= status < 500, (status, body)
    assert b"caches a picture" in body
    assert chat(port, job("w5 <image> w7", [0]))[0] == 200


@pytest.mark.parametrize(
    ("architecture", "plugins", "why"),
    [
        ("LlamaForCausalLM", None, "whose pictures are not pruned in vLLM"),
        ("LlavaForConditionalGeneration", "other", "VLLM_PLUGINS='other' keeps vLLM from loading saint"),
    ],
)
def test_what_would_not_prune_is_not_started(architecture, plugins, why, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": [architecture], "model_type": "llava"}))
    own = {} if plugins is None else {"VLLM_PLUGINS": plugins}
    done = subprocess.run(
        [PYTHON, "-m", "saint", "serve", str(tmp_path), "--plan", json.dumps(PLAN.to_dict())],
        env={**environment(), **own}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert why in " ".join(done.stderr.split())
