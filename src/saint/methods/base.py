"""What a method may ask for and what it returns.

A method is a frozen dataclass: its fields are its settings, ``select`` its only decision, for which ``score`` may be enough
(:class:`Scorer`). Gathering, protection of prefix tokens and ragged batches exist once, outside.
"""

import dataclasses
import inspect
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from .. import graph, greedy
from ..errors import UnknownSettingError
from ..tokens import Candidates, Selection, Tower

Budget = str | int | float


class _Settings:
    """The signature of a method's class: that of its ``__init__``, which ``__new__`` would hide from help() and editors."""

    def __get__(self, _: object, cls: type) -> inspect.Signature:
        own = inspect.signature(cls.__init__)  # type: ignore[misc]
        return own.replace(parameters=list(own.parameters.values())[1:], return_annotation=inspect.Signature.empty)


@dataclasses.dataclass(frozen=True)
class Method(ABC):
    """Base of all methods."""

    name: ClassVar[str]  # registry name, lower_snake
    paper: ClassVar[str]  # citation key or URL of the publication
    stages: ClassVar[frozenset[str]]  # stages the method is defined for
    # what a stage computes on demand: "last_query" fills `attention`, "question", "first_query" and "raters" `rows`, "frames"
    # `cells`, "pixels" `pixels`, `grids` and `cells` in front of block 0, and with "channels" only if it is known which values
    # are of one channel; "resized" shows the encoder smaller pictures and fills `grids`; "text" fills `text` in front of a
    # language model, and what `needs.TOWER` names fills `tower` there; inside an encoder what `needs.TOWER_ATTENTION` names
    # fills `rows`
    needs: ClassVar[frozenset[str]] = frozenset()
    merges: ClassVar[bool] = False  # tokens go into survivors instead of away; not in the connector stage
    # of methods that merge: a survivor becomes the mean of what it stands for, or stays as it is
    averages: ClassVar[bool] = True

    __signature__: ClassVar[inspect.Signature] = _Settings()  # type: ignore[assignment]

    def __new__(cls, *_: Any, **settings: Any) -> Self:
        """Refuse settings that there are not, and say which there are."""
        known = cls.__signature__.parameters
        if unknown := [name for name in settings if name not in known]:
            raise UnknownSettingError(cls.__name__, unknown[0], list(known))
        return super().__new__(cls)

    @abstractmethod
    def select(self, candidates: Candidates) -> Selection | None:
        """Choose the survivors of one drop point; None when everything stays."""

    def asks(self, slot: str) -> frozenset[str]:
        """Return which of its ``needs`` a stage of a slot computes for it: all, where no slot shows something of its own."""
        return self.needs

    def layers(self, stage: str, depth: int) -> list[int]:
        """Layers used when the plan names none."""
        raise ValueError(f"{type(self).__name__} has no default layers for {stage}; give Stage(..., layers=[...])")

    def tower_layers(self, depth: int, read: int, prefix: int) -> tuple[int, ...]:
        """Layers of the vision tower that it looks at, where it needs something of :data:`saint.needs.TOWER`.

        Args:
            depth: layers of the tower.
            read: the 0-based layer behind which the language model's features are read.
            prefix: protected tokens in front of its patches; 0: it has no class token.
        """
        return (read,)

    @property
    def fixed(self) -> int | float | None:
        """Return what it keeps whatever the picture, a number or a share of the tokens; None where pictures or layers decide."""
        return getattr(self, "keep", None)

    def final(self, total: int) -> int:
        """Tokens that a complete stage of a fixed budget leaves of ``total``."""
        assert self.fixed is not None
        return final_keep(self.fixed, total)

    def keeping(self, keep: int | float) -> Self:
        """The same method with another fixed budget.

        Raises:
            ValueError: a wrong number, or a method that takes none.
        """
        if "keep" not in {field.name for field in dataclasses.fields(self)}:
            raise ValueError(f"{type(self).__name__} takes no number of tokens to keep")
        return dataclasses.replace(self, **{"keep": keep})

    def voting(self, threshold: float) -> Self:
        """The same method with a number of tokens for each picture, by a threshold.

        Raises:
            ValueError: a method that has none.
        """
        raise ValueError(f"{type(self).__name__} has no threshold by which pictures decide")

    @property
    def keeps_everything(self) -> bool:
        """Tell whether its budget says that nothing may leave."""
        return isinstance(self.fixed, float) and self.fixed == 1.0

    @property
    def votes(self) -> bool:
        """Tell whether the picture decides how many tokens it keeps."""
        return False

    @property
    def shared(self) -> bool:
        """Tell whether the samples of a batch decide that together, so that all keep the same number."""
        return False

    def flops(self, before: int, after: int, dim: int) -> float:
        """FLOPs of choosing ``after`` of ``before`` tokens of one sample by keys of ``dim`` channels; 0 where they are few."""
        return 0.0

    def size_bias(self) -> float:
        """Of merging methods: beta, where later attention adds beta * log(size) to the logits of a token's key."""
        return 0.0

    def validate(self, total: int, steps: int) -> None:  # noqa: B027  # most methods accept any number
        """Raise ``ValueError`` when ``total`` candidates over ``steps`` drop points cannot work."""

    def to_dict(self) -> dict[str, Any]:
        return {"method": self.name, **dataclasses.asdict(self)}


