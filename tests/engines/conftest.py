import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # modules that the other interpreter runs, too
torch.set_num_threads(1)  # tiny matrices: more threads only wait for each other

import checkpoints  # noqa: E402
from vllm_reference import HERE, PYTHON, SIDE, SMALL, SPECIAL, Reference, environment  # noqa: E402


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("llava")
    checkpoints.llava(path)
    return path


@pytest.fixture(scope="session")
def reference(folder):
    return Reference(folder)


@pytest.fixture(scope="session")
def run(folder, tmp_path_factory):
    def start(rounds, plan=None, loads=0, model=folder, side=SIDE, fails=False, never=SPECIAL, plugin=True, **settings):
        where = tmp_path_factory.mktemp("run")
        jobs = {"model": str(model), "settings": {**SMALL, **settings}, "rounds": rounds, "side": side, "loads": loads}
        jobs["never"] = never
        (where / "jobs.json").write_text(json.dumps(jobs))
        env = environment() | ({} if plan is None else {"SAINT_PLAN": plan}) | ({} if plugin else {"VLLM_PLUGINS": ""})
        done = subprocess.run(
            [PYTHON, str(HERE / "drive_vllm.py"), "jobs.json", "results.json"],
            cwd=where, env=env, capture_output=True, text=True, check=False, timeout=900,
        )  # fmt: skip
        if fails:
            assert done.returncode != 0
            return done.stderr
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return json.loads((where / "results.json").read_text())

    return start


@pytest.fixture(scope="session", params=["qwen2.5-vl", "qwen3-vl"])
def grid(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("grid")
    checkpoints.FAMILIES[request.param](path)
    return path
