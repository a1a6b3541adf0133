"""What follows from times of variants that took turns: medians, ratios, and after how many tokens which one is ahead.

No model is in here. A variant is called "model/setting/way", of an encoder "batch/setting". A *round* holds, by variant, the ms
from the start of a run to each of its *marks*: numbers of new tokens, of which the first is 1. Variants that a round lacks were
not run in it; two of them are compared over the rounds that have both.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

from saint.lab.bench import Spread
from saint.lab.records import differences, plain

UNPRUNED = "unpruned"

Round = Mapping[str, Sequence[float]]


def together(rounds: Sequence[Round], names: Sequence[str]) -> list[Round]:
    """Return the rounds in which all of ``names`` ran."""
    return [one for one in rounds if all(name in one for name in names)]


def step(times: Sequence[float], marks: Sequence[int], mark: int) -> float:
    """Return ms per token behind the first, up to ``mark`` tokens."""
    return (times[marks.index(mark)] - times[0]) / (mark - 1)


# -- one variant ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Times:
    """One variant, in ms over the rounds.

    Attributes:
        first: to the first token, or of the whole run where there is nothing behind it.
        per_token: of each token behind it, by the number of new tokens.
        total: by the number of new tokens.
    """

    first: Spread
    per_token: dict[int, Spread]
    total: dict[int, Spread]

    @classmethod
    def of(cls, rounds: Sequence[Round], name: str, marks: Sequence[int]) -> "Times":
        """Of the rounds in which the variant ran, at least one."""
        runs = [one[name] for one in together(rounds, [name])]
        return cls(
            Spread.of([times[0] for times in runs]),
            {mark: Spread.of([step(times, marks, mark) for times in runs]) for mark in marks[1:]},
            {mark: Spread.of([times[i] for times in runs]) for i, mark in enumerate(marks)},
        )


# -- two variants -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SpeedUp:
    """Time of one variant over that of another: above 1, the other is faster.

    Attributes:
        of_medians: the quotient of the two medians.
        rounds: quotients of the same round.
    """

    of_medians: float
    rounds: Spread

    @classmethod
    def of(cls, slow: Sequence[float], fast: Sequence[float]) -> "SpeedUp":
        """Of two times per round, in the same order."""
        quotients = [a / b for a, b in zip(slow, fast, strict=True)]
        return cls(statistics.median(slow) / statistics.median(fast), Spread.of(quotients))


@dataclass(frozen=True)
class Gain:
    """What a variant gains on another one. Fields are those of :class:`Times`."""

    first: SpeedUp
    per_token: dict[int, SpeedUp]
    total: dict[int, SpeedUp]

    @classmethod
    def of(cls, rounds: Sequence[Round], base: str, name: str, marks: Sequence[int]) -> "Gain | None":
        """Return what ``name`` gains on ``base``; None where no round has both."""
        both = [(one[base], one[name]) for one in together(rounds, [base, name])]
        if not both:
            return None
        slow, fast = zip(*both, strict=True)
        at = [SpeedUp.of([times[i] for times in slow], [times[i] for times in fast]) for i in range(len(marks))]
        steps = {
            mark: SpeedUp.of([step(times, marks, mark) for times in slow], [step(times, marks, mark) for times in fast])
            for mark in marks[1:]
        }
        return cls(at[0], steps, dict(zip(marks, at, strict=True)))


# -- after how many tokens --------------------------------------------------------------------------------------------


class Line(NamedTuple):
    """The total time of an answer by its length: ``first + (tokens - 1) * step``, in ms."""

    first: float
    step: float

    def total(self, tokens: int) -> float:
        """Return ms for an answer of so many tokens."""
        return self.first + (tokens - 1) * self.step

    @classmethod
    def of(cls, runs: Sequence[Sequence[float]], marks: Sequence[int]) -> "Line":
        """Through the medians of the time to the first token and of the time per token up to the last mark."""
        return cls(
            statistics.median(times[0] for times in runs),
            statistics.median(step(times, marks, marks[-1]) for times in runs),
        )


class Crossing(NamedTuple):
    """For which lengths an answer of one variant is there before that of another.

    Attributes:
        ahead: for all lengths, for none, for those up to ``tokens``, or for those from ``tokens`` on.
        tokens: None where it is all or none.
    """

    ahead: Literal["always", "never", "until", "from"]
    tokens: int | None = None

    @classmethod
    def of(cls, one: Line, other: Line, most: int) -> "Crossing":
        """Compare answers of 1 to ``most`` tokens; a tie is not ahead."""
        ahead = [one.total(tokens) < other.total(tokens) for tokens in range(1, most + 1)]
        if all(ahead) or not any(ahead):
            return cls("always" if ahead[0] else "never")
        return cls("until", sum(ahead)) if ahead[0] else cls("from", most - sum(ahead) + 1)


@dataclass(frozen=True)
class Ahead:
    """When ``name`` is ahead of ``than``.

    Attributes:
        name, than: variants.
        found: from the medians over the rounds that have both.
        alike: of these rounds, those that alone give the same kind of answer.
        rounds: their number.
        low, high: fewest and most tokens among those ``alike``; None where ``found`` has no number.
    """

    name: str
    than: str
    found: Crossing
    alike: int
    rounds: int
    low: int | None
    high: int | None

    @classmethod
    def of(cls, rounds: Sequence[Round], name: str, than: str, marks: Sequence[int]) -> "Ahead | None":
        """Return None where no round has both."""
        both = together(rounds, [name, than])
        if not both:
            return None

        def crossing(among: Sequence[Round]) -> Crossing:
            lines = [Line.of([one[which] for one in among], marks) for which in (name, than)]
            return Crossing.of(*lines, marks[-1])

        found = crossing(both)
        alike = [alone for alone in map(crossing, [[one] for one in both]) if alone.ahead == found.ahead]
        tokens = [alone.tokens for alone in alike if alone.tokens is not None]
        return cls(name, than, found, len(alike), len(both), min(tokens, default=None), max(tokens, default=None))


def fastest(lines: Mapping[str, Line], most: int) -> list[tuple[int, str]]:
    """Return from how many tokens on which of ``lines`` has the least total, up to ``most`` tokens; a tie goes to the first."""
    found: list[tuple[int, str]] = []
    for tokens in range(1, most + 1):
        best = min(lines, key=lambda name: lines[name].total(tokens))
        if not found or found[-1][1] != best:
            found.append((tokens, best))
    return found


def misfit(runs: Sequence[Sequence[float]], marks: Sequence[int]) -> float:
    """Return the largest share by which the line misses the median total at a mark between the first and the last."""
    line = Line.of(runs, marks)
    totals = [statistics.median(times[i] for times in runs) for i in range(len(marks))]
    return max((abs(line.total(mark) / total - 1) for mark, total in zip(marks, totals, strict=True)), default=0.0)


# -- a part of a record -----------------------------------------------------------------------------------------------


def derived(rounds: Sequence[Round], told: Mapping[str, Any], marks: Sequence[int]) -> dict[str, Any]:
    """Return what follows from the rounds: times, gains on the unpruned variant, and which is ahead after how many tokens."""
    ran = [name for name in told if "flops" in told[name] and together(rounds, [name])]
    found: dict[str, Any] = {"times": {}, "gains": {}}
    for name in ran:
        found["times"][name] = asdict(Times.of(rounds, name, marks))
        base = unpruned_of(name, told)
        gain = Gain.of(rounds, base, name, marks) if base is not None and base in ran else None
        if base is None or gain is None:
            continue
        # of a decoded token the bound says little on a CPU: reading the weights takes the time
        bounds = {part: told[base]["flops"][part] / flops for part, flops in told[name]["flops"].items()}
        found["gains"][name] = {
            "over": base,
            **asdict(gain),
            "bounds": bounds,
            "of_the_bound": gain.first.of_medians / bounds["first"],
        }
    if len(marks) > 1:
        runs = {name: [one[name] for one in together(rounds, [name])] for name in ran}
        found["misfit"] = {name: misfit(taken, marks) for name, taken in runs.items()}
        pairs = [(name, than) for name in ran for than in compared_with(name, told) if than in ran]
        ahead = [Ahead.of(rounds, name, than, marks) for name, than in pairs]
        found["ahead"] = [{**asdict(one), "found": one.found._asdict()} for one in ahead if one is not None]
        found["fastest"] = []
        for names in beside(rounds, ran):
            shared = together(rounds, names)
            lines = {name: Line.of([one[name] for one in shared], marks) for name in names}
            order = [{"from": tokens, "variant": name} for tokens, name in fastest(lines, marks[-1])]
            found["fastest"].append({"among": names, "rounds": len(shared), "order": order})
    return found


def beside(rounds: Sequence[Round], names: Sequence[str]) -> list[list[str]]:
    """Return which of ``names`` ran in the same rounds, the most first: every such group that is no part of another."""
    groups = {tuple(name for name in names if name in one) for one in rounds}
    whole = [one for one in groups if not any(set(one) < set(other) for other in groups)]
    return [list(one) for one in sorted(whole, key=lambda one: (-len(one), one)) if len(one) > 1]


def unpruned_of(name: str, told: Mapping[str, Any]) -> str | None:
    """Return the unpruned variant of the same batch or way; of another model where a part has no such of its own."""
    first, setting, *way = name.split("/")
    if setting == UNPRUNED:
        return None
    own = "/".join([first, UNPRUNED, *way])
    others = [other for other in told if other.split("/")[1:] == [UNPRUNED, *way]]
    return own if own in told else next(iter(others), None)


def compared_with(name: str, told: Mapping[str, Any]) -> list[str]:
    """Return the variants beside which a length of answer is looked for: unpruned, and other ways of the same setting."""
    first, setting, way = name.split("/")
    cache, *compiled = way.split(" ")
    found = [unpruned_of(name, told)]
    if cache == "static":
        found.append("/".join([first, setting, " ".join(["dynamic", *compiled])]))
    if compiled:
        found.append("/".join([first, setting, cache]))
    return [other for other in found if other is not None]


def section(
    before: Mapping[str, Any] | None,
    depends: Mapping[str, Any],
    told: Mapping[str, Any],
    taken: Sequence[Round],
    call: Mapping[str, Any],
) -> dict[str, Any]:
    """Return a part of the record with these rounds added.

    Args:
        before: what the record holds of it.
        depends: conditions, which must be those of the rounds before.
        told: what is known of the variants that were asked for.
        taken: new rounds.
        call: what the record says of the call that took them.

    Raises:
        ValueError: the rounds before were measured under other conditions.
    """
    conditions = plain(depends)
    old = before or {"conditions": conditions, "calls": [], "variants": {}, "rounds": []}
    if changed := differences(old["conditions"], conditions):
        raise ValueError(
            f"rounds of the same conditions are expected, and these changed: {changed}. Give --anew to forget the rounds before, "
            "or another --out"
        )
    known, rounds = {**old["variants"], **told}, [*old["rounds"], *taken]
    return {
        "conditions": conditions,
        "calls": [*old["calls"], {**call, "rounds": len(taken), "variants": sorted({n for one in taken for n in one})}],
        "variants": known,
        "derived": derived(rounds, known, depends["marks"]),
        "rounds": rounds,
    }
