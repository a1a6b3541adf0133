"""Which visual tokens of a prompt show the same place of a video at different times.

Letters: B prompts, L positions of the longest prompt.
"""

import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ..frames import NONE, numbered
from ..patch import Uncopyable
from ..upstream.names import ENCODED, POOLED, VIDEO_FEATURES, Parameters
from ..upstream.specs import Clip, FamilySpec


class Videos(Uncopyable):
    """What the videos became that a model encoded.

    ``generate`` encodes in front of the forward, which then is given features alone, and so may a user who asks several questions
    about one video. The features tell which; of those that ``generate`` has copied for its beams it is the call before.

    Args:
        model: the module of the family's spec.
        spec: what is known of the family, with ``clips``.
    """

    def __init__(self, model: Any, spec: FamilySpec) -> None:
        assert spec.clips is not None
        self.model, self.clips = model, spec.clips
        self.method = VIDEO_FEATURES.of(model) or str(VIDEO_FEATURES)
        self.parameters = Parameters(getattr(type(model), self.method))
        self._known = WeakIdKeyDictionary()  # features of a video -> clips
        self._own = threading.local()  # clips of the last call, mask of the forward

    def encode(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """In place of the method that computes the features of videos: notes what each video becomes."""

        def encode(*args: Any, **kwargs: Any) -> Any:
            output = original(*args, **kwargs)
            clips = self.clips(self.model, self.parameters.named(args, kwargs))
            self._own.clips = clips
            if (first := _first(POOLED.get(output))) is not None:
                self._known[first] = clips
            return output

        return encode

    def begin(self, given: Mapping[str, Any]) -> None:
        """In front of a forward of the model, with its arguments."""
        self._own.mask = None
        encoded = ENCODED.read(given)
        video = None if encoded is None else encoded.get("video")
        first = None if video is None else _first(POOLED.get(video))
        if first is not None and (clips := self._known.get(first)) is not None:
            self._own.clips = clips

    def see(self, mask: Tensor) -> None:
        """Note where the tokens of videos are, bool [B, L]; may be told before the videos are encoded."""
        self._own.mask = mask

    def cells(self) -> Tensor | None:
        """In front of the language model: see :func:`cells_of`."""
        mask = getattr(self._own, "mask", None)
        return None if mask is None else cells_of(mask, getattr(self._own, "clips", []))


def cells_of(mask: Tensor, clips: list[Clip]) -> Tensor | None:
    """The cells of the positions of prompts, see :class:`saint.tokens.Facts`.

    Args:
        mask: where the tokens of videos are, bool [B, L].
        clips: of the videos, in the order of the prompts. Prompts that ``generate`` has copied for its beams stand side by side.

    Returns:
        int64 [B, L]; None where no video has several frames.

    Raises:
        ValueError: the tokens are not those of the videos.
    """
    counts = mask.sum(1).tolist()
    total, each = sum(counts), sum(frames * tokens + behind for frames, tokens, behind in clips)
    if not total:
        return None
    if not each or total % each:
        raise ValueError(
            f"the prompts have {total} tokens of videos, and the videos encoded last became {each}, so the frames of the tokens "
            "are not known: encode them with the patched model (get_video_features, or pass pixels)"
        )
    copies, flat = total // each, list[Tensor]()
    numbers, every = numbered((clip.frames, clip.tokens) for clip in clips)
    if not every:
        return None
    for one, clip in zip(numbers, clips, strict=True):
        flat += [one] * clip.frames + [torch.full((clip.behind,), NONE)]
    videos, start, rows = torch.cat(flat), 0, list[Tensor]()
    for row, count in enumerate(counts):
        copy = row % copies
        own = videos[start : start + count]
        rows.append(torch.where(own == NONE, own, own + copy * every))
        start += count if copy == copies - 1 else 0
    if start != each or sum(map(len, rows)) != total:
        raise ValueError(
            f"the prompts have {counts} tokens of videos, which is not {copies} times those of {len(clips)} videos"
        )
    cells = torch.full(mask.shape, NONE, device=mask.device)
    cells[mask] = torch.cat(rows).to(mask.device)
    return cells


def _first(features: Any) -> Tensor | None:
    """The first tensor of what a video became."""
    one = features[0] if isinstance(features, (tuple, list)) and features else features
    return one if isinstance(one, Tensor) else None
