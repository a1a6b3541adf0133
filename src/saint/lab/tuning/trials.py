"""Forwards of plans on images, written down as they are made, so that a killed run continues."""

import hashlib
import json
import math
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...plans import Plan
from ...samples import Sample
from ...session import Session, pruned
from ...upstream.names import IDS
from ..eval.journal import Journal
from ..eval.report import fingerprint
from ..kinds import Subject


@dataclass(frozen=True)
class Trial:
    """A plan on n images.

    Attributes:
        losses: against the unpruned model, float64 [n]; see :meth:`saint.lab.kinds.Subject.losses`.
        left: tokens behind each drop point, in order, int64 [points, n].
    """

    losses: np.ndarray
    left: np.ndarray

    @property
    def loss(self) -> float:
        """Mean over the images."""
        return float(self.losses.mean())

    @property
    def distances(self) -> np.ndarray:
        """Square roots of the losses, [n]: of cosines, angles up to a constant (1 - cos is about half their square).

        Losses have heavy tails, and a choice by their mean is made by a few images.
        """
        return np.sqrt(np.maximum(self.losses, 0.0))

    @property
    def score(self) -> float:
        """Return what layouts are compared by: the squared mean of the distances, which is in units of the loss."""
        return float(self.distances.mean() ** 2)


class Trials:
    """Runs plans, each once.

    Args:
        subject: the model, unpruned.
        samples: the images, by number.
        facts: what else results depend on, for the journal's key.
        journal: file that keeps the results; see :class:`saint.lab.eval.Journal`.
        tick: called with the number of images that have been through the model since the last call.

    Raises:
        JournalError: the journal belongs to another run.
    """

    def __init__(
        self,
        subject: Subject,
        samples: Sequence[Sample],
        *,
        facts: Mapping[str, Any],
        journal: str | os.PathLike[str] | None = None,
        tick: Callable[[int], None] = lambda _: None,
    ) -> None:
        self.subject, self.samples, self.tick = subject, list(samples), tick
        self.model, self.measure = subject.model, subject.tuned_by
        self._asked: dict[int, tuple[Sample, int]] = {}
        self._bases: dict[int, Tensor] = {}
        self._known: dict[str, dict[str, Any]] = {}
        key = {"kind": "tune", **facts, "measure": self.measure, "batch": subject.together}
        key |= {"weights": fingerprint(subject.model), "data": self._fingerprint()}
        self._journal = None if journal is None else Journal(Path(journal), key)
        if self._journal is not None:
            self._known.update(self._journal.done)
        self.resumed = len(self._known)

    def close(self) -> None:
        """Close the journal."""
        if self._journal is not None:
            self._journal.close()

    def run(self, plan: Plan, which: Sequence[int]) -> Trial:
        """``plan`` on the images ``which``."""
        text = json.dumps([plan.to_dict(), list(which)], sort_keys=True)
        name = hashlib.sha256(text.encode()).hexdigest()
        if name not in self._known:
            self._known[name] = self._measured(plan, which)
            if self._journal is not None:
                self._journal.append([{"id": name, **self._known[name]}])
        else:
            self.tick(len(which))
        found = self._known[name]
        return Trial(np.array(found["losses"]), np.array(found["left"]).reshape(-1, len(which)))

    def _measured(self, plan: Plan, which: Sequence[int]) -> dict[str, Any]:
        self._see(which)
        losses: list[float] = []
        left: list[list[list[int]]] = []
        with pruned(self.model, plan) as session:
            for numbers in self._batches(which):
                found = self._forward(numbers, session)
                losses += self._losses(numbers, found)
                if bad := [
                    n for n, loss in zip(numbers, losses[-len(numbers) :], strict=True) if not math.isfinite(loss)
                ]:
                    raise ValueError(f"the output for image(s) {bad} is not finite: leave them out, or use float32")
                left.append([entry.tokens_out.tolist() for entry in session.trace])
                self.tick(len(numbers))
        points = zip(*left, strict=True)  # of each batch's lists the first drop point's, then the second's, ...
        return {"losses": losses, "left": [list(chain.from_iterable(batches)) for batches in points]}

    def shapes(self, number: int) -> list[Any]:
        """Shapes and dtypes of an image's tensors: images that share them may share a batch."""
        return [(tuple(t.shape), t.dtype) for t in self.samples[number].tensors]

    def show(self, plan: Plan, which: Sequence[int], enough: type[Exception]) -> None:
        """Run ``plan`` for what its methods see, until one of them raises ``enough``; nothing is kept."""
        with pruned(self.model, plan) as session:
            for numbers in self._batches(which):
                with suppress(enough):
                    self._forward(numbers, session)
                self.tick(len(numbers))

    def once(self, number: int) -> Callable[[nn.Module], Any]:
        """The forward of one image by a model, for counting and timing."""
        sample = self.samples[number]

        def run(model: nn.Module) -> Any:
            with torch.inference_mode():
                return model(*sample.args, **sample.kwargs)

        return run

    def _see(self, which: Sequence[int]) -> None:
        """Keep what the unpruned model answers."""
        self._asked.update({i: self.subject.asked(self.samples[i]) for i in which if i not in self._asked})
        for numbers in self._batches([number for number in which if number not in self._bases]):
            answers = self._forward(numbers)
            self._bases.update(dict(zip(numbers, answers.split(1), strict=True)))

    def _losses(self, numbers: Sequence[int], found: Tensor) -> list[float]:
        return self.subject.losses(torch.cat([self._bases[number] for number in numbers]), found)

    def _forward(self, numbers: Sequence[int], session: Session | None = None) -> Tensor:
        """Return what is compared: [B, C], [B, 1, H, W], or the logits of the answer's tokens [1, tokens, vocabulary]."""
        asked = [self._asked.get(number, (self.samples[number], 1)) for number in numbers]
        samples, length = [sample for sample, _ in asked], asked[0][1]
        args = tuple(_joined(values) for values in zip(*(s.args for s in samples), strict=True))
        kwargs = {name: _joined([s.kwargs[name] for s in samples]) for name in samples[0].kwargs}
        behind = length - 1  # tokens of the answer, of which a plan knows nothing when it decides
        prompt = session.prompt(IDS.read(kwargs).shape[1] - behind) if session is not None and behind else nullcontext()
        with torch.inference_mode(), prompt:
            return self.subject.compared(self.model(*args, **kwargs), length)

    def _batches(self, which: Sequence[int]) -> Iterator[list[int]]:
        """Neighbours whose tensors have the same shapes, at most a batch of them."""
        batch: list[int] = []
        for number in which:
            if batch and (len(batch) == self.subject.together or self.shapes(batch[0]) != self.shapes(number)):
                yield batch
                batch = []
            batch.append(number)
        if batch:
            yield batch

    def _fingerprint(self) -> int:
        """Of the images and of what else the forwards are given."""
        found = 0
        for sample in self.samples:
            for name, value in [*enumerate(sample.args), *sorted(sample.kwargs.items())]:
                plain = (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else value
                found = zlib.crc32(repr((name, plain)).encode(), found)
                if isinstance(value, Tensor):
                    found = zlib.crc32(value.detach().cpu().flatten().view(torch.uint8).numpy().tobytes(), found)
        return found


def _joined(values: Sequence[Any]) -> Any:
    first = values[0]
    return torch.cat(list(values)) if isinstance(first, Tensor) else first
