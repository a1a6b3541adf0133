"""Accuracy at speed, on the models that anyone can rebuild offline. Writes evidence/results/*.json and docs/results.md.

    python evidence/measure.py encoders --stamps DIR   # CLIP ViT-B/16: kNN on Tux Paint stamps
    python evidence/measure.py fashion --fashion DIR   # the same on Fashion-MNIST, a larger sample
    python evidence/measure.py saliency --stamps DIR   # DINOv2: correlation of saliency maps with the unpruned one
    python evidence/measure.py vlm                     # the small LLaVA: questions about held-out scenes
    python evidence/measure.py modes                   # one plan of each mode on more scenes
    python evidence/measure.py easy                    # the small LLaVA: easy-VQA
    python evidence/measure.py tables                  # docs/results.md from the records

DIR is .../tuxpaint/stamps of Debian's tuxpaint-stamps-default and .../datasets/fashion-mnist of its dataset-fashion-mnist,
installed or unpacked.
"""

import argparse
import dataclasses
import gzip
import json
import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import measure_vlm
import numpy as np
import torch
from ablations import SaintMerged, ToMeDropped
from cells import interval, percent
from PIL import Image
from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn, track
from torch import Tensor

import saint
from saint.flops import left_out
from saint.lab import demo
from saint.lab.bench import bench_forward
from saint.lab.bench.cost import cost
from saint.lab.eval import Item, Samples, compare, evaluate_images
from saint.lab.images import read_image
from saint.lab.records import environment, write_json
from saint.methods import Grid, Random, ToMe
from saint.plans import Plan, Stage

HERE = Path(__file__).parent
RESULTS = HERE / "results"
console = Console(width=150)

# class -> folders under the stamps
STAMPS = {
    "bird": ["animals/birds"],
    "fish": ["animals/fish"],
    "insect": ["animals/insects"],
    "mammal": ["animals/mammals"],
    "clothes": ["clothes"],
    "fruit": ["food/fruit"],
    "vegetable": ["food/vegetables"],
    "flower": ["plants/flowers"],
    "house": ["town/houses"],
    "road sign": ["town/roadsigns"],
    "vehicle": ["vehicles"],
    "money": ["symbols/money"],
    "tool": ["household/tools"],
    "planet": ["space/planets"],
}


# by label
FASHION = ["T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot"]


def stamps(folder: Path, most: int | None = None) -> list[tuple[Path, int]]:
    """The files, or ``most`` of each class, in a fixed order."""
    if not folder.is_dir():
        raise SystemExit(
            f"{folder} is no folder: give --stamps the stamps folder of Debian's tuxpaint-stamps-default "
            "(apt-get download tuxpaint-stamps-default && dpkg -x tuxpaint-stamps-default*.deb unpacked)"
        )
    out = []
    for label, places in enumerate(STAMPS.values()):
        files = sorted(file for place in places for file in (folder / place).rglob("*.png"))
        random.Random(0).shuffle(files)
        out += [(file, label) for file in sorted(files[:most])]
    return out


def encoder_plans() -> dict[str, Plan]:
    def at(method: Any, layers: Any = "first_half") -> Plan:
        return Plan(vision=Stage(method, layers=layers))

    plans = {f"saint, tau {t:g}, sample": at(saint.Saint(threshold=t)) for t in (0.7, 0.75, 0.8)}
    plans["saint, tau 0.75, batch of 8"] = at(saint.Saint(threshold=0.75, budget="batch"))
    plans |= {f"saint, tau 0.75, K {k}": at(saint.Saint(threshold=0.75, neighbors=k)) for k in (1, 20)}
    for share, keep in (("0.7", 0.62), ("0.5", 0.375)):
        plans |= {
            f"saint at {share}": at(saint.Saint(budget=keep)),
            f"saint's choice, merged, at {share}": at(SaintMerged(budget=keep)),
            f"tome at {share}": at(ToMe(keep=keep)),
            f"tome's choice, dropped, at {share}": at(ToMeDropped(budget=keep)),
            f"grid at {share}": at(Grid(keep=keep)),
            f"random at {share}": at(Random(keep=keep)),
        }
    plans["full graph at 0.5"] = at(saint.SaintFullGraph(keep=0.375))
    plans["saint, gamma 0, at 0.5"] = at(saint.Saint(keep=0.375, gamma=0.0))
    plans["saint, layers 6..11, at 0.7"] = at(saint.Saint(keep=0.14), range(6, 12))
    return plans


