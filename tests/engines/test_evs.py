"""EVS keeps the tokens that vLLM's own EVS keeps."""

import json
import subprocess

import torch
from vllm_reference import PYTHON, environment, needs_vllm

from saint.methods import EVS
from saint.tokens import Candidates, Facts, TokenMap

pytestmark = needs_vllm
CASES = [(4, 4, 6, 0.5), (8, 8, 8, 0.75), (5, 4, 4, 0.9), (2, 8, 12, 0.25)]  # frames, rows, columns, what goes
ASK = """
import json, sys, torch
from vllm.multimodal.video_prune.evs import compute_retention_mask
out = []
for embeddings, (frames, rows, columns, share) in json.load(sys.stdin):
    mask = compute_retention_mask(torch.tensor(embeddings), (frames, rows, columns), 2, share)
    out.append(mask.nonzero().flatten().tolist())
print(json.dumps(out))
"""


def test_tokens_of_vllm():
    g = torch.Generator().manual_seed(0)
    videos = []
    for frames, rows, columns, _ in CASES:
        shown = torch.randn(frames, rows * columns // 4, 8, generator=g)
        shown[1:] = torch.where(torch.rand(shown[1:, :, :1].shape, generator=g) < 0.3, shown[:-1], shown[1:])
        videos.append(shown.flatten(0, 1))
    asked = json.dumps([(video.tolist(), case) for video, case in zip(videos, CASES, strict=True)])
    command = [PYTHON, "-c", ASK]
    done = subprocess.run(command, input=asked, capture_output=True, text=True, timeout=300, env=environment())
    assert not done.returncode, done.stderr[-3000:]
    wanted = json.loads(done.stdout.splitlines()[-1])
    for video, (frames, rows, columns, share), want in zip(videos, CASES, wanted, strict=True):
        cells = torch.arange(rows * columns // 4).repeat(frames).unsqueeze(0)
        tokens = TokenMap.full(1, len(video), video.device)
        got = EVS(keep=1 - share).select(Candidates(video[None], video[None], tokens, 0, 1, facts=Facts(cells=cells)))
        assert got.slots[0].tolist() == want
        assert len(want) == max(rows * columns // 4, int(frames * rows * columns // 4 * (1 - share)))