@dataclasses.dataclass(frozen=True)
class FixedBudget(Method):
    """Base of methods that keep as many tokens as they are told, whatever the picture."""

    keep: int | float = 0.5  # survivors of the stage: a number (int) or a fraction of the candidates (float)

    def __post_init__(self) -> None:
        check_budget(self.keep)

    def validate(self, total: int, steps: int) -> None:
        final_keep(self.keep, total)

    def select(self, candidates: Candidates) -> Selection | None:
        goal = goals(self.keep, candidates)
        return None if goal == candidates.tokens.lengths else self.choose(candidates, goal)

    @abstractmethod
    def choose(self, candidates: Candidates, goal: tuple[int, ...]) -> Selection:
        """Choose exactly ``goal[b]`` survivors of sample b. Called only when at least one token must be dropped."""


@dataclasses.dataclass(frozen=True)
class Scorer(FixedBudget):
    """Base of methods that keep the tokens of highest score, as many as they are told."""

    @abstractmethod
    def score(self, candidates: Candidates) -> Tensor:
        """Score the candidates, [B, N]: high stays, of equal ones the earlier. Padding may hold anything."""

    def choose(self, candidates: Candidates, goal: tuple[int, ...]) -> Selection:
        return Selection.from_scores(self.score(candidates), goal, candidates.tokens)


@dataclasses.dataclass(frozen=True)
class PixelMethod(Method):
    """Base of methods that look at the pixels of patches, in front of block 0. The picture decides how many leave."""

    stages: ClassVar[frozenset[str]] = frozenset({"vision"})
    needs: ClassVar[frozenset[str]] = frozenset({"pixels", "channels"})

    @property
    def votes(self) -> bool:
        return True

    @abstractmethod
    def leaves(self, candidates: Candidates, pixels: Tensor) -> Tensor:
        """Mark what may leave, bool [B, N]; ``pixels`` [B, N, C, V], see :class:`saint.tokens.Facts`. No padding."""

    def select(self, candidates: Candidates) -> Selection | None:
        tokens, pixels = candidates.tokens, candidates.facts.pixels
        if pixels is None:
            raise ValueError(f'{type(self).__name__} looks at pixels, which are shown with placement="input" only')
        leaves = self.leaves(candidates, pixels)
        found = host_counts(leaves.sum(1))
        # the earlier ones leave first, and one token stays at least
        drop = spared(tuple(min(r, n - 1) for r, n in zip(found, tokens.lengths, strict=True)), candidates)
        if not any(drop):
            return None
        if drop != found:
            leaves &= leaves.cumsum(1) <= torch.tensor(drop, device=leaves.device).unsqueeze(1)
        keep = ~leaves if tokens.valid is None else ~leaves & tokens.valid
        return Selection.from_mask(keep, tuple(n - r for n, r in zip(tokens.lengths, drop, strict=True)))


@dataclasses.dataclass(frozen=True)
class Greedy(FixedBudget):
    """Base of methods that take one token after another, each time the one that gains most, until as many as they are told."""

    @abstractmethod
    def gain(self, candidates: Candidates) -> greedy.Gain:
        """Give what each token adds to a subset, which is empty yet."""

    def flops(self, before: int, after: int, dim: int) -> float:
        return 2 * before**2 * dim  # similarities of all pairs

    def choose(self, candidates: Candidates, goal: tuple[int, ...]) -> Selection:
        with graph.full_precision(candidates.features.device):
            return greedy.subset(self.gain(candidates), goal, candidates.tokens)


def relevance(candidates: Candidates) -> Tensor:
    """Tell how much the text of each prompt is about each candidate, float32 [B, N] in [0, 1]; padding: anything.

    The mean cosine of its embedding with those of the text, less the smallest of the sample, over the largest less the
    smallest; 1 of all where they are equal, and where there is no text.

    Raises:
        ValueError: there is no text to look at.
    """
    text, valid = candidates.facts.text, candidates.tokens.valid
    if text is None:
        raise ValueError("the text of the prompts is not shown here: relevance is for the connector stage")
    with graph.full_precision(text.device):
        words = torch.nn.functional.normalize(text.float(), dim=-1)
        count = (words != 0).any(-1).sum(1).clamp_min(1)  # of rows that are no padding
        about = (graph.metric(candidates.features) @ (words.sum(1) / count.unsqueeze(1)).unsqueeze(-1)).squeeze(-1)
    low = about if valid is None else about.masked_fill(~valid, torch.inf)
    high = about if valid is None else about.masked_fill(~valid, -torch.inf)
    low, high = low.amin(1, keepdim=True), high.amax(1, keepdim=True)
    return torch.where(high > low, (about - low) / (high - low).clamp_min(1e-30), 1.0)