def flops(model: Any, plan: Plan, pictures: list[Tensor], part: str = "") -> float:
    """Mean FLOPs of a forward at batch 1, with ``plan`` on the model or on a ``part`` of it."""
    with saint.pruned(model.get_submodule(part), plan):
        costs = [
            cost(lambda pixels=pixels: model(pixel_values=pixels[None]), torch.device("cpu")) for pixels in pictures
        ]
    if missing := left_out(*(found.uncounted for found in costs)):
        raise SystemExit(f"no share of the FLOPs can be published{missing}")
    return sum(found.flops for found in costs) / len(costs)


def fashion_pictures(folder: Path, most: int) -> Samples:
    """The first ``most`` test pictures of Fashion-MNIST."""
    files = [folder / f"t10k-{name}-ubyte.gz" for name in ("images-idx3", "labels-idx1")]
    if missing := [file.name for file in files if not file.is_file()]:
        raise SystemExit(
            f"{folder} has no {' and no '.join(missing)}: give --fashion the folder of Debian's dataset-fashion-mnist "
            "(apt-get download dataset-fashion-mnist && dpkg -x dataset-fashion-mnist*.deb unpacked)"
        )
    images, labels = (np.frombuffer(gzip.decompress(file.read_bytes()), np.uint8) for file in files)
    pictures = images[16:].reshape(-1, 28, 28)[:most]  # behind the headers of the idx format
    return Samples(
        [
            Item(f"t10k/{i}", f"{files[0]}, picture {i}", partial(_grey, picture), label=int(labels[8 + i]))
            for i, picture in enumerate(pictures)
        ],
        FASHION,
    )


def _grey(picture: np.ndarray) -> Image.Image:
    return Image.fromarray(picture).convert("RGB")


def encoders(options: argparse.Namespace) -> None:
    samples = Samples(
        [
            Item(str(file.relative_to(options.stamps)), str(file), partial(read_image, file), label=label)
            for file, label in stamps(options.stamps)
        ],
        list(STAMPS),
    )
    _knn("encoders", samples, encoder_plans(), options, timed=True)


def fashion(options: argparse.Namespace) -> None:
    wanted = [f"{name} at {share}" for share in ("0.7", "0.5") for name in ("saint", "tome", "grid", "random")]
    plans = encoder_plans()
    pictures = fashion_pictures(options.fashion, options.pictures)
    _knn("fashion", pictures, {name: plans[name] for name in wanted}, options, timed=False)


def _knn(name: str, samples: Samples, plans: dict[str, Plan], options: argparse.Namespace, *, timed: bool) -> None:
    """Accuracy, cosine and FLOPs of every plan; with ``timed`` also the speed of those of equal FLOPs."""
    info = demo.MODELS["clip-b16"]
    model = info.load()
    with Progress(*Progress.get_default_columns(), TimeElapsedColumn(), console=console) as progress:
        task = progress.add_task(f"features of {len(samples.items)} pictures", total=len(samples.items))
        report = evaluate_images(
            model, samples, plans, batch=8, scores=["knn"], journal=options.cache / f"{name}.jsonl",
            inputs=lambda images: {"pixel_values": torch.stack([info.preprocess(i) for i in images])},
            tick=lambda done: progress.advance(task, done),
        )  # fmt: skip
    shown = [info.preprocess(sample.load()) for sample in random.Random(0).sample(samples.items, 24)]
    whole = flops(model, Plan(), shown)
    rows = []
    for title, plan in track(plans.items(), "FLOPs and time", console=console):
        row = {
            "plan": title,
            "settings": plan.to_dict(),
            "flops": flops(model, plan, shown) / whole,
            "knn": dataclasses.asdict(report.scores[title]["knn"]),
            "cosine": dataclasses.asdict(report.agreement[title]["cosine"]),
        }
        saint_there = f"saint at {title.rpartition(' at ')[2]}"
        if saint_there in plans and title != saint_there:
            row["against saint"] = dataclasses.asdict(report.between(saint_there, title)["knn"])
        if timed and " at 0." in title:
            speed = bench_forward(
                model, plan, {"pixel_values": torch.stack(shown[:8])}, repeats=5, warmup=1, extras=False
            )
            row["speedup"] = dataclasses.asdict(speed.speedup)
        rows.append(row)
        console.print(
            f"{title}: {row['flops']:.3f} of the FLOPs, kNN {row['knn']['base']:.3f} -> {row['knn']['pruned']:.3f}"
        )
    write_json(
        RESULTS / f"{name}.json",
        {"kind": f"evidence/{name}", "command": f"python evidence/measure.py {name}", "classes": samples.classes,
         "given": report.given, "evaluated": report.evaluated, "rows": rows, "environment": environment("cpu")},
    )  # fmt: skip


