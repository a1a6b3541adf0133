"""The contracts on every ViT-like model name of timm and every vision tower of open_clip, without weights.

    python tools/zoo.py --out zoo.jsonl           # hours on one core; continues where it stopped
    python tools/zoo.py --out zoo.jsonl --only beit
    python tools/zoo.py --out zoo.jsonl --table docs/zoo.csv

A model is built as its factory builds it, except for its size: three blocks, pictures of 6 x 6 patches, and narrower where
three blocks at the real width hold too many parameters. Weights are random and lively. An outcome is one of

- ``holds``: every contract, at the default placement and behind the layers
- ``fails``: the contract and its message
- ``refused``: the reason that ``saint.apply`` gives
- ``not tried``: the model could not be built at this size, or took too long
"""

import _thread
import argparse
import csv
import json
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

from saint.errors import UnsupportedModelError
from saint.plans import Plan
from saint.testing.contracts import check_batch, check_model, check_oracle
from saint.testing.examples import enliven, example_inputs, example_plan
from saint.upstream.versions import installed
from saint.vision.locate import locate

# modules of timm whose models are vision transformers or near relatives
MODULES = (
    "vision_transformer", "deit", "eva", "beit", "vision_transformer_hybrid", "vision_transformer_relpos", "naflexvit",
    "vitamin", "cait", "vision_transformer_sam", "hieradet_sam2", "gemma4_vit", "qwen3_vit", "deepseek_vit", "hiera",
    "xcit", "volo", "convit", "crossvit", "tnt", "pit",
)  # fmt: skip
OUTCOMES = ("holds", "fails", "refused", "not tried")
DEPTH = 3
SIDE = 6  # patches
WIDEST = 8_000_000  # parameters at the real width
NARROW = (4, 6, 8, 12)  # heads otherwise; the first that the architecture allows


@dataclass(frozen=True)
class Record:
    """Outcome of one name.

    Attributes:
        library: "timm" or "open_clip".
        module: where timm registers the name; what open_clip builds the tower from.
        name: model name.
        cls: class of the encoder.
        outcome: one of ``OUTCOMES``.
        detail: size of the model that was tried, or the reason.
        versions: of the library and torch.
    """

    library: str
    module: str
    name: str
    cls: str
    outcome: str
    detail: str
    versions: str


# -- names and how to build them -------------------------------------------------------------------------------------


def names() -> list[tuple[str, str, str]]:
    """(library, module, name) of everything to try."""
    import open_clip
    import timm

    out = [("timm", module, name) for module in MODULES for name in timm.list_models(module=module)]
    for name in open_clip.list_models():
        tower = open_clip.get_model_config(name)["vision_cfg"]
        kind = "timm trunk" if "timm_model_name" in tower else "ViT" if isinstance(tower["layers"], int) else "ResNet"
        out.append(("open_clip", kind, name))
    return out


