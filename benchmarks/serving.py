"""Requests with pictures through vLLM, unpruned and pruned: throughput, time to first token, KV blocks.

    python benchmarks/serving.py --json benchmarks/results/serving-cpu.json

Runs in an environment with vLLM and saint (``make engines`` makes one: ``.engines/bin/python``). The model has random
weights and the proportions of LLaVA-1.5: a 336-pixel CLIP with 576 tokens that is a small part of a Llama. Both sides
run in one engine, in turns, as requests that differ in nothing but ``mm_processor_kwargs``; each picture is new, so no
cache answers. A client keeps a fixed number of requests in flight, then sends them at a fixed rate, whatever is in flight: at 0.8
of what the unpruned side served with most in flight. Ratios compare turns of the same round.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SIDE, PATCH, IMAGE, PAD, VOCAB = 336, 14, 4, 0, 1024
SHAPES = {  # tower: channels, layers; language model: channels, MLP, layers
    "tiny": ((64, 2), (128, 256, 2)),  # to try the script
    "120m": ((192, 12), (768, 2048, 16)),  # tower : language model = 1 : 21, as in LLaVA-1.5 7B
    "200m": ((256, 12), (1024, 2816, 16)),
}


def write_model(folder: Path, shape: str) -> dict[str, int]:
    """A random LLaVA as a folder; parameters by part."""
    import torch
    import transformers as hf
    from safetensors.torch import load_file, save_file
    from tokenizers import Tokenizer, models, pre_tokenizers

    (width, depth), (channels, inner, layers) = SHAPES[shape]
    torch.manual_seed(0)
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(
            hidden_size=width, intermediate_size=4 * width, num_hidden_layers=depth, num_attention_heads=width // 64,
            image_size=SIDE, patch_size=PATCH,
        ),
        text_config=hf.LlamaConfig(
            hidden_size=channels, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=channels // 64,
            num_key_value_heads=channels // 64, vocab_size=VOCAB, max_position_embeddings=4096, pad_token_id=PAD,
            eos_token_id=None,
        ),
        image_token_id=IMAGE,
    )  # fmt: skip
    model = hf.LlavaForConditionalGeneration(config)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    file = folder / "model.safetensors"
    prefix, wanted = "vision_tower.", "vision_tower.vision_model."  # what published checkpoints call it
    weights = load_file(file).items()
    renamed = {
        wanted + name[len(prefix) :] if name.startswith(prefix) and not name.startswith(wanted) else name: weight
        for name, weight in weights
    }
    save_file(renamed, file, {"format": "pt"})
    special = {"<pad>": PAD, "<unk>": 1, "<image>": IMAGE}
    words = {f"w{token}": token for token in range(VOCAB) if token not in special.values()}
    inner_tokenizer = Tokenizer(models.WordLevel({**words, **special}, unk_token="<unk>"))
    inner_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=inner_tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
    )
    hf.LlavaProcessor(
        hf.CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}),
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
    counts = {"tower": 0, "connector": 0, "language": 0}
    for name, parameter in model.named_parameters():
        counts["tower" if "vision_tower" in name else "connector" if "projector" in name else "language"] += (
            parameter.numel()
        )
    return counts


class Client:
    """Sends requests to an engine that it steps itself."""

    def __init__(self, engine: Any, words: int, new: int) -> None:
        from vllm import SamplingParams

        self.engine, self.words = engine, words
        self.sampling = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
        self.number = 0

    def run(self, count: int, flying: int, keep: float, rate: float = 0.0) -> dict[str, float]:
        """``count`` requests: requests per second, medians of TTFT and latency in seconds, most KV blocks in use (share of all).

        Args:
            count: requests.
            flying: so many at most are in flight.
            keep: fraction of the visual tokens.
            rate: requests that come in per second; a request that finds no place waits, and its time runs. 0: as soon as there is
                a place.
        """
        import numpy as np
        from PIL import Image

        came: dict[str, float] = {}  # of requests in flight, when they came in
        silent: set[str] = set()  # those without a token so far
        firsts: list[float] = []
        latencies: list[float] = []
        most, sent, tokens = 0.0, 0, 0
        pictures = []
        for i in range(count):
            draw = np.random.default_rng(self.number + i)
            pictures.append(Image.fromarray(draw.integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)))
        manager = self.engine.engine_core.engine_core.scheduler.kv_cache_manager
        begin = time.perf_counter()
        while sent < count or came:
            while sent < count and len(came) < flying:
                due = begin + sent / rate if rate else time.perf_counter()
                if due > time.perf_counter():
                    if came:
                        break
                    time.sleep(due - time.perf_counter())
                name = str(self.number + sent)
                prompt = {
                    "prompt": "w7 <image> " + " ".join(f"w{9 + i}" for i in range(self.words)),
                    "multi_modal_data": {"image": pictures[sent]},
                    "mm_processor_kwargs": {"saint": {"keep": keep}},
                }
                came[name] = due
                silent.add(name)
                self.engine.add_request(name, prompt, self.sampling)
                sent += 1
            for output in self.engine.step():
                if output.request_id in silent and output.outputs[0].token_ids:
                    firsts.append(time.perf_counter() - came[output.request_id])
                    silent.remove(output.request_id)
                    tokens = len(output.prompt_token_ids)
                if output.finished:
                    latencies.append(time.perf_counter() - came.pop(output.request_id))
            most = max(most, manager.usage)
        seconds = time.perf_counter() - begin
        self.number += count
        assert len(firsts) == count
        return {
            "requests_per_second": count / seconds,
            "ttft_median": statistics.median(firsts),
            "latency_median": statistics.median(latencies),
            "kv_used": most,
            "prompt_tokens": tokens,
        }


def measure(client: Client, count: int, flying: int, keep: float, rounds: int, rate: float = 0.0) -> dict[str, Any]:
    """Both sides, in turns, and their ratios round by round; arguments of :meth:`Client.run`."""
    sides: dict[str, list[dict[str, float]]] = {"unpruned": [], "pruned": []}
    for turn in range(rounds):
        order = ("unpruned", "pruned") if turn % 2 == 0 else ("pruned", "unpruned")
        for side in order:
            sides[side].append(client.run(count, flying, 1.0 if side == "unpruned" else keep, rate))
    pairs = list(zip(sides["unpruned"], sides["pruned"], strict=True))
    row: dict[str, Any] = {"in_flight": flying, "rate": rate, "requests": count, "rounds": rounds}
    for side, runs in sides.items():
        row[side] = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    ratios = {"throughput": "requests_per_second", "ttft": "ttft_median", "latency": "latency_median", "kv": "kv_used"}
    for name, measured in ratios.items():
        row[f"{name}_ratio"] = _spread([p[measured] / u[measured] for u, p in pairs])
    print(f"{rate:.2f} requests/s come in:" if rate else f"{flying:3} in flight:", end=" ")
    for name, measured in ratios.items():
        before, after = row["unpruned"][measured], row["pruned"][measured]
        print(f"{name} {before:.3g} -> {after:.3g} (x{row[f'{name}_ratio']['median']:.2f})", end="; ")
    print(flush=True)
    return row


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--shape", choices=SHAPES, default="120m")
    parser.add_argument("--keep", type=float, default=0.25, help="fraction of the visual tokens")
    parser.add_argument("--in-flight", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--turns", type=int, default=2, help="requests per place in flight")
    parser.add_argument("--words", type=int, default=40, help="text tokens of a prompt")
    parser.add_argument("--new", type=int, default=16, help="tokens of an answer")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=2, help="1 on a busy machine, where threads wait for each other")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the client steps the engine and reads its KV manager
        "VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "2"),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(given.threads),
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
    }
    os.environ.pop("SAINT_PLAN", None)
    with tempfile.TemporaryDirectory() as folder:
        parameters = write_model(Path(folder), given.shape)
        print(f"{given.shape}: {parameters}", flush=True)
        from vllm import LLM

        engine = LLM(
            folder, dtype=given.dtype, enforce_eager=True, seed=0, max_model_len=1024,
            max_num_seqs=max(given.in_flight), max_num_batched_tokens=2048, limit_mm_per_prompt={"image": 1},
            mm_processor_cache_gb=0,
        ).llm_engine  # fmt: skip
        client = Client(engine, given.words, given.new)
        for keep in (1.0, given.keep):
            client.run(2, 2, keep)  # warm-up
        load = os.getloadavg()[0]
        rows = [measure(client, max(4, given.turns * n), n, given.keep, given.rounds) for n in given.in_flight]
        busiest = rows[-1]["unpruned"]["requests_per_second"]
        rows.append(
            measure(client, rows[-1]["requests"], rows[-1]["in_flight"], given.keep, given.rounds, 0.8 * busiest)
        )
    if given.json is not None:
        from saint.backends.vllm import names
        from saint.lab.records import environment, write_json

        record = {
            "kind": "benchmarks/serving",
            "command": "python benchmarks/serving.py",
            "environment": {**environment("cpu"), "vllm": names.version(), "load_before": load},
            "settings": {name: value for name, value in vars(given).items() if name != "json"},
            "parameters": parameters,
            "visual_tokens": (SIDE // PATCH) ** 2,
            "rows": rows,
        }
        write_json(given.json, record)


if __name__ == "__main__":
    main()