# -- saliency -----------------------------------------------------------------------------------------------------------


def crops(folder: Path) -> Iterator[Image.Image]:
    """The photographs and four overlapping crops of each, and every eighth stamp on a photograph's crop."""
    photographs = [image for _, image in demo.photos()]
    for image in photographs:
        yield image
        width, height = image.width * 2 // 3, image.height * 2 // 3
        for x in (0, image.width - width):
            for y in (0, image.height - height):
                yield image.crop((x, y, x + width, y + height))
    rng = random.Random(0)
    for file, _ in stamps(folder, most=12)[::8]:
        behind = rng.choice(photographs)
        side = min(behind.size) // 2
        x, y = rng.randrange(behind.width - side), rng.randrange(behind.height - side)
        ground = behind.crop((x, y, x + side, y + side)).resize((448, 448)).convert("RGBA")
        stamp = Image.open(file).convert("RGBA")
        stamp.thumbnail((220, 220))
        ground.alpha_composite(stamp, (rng.randrange(448 - stamp.width), rng.randrange(448 - stamp.height)))
        yield ground.convert("RGB")


def saliency(options: argparse.Namespace) -> None:
    info = demo.MODELS["dinov2-s"]
    model = info.load()

    def at(method: Any, output: str = "similar") -> Plan:
        return Plan(vision=Stage(method, layers=[0, 2, 4], output=output))

    plans = {f"saint, centred, tau {t:g}": at(saint.Saint(threshold=t, center=True)) for t in (0.6, 0.7, 0.8)}
    plans["saint, centred, nearest, tau 0.7"] = at(saint.Saint(threshold=0.7, center=True), "nearest")
    plans["saint, not centred, tau 0.75"] = at(saint.Saint(threshold=0.75))
    for share, keep in (("0.7", 0.64), ("0.5", 0.41)):
        voting = saint.Saint(
            budget=keep, threshold=0.85
        )  # thresholds of these rows: the better of two, see docs/results.md
        plans |= {
            f"saint, centred, at {share}": at(saint.Saint(budget=keep, threshold=0.6, center=True)),
            f"saint, not centred, at {share}": at(voting),
            f"saint, not centred, nearest, at {share}": at(voting, "nearest"),
            f"saint's choice, merged, at {share}": at(SaintMerged(budget=keep, threshold=0.85)),
            f"full graph, centred, at {share}": at(saint.SaintFullGraph(keep=keep, center=True)),
            f"full graph, not centred, at {share}": at(saint.SaintFullGraph(keep=keep)),
            f"tome at {share}": at(ToMe(keep=keep)),
            f"tome, beta 0, at {share}": at(ToMe(keep=keep, beta=0.0)),
            f"tome's choice, dropped, at {share}": at(ToMeDropped(budget=keep)),
            f"grid at {share}": at(Grid(keep=keep)),
            f"random at {share}": at(Random(keep=keep)),
        }
    pictures = [info.preprocess(image) for image in crops(options.stamps)]
    base = [_map(model, pixels) for pixels in track(pictures, "unpruned", console=console)]
    whole = flops(model, Plan(), pictures[:24], "backbone")
    rows = []
    for name, plan in track(plans.items(), "plans", console=console):
        with saint.pruned(model.backbone, plan):
            found = [_map(model, pixels) for pixels in pictures]
        scores = [float(np.corrcoef(a, b)[0, 1]) for a, b in zip(base, found, strict=True)]
        iou = [
            float(((a > 0.5) & (b > 0.5)).sum() / max(1, ((a > 0.5) | (b > 0.5)).sum()))
            for a, b in zip(base, found, strict=True)
        ]
        row = {
            "plan": name, "settings": plan.to_dict(), "flops": flops(model, plan, pictures[:24], "backbone") / whole,
            "correlation": scores, "iou": iou,
        }  # fmt: skip
        rows.append(row)
        console.print(
            f"{name}: {row['flops']:.3f} of the FLOPs, correlation {np.mean(scores):.4f}, IoU {np.mean(iou):.3f}"
        )
    write_json(
        RESULTS / "saliency.json",
        {
            "kind": "evidence/saliency",
            "command": "python evidence/measure.py saliency",
            "images": len(pictures),
            "rows": rows,
            "environment": environment("cpu"),
        },
    )


def _map(model: Any, pixels: Tensor) -> np.ndarray:
    with torch.inference_mode():
        return model(pixel_values=pixels[None])[0, 0].flatten().numpy().astype(np.float64)


# -- docs/results.md ----------------------------------------------------------------------------------------------------


