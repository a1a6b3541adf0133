"""Labelled images where people keep them: a folder per class, webdataset shards, Hugging Face data sets."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from ...extras import require
from ..images import mark, read_image
from ..loading.failures import explained
from . import shards as shards_
from .items import Failure, Item, evenly
from .listing import Left, one_kind, printable, tell, walk

SPLITS = {"train", "training", "val", "valid", "validation", "test", "dev"}
FORMS = "a folder with a folder per class, .tar shards (a file or a folder), a saved data set, or hf:NAME"


@dataclass(frozen=True)
class Samples:
    """Samples, with the names of their classes where known, and those that were given but are unusable.

    Attributes:
        items: what is evaluated.
        classes: their names; None where the data has none.
        unreadable: what has no label or no image, with the reason.
        left_out: files that are no samples: reason -> names.
        origin: what a data set says tells it from others; "" of files, whose samples have sizes.
    """

    items: list[Item]
    classes: list[str] | None = None
    unreadable: list[Failure] = field(default_factory=list)
    left_out: Left = field(default_factory=dict)
    origin: str = ""

    @property
    def labelled(self) -> bool:
        """Whether every sample has a label."""
        return all(sample.label is not None for sample in self.items)


def find_samples(
    data: str,
    *,
    split: str | None = None,
    classes: Sequence[str] | None = None,
    limit: int | None = None,
    labels: bool = True,
) -> Samples:
    """The samples at ``data``, in an order that never changes.

    Args:
        data: a folder with a folder per class (or just images: no labels), ``.tar`` shards (a file, or a folder of them), a
            folder written by ``Dataset.save_to_disk``, or ``hf:NAME`` for a data set of the hub.
        split: of a data set with several.
        classes: class names in the order of the labels; None means what the data says, for folders their sorted names.
        limit: at most so many samples, evenly spaced over all.
        labels: False: folders are no classes, every picture below ``data`` is taken, and ``data`` may be one picture.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: no image in it, a folder that is no class, or a split that is not there.
        MissingExtraError: ``datasets`` is needed and not installed.
    """
    path = Path(data)
    left: Left = {}
    if data.startswith("hf:"):
        made = _hub(data[3:], split)
    elif not path.exists():
        raise FileNotFoundError(f"no such data: {data}; give {FORMS}")
    elif not labels and path.is_file() and path.suffix.lower() != ".tar":
        made = Samples([_file(path, path.parent, None)])
    elif (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
        made = _saved(path, split, left)
    else:
        kind, files = (".tar", [path]) if path.is_file() else one_kind(path, left, FORMS, ".tar")
        if kind == ".tar":
            made = _shards(path, files, left)
        else:
            made = _folder(path, files, classes) if labels else Samples([_file(f, path, None) for f in files])
    items = made.items
    if not items:
        reasons = "; ".join(f"{f.where}: {f.reason}" for f in made.unreadable[:3])
        raise ValueError(f"no image at {data}" + (f" ({reasons})" if reasons else "") + f"; give {FORMS}")
    names = list(classes) if classes is not None else made.classes
    return Samples(evenly(items, limit), names, made.unreadable, left, made.origin)


def _folder(path: Path, files: Sequence[Path], classes: Sequence[str] | None) -> Samples:
    inside = [f for f in files if f.parent != path]
    if not inside:
        return Samples([_file(f, path, None) for f in files])
    folders = sorted({f.relative_to(path).parts[0] for f in inside})
    names = list(classes) if classes is not None else [printable(name) for name in folders]
    unknown = [printable(name) for name in folders if printable(name) not in names]
    if unknown:
        raise ValueError(
            f"the folder {unknown[0]!r} in {path} is none of the {len(names)} given classes ({names[0]}, ...)"
        )
    if classes is None and {name.lower() for name in names} <= SPLITS:
        raise ValueError(
            f"{path} holds splits ({', '.join(names)}), not classes: give one of them, such as {path / folders[0]}; "
            "if they are classes, name them (--classes)"
        )
    return Samples(
        [_file(f, path, names.index(printable(f.relative_to(path).parts[0]))) for f in inside],
        names,
        [
            Failure(printable(f.name), printable(f.name), "an image outside the class folders has no label")
            for f in files
            if f.parent == path
        ],
    )


def _file(file: Path, root: Path, label: int | None) -> Item:
    name = printable(file.relative_to(root).as_posix())
    return Item(name, name, lambda: read_image(file), mark=mark(file), label=label)


def _shards(path: Path, shards: Sequence[Path], left: Left) -> Samples:
    items: list[Item] = []
    bad: list[Failure] = []
    inside: Left = {}
    for shard in shards:
        name = printable(shard.name if shard == path else shard.relative_to(path).as_posix())
        groups, broken = shards_.groups(shard, inside)
        if broken is not None:
            bad.append(Failure(name, name, broken))
        for key, members in groups.items():
            where = f"{name}: {key}"
            picture = shards_.picture(members)
            if picture is None:
                bad.append(Failure(f"{name}/{key}", where, f"no image among {', '.join(members)}"))
                continue
            try:
                label = _label(shard, members)
            except ValueError as error:
                bad.append(Failure(f"{name}/{key}", where, str(error)))
                continue
            items.append(Item(f"{name}/{key}", where, _member(shard, picture), mark=picture.size, label=label))
    tell(path, inside)
    left.update(inside)
    return Samples(items, None, bad)


def _label(shard: Path, members: dict[str, shards_.Member]) -> int | None:
    if "cls" in members:
        text = shards_.contents(shard, members["cls"]).decode().strip()
        if not text.isdigit():
            raise ValueError(f"the label must be a class number, got {text[:40]!r}")
        return int(text)
    if "json" in members:
        fields = json.loads(shards_.contents(shard, members["json"]))
        value = fields.get("label", fields.get("cls")) if isinstance(fields, dict) else None
        return value if isinstance(value, int) else None
    return None


def _member(shard: Path, member: shards_.Member) -> Callable[[], Image.Image]:
    return lambda: read_image(shards_.contents(shard, member))


def _saved(path: Path, split: str | None, left: Left) -> Samples:
    datasets: Any = require("datasets", "eval")
    other = [file for file in walk(path, left) if file.suffix not in (".arrow", ".json")]
    if other:
        left["beside a saved data set"] = [printable(file.relative_to(path).as_posix()) for file in other]
    tell(path, left)
    return _rows(datasets, datasets.load_from_disk(str(path)), str(path), split)


def _hub(name: str, split: str | None) -> Samples:
    datasets: Any = require("datasets", "eval")
    with explained(f"the data set {name}"):
        loaded = datasets.load_dataset(name, split=split) if split else datasets.load_dataset(name)
    return _rows(datasets, loaded, name, split)


def _rows(datasets: Any, loaded: Any, name: str, split: str | None) -> Samples:
    if hasattr(loaded, "keys"):
        if split is None and len(loaded) == 1:
            split = next(iter(loaded))
        if split not in loaded:
            raise ValueError(f"{name} has the splits {', '.join(loaded)}: choose one with --split")
        loaded = loaded[split]
    features = loaded.features
    image = next((key for key, kind in features.items() if isinstance(kind, datasets.Image)), None)
    if image is None:
        raise ValueError(f"{name} has no image column among {', '.join(features)}")
    named = next((key for key, kind in features.items() if isinstance(kind, datasets.ClassLabel)), None)
    column = named or ("label" if "label" in features else None)
    rows = loaded.cast_column(image, datasets.Image(decode=False))  # decoding is ours, so that broken images are told
    labels: list[Any] = rows[column] if column is not None else []

    def load(row: int) -> Callable[[], Image.Image]:
        def read() -> Image.Image:
            value = rows[row][image]
            return read_image(value["bytes"] if value.get("bytes") else Path(value["path"]))

        return read

    items: list[Item] = []
    bad: list[Failure] = []
    for row in range(len(rows)):
        label = labels[row] if column is not None else None
        if column is not None and (not isinstance(label, int) or label < 0):
            bad.append(Failure(str(row), f"{name}, row {row}", f"the label must be a class number, got {label!r}"))
        else:
            items.append(Item(str(row), f"{name}, row {row}", load(row), label=label))
    origin = str(loaded._fingerprint)  # of its files, split and rows
    return Samples(items, list(features[named].names) if named else None, bad, origin=origin)