def build(library: str, name: str) -> nn.Module:
    """The model called ``name`` at reduced size, in eval mode, with lively random weights."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = _timm(name) if library == "timm" else _open_clip(name)
    return enliven(model.eval())


def _timm(name: str, **given: Any) -> nn.Module:
    import timm

    create = timm.create_model
    given = {"num_classes": 7, **given}
    refused: Exception | None = None
    for shape in _shapes(create, name, given):
        try:
            return create(name, pretrained=False, **given, **shape)
        except (AssertionError, RuntimeError, TypeError, ValueError) as error:
            refused = error  # an architecture has rules for its widths
    assert refused is not None
    raise refused


def _shapes(create: Callable[..., nn.Module], name: str, given: dict[str, Any]) -> list[dict[str, Any]]:
    """Arguments of a factory for a small model of the same architecture, the best first."""
    real: Any = None
    shape: dict[str, Any] = {}
    # some factories count heads of keys and values for each block
    for shape in ({"depth": DEPTH}, {"depth": DEPTH, "num_kv_heads": 2}):
        try:
            with torch.device("meta"):
                real = create(name, pretrained=False, **given, **shape)
            break
        except Exception:  # whatever a factory does with an argument it does not know
            continue
    if real is None:
        return [{}]  # a factory that takes none of this; its size is what it is
    embed: Any = getattr(real, "patch_embed", None)
    if hasattr(real, "embeds"):
        shape["pos_embed_grid_size"] = (SIDE, SIDE)
    elif hasattr(embed, "feat_ratio"):
        shape["img_size"] = SIDE * embed.feat_ratio()
    heads = next((n for m in real.modules() if isinstance(n := getattr(m, "num_heads", None), int)), None)
    count = sum(parameter.numel() for parameter in real.parameters())
    width = getattr(real, "embed_dim", None)
    # the width of a stem of convolutions decides the width of what comes behind it
    if heads is not None and isinstance(width, int) and count > WIDEST and not name.startswith("vitamin"):
        narrow = [shape | {"embed_dim": width // heads * count, "num_heads": count} for count in NARROW]
        return [*narrow, shape]
    return [shape]


def _open_clip(name: str) -> nn.Module:
    import open_clip
    from open_clip.model import _build_vision_tower

    config = open_clip.get_model_config(name)
    tower = dict(config["vision_cfg"])
    if "timm_model_name" in tower:
        tower["timm_model_pretrained"] = False
        with mock.patch("timm.create_model", side_effect=lambda name, pretrained=False, **rest: _trunk(name, rest)):
            return _build_vision_tower(config["embed_dim"], tower, config.get("quick_gelu", False))
    if isinstance(tower["layers"], int):
        width, head = tower.get("width", 768), tower.get("head_width", 64)
        tower |= {"layers": DEPTH, "image_size": SIDE * tower.get("patch_size", 16)}
        if DEPTH * 12 * width**2 > WIDEST:
            tower |= {"width": head * NARROW[0]}
            tower |= {"attn_pooler_heads": NARROW[0]} if tower.get("attentional_pool") else {}
    return _build_vision_tower(config["embed_dim"], tower, config.get("quick_gelu", False))


def _trunk(name: str, given: dict[str, Any]) -> nn.Module:
    import timm.models

    with mock.patch("timm.create_model", timm.models.create_model):
        return _timm(name, **given)


# -- one name ----------------------------------------------------------------------------------------------------------


class _LateError(Exception):
    """A model took longer than it may."""


@contextmanager
def _limit(seconds: int) -> Iterator[None]:
    def late(*_: Any) -> None:
        raise _LateError(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    # not signal.alarm: a process may have been started with that signal blocked, and the model would run forever
    timer = threading.Timer(seconds, _thread.interrupt_main, [signal.SIGALRM])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        signal.signal(signal.SIGALRM, before)


def attempt(library: str, module: str, name: str, limit: int = 120) -> Record:
    """Build one model and run the contracts on it.

    Args:
        library, module, name: see :func:`names`.
        limit: seconds.
    """
    record = Record(library, module, name, "", "not tried", "", _versions(library))
    try:
        with _limit(limit):
            try:
                model = build(library, name)
            except _LateError:
                raise
            except Exception as error:  # of a factory
                return replace(record, detail=f"could not be built: {_line(error)}")
            record = replace(record, cls=type(model).__name__)
            return _contracts(record, model)
    except _LateError as error:
        return replace(record, outcome="not tried", detail=str(error))


def _contracts(record: Record, model: nn.Module) -> Record:
    try:
        _, encoder, _ = locate(model)
    except UnsupportedModelError as error:
        return replace(record, outcome="refused", detail=_line(error))
    record = replace(record, cls=type(encoder).__name__)
    where = "a plan"
    try:
        inputs = example_inputs(model)
        plan = example_plan(model, inputs)
        for result in check_model(model, plan, inputs):
            if result.outcome != "passed":
                outcome = "fails" if result.outcome == "failed" else "not tried"
                return replace(record, outcome=outcome, detail=f"{result.contract}: {_line(result.detail)}")
        (stage,) = plan.vision
        behind = Plan(vision=replace(stage, placement="post", layers=[0, DEPTH - 1]))
        for where, check in (("masked oracle", check_oracle), ("batch independence", check_batch)):  # noqa: B007
            check(model, behind, inputs)
    except UnsupportedModelError as error:
        return replace(record, outcome="refused", detail=_line(error))
    except _LateError:
        raise
    except Exception as error:  # whatever it is, it is this name's outcome
        return replace(record, outcome="fails", detail=f"{where}: {type(error).__name__}: {_line(error)}")
    return replace(record, outcome="holds", detail=_size(model, inputs))


def _size(model: nn.Module, inputs: dict[str, Any]) -> str:
    _, encoder, spec = locate(model)
    blocks = encoder.get_submodule(spec.blocks)
    shapes: list[tuple[int, ...]] = []
    hook = next(iter(blocks.children())).register_forward_pre_hook(lambda _, args: shapes.append(args[0].shape))
    with torch.no_grad():
        model(**inputs)
    hook.remove()
    return f"{len(blocks)} blocks, width {shapes[0][2]}, {shapes[0][1]} tokens"  # type: ignore[arg-type]


def _line(error: Any) -> str:
    return " ".join(str(error).split())[:300]


def _versions(library: str) -> str:
    name = {"open_clip": "open_clip_torch"}.get(library, library)
    return f"{library} {installed(name)}, torch {(installed('torch') or '').partition('+')[0]}"


# -- all of them -------------------------------------------------------------------------------------------------------


def read(path: Path) -> list[Record]:
    """Records of a file, one per name; a line that a killed run left half written is dropped."""
    out: dict[tuple[str, str], Record] = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            record = Record(**json.loads(line))
        except json.JSONDecodeError:
            continue
        out[record.library, record.name] = record
    return list(out.values())


def sweep(path: Path, only: str = "", limit: int = 120) -> None:
    """Try every name that ``path`` has no record of, and append one line each.

    Args:
        path: JSON lines.
        only: names or modules that contain it.
        limit: seconds per model.
    """
    done = {(record.library, record.name) for record in read(path)}
    todo = [n for n in names() if (n[0], n[2]) not in done and (only in n[2] or only in n[1])]
    start = time.monotonic()
    if path.exists() and not path.read_text().endswith("\n"):
        path.write_text(path.read_text() + "\n")
    for index, (library, module, name) in enumerate(todo):
        began = time.monotonic()
        record = attempt(library, module, name, limit)
        with path.open("a") as file:
            file.write(json.dumps(asdict(record)) + "\n")
        now = time.monotonic()
        left = (now - start) / (index + 1) * (len(todo) - index - 1)
        print(
            f"[{index + 1}/{len(todo)}, {left / 60:.0f} min left] {library} {name}: {record.outcome} "
            f"({record.detail}) {now - began:.1f} s",
            file=sys.stderr,
        )


def write_table(path: Path, records: list[Record]) -> None:
    """CSV, in the order of :func:`names`."""
    order = {(library, name): place for place, (library, _, name) in enumerate(names())}
    records = [record for record in records if (record.library, record.name) in order]
    records.sort(key=lambda record: order[record.library, record.name])
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["class" if field.name == "cls" else field.name for field in fields(Record)])
        writer.writerows([list(asdict(record).values()) for record in records])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python tools/zoo.py", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--out", type=Path, default=Path("zoo.jsonl"), help="JSON lines; names that have one are skipped"
    )
    parser.add_argument("--only", default="", help="names or modules that contain this")
    parser.add_argument("--limit", type=int, default=120, help="seconds per model")
    parser.add_argument("--table", type=Path, help="write the records of --out as CSV, and try nothing")
    arguments = parser.parse_args()
    if arguments.table:
        write_table(arguments.table, read(arguments.out))
    else:
        sweep(arguments.out, arguments.only, arguments.limit)


if __name__ == "__main__":
    main()