def _conditions(record: dict[str, Any]) -> str:
    facts = record["environment"]
    packages = ", ".join(f"{name} {facts[name]}" for name in ("torch", "transformers"))
    return f"`{record['command']}`: {facts['cpu']}, {facts['threads']} threads, float32, {packages}, {record['date'][:10]}."


def _knn_table(of: str, record: dict[str, Any]) -> list[str]:
    timed = any("speedup" in row for row in record["rows"])
    lines = [
        f"kNN (k = 5, leave one out) on {record['evaluated']} {of} of {len(record['classes'])} classes; unpruned "
        f"{percent(record['rows'][0]['knn']['base'])} %. Difference in points with its 95 % interval, and the smallest "
        "difference that this sample could have shown with 80 % power. Cosine: pruned against unpruned embedding. Behind SAINT: "
        'difference to the row "saint at" the same share.',
        "",
        "| plan | FLOPs | kNN | difference | detectable | behind SAINT | cosine |"
        + (" images/s, of unpruned |" if timed else ""),
        "|---|---|---|---|---|---|---|" + ("---|" if timed else ""),
    ]
    for row in record["rows"]:
        knn, speed, behind = row["knn"], row.get("speedup"), row.get("against saint")
        times = (
            f" x{speed['median']:.2f} [{speed['p20']:.2f}, {speed['p80']:.2f}] |" if speed else " |" if timed else ""
        )
        lines.append(
            f"| {row['plan']} | {row['flops']:.2f} | {percent(knn['pruned'])} | {interval(knn)} | "
            f"{percent(knn['detectable'])} | {interval(behind) if behind else ''} | {row['cosine']['mean']:.4f} |{times}"
        )
    return lines


def _saliency_table(record: dict[str, Any]) -> list[str]:
    lines = [
        f"Pearson correlation of the pruned with the unpruned saliency map, and IoU at 0.5, over {record['images']} pictures "
        "(photographs, crops of them, clip-art stamps on them). Interval: 95 %, of the mean.",
        "",
        "| plan | FLOPs | correlation | interval | lowest | IoU |",
        "|---|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        values = np.array(row["correlation"])
        paired = compare([0.0] * len(values), values.tolist())
        lines.append(
            f"| {row['plan']} | {row['flops']:.2f} | {values.mean():.4f} | [{paired.low:.4f}, {paired.high:.4f}] | "
            f"{values.min():.3f} | {np.mean(row['iou']):.3f} |"
        )
    return lines


_TABLES = {
    "encoders": partial(_knn_table, "clip-art stamps (Tux Paint)"), "fashion": partial(_knn_table, "pictures of Fashion-MNIST"),
    "saliency": _saliency_table, "vlm": measure_vlm.table, "modes": measure_vlm.modes_table, "easy": measure_vlm.table,
}  # fmt: skip


def tables(options: argparse.Namespace) -> None:
    """Put the tables between their marks in docs/results.md."""
    page = HERE.parent / "docs" / "results.md"
    text = page.read_text()
    for name, table in _TABLES.items():
        file = RESULTS / f"{name}.json"
        if not file.exists():
            continue
        record = json.loads(file.read_text())
        start, end = f"<!-- {name}: generated by make results -->", f"<!-- end {name} -->"
        head, _, rest = text.partition(start)
        _, _, tail = rest.partition(end)
        text = "\n".join([f"{head}{start}", *table(record), "", _conditions(record), f"{end}{tail}"])
    page.write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, run: Callable[..., None], **options: dict[str, Any]) -> None:
        sub = commands.add_parser(name)
        sub.set_defaults(run=run)
        for option, settings in options.items():
            sub.add_argument(f"--{option}", **settings)

    def pictures(count: int) -> dict[str, Any]:
        return {"type": int, "default": count}

    folder: dict[str, Any] = {"type": Path, "required": True}
    cache: dict[str, Any] = {"type": Path, "default": HERE / "cache"}
    command("encoders", encoders, stamps=folder, cache=cache)
    command("fashion", fashion, fashion=folder, cache=cache, pictures=pictures(1500))
    command("saliency", saliency, stamps=folder)
    command("vlm", partial(measure_vlm.about_scenes, results=RESULTS), pictures=pictures(240))
    rows: dict[str, Any] = {"nargs": "+", "metavar": "ROW"}
    command("modes", partial(measure_vlm.about_modes, results=RESULTS), pictures=pictures(1000), only=rows)
    command("easy", partial(measure_vlm.about_easy, results=RESULTS), pictures=pictures(40))
    command("tables", tables)
    options = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    options.run(options)


if __name__ == "__main__":
    main()