def likeness(values: Tensor, slots: Tensor) -> Tensor:
    """Compare some tokens with all: cosines, float32 [B, K, N]; values [B, N, C], slots int64 [B, K]."""
    points = graph.metric(values)
    with graph.full_precision(values.device):
        return points.gather(1, slots.unsqueeze(-1).expand(-1, -1, points.shape[2])) @ points.mT


def tower_of(candidates: Candidates) -> Tower:
    """Give what the vision tower showed of the candidates.

    Raises:
        ValueError: nothing is shown of it.
    """
    if candidates.facts.tower is None:
        raise ValueError("the vision tower is not shown here: its attention and keys are for the connector stage")
    return candidates.facts.tower


def host_counts(counts: Tensor) -> tuple[int, ...]:
    """Votes [B] as Python ints; under ``torch.compile`` the graph breaks here."""
    if torch.compiler.is_exporting():
        raise RuntimeError(
            "a budget by votes gives every batch other lengths, which an exported graph cannot have: give a number or a fraction "
            "as keep, or freeze the plan (saint.freeze)"
        )
    if torch.compiler.is_compiling():
        _warn_of_recompiling()
    return _host_counts(counts) if torch.compiler.is_compiling() else tuple(counts.tolist())


@torch.compiler.disable
def _warn_of_recompiling() -> None:
    global _warned_of_recompiling
    if not _warned_of_recompiling:
        _warned_of_recompiling = True
        warnings.warn(
            "a budget by votes gives every batch other lengths: under torch.compile each is compiled anew until the recompile "
            "limit, then runs eagerly; give a number or a fraction as keep for one graph",
            stacklevel=2,
        )


_warned_of_recompiling = False


@torch.compiler.disable
def _host_counts(counts: Tensor) -> tuple[int, ...]:
    return tuple(counts.tolist())


# -- checks of settings: every method uses these, so that none takes what another refuses --------------------------------

HUGE = 2**31  # no count of tokens, layers or neighbours gets here; beyond 2**63 tensors overflow


def check_flag(name: str, value: Any) -> None:
    """Raise ``ValueError`` unless ``value`` is True or False: a truth test would take "false", 0 and NaN."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False (true or false in JSON, without quotes), got {_shown(value)}")


def check_integer(name: str, value: Any, low: int, high: int = HUGE, hint: str = "") -> None:
    """Raise ``ValueError`` unless ``value`` is an int in [``low``, ``high``]; bools and floats are none."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        most = f" and <= {high}" if _above(value, high) else ""
        raise ValueError(f"{name} must be an integer >= {low}{most}, got {_shown(value)}{hint and f'; {hint}'}")


