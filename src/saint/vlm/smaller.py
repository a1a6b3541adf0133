"""Smaller pictures through the processor of a model, also where the model itself cannot be shown smaller ones.

What a processor can be asked for is read off it: it may follow the size of a picture, and it may have a limit (of tiles, of
pixels, of tokens) that can be turned down. What comes of it is counted, never computed here.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple

from ..errors import UnsupportedModelError
from ..upstream.names import (
    CALL_OPTIONS,
    IDS,
    IMAGE_COUNTS,
    IMAGE_PROCESSOR,
    LONGEST_EDGE,
    PICTURE_SIZE,
    PROMPT_COUNTS,
    SHORTEST_EDGE,
)
from .prompts import with_picture

Size = tuple[int, int]  # height and width in pixels
Call = tuple[Size, Mapping[str, Any]]  # a picture and the options that the processor is called with
Count = Callable[[Call], int | None]

_AT_MOST, _AT_LEAST = "max_", "min_"  # what the names of options begin with that say so
_PATCH = 14 * 14  # pixels: fewer than a token shows where pictures are not made larger
_WASTE = 4  # how many times fewer it may show in a smaller picture
_SHAPES = (64, 64), (448, 448), (500, 2000), (2000, 2000)  # of pictures that differ in whatever a processor looks at
_USUAL = 224  # pixels of a side that any processor takes
_STEPS = 64  # how finely is searched where each step takes a picture
_NEAREST, _BICUBIC = 0, 3  # PIL's numbers for them


@dataclass(frozen=True)
class SmallerPictures:
    """Pictures and options with which a processor makes fewer visual tokens.

    ``processor(text=..., images=found.images, **found.options)`` makes the inputs of a model.

    Attributes:
        images: for the processor, in the order they were given; the very ones where they were not shrunk.
        options: keyword arguments of its call, also ``processor_kwargs`` of ``apply_chat_template``.
        before: visual tokens of each picture without, where it is alone in its prompt: of several, some processors cut none.
        after: and with them.
        by: what was turned down: "picture", or an option of the processor; None where all pictures had few enough.
    """

    images: list[Any]
    options: dict[str, Any]
    before: tuple[int, ...]
    after: tuple[int, ...]
    by: str | None


def smaller_pictures(processor: Any, images: Sequence[Any], pixels: int | float) -> SmallerPictures:
    """Find what makes a processor of transformers turn pictures into fewer visual tokens, for one call with all of them.

    Each picture is shrunk; or, for all of them, one of the limits is turned down that the processor takes in its call (its
    options called ``max_...``, and those in its ``size``). Of what leaves every picture few enough tokens, that is taken which
    leaves most; where that is the same, pictures are shrunk. None is shrunk that the processor would make much larger again.

    Args:
        processor: of a vision-language model, with its tokenizer.
        images: PIL images.
        pixels: share of the visual tokens that a picture has without, in (0, 1], or (an int) how many it has at most. What a
            processor scales down anyway is shrunk from what it would have been.

    Returns:
        Pictures and options for the call, with the numbers of visual tokens.

    Raises:
        UnsupportedModelError: the processor makes as many tokens of any picture whatever is turned down, or writes none.
        ValueError: so few are not possible, with the least that is, or of a picture that is small already; or ``pixels`` is
            neither a share nor a number.
        TypeError: what is no picture.
    """
    _check(pixels, images)
    sizes = [(image.height, image.width) for image in images]
    if not sizes:
        return SmallerPictures([], {}, (), (), None)
    counting = _Counting.of(processor, images[0])
    before = tuple(counting.whole((size, {})) for size in sizes)
    most = [pixels if isinstance(pixels, int) else math.floor(pixels * count) for count in before]
    if all(count <= limit for count, limit in zip(before, most, strict=True)):
        return SmallerPictures(list(images), {}, before, before, None)
    tried = {"picture": _pictures(counting, sizes, most)}
    tried |= {limit.name: _turned_down(counting, limit, sizes, most) for limit in _limits(processor)}
    found = {name: one for name, one in tried.items() if one is not None and one.fits}
    if not found:
        raise _too_few(counting, pixels, sizes, before, tried)
    by = max(found, key=lambda name: sum(found[name].counts))  # of equals the first: the picture
    calls = found[by].calls
    shown = [_resized(image, size) for image, (size, _) in zip(images, calls, strict=True)]
    return SmallerPictures(shown, dict(calls[0][1]), before, tuple(found[by].counts), by)


def _check(pixels: int | float, images: Sequence[Any]) -> None:
    share = isinstance(pixels, float) and 0 < pixels <= 1
    if not share and (isinstance(pixels, bool) or not isinstance(pixels, int) or pixels < 1):
        raise ValueError(
            f"pixels is a share of the visual tokens in (0, 1], or how many a picture has at most (an int); got {pixels!r}"
        )
    for image in images:
        if not (hasattr(image, "resize") and hasattr(image, "height")):
            raise TypeError(f"images are PIL images; got {type(image).__name__}")


# -- what a processor makes of a picture --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Counting:
    """Counts the visual tokens of pictures, each once.

    Attributes:
        processor: makes them.
        picture: that is shown to it, in all sizes.
        text: a prompt with one picture.
        token: the placeholder, found as what a picture adds most of: several processors say another.
        marks: what the processor's own count, where it has one, holds besides: tokens around a picture.
        known: numbers that were asked for.
    """

    processor: Any
    picture: Any
    text: str
    token: int = 0
    marks: int = 0
    known: dict[Any, int] = field(default_factory=dict)

    @classmethod
    def of(cls, processor: Any, picture: Any) -> "_Counting":
        """Find out how to count, with a picture that is shown in all sizes."""
        size = max(_USUAL, picture.height), max(_USUAL, picture.width)  # a tiny one may be one token, as a mark is
        bare = cls(processor, picture.convert("RGB"), with_picture(processor, ""))
        prompt = Counter(bare._prompt((size, {})))
        written = Counter(processor.tokenizer(bare.text)["input_ids"])
        token, added = max((prompt - written).items(), key=itemgetter(1), default=(0, 0))
        if added < 2:
            raise UnsupportedModelError(
                f"{type(processor).__name__} writes no visual tokens into a prompt, so there are none to make fewer of"
            )
        bare.known[(*size, repr({}))] = prompt[token]
        told = bare._told((size, {}))
        return replace(bare, token=token, marks=0 if told is None else told - prompt[token])

    @property
    def ways(self) -> list[Count]:
        """Return how to count, the quickest first."""
        return [self.expected, self.made] if PROMPT_COUNTS.of(self.processor) is not None else [self.made]

    def expected(self, call: Call) -> int | None:
        """Ask the processor what it will make, which takes no pixels; None where it refuses."""
        try:
            told = self._told(call)
        except Exception:  # whatever a processor says of a picture that is too small for it, or of an option
            return None
        return None if told is None else told - self.marks

    def made(self, call: Call) -> int | None:
        """Count what it makes of a picture; None where it refuses."""
        try:
            return self.whole(call)
        except Exception:  # as above
            return None

    def whole(self, call: Call) -> int:
        """Count the same, where it must not refuse."""
        key = (*call[0], repr(call[1]))
        if key not in self.known:
            self.known[key] = self._prompt(call).count(self.token)
        return self.known[key]

    def _told(self, call: Call) -> int | None:
        ask = PROMPT_COUNTS.get(self.processor)
        if ask is None:
            return None
        size, options = call
        counts = IMAGE_COUNTS.get(ask(image_sizes=[size], **options))
        return counts[0] if counts else None

    def _prompt(self, call: Call) -> list[int]:
        (height, width), options = call
        picture = self.picture.resize((width, height), resample=_NEAREST)
        made = self.processor(text=[self.text], images=[[picture]], return_tensors="pt", **options)
        ids: list[int] = IDS.read(made)[0].tolist()
        return ids


class _Limit(NamedTuple):
    """An option of a call that says how much there is at most."""

    name: str
    value: int
    options: Callable[[int], dict[str, Any]]  # of the call, with another value


def _limits(processor: Any) -> Iterator[_Limit]:
    """The limits that a processor takes in its call; how much there is at least goes down with them."""
    images = IMAGE_PROCESSOR.get(processor)
    taken = getattr(CALL_OPTIONS.get(images), "__annotations__", {})
    for name, value in _at_most({name: getattr(images, name, None) for name in taken}):
        least = _AT_LEAST + name.removeprefix(_AT_MOST)
        yield _Limit(name, value, partial(_lowered, {least: getattr(images, least, None)}, name, least))
    size = dict(PICTURE_SIZE.get(images) or {})  # a class of transformers that iterates over pairs, or a dict
    whole = PICTURE_SIZE.spellings[0]
    for name, value in _at_most(size):
        least = (
            SHORTEST_EDGE.spellings[0] if name in LONGEST_EDGE.spellings else _AT_LEAST + name.removeprefix(_AT_MOST)
        )

        def options(less: int, name: str = name, least: str = least) -> dict[str, Any]:
            return {whole: {**size, **_lowered(size, name, least, less)}}

        yield _Limit(f"{whole}.{name}", value, options)


def _at_most(options: Mapping[str, Any]) -> list[tuple[str, int]]:
    """Those that say how much there is at most, where that is a number that can be turned down."""
    return [
        (name, value)
        for name, value in options.items()
        if (name.startswith(_AT_MOST) or name in LONGEST_EDGE.spellings) and _countable(value) and value > 1
    ]


def _lowered(held: Mapping[str, Any], name: str, least: str, value: int) -> dict[str, Any]:
    low = held.get(least)
    return {name: value, least: value} if low is not None and _countable(low) and low > value else {name: value}


def _countable(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


# -- how far down -------------------------------------------------------------------------------------------------------


class _Tried(NamedTuple):
    """What came of turning one thing down: as little as needed where that fits, as far as possible where it does not."""

    fits: bool
    calls: list[Call]
    counts: list[int]


@dataclass(frozen=True)
class _Search:
    """Turns one thing down until each picture has few enough tokens.

    Attributes:
        counting: says how many there are.
        calls: how the processor is called with each picture, for a value of what is turned down.
        top: the value that there is.
        most: tokens of each picture at most.
        shows: pixels that a token shows at least; with fewer, a picture is shrunk that is made larger again.
    """

    counting: _Counting
    calls: Callable[[int], list[Call]]
    top: int
    most: list[int]
    shows: float = 0.0

    def tried(self) -> _Tried | None:
        """The largest value with which all pictures fit, by what is made of them in the end; None where no other is taken."""
        made, found = self.counting.made, None
        for count in self.counting.ways:
            value, lowest = self._largest(count, exact=count != made)
            found = self._counted(made, value or lowest)
            if found is not None and found.fits == bool(value):
                break  # what the processor says holds where it matters
        if found is None or not self._shown(found):
            found = self._counted(made, lowest)
        return found

    def _largest(self, count: Count, exact: bool) -> tuple[int, int]:
        """The largest value that fits by ``count``, and the least that may be taken; 0 where there is none.

        Halves first: where a processor takes some numbers alone, those are halves of each other.
        """
        high, low, lowest = self.top, self.top // 2, 0
        while low:
            found = self._counted(count, low)
            lowest = low if found is not None and self._shown(found) else lowest
            if found is not None and found.fits:
                break
            high, low = low, low // 2
        while low and high - low > (1 if exact else max(1, low // _STEPS)):
            middle = (low + high) // 2
            found = self._counted(count, middle)
            low, high = (middle, high) if found is not None and found.fits else (low, middle)
        return low, lowest

    def _counted(self, count: Count, value: int) -> _Tried | None:
        """Count what comes of ``value``; None where it is refused."""
        calls = self.calls(value) if value else []
        counts = [n for call in calls if (n := count(call)) is not None]
        if not calls or len(counts) < len(calls):
            return None
        return _Tried(all(n <= most for n, most in zip(counts, self.most, strict=True)), calls, counts)

    def _shown(self, tried: _Tried) -> bool:
        return all(math.prod(size) >= n * self.shows for (size, _), n in zip(tried.calls, tried.counts, strict=True))


def _pictures(counting: _Counting, sizes: Sequence[Size], most: Sequence[int]) -> _Tried | None:
    """Shrink each picture that has too many tokens."""
    each = []
    for size, limit in zip(sizes, most, strict=True):
        before = counting.whole((size, {}))
        found = _Tried(before <= limit, [(size, {})], [before])
        if not found.fits:
            shows = min(_PATCH, math.prod(size) / before) / _WASTE
            found = _Search(counting, partial(_shrunk, size), max(size), [limit], shows).tried() or found
        each.append(found)
    return _Tried(all(one.fits for one in each), [one.calls[0] for one in each], [one.counts[0] for one in each])


def _turned_down(counting: _Counting, limit: _Limit, sizes: Sequence[Size], most: list[int]) -> _Tried | None:
    """Turn a limit down for all pictures."""

    def calls(value: int) -> list[Call]:
        options = limit.options(value)
        return [(size, options) for size in sizes]

    return _Search(counting, calls, limit.value, most).tried()


def _shrunk(size: Size, long: int) -> list[Call]:
    """The call with a picture of ``size``, the longer side of which is made ``long``."""
    height, width = (max(1, round(side * long / max(size))) for side in size)
    return [((height, width), {})]


def _resized(image: Any, size: Size) -> Any:
    if (image.height, image.width) == size:
        return image
    if image.mode in ("1", "P"):  # PIL does not interpolate those
        image = image.convert("RGBA" if "transparency" in image.info else "RGB")
    return image.resize((size[1], size[0]), resample=_BICUBIC)


def _too_few(
    counting: _Counting,
    pixels: int | float,
    sizes: Sequence[Size],
    before: Sequence[int],
    tried: Mapping[str, _Tried | None],
) -> ValueError:
    """The error where nothing fits."""
    name, what = type(counting.processor).__name__, f"a smaller {', '.join(tried)}"
    counts = [one.counts for one in tried.values() if one is not None]
    lowest = [min(found[i] for found in counts) for i in range(len(before))]  # of each picture alone
    stays = next((i for i, (low, full) in enumerate(zip(lowest, before, strict=True)) if low >= full), None)
    if stays is not None:
        (height, width), count = sizes[stays], before[stays]
        made = f"{name} makes {count} visual tokens of a picture of {width} x {height} whatever is turned down (tried: {what})"
        if any(counting.ways[0]((size, {})) not in (None, count) for size in _SHAPES):  # it is about this picture
            return ValueError(f"{made}: leave such pictures out, or drop tokens")
        return UnsupportedModelError(
            f"{made}: show its tower smaller pictures (saint.Plan(pixels=...), where that can be), or drop tokens"
        )
    if isinstance(pixels, int):
        least = f"{min(max(found) for found in counts)}"
    else:  # rounded up, so that what is said can be had
        shares = [max(n / full for n, full in zip(found, before, strict=True)) for found in counts]
        least = f"{math.ceil(min(shares) * 100) / 100:g}"
    return ValueError(
        f"{name} cannot make so few visual tokens of these pictures: the least that was found is pixels={least}, got {pixels:g} "
        f"(tried: {what})"
    )
