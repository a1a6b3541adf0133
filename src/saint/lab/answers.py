"""Answers in words: normalised, and scored against references."""

import re
import string
from collections.abc import Sequence

from ..extras import require

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans({c: " " for c in string.punctuation.replace("'", "")})
LETTERS = string.ascii_uppercase


def normalise(text: str) -> str:
    """Lower case, without articles (a, an, the) and punctuation, single spaces. A point or comma inside a number stays.

    Example:
        >>> normalise("The  Red, bus."), normalise("3.5")
        ('red bus', '3.5')
    """
    kept = re.sub(r"(?<=\d)[.,](?=\d)", lambda found: {".": "\0", ",": "\1"}[found[0]], text.lower())
    cleaned = _ARTICLES.sub(" ", kept.translate(_PUNCTUATION))
    return " ".join(cleaned.split()).replace("\0", ".").replace("\1", ",")


def exact(prediction: str, answers: Sequence[str]) -> float:
    """1 if the normalised prediction equals one of the normalised answers, else 0."""
    said = normalise(prediction)
    return float(any(said == normalise(answer) for answer in answers))


def anls(prediction: str, answers: Sequence[str], threshold: float = 0.5) -> float:
    """Average normalised Levenshtein similarity of one question (Biten et al., ICCV 2019).

    ``1 - d`` of the closest answer, where d is the edit distance (insertions, deletions, replacements) over the longer length,
    of lower-case texts without outer space; 0 where ``d >= threshold``.

    Raises:
        MissingExtraError: rapidfuzz is not installed.

    Example:
        >>> anls("kitten", ["mitten"]), anls("dog", ["cat"])
        (0.8333333333333334, 0.0)
    """
    edits = require("rapidfuzz.distance", "eval").Levenshtein
    said = " ".join(prediction.lower().split())
    best = 0.0
    for answer in answers:
        want = " ".join(answer.lower().split())
        distance = edits.normalized_distance(said, want)
        if distance < threshold:
            best = max(best, 1 - distance)
    return best


def chosen(prediction: str, choices: Sequence[str]) -> int | None:
    """Which choice a text names: its text, a leading letter ("B", "(b)", "B. red"), "answer is B", or the only one mentioned.

    Returns:
        Index into ``choices``; None where the text names none, or several.

    Example:
        >>> chosen("B. red", ["blue", "red"]), chosen("it is red", ["blue", "red"]), chosen("?", ["blue", "red"])
        (1, 1, None)
    """
    said, texts = normalise(prediction), [normalise(choice) for choice in choices]
    if said in texts:
        return texts.index(said)
    last = LETTERS[len(choices) - 1]
    span = f"[A-{last}a-{last.lower()}]"
    patterns = (
        rf"\s*\(?({span})\s*(?:[.):,]|$)",  # B, B., (B), B: red
        rf".*\banswer\s*(?:is|:)?\s*:?\s*\(?({span})\b",
        rf".*\boption\s*\(?({span})\b",
    )
    for pattern in patterns:
        if found := re.match(pattern, prediction, re.IGNORECASE | re.DOTALL):
            return LETTERS.index(found[1].upper())
    mentioned = [i for i, text in enumerate(texts) if text and re.search(rf"\b{re.escape(text)}\b", said)]
    return mentioned[0] if len(mentioned) == 1 else None


def choice(prediction: str, answers: Sequence[str], choices: Sequence[str]) -> float:
    """1 if the prediction names the right choice, else 0. Answers are letters or texts of choices."""
    named = chosen(prediction, choices)
    return float(named is not None and named in right_choices(answers, choices))


def right_choices(answers: Sequence[str], choices: Sequence[str]) -> set[int]:
    """Indices of the choices that ``answers`` give as letters or texts.

    Raises:
        ValueError: an answer is neither.
    """
    texts = [normalise(text) for text in choices]
    right = set()
    for answer in answers:
        letter = answer.strip().strip("().").upper()
        if normalise(answer) in texts:
            right.add(texts.index(normalise(answer)))
        elif len(letter) == 1 and letter in LETTERS[: len(choices)]:
            right.add(LETTERS.index(letter))
        else:
            raise ValueError(f"the answer {answer!r} is none of the choices {list(choices)} nor one of their letters")
    return right