def check_number(name: str, value: Any, low: float, high: float, hint: str = "") -> None:
    """Raise ``ValueError`` unless ``value`` is a finite int or float in [``low``, ``high``]; bools are none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise ValueError(f"{name} must be a number in [{low:g}, {high:g}], got {_shown(value)}{hint and f'; {hint}'}")


def check_budget(budget: Budget, dynamic: tuple[str, ...] = (), name: str = "keep") -> None:
    """Raise ``ValueError`` unless ``budget`` is one of ``dynamic``, an int >= 1 or a fraction in (0, 1]."""
    if isinstance(budget, str):
        ok = budget in dynamic
    elif isinstance(budget, bool):
        ok = False
    elif isinstance(budget, int):
        ok = 1 <= budget <= HUGE
    else:
        ok = isinstance(budget, float) and 0.0 < budget <= 1.0
    if not ok:
        words = "".join(f"'{word}', " for word in dynamic)
        raise ValueError(
            f"{name} must be {words}an int >= 1 (tokens kept) or a float in (0, 1] (fraction of candidates kept), "
            f"got {_shown(budget)}"
        )


def _above(value: Any, high: int) -> bool:
    return isinstance(value, int) and value > high


def _shown(value: Any) -> str:
    text = repr(value) if not _above(value, 10**300) else "a larger int"  # Python refuses to print ints of 4300 digits
    return text if len(text) <= 80 else f"{text[:77]}..."


# -- budgets over drop points -----------------------------------------------------------------------------------------


def final_keep(budget: int | float, total: int) -> int:
    """Tokens that a complete stage leaves: the int itself, or the fraction of ``total`` rounded half up, at least 1."""
    if isinstance(budget, int):
        if budget > total:
            raise ValueError(
                f"keep={budget} tokens to keep, but there are only {total} candidates; "
                f"use an int <= {total} or a fraction in (0, 1]"
            )
        return budget
    return max(1, math.floor(budget * total + 0.5))


def scheduled_keep(keep: int, total: int, step: int, steps: int) -> int:
    """Survivors after drop point ``step`` of ``steps`` when ``keep`` of ``total`` survive the stage.

    Geometric: every drop point removes the same share, so no single layer is asked for more than the others.
    """
    if step == steps - 1:
        return keep
    return math.ceil(total * (keep / total) ** ((step + 1) / steps))


def goals(keep: int | float, candidates: Candidates) -> tuple[int, ...]:
    """Survivors of each sample after this drop point when the stage keeps ``keep`` (int: tokens, float: fraction)."""
    kept = (
        scheduled_keep(final_keep(keep, total), total, candidates.step, candidates.steps)
        for total in candidates.tokens.total
    )
    if candidates.facts.min_keep is None:
        return tuple(kept)
    # of what is there: a sample that keeps more than its schedule at one drop point has more in front of the next
    bounds = zip(kept, candidates.facts.min_keep, candidates.tokens.lengths, strict=True)
    return tuple(min(max(k, least), n) for k, least, n in bounds)


def to_drop(budget: int | float, candidates: Candidates) -> tuple[int, ...]:
    """Tokens of each sample that go at this drop point when the stage keeps ``budget`` (int: tokens, float: fraction)."""
    left = goals(budget, candidates)
    return tuple(n - k for n, k in zip(candidates.tokens.lengths, left, strict=True))


def spared(drop: tuple[int, ...], candidates: Candidates) -> tuple[int, ...]:
    """Cap ``drop`` so that as many tokens of each sample stay as ``candidates.facts.min_keep`` says."""
    if candidates.facts.min_keep is None:
        return drop
    bounds = zip(drop, candidates.tokens.lengths, candidates.facts.min_keep, strict=True)
    return tuple(max(0, min(r, n - least)) for r, n, least in bounds)


def check_steps(budget: int | float, total: int, steps: int, most: Callable[[int], int], verb: str) -> None:
    """Raise ``ValueError`` where a drop point would have to ``verb`` more than ``most(tokens in front of it)``, about half."""
    keep, before = final_keep(budget, total), total
    for step in range(steps):
        after = scheduled_keep(keep, total, step, steps)
        if before - after > most(before):
            raise ValueError(
                f"keep={budget!r} keeps {keep} of {total} tokens, but each of the {steps} drop point(s) can {verb} at most "
                f"half: give more layers, or keep at least {math.ceil(total / 2**steps)} (a share of {0.5**steps:.3g})"
            )
        before = after


def check_possible(method: Method, steps: int, fewest: int) -> None:
    """Raise ``ValueError`` where ``method`` keeps a share that ``steps`` drop points reach with no number of candidates.

    Args:
        method: of a stage.
        steps: its drop points.
        fewest: candidates that come to it at least; of very few, rounding lets any share through.
    """
    if not isinstance(method.fixed, float):
        return
    for total in (*range(fewest, 64), *(2**power for power in range(31, 5, -1))):
        try:
            return method.validate(total, steps)
        except ValueError as error:
            told = error
    raise ValueError(f"{told}; it is the same for any other number of tokens")


def survivors(method: Method, total: int | None) -> int | None:
    """Tokens that a stage leaves of ``total`` (None: any number), where that is one number, whatever the picture."""
    budget = method.fixed
    if not isinstance(budget, int | float):
        return None
    if total is None:
        return budget if isinstance(budget, int) else None
    return method.final(total)


def floored(drop: tuple[int, ...], candidates: Candidates, floor: float) -> tuple[int, ...]:
    """Cap ``drop`` so that ceil(floor * original candidates) survive; warn when that binds."""
    tokens = candidates.tokens
    allowed = (max(0, n - math.ceil(floor * t)) for n, t in zip(tokens.lengths, tokens.total, strict=True))
    capped = tuple(min(r, a) for r, a in zip(drop, allowed, strict=True))
    if capped != drop:
        warnings.warn(
            f"the floor of {floor:g} of the candidates held tokens back; the keys of this model may share a large "
            "common component: try center=True or a higher threshold",
            stacklevel=2,
        )
    return spared(capped, candidates)


def step_possible(method: Method, came: int, left: int) -> bool:
    """Tell whether ``method`` can leave ``left`` of ``came`` tokens at one drop point."""
    step = method.keeping(left / came)
    try:
        step.validate(came, 1)
    except ValueError:
        return False
    return step.final(came) == left
