"""The two claims of the paper at real model shapes, with random weights and fixed budgets (cost does not depend on weights then).

    python benchmarks/headline.py --scale cpu     # scaled down, same proportions, about two minutes on two cores
    python benchmarks/headline.py --full          # real shapes, bfloat16, needs a GPU

1. ViT-H/14 at 224 pixels: images per second, unpruned and pruned at about half the FLOPs.
2. LLaVA-1.5-13B shape at 25 % equivalent visual tokens against the 7B shape unpruned: time to first token, and end to end
   for 1, 16 and 128 new tokens.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from rich.console import Console

import saint
from saint.flops import left_out
from saint.lab.bench import bench_forward, bench_generation
from saint.lab.records import environment, write_json
from saint.plans import Plan, Stage

IMAGE = 50
TEXT = 40  # prompt tokens beside the 576 of the image
LENGTHS = (1, 16, 128)
console = Console()

# width, MLP width, layers, heads
SHAPES = {
    "full": {
        "vit-h": (1280, 5120, 32, 16),
        "clip-l": (1024, 4096, 24, 16),
        "7b": (4096, 11008, 32, 32),
        "13b": (5120, 13824, 40, 40),
    },
    # 1/8 of the width of the language models, 1/4 of that of the encoders; depths as they are
    "cpu": {
        "vit-h": (320, 1280, 32, 4),
        "clip-l": (256, 1024, 24, 4),
        "7b": (512, 1376, 32, 4),
        "13b": (640, 1728, 40, 5),
    },
}


def tower(shape: tuple[int, int, int, int], image: int) -> hf.CLIPVisionConfig:
    width, mlp, layers, heads = shape
    return hf.CLIPVisionConfig(
        hidden_size=width, intermediate_size=mlp, num_hidden_layers=layers, num_attention_heads=heads, image_size=image,
        patch_size=14, projection_dim=width,
    )  # fmt: skip


def llava(shapes: dict[str, Any], size: str, device: str, dtype: torch.dtype) -> Any:
    width, mlp, layers, heads = shapes[size]
    config = hf.LlavaConfig(
        vision_config=tower(shapes["clip-l"], 336),
        text_config=hf.LlamaConfig(
            hidden_size=width, intermediate_size=mlp, num_hidden_layers=layers, num_attention_heads=heads,
            num_key_value_heads=heads, vocab_size=32064, pad_token_id=0, eos_token_id=None,
        ),
        image_token_id=IMAGE, image_seq_length=576,
    )  # fmt: skip
    model = built(lambda: hf.LlavaForConditionalGeneration(config), device, dtype)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def built(make: Any, device: str, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return make().eval()
    finally:
        torch.set_default_dtype(before)


def encoder(shapes: dict[str, Any], device: str, dtype: torch.dtype, batches: list[int], repeats: int) -> list[Any]:
    config = tower(shapes["vit-h"], 224)
    model = built(lambda: hf.CLIPVisionModelWithProjection(config), device, dtype)
    plan = Plan(vision=Stage(saint.Saint(threshold=0.75, keep=0.28), layers="first_half"))
    rows = []
    for batch in batches:
        inputs = {"pixel_values": torch.randn(batch, 3, 224, 224, device=device, dtype=dtype)}
        result = bench_forward(model, plan, inputs, repeats=repeats, warmup=3, extras=False)
        rates = {"unpruned": 1e3 * batch / result.base.median, "pruned": 1e3 * batch / result.pruned.median}
        rows.append({"batch": batch, "images_per_second": rates, **result.to_dict()})
        console.print(
            f"ViT-H/14 shape, batch {batch}: {rates['unpruned']:.1f} -> {rates['pruned']:.1f} images/s, "
            f"{1 / result.bound:.2f} of the FLOPs{left_out(result.uncounted)}, speed-up {result.speedup.median:.3f} of "
            f"{result.bound:.3f}, efficiency {result.efficiency:.3f}"
        )
    return rows


def language(shapes: dict[str, Any], device: str, dtype: torch.dtype, lengths: tuple[int, ...], repeats: int) -> Any:
    small, large = (llava(shapes, size, device, dtype) for size in ("7b", "13b"))
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(100, 32000, (1, TEXT + 576), generator=g)
    ids[:, 5 : 5 + 576] = IMAGE
    inputs = {
        "input_ids": ids.to(device),
        "attention_mask": torch.ones_like(ids).to(device),
        "pixel_values": torch.randn(1, 3, 336, 336, generator=g).to(device, dtype),
    }
    quarter = {
        "vision": Plan(vision=Stage(saint.SaintFullGraph(keep=144, step=16), layers=[19])),
        "hybrid": Plan(
            vision=Stage(saint.SaintFullGraph(keep=216, step=16), layers=[19]),
            language=Stage(saint.Saint(threshold=0.83, keep=110), layers=range(7, 17)),
        ),
    }
    rows = []
    for length in lengths:
        pruned = bench_generation(large, quarter, inputs, length, repeats, 2)
        plain = bench_generation(small, {"vision": quarter["vision"]}, inputs, length, repeats, 2)
        base = plain.times["base"]
        prompt = ids.shape[1]
        equivalent = {name: gain.kv * prompt - TEXT for name, gain in pruned.gains.items()}
        row = {
            "new_tokens": length,
            "equivalent_visual_tokens": equivalent,
            "13b": pruned.to_dict(),
            "7b": plain.to_dict(),
            "13b_pruned_over_7b_unpruned": {
                name: {
                    "first": pruned.times[name].first.median / base.first.median,
                    "total": pruned.times[name].total.median / base.total.median,
                    "prefill_flops": pruned.times[name].prefill.flops / base.prefill.flops,
                }
                for name in quarter
            },
        }
        rows.append(row)
        for name in quarter:
            gain, ratio = pruned.gains[name], row["13b_pruned_over_7b_unpruned"][name]
            decode = f", decode x{gain.decode.median:.3f}" if gain.decode is not None else ""
            console.print(
                f"{length} new, {name} ({equivalent[name] / 576:.1%} equivalent tokens): 13B TTFT "
                f"{pruned.times['base'].first.median:.1f} -> {pruned.times[name].first.median:.1f} ms, speed-up "
                f"{gain.first.median:.3f} of {gain.bound:.3f}{left_out(gain.uncounted)}, "
                f"efficiency {gain.efficiency:.3f}{decode}; 7B unpruned "
                f"{base.first.median:.1f} ms; 13B pruned / 7B: TTFT {ratio['first']:.3f}, end to end {ratio['total']:.3f}"
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--scale", choices=["cpu"], default="cpu")
    parser.add_argument("--full", action="store_true", help="real shapes, bfloat16, on CUDA")
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.full and not torch.cuda.is_available():
        parser.error("--full needs a CUDA device: 13 billion bfloat16 weights and 7 billion more")
    if options.threads:
        torch.set_num_threads(options.threads)
    name, device, dtype = ("full", "cuda", torch.bfloat16) if options.full else ("cpu", "cpu", torch.float32)
    out = options.out or Path(__file__).parent / "results" / f"headline-{name}.json"
    shapes = SHAPES[name]
    repeats = options.repeats or (20 if options.full else 3)
    vit = encoder(shapes, device, dtype, [1, 32, 256] if options.full else [4], max(repeats, 7))
    generation = language(shapes, device, dtype, LENGTHS, repeats) if options.full else None
    if generation is None:
        generation = language(shapes, device, dtype, (1, 16), repeats)
    record = {
        "kind": "headline",
        "command": "python benchmarks/headline.py " + ("--full" if options.full else "--scale cpu"),
        "weights": "random, torch seed 0",
        "shapes (width, MLP width, layers, heads)": shapes,
        "vit-h": vit,
        "llava": generation,
        "environment": environment(device),
    }
    write_json(out, record)
    console.print(f"wrote {out}")


if __name__ == "__main__":
    main()
