"""`saint compare`: several plans for MODEL in one table: work, speed, agreement, scores."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from . import options
from .common import doing, finish, progress, save, show, warn_busy

if TYPE_CHECKING:
    from ...plans import Plan
    from ..eval import Report
    from ..kinds import Subject
    from ..sources.photos import Photo


class Asking(NamedTuple):
    """What a comparison looks at, as it was typed."""

    images: Path | None
    questions: Path | None
    prompt: str | None
    labels: bool
    limit: int


class Looked(NamedTuple):
    """What it looks at, read.

    Attributes:
        photos: that are timed, or some of them.
        prompt: that is asked while timing; None: to describe the picture.
        score: evaluates plans on all of it.
        left_out: files that were no pictures, for the record.
    """

    photos: "Sequence[Photo]"
    prompt: str | None
    score: "Callable[[Mapping[str, Plan], Callable[[int], None]], Report]"
    samples: int
    left_out: Sequence[Any]


@options.model_options(dtype="float32")
def compare(
    model: Annotated[str, typer.Argument(help=options.MODEL_HELP)],
    plans: Annotated[
        str,
        typer.Option("--plans", help="recipes, .json files and shares of the work, with commas: a.json,vit/match,0.5"),
    ],
    images: options.Images = None,
    questions: options.Questions = None,
    prompt: options.Prompt = None,
    labels: Annotated[
        bool, typer.Option("--labels", help="encoders: folders below --images are classes, and accuracy is scored too")
    ] = False,
    limit: options.Limit = 50,
    batch: Annotated[int, typer.Option(min=1, help="pictures per timed forward")] = 1,
    repeats: Annotated[int | None, typer.Option(min=1, help="timed rounds, as of saint bench")] = None,
    warmup: Annotated[int, typer.Option(min=0, help="rounds before them")] = 3,
    new_tokens: Annotated[
        int | None, typer.Option(min=1, help="vision-language models: tokens generated while timing [default: 32]")
    ] = None,
    json: options.Json = None,
    *,
    how: options.How,
) -> None:
    """Compare plans for MODEL: FLOPs left, tokens kept, measured speed-up, agreement with the unpruned model, scores.

    Each is timed as saint bench does and scored as saint eval does, on the same pictures.
    """
    from ..kinds import kind_of
    from ..loading.plans import choose_several
    from ..records import environment

    choices = choose_several([text for text in (part.strip() for part in plans.split(",")) if text])
    if not choices:
        raise ValueError("--plans names at least one plan: recipes, .json files or shares of the work, with commas")
    kind = kind_of(model)
    kind.check(
        model,
        {
            "--size": how.size,
            "--prompt": prompt,
            "--questions": questions,
            "--labels": labels,
            "--new-tokens": new_tokens,
        },
    )
    subject = how.load(kind, model)
    looked = _LOOKS[subject.gives](subject, Asking(images, questions, prompt, labels, limit), model)
    made = {choice.name: subject.planned(choice) for choice in choices}
    speeds, timed = _speeds(subject, made, looked, batch, repeats, warmup, new_tokens)
    with progress("scoring", looked.samples) as tick:
        report = looked.score(made, tick)
    record = {
        "kind": "compare",
        "model": model,
        "pretrained": how.pretrained,
        **subject.told(prompt),
        **report.to_dict(),
        "speeds": speeds,
        "timing": timed,
        "left_out": looked.left_out,
        "environment": environment(subject.device),
    }
    show(record)
    warn_busy(timed["load_average"], {})
    if json is not None:
        save(json, record)
    finish([(failure.where, failure.reason) for failure in report.failures], "scored")


def _speeds(
    subject: "Subject", plans: "Mapping[str, Plan]", looked: Looked, batch: int, repeats: int | None, warmup: int,
    new_tokens: int | None,
) -> tuple[dict[str, Any], dict[str, Any]]:  # fmt: skip
    """Time each plan; return what it leaves and how fast it is, and the conditions of the timing."""
    pictures = [photo.image for photo in looked.photos]
    speeds: dict[str, Any] = {}
    timed: dict[str, Any] = {}
    for name, plan in plans.items():
        with doing(f"timing {name}"):
            result = subject.bench(
                {name: plan}, pictures, prompt=looked.prompt, new_tokens=new_tokens, repeats=repeats, warmup=warmup,
                extras=False, batch=batch,
            )  # fmt: skip
        which = [looked.photos[i].name for i in result.timed_of(len(pictures))]
        speeds[name] = {
            "flops": result.flops_left, "kept": result.kept, "speedup": vars(result.gain), "bound": result.flops_bound,
            "timed": which,
        }  # fmt: skip
        timed = {key: value for key, value in result.conditions.items() if key not in ("times_ms", "steps_ms")}
    return speeds, timed


# -- what there is to look at -----------------------------------------------------------------------------------------


def _look_at_images(subject: Any, asked: Asking, model: str) -> Looked:
    from ..eval import evaluate_images, find_samples
    from ..sources.items import Item
    from ..sources.listing import left_facts
    from ..sources.samples import Samples

    if asked.images is None:
        from ..demo import photos

        samples = Samples([Item.photo(name, photo) for name, photo in photos()[: asked.limit]])
    else:
        samples = find_samples(str(asked.images), limit=asked.limit, labels=asked.labels)
    facts = {"model": model, "limit": asked.limit}
    return Looked(
        _photos(samples.items),
        None,
        lambda plans, tick: evaluate_images(
            subject.model, samples, plans, inputs=subject.pixels, batch=8, facts=facts, tick=tick
        ),
        len(samples.items),
        left_facts(samples.left_out),
    )


def _look_at_questions(subject: Any, asked: Asking, model: str) -> Looked:
    from ..eval import evaluate_vqa, find_samples, read_questions
    from ..sources.items import evenly
    from ..sources.listing import left_facts
    from ..sources.photos import Photo
    from ..sources.questions import Question, default_prompt

    if asked.images is None:
        raise ValueError("give --images, and --questions or --prompt, to compare plans of a vision-language model on")
    left: Any = {}
    if asked.questions is not None:
        found, unreadable = read_questions(asked.questions, asked.images)
        prompt = default_prompt
    else:
        samples = find_samples(str(asked.images), limit=asked.limit, labels=False)
        words = asked.prompt or "Describe the image."
        found = [Question(photo.image, words, id=photo.name, where=photo.name) for photo in _photos(samples.items)]
        unreadable, left = samples.unreadable, samples.left_out

        def prompt(question: Question) -> str:
            return question.question

    found = evenly(found, asked.limit)
    first = found[0].item(prompt(found[0]))
    picture = first.load()
    assert picture is not None, "of a question"
    facts = {"model": model, "limit": asked.limit}
    return Looked(
        [Photo(first.id or first.where, picture)],
        first.prompt,
        lambda plans, tick: evaluate_vqa(
            subject.model, subject.processor, found, plans, prompt=prompt, facts=facts, unreadable=unreadable, tick=tick
        ),
        len(found),
        left_facts(left),
    )


def _photos(items: "Sequence[Any]") -> "list[Photo]":
    """Read what can be read; scoring says of the others why not."""
    from ..sources.photos import Photo

    photos = []
    for item in items:
        try:
            photos.append(Photo(item.id, item.load()))
        except (OSError, ValueError):
            continue
    if not photos:
        raise ValueError(f"none of the {len(items)} image(s) can be read, the first of them {items[0].where}")
    return photos


_LOOKS = {"embeddings": _look_at_images, "answers": _look_at_questions}  # by what a model gives
