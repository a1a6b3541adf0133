"""Options and habits that several commands share."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from ...plans import Plan
    from ..bench import Spread
    from ..kinds import Subject
    from ..sources.listing import Left
    from ..sources.photos import Photo, Unreadable

S = TypeVar("S", bound="Subject")

out = Console()
err = Console(stderr=True)

DEFAULT_MODEL = "demo:clip-b16"
MODEL_HELP = "timm:NAME, hf:NAME_OR_PATH, open_clip:NAME/TAG or demo:NAME"
Images = Annotated[Path | None, typer.Option("--images", help="an image, or a folder of them [default: photographs]")]
PlanText = Annotated[str | None, typer.Option("--plan", help="a recipe's name, JSON, or a .json file")]
Threshold = Annotated[float | None, typer.Option(help="cosine from which two tokens count as similar, in (-1, 1]")]
Layers = Annotated[str | None, typer.Option(help='drop points: "first_half", "0-5" or "0,2,4"')]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps")]
Size = Annotated[int | None, typer.Option(help="side of the pictures in pixels [default: the model's]")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads [default: torch's choice]")]
Pretrained = Annotated[bool, typer.Option(help="--no-pretrained: random weights, nothing is downloaded")]
DType = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16")]
Limit = Annotated[int, typer.Option(min=1, help="use at most so many images")]
Questions = Annotated[
    Path | None,
    typer.Option(
        "--questions",
        help='vision-language models, JSON lines: {"image": "file", "question": "..."} [default: --prompt of every image]',
    ),
]
Prompt = Annotated[
    str | None, typer.Option(help="vision-language models, without --questions [default: Describe the image.]")
]


Prompts = Annotated[
    Path | None,
    typer.Option(
        "--prompts",
        help='language models without images, instead of --images: a prompt per line, or .jsonl {"prompt": "..."}',
    ),
]
Json = Annotated[Path | None, typer.Option("--json", help="also write the results to this file")]


def warn_busy(load: float | None, spreads: "Mapping[str, Spread]") -> None:
    """Say so when this machine was too busy for its times to mean much."""
    from ..bench.timing import disturbances

    for reason in disturbances(load, spreads):
        err.print(f"[yellow]note[/] {reason}", highlight=False)


def make_plan(default: "Plan", plan: str | None, threshold: float | None, layers: str | None) -> "Plan":
    """The plan the options ask for.

    Raises:
        ValueError: not a plan, or an option that does not fit its method.
    """
    from ..loading.plans import changed_plan, read_plan

    return changed_plan(default if plan is None else read_plan(plan), threshold, layers)


def dtype_of(name: str) -> Any:
    """The torch dtype called ``name``; None for "auto"."""
    import torch

    if name == "auto":
        return None

    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in dtypes:
        raise ValueError(f"dtype must be one of {', '.join(dtypes)}, got {name!r}")
    return dtypes[name]


def load(
    kind: "type[S]",
    model: str,
    device: str,
    *,
    size: int | None = None,
    threads: int | None = None,
    pretrained: bool = True,
    dtype: Any = None,
) -> "S":
    """Set the threads, load the model, say what is loaded; ``dtype`` None is the checkpoint's."""
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    with err.status(f"loading {model}"):
        return kind.load(model, device, pretrained, size=size, dtype=dtype)


def save(file: Path, record: dict[str, Any]) -> None:
    """Write the record of ``--json``, and say so."""
    from ..records import write_json

    write_json(file, record)
    err.print(f"wrote {file}", highlight=False)


def pictures(images: Path | None, limit: int, left: "Left") -> tuple[list["Photo"], list["Unreadable"]]:
    """The user's images, or photographs that are there anyway; and what cannot be read.

    ``left`` gets what is left out, see :func:`saint.lab.sources.listing.find_pictures`.
    """
    from ..sources.photos import Photo, load_images

    if images is None:
        from ..demo import photos

        return [Photo(name, photo) for name, photo in photos()[:limit]], []
    good, bad = load_images(images, limit, left)
    return good, bad


def finish(left_out: Sequence[Sequence[str]], what: str = "read", things: str = "image(s)") -> None:
    """Name what was left out, each with the reason, and end with exit status 1 where there is anything.

    Args:
        left_out: where and why.
        what: could not be done with them.
        things: what they are.
    """
    if left_out:
        for where, reason in left_out[:20]:
            err.print(f"[yellow]skipped[/] {where}: {reason}", highlight=False)
        err.print(f"[yellow]{len(left_out)} {things} could not be {what}[/]")
        raise typer.Exit(1)


@contextmanager
def progress(what: str, total: int) -> Iterator[Any]:
    """A bar on stderr; yields the function that advances it, by one where no number is given."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda count=1: bar.advance(task, count)


@contextmanager
def resumable(journal: Path | None) -> Iterator[None]:
    """An interruption ends with status 130 and says how to go on; results are in ``journal``, where there is one."""
    try:
        yield
    except KeyboardInterrupt:
        kept = "nothing was kept"
        if journal is not None:
            kept = f"results so far are in {journal}: run the same command again to continue"
        err.print(f"[yellow]interrupted[/]; {kept}", highlight=False)
        raise typer.Exit(130) from None


def bar(share: float, width: int = 20) -> str:
    """A share in [0, 1] as a bar."""
    full = round(share * width)
    return "█" * full + "[dim]" + "░" * (width - full) + "[/]"
