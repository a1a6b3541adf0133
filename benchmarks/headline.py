"""The claims of the paper at the shapes of its models, with random weights and fixed budgets, whose cost depends on no weights.

    python benchmarks/headline.py vit-h      # ViT-H/14 at 224 pixels, its real shape: images per second at half of the FLOPs
    python benchmarks/headline.py 7b         # answers of the LLaVA-1.5-7B shape, an eighth as wide, of all its layers
    python benchmarks/headline.py 13b        # the same of the 13B shape
    python benchmarks/headline.py both       # the 13B shape pruned beside the 7B shape unpruned
    python benchmarks/headline.py 13b --scale full     # real widths, bfloat16, needs a GPU

Answers are generated in four ways: with a dynamic or a static cache, eagerly or with a compiled step. All variants of a call
take turns in one process. A call adds `--rounds` rounds to its part of the record, so a part can be measured in several calls,
also with some of the `--settings` and `--ways` each. What is derived is derived anew from all rounds; two variants are compared
over the rounds that have both. The record is written after every round, so a call that is ended early loses the round it is
in. `--anew` forgets what a part holds. `make tables` writes the tables of docs/results.md.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import timm
import torch
import transformers as hf
from rich.console import Console
from rounds import UNPRUNED, section
from torch._dynamo.utils import counters

import saint
from saint.lab.bench.cost import cost
from saint.lab.bench.timing import interleave, load_average, synchronize
from saint.lab.records import environment, write_json
from saint.lab.variants import BASE, Variant, variants
from saint.plans import Plan, Stage

IMAGE = 50  # token id
VISUAL, TEXT = 576, 40  # tokens of the prompt
HALF = 0.5  # share of the FLOPs
KEPT = 0.25  # share of the visual tokens
console = Console(soft_wrap=True)

# width, MLP width, layers, heads, heads of keys: the real ones; --scale cpu has an eighth of the widths and of the heads
LANGUAGE = {"7b": (4096, 11008, 32, 32, 32), "13b": (5120, 13824, 40, 40, 40)}
NARROW = 8
# of the stand-in for the tower: its output has the real number of tokens, and its time is next to none of any variant
TOWER = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}

SETTINGS = {
    "connector": Plan(connector=saint.SaintFullGraph(keep=KEPT, step=16)),
    "language": Plan(language=Stage(saint.SaintFullGraph(keep=KEPT, step=16), layers=[1])),
    "hybrid": Plan(
        vision=Stage(saint.SaintFullGraph(keep=0.5, step=16), layers=[0]),
        language=Stage(saint.SaintFullGraph(keep=0.5, step=16), layers=[1]),
    ),
}
# a cache, and whether the step is compiled
WAYS = ["dynamic", "static", "dynamic compiled", "static compiled"]
COMPILE = hf.CompileConfig(mode="default")
WARM = 12  # tokens
TRIES = 5  # until a run compiles nothing
BATCHES = (1, 4)
HEAD = {"kind": "headline", "command": "python benchmarks/headline.py PART", "weights": "random, torch seed 0"}


class Run(Protocol):
    """A variant: what a part times."""

    def warm(self) -> None:
        """Make it ready to be timed."""

    def take(self) -> list[float]:
        """Run once and return the ms to each mark."""

    def flops(self) -> dict[str, float]:
        """Count FLOPs: "first" (up to the first token, or of the whole run) and "token" (of each behind it)."""

    def facts(self) -> dict[str, Any]:
        """Return what else the record says of it."""


# -- encoder ----------------------------------------------------------------------------------------------------------


@contextmanager
def encoder(options: argparse.Namespace) -> Iterator[tuple[dict[str, Run], dict[str, Any]]]:
    """Yield the variants of a ViT-H/14, by batch and plan, and what their times depend on."""
    device, dtype = placed(options)
    shape = {"embed_dim": options.width or 1280, "depth": options.layers or 32, "num_heads": 16, "num_classes": 1000}
    model = built(lambda: timm.create_model("vit_huge_patch14_224", **shape), device, dtype)
    picture = torch.randn(max(BATCHES), 3, 224, 224, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    # one plan of matching, from shapes; and votes in the first half of the layers as published, of which FLOPs are counted
    plans = {"plan_for": saint.plan_for(model, keep=HALF), "votes": halved(model, picture[:1])}
    names = {name: plans[name] for name in chosen(plans, options.settings)}
    with variants(model, names) as made:
        found = {
            f"batch {batch}/{UNPRUNED if name == BASE else name}": Forward(variant.model, picture[:batch])
            for batch in BATCHES
            for name, variant in made.items()
        }
        depends = {"shape": shape, "plans": {name: plan.to_dict() for name, plan in plans.items()}, "marks": [1]}
        yield found, {**depends, "input": list(picture.shape[1:]), "mode": "torch.inference_mode"}


def halved(model: Any, picture: torch.Tensor) -> Plan:
    """Return the plan of votes, of a fixed budget, that leaves half of the FLOPs as they are counted."""

    def flops(budget: float) -> float:
        plan = Plan(vision=Stage(saint.Saint(threshold=0.75, keep=budget), layers="first_half"))
        with saint.pruned(model, plan):
            return cost(partial(model, picture), picture.device).flops

    whole = cost(partial(model, picture), picture.device).flops
    low, high = max(0.05, 0.5 ** (len(model.blocks) // 2)), 1.0  # a drop point lets half go at most
    while high - low > 0.004:  # of 256 tokens, one
        middle = (low + high) / 2
        low, high = (middle, high) if flops(middle) < HALF * whole else (low, middle)
    return Plan(vision=Stage(saint.Saint(threshold=0.75, keep=round(low, 4)), layers="first_half"))


class Forward:
    """A forward of an encoder."""

    def __init__(self, model: Any, picture: torch.Tensor) -> None:
        self.model, self.picture = model, picture

    def warm(self) -> None:
        self.take()

    def take(self) -> list[float]:
        synchronize(self.picture.device)
        start = time.perf_counter()
        with torch.inference_mode():
            self.model(self.picture)
        synchronize(self.picture.device)
        return [round(1e3 * (time.perf_counter() - start), 3)]

    def flops(self) -> dict[str, float]:
        return {"first": cost(partial(self.model, self.picture), self.picture.device).flops}

    def facts(self) -> dict[str, Any]:
        return {"batch": len(self.picture)}


# -- answers ----------------------------------------------------------------------------------------------------------


@contextmanager
def answers(options: argparse.Namespace) -> Iterator[tuple[dict[str, Run], dict[str, Any]]]:
    """Yield the variants of one or both language models, by model, setting and way, and what their times depend on."""
    device, dtype = placed(options)
    # a graph per variant; torch would run eagerly behind the eighth, without a word
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 1024
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    marks = sorted({1, *options.new_tokens})
    inputs = prompt(device, dtype)
    both = options.part == "both"
    sizes, ways = (list(LANGUAGE), ["dynamic"]) if both else ([options.part], WAYS)
    found: dict[str, Run] = {}
    shapes, real = {}, {}
    with ExitStack() as stack:
        for size in sizes:
            model, shapes[size] = llava(size, options, device, dtype)
            real[size] = {"hidden_size": LANGUAGE[size][0], "num_hidden_layers": LANGUAGE[size][2]}
            plans = {name: SETTINGS[name] for name in chosen(SETTINGS, options.settings)}
            made = stack.enter_context(variants(model, {} if (both and size == "7b") else plans))
            if both and size != "7b":
                made = {name: variant for name, variant in made.items() if name != BASE}
            for name, variant in made.items():
                # of dynamic caches, and on a CPU, `generate` would compile nothing: the way alone decides
                variant.model._valid_auto_compile_criteria = lambda _, config: config.compile_config is not None
                for way in chosen(ways, options.ways):
                    key = f"{size}/{UNPRUNED if name == BASE else name}/{way}"
                    found[key] = Answer(variant, inputs, way, marks)
        depends = {"shapes": shapes, "real": real, "tower": TOWER, "visual": VISUAL, "text": TEXT, "marks": marks}
        plans = {name: plan.to_dict() for name, plan in SETTINGS.items()}
        yield found, {**depends, "plans": plans, "compile": COMPILE.to_dict(), "mode": "torch.no_grad, greedy"}


def llava(size: str, options: argparse.Namespace, device: str, dtype: torch.dtype) -> tuple[Any, dict[str, int]]:
    """Return a model with a tiny tower, and the shape of its language model."""
    width, mlp, layers, heads, shared = LANGUAGE[size]
    if options.scale == "cpu":
        width, mlp, heads, shared = (number // NARROW for number in (width, mlp, heads, shared))
    if options.width:
        width, mlp, heads, shared = options.width, options.width * 43 // 16, 4, 4
    shape = {
        "hidden_size": width, "intermediate_size": mlp, "num_hidden_layers": options.layers or layers,
        "num_attention_heads": heads, "num_key_value_heads": shared, "vocab_size": 32064,
    }  # fmt: skip
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**TOWER, image_size=336, patch_size=14),
        text_config=hf.LlamaConfig(**shape, pad_token_id=0, eos_token_id=None),
        image_token_id=IMAGE, image_seq_length=VISUAL,
    )  # fmt: skip
    model = built(lambda: hf.LlavaForConditionalGeneration(config), device, dtype)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model, shape


def prompt(device: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return a picture between words."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(100, 32000, (1, TEXT + VISUAL), generator=draw)
    ids[:, 5 : 5 + VISUAL] = IMAGE
    return {
        "input_ids": ids.to(device),
        "attention_mask": torch.ones_like(ids).to(device),
        "pixel_values": torch.randn(1, 3, 336, 336, generator=draw).to(device, dtype),
    }


class Answer:
    """A greedy answer of fixed length; a static cache has room for the longest one, wherever it is stopped."""

    def __init__(self, variant: Variant, inputs: Mapping[str, torch.Tensor], way: str, marks: Sequence[int]) -> None:
        self.variant, self.inputs, self.marks = variant, inputs, marks
        self.device = inputs["input_ids"].device
        self.cache, _, compiled = way.partition(" ")
        self.compiled = bool(compiled)
        self.told: dict[str, Any] = {"graphs": 0, "breaks": 0, "compiled_again": 0} if compiled else {}

    def warm(self) -> None:
        start = time.perf_counter()
        self._settled(min(WARM, self.marks[-1]))
        if self.compiled:
            self.told["ready_s"] = round(time.perf_counter() - start, 1)

    def take(self) -> list[float]:
        stamps = self._settled(self.marks[-1])
        return [round(stamps[mark - 1], 3) for mark in self.marks]

    def flops(self) -> dict[str, float]:
        # by the operators of the eager step, which a compiled one fuses and hides
        first, more = (cost(partial(self._stamps, length, False), self.device).flops for length in (1, 3))
        return {"first": first, "token": (more - first) / 2}

    def facts(self) -> dict[str, Any]:
        session = self.variant.session
        memory = None if session is None else session.kv_memory
        return {**self.told, "kv_share": 1.0 if memory is None else memory.kept / memory.unpruned}

    def _settled(self, length: int) -> list[float]:
        """Return the stamps of an answer during which nothing was compiled."""
        for attempt in range(TRIES):
            counters.clear()
            stamps = self._stamps(length, self.compiled)
            graphs = counters["stats"]["unique_graphs"]
            if not graphs:
                return stamps
            self.told["graphs"] += graphs
            self.told["breaks"] += sum(counters["graph_break"].values())
            self.told["compiled_again"] += attempt > 0
        raise RuntimeError(f"the step is compiled anew for each answer ({TRIES} of {TRIES} tried)")

    def _stamps(self, length: int, compiled: bool) -> list[float]:
        """Return the ms to each of ``length`` tokens."""
        stamps: list[float] = []

        def clock(ids: torch.Tensor, _: Any, **__: Any) -> torch.Tensor:
            synchronize(self.device)
            stamps.append(1e3 * (time.perf_counter() - start))
            return torch.full((len(ids),), len(stamps) >= length, dtype=torch.bool, device=self.device)

        way = ({"cache_implementation": "static"} if self.cache == "static" else {}) | (
            {"compile_config": COMPILE} if compiled else {}
        )
        synchronize(self.device)
        start = time.perf_counter()
        with torch.no_grad():
            self.variant.model.generate(
                **self.inputs, **way, max_new_tokens=self.marks[-1], do_sample=False, num_beams=1,
                stopping_criteria=[clock],
            )  # fmt: skip
        return stamps


# -- a part of the record ---------------------------------------------------------------------------------------------


PARTS: dict[str, Callable[[argparse.Namespace], Any]] = {
    "vit-h": encoder, "7b": answers, "13b": answers, "both": answers,
}  # fmt: skip


def placed(options: argparse.Namespace) -> tuple[str, torch.dtype]:
    return ("cuda", torch.bfloat16) if options.scale == "full" else ("cpu", torch.float32)


def built(make: Callable[[], Any], device: str, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return make().eval()
    finally:
        torch.set_default_dtype(before)


def chosen(there: Sequence[str] | Mapping[str, Any], asked: Sequence[str] | None) -> list[str]:
    return [name for name in there if asked is None or name in asked]


def ready(found: Mapping[str, Run]) -> tuple[dict[str, Run], dict[str, dict[str, Any]]]:
    """Warm every variant up.

    Returns:
        Those that run; and of all what the record holds: counted FLOPs, or why a variant is refused (which it says) or failed.
    """
    running, told = {}, {}
    for name, run in found.items():
        try:
            run.warm()
        except Exception as error:  # whatever it is, it is what someone would get who asks for this way
            reason = " ".join(str(error).split())
            outcome = "refused" if isinstance(error, ValueError | NotImplementedError) else "failed"
            told[name] = {outcome: f"{type(error).__name__}: {reason:.300}"}
            console.print(f"{name}: {outcome}: {told[name][outcome]}")
            continue
        running[name] = run
        told[name] = {"flops": run.flops(), **run.facts()}
        console.print(f"{name}: ready, {told[name]}")
    return running, told


def measure(running: Mapping[str, Run], device: str, rounds: int, before: int) -> Iterator[dict[str, list[float]]]:
    """Time all variants in turn, and yield each round; every second one of the part goes backwards."""
    for number in range(before, before + rounds):
        taken: dict[str, list[float]] = {}
        order = list(running) if number % 2 == 0 else list(reversed(running))
        # a round at a time: between them garbage is collected
        interleave({name: partial(put, taken, name, running[name]) for name in order}, torch.device(device), 1, 0)
        yield {name: taken[name] for name in running}


def put(taken: dict[str, list[float]], name: str, run: Run) -> None:
    taken[name] = run.take()


def stored(file: Path) -> dict[str, Any]:
    """Read what a file holds, without what is written anew."""
    record = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return {name: value for name, value in record.items() if name not in ("version", "saint", "date", *HEAD)}


def place(record: dict[str, Any], part: str) -> dict[str, Any]:
    """Return the table of a record in which a part has its entry."""
    return record if part == "vit-h" else record.setdefault("llava", {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=list(PARTS))
    parser.add_argument("--scale", choices=["cpu", "full"], default="cpu", help="full: real widths, bfloat16, on CUDA")
    parser.add_argument("--rounds", type=int, default=3, help="0: compile alone, into torch's cache on disk")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--new-tokens", type=int, nargs="+", default=[32, 256], help="answers are timed at these lengths"
    )
    parser.add_argument("--settings", nargs="+", help="of these plans alone, beside the unpruned model")
    parser.add_argument("--ways", nargs="+", choices=WAYS, help="in these ways of generating alone")
    parser.add_argument("--layers", type=int, help="fewer than the model has, to try the script")
    parser.add_argument("--width", type=int, help="another than the model has, to try the script; divisible by 64")
    parser.add_argument("--anew", action="store_true", help="forget the rounds that the part holds")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/headline-shapes-SCALE.json")
    options = parser.parse_args()
    settings = ["plan_for", "votes"] if options.part == "vit-h" else list(SETTINGS)
    if unknown := set(options.settings or []) - set(settings):
        parser.error(f"{options.part} has the settings {', '.join(settings)}, got {', '.join(sorted(unknown))}")
    if options.rounds < 0 or min(options.new_tokens) < 2:
        parser.error(f"--rounds >= 0 and --new-tokens >= 2 are expected, got {options.rounds} and {options.new_tokens}")
    if (options.layers or options.width) and options.out is None:
        parser.error(
            "--layers and --width try the script, and benchmarks/results/ holds the shapes of the models: give --out"
        )
    if options.scale == "full" and not torch.cuda.is_available():
        parser.error("--scale full needs a CUDA device: 13 billion bfloat16 weights")
    torch.set_num_threads(options.threads)
    out = options.out or Path(__file__).parent / "results" / f"headline-shapes-{options.scale}.json"
    record = stored(out)
    held = place(record, options.part)
    before = None if options.anew else held.get(options.part)
    call = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "load_average": load_average()}
    start = time.perf_counter()
    with PARTS[options.part](options) as (found, depends):
        device, dtype = placed(options)
        depends |= {"dtype": str(dtype).removeprefix("torch."), "environment": environment(device)}
        section(before, depends, {}, [], {})  # other conditions are told of before anything is timed
        running, told = ready(found)
        if not running:
            parser.error(
                f"variants that run are expected, and of the {len(found)} asked for none does; `both` has the way dynamic"
            )
        call["prepared_s"], taken = round(time.perf_counter() - start, 1), []
        for one in measure(running, device, options.rounds, len(before["rounds"]) if before else 0):
            taken.append(one)
            told |= {name: {**told[name], **run.facts()} for name, run in running.items()}
            call["seconds"] = round(time.perf_counter() - start, 1)
            held[options.part] = section(before, depends, told, taken, call)
            write_json(out, {**record, **HEAD})  # after each round: what is measured is kept
            console.print(f"round {len(taken)} of {options.rounds}, {call['seconds']:.0f} s after the start")
    console.print(f"wrote {out}" if options.rounds else f"ready after {call['prepared_s']:.0f} s; nothing was timed")


if __name__ == "__main__":
    main()
