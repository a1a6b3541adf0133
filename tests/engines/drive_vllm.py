"""Runs prompts through vLLM in an interpreter that has it: ``python drive_vllm.py JOBS RESULTS``, both JSON.

Jobs: ``model`` (a folder), ``settings`` (of the engine), ``rounds``: lists of requests, each list at once. A request has
``text``, ``images``, ``videos`` (seeds), ``saint`` (or null) and ``new`` (tokens); ``never``: tokens that are not made. Results:
``rounds`` of the same shape with ``prompt`` (tokens), ``new``, ``cached`` (prompt tokens from the prefix cache) and ``error``;
per round what was ``kept``, picture by picture, and what the ``tower`` left of those it saw last; ``most``, the tokens of an
item that memory is planned for.
"""

import json
import os
import sys
from pathlib import Path


def picture(seed, side):
    import numpy as np
    from PIL import Image

    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*side, 3), dtype=np.uint8))


def video(seed, side, frames=4):
    import numpy as np

    pixels = np.random.default_rng(seed).integers(0, 255, (frames, *side, 3), dtype=np.uint8)
    about = {"fps": 2.0, "duration": frames / 2, "total_num_frames": frames, "frames_indices": list(range(frames))}
    return pixels, {**about, "video_backend": "opencv", "do_sample_frames": False}


def request(job, side):
    prompt = {"prompt": job["text"]}
    data = {}
    if job["images"]:
        data["image"] = [picture(seed, side) for seed in job["images"]]
    if job["videos"]:
        data["video"] = [video(seed, side) for seed in job["videos"]]
    if data:
        prompt["multi_modal_data"] = data
    if job["saint"] is not None:
        prompt["mm_processor_kwargs"] = {"saint": job["saint"]}
    return prompt


ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process, so that its choices can be noted
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",  # tiny matrices
}


def main(jobs):
    from vllm import LLM, SamplingParams
    from vllm.multimodal import MULTIMODAL_REGISTRY
    from vllm.multimodal.encoder_budget import MultiModalBudget

    import saint.backends.vllm as plugin
    from saint.backends.vllm import selection, tower

    sessions, prune = [], tower.prune

    def remember(*args):
        sessions.append(prune(*args))
        return sessions[-1]

    tower.prune = remember
    noted = []
    choose = selection.choose

    def note(features, choice):
        kept = choose(features, choice)
        noted.extend(kept.tolist())
        return kept

    selection.choose = note
    engine = LLM(jobs["model"], dtype="float32", seed=0, **{"enforce_eager": True, **jobs["settings"]})
    for _ in range(jobs.get("loads", 0)):
        plugin.register()
    planned = MultiModalBudget(engine.llm_engine.vllm_config, MULTIMODAL_REGISTRY)
    results = {"rounds": [], "kept": [], "tower": [], "most": dict(planned.mm_max_toks_per_item)}
    for requests in jobs["rounds"]:
        noted.clear()
        prompts = [request(job, jobs["side"]) for job in requests]
        ways = [
            SamplingParams(
                temperature=0, max_tokens=job["new"], ignore_eos=True, logit_bias=dict.fromkeys(jobs["never"], -100)
            )
            for job in requests
        ]
        try:
            answers = engine.generate(prompts, ways, use_tqdm=False)
        except ValueError as error:
            results["rounds"].append([{"error": str(error)}])
        else:
            results["rounds"].append(
                [
                    {
                        "prompt": list(answer.prompt_token_ids),
                        "new": list(answer.outputs[0].token_ids),
                        "cached": answer.num_cached_tokens,
                        "error": None,
                    }
                    for answer in answers
                ]
            )
        results["kept"].append(list(noted))
        traces = [session.trace[-1] for session in sessions]
        results["tower"].append([kept.tolist() for trace in traces for kept in trace.kept])
    return results


if __name__ == "__main__":
    os.environ.update(ENVIRONMENT)
    Path(sys.argv[2]).write_text(json.dumps(main(json.loads(Path(sys.argv[1]).read_text()))))
