"""Options that several commands share; those about a model become one argument."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from .common import doing

if TYPE_CHECKING:
    from ..kinds import Subject

S = TypeVar("S", bound="Subject")

DEFAULT_MODEL = "demo:clip-b16"
MODEL_HELP = "timm:NAME, hf:NAME_OR_PATH, open_clip:NAME/TAG or demo:NAME"
Images = Annotated[Path | None, typer.Option("--images", help="an image, or a folder of them [default: photographs]")]
PLAN_HELP = "a recipe's name, JSON, a .json file, or a share of the work such as 0.5"
PlanText = Annotated[str | None, typer.Option("--plan", help=PLAN_HELP)]
Keep = Annotated[
    float | None,
    typer.Option(
        "--keep", help="in place of --plan: the share of the work that a plan made for the model leaves, e.g. 0.5"
    ),
]
Pixels = Annotated[
    str | None,
    typer.Option(
        "--pixels",
        help="shrink pictures in front of all else: share of their pixels, e.g. 0.6, or how many patches at most",
    ),
]
Threshold = Annotated[float | None, typer.Option(help="cosine from which two tokens count as similar, in (-1, 1]")]
Layers = Annotated[str | None, typer.Option(help='drop points: "first_half", "all", "0-5" or "0,2,4"')]
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
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class How:
    """How a model is to be loaded, as it was typed."""

    device: str = "auto"
    threads: int | None = None
    pretrained: bool = True
    size: int | None = None
    dtype: str = "auto"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")

    @property
    def number(self) -> Any:
        """The torch dtype; None for "auto", the checkpoint's."""
        import torch

        return None if self.dtype == "auto" else getattr(torch, self.dtype)

    def set_threads(self) -> None:
        """Take so many CPU threads from here on, where a number is given."""
        import torch

        if self.threads is not None:
            torch.set_num_threads(self.threads)

    def load(self, kind: "type[S]", model: str) -> "S":
        """Set the threads and load the model, and say meanwhile what is loaded."""
        number = self.number
        self.set_threads()
        with doing(f"loading {model}"):
            return kind.load(model, self.device, self.pretrained, size=self.size, dtype=number)


_ABOUT_MODELS = {"size": Size, "threads": Threads, "device": Device, "dtype": DType, "pretrained": Pretrained}


def model_options(*without: str, **defaults: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options about its model in place of its parameter ``how``, a :class:`How`.

    Args:
        without: options that it does not have.
        defaults: of options, where they are not those of :class:`How`.
    """
    names = [name for name in _ABOUT_MODELS if name not in without]

    def decorated(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def run(**given: Any) -> None:
            how = How(**{**defaults, **{name: given.pop(name) for name in names}})
            command(**given, how=how)

        kept = inspect.signature(command)
        own = [
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=defaults.get(name, getattr(How, name)),
                annotation=_ABOUT_MODELS[name],
            )
            for name in names
        ]  # fmt: skip
        parameters: list[inspect.Parameter] = []
        for parameter in kept.parameters.values():
            keyword = parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            parameters += own if parameter.name == "how" else [keyword]
        run.__signature__ = kept.replace(parameters=parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        del run.__wrapped__  # its signature is another
        return run

    return decorated
