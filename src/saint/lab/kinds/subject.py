"""A model that a command works on, whatever its kind. What differs between kinds is asked of it, and of nothing else."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, Self

import torch
from PIL import Image
from torch import Tensor, nn

from ...methods.resize import Resize
from ...planning import plan_for
from ...plans import Plan, Stage
from ...samples import Sample
from ...testing import Result
from ...tokens import LayerTrace
from ..loading.models import FORMS, resolve_device
from ..loading.plans import Choice
from ..sources.items import Item
from ..sources.listing import Left
from ..sources.samples import find_samples
from .tiles import Tile

COSINE, KL, ANSWER_KL = "1 - cosine", "KL of the next token", "KL of the answer's tokens"  # measures of a loss
Bad = list[tuple[str, str]]  # where, and why it could not be used
Inputs = dict[str, Any]


class Given(NamedTuple):
    """Where a command's items come from: options as they were typed, None where one was not."""

    images: Path | None = None
    questions: Path | None = None
    prompt: str | None = None
    prompts: Path | None = None


class Answered(NamedTuple):
    """What a model answers to one input.

    Attributes:
        text: of a model that writes; None otherwise.
        output: what the model returned; None of a model that writes.
        times: of a model that writes, when its tokens came: see :class:`saint.lab.bench.generation.TimedAnswer`.
    """

    text: str | None
    output: Any
    times: Any = None


class Wanted(NamedTuple):
    """How a model is to be loaded; see :meth:`Subject.load`."""

    pretrained: bool = True
    size: int | None = None
    dtype: torch.dtype | None = None


class Checked(NamedTuple):
    """What the contracts said of a model.

    Attributes:
        about: what was checked, in a line.
        plan: under which it was.
        results: of each contract.
    """

    about: str
    plan: Plan
    results: Sequence[Result]


@dataclass(frozen=True)
class Subject(ABC):
    """A model in eval mode, and all that a command has to know about its kind.

    Attributes:
        model: the network.
        device: where it is.
        spec: what the user typed; "" of a model that was handed over.
        title: for tables and messages.
        licence: of the weights, where known.
    """

    model: Any
    device: torch.device
    spec: str = ""
    title: str = ""
    licence: str | None = None

    called: ClassVar[str]  # "an encoder"
    gives: ClassVar[str]  # "embeddings"
    refuses: ClassVar[Mapping[str, str]] = MappingProxyType({})  # option -> why
    things: ClassVar[str] = "image(s)"  # what its items are
    sees: ClassVar[bool] = True  # its tokens are of images
    candidates: ClassVar[str] = "visual tokens"
    measure: ClassVar[str]  # of a loss
    tuned_by: ClassVar[str]  # the same where a plan is tuned, which looks at what :meth:`asked` shows
    slot: ClassVar[str]  # of the layers that a plan is tuned for
    counts: ClassVar[bool] = False  # what stays of each picture is counted before some are timed
    checks: ClassVar[Sequence[str]] = ()  # names of its contracts
    together: ClassVar[int] = 1  # items of one shape per forward; more where results do not depend on it

    # -- by name ------------------------------------------------------------------------------------------------------

    @classmethod
    @abstractmethod
    def named(cls, spec: str) -> bool:
        """Tell whether ``spec`` names a model of this kind; reads its config, no weights."""

    @classmethod
    def known(cls, spec: str) -> None:
        """Refuse a ``spec`` of which it can be told without loading anything that there is no such model.

        Raises:
            ValueError: there is none; or no such name.
        """
        if ":" not in spec:
            raise ValueError(f"a model is {FORMS}; got {spec!r}")

    @classmethod
    def load(
        cls,
        spec: str,
        device: str | torch.device = "cpu",
        pretrained: bool = True,
        *,
        size: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """Load the model called ``spec`` with what prepares its inputs.

        Args:
            spec: a name, see :data:`saint.lab.loading.FORMS`.
            device: where to put it; "auto": CUDA where there is one.
            pretrained: False gives random weights (always the same) and downloads none.
            size: side of the pictures in pixels; None means the model's own.
            dtype: of the weights; None means that of the checkpoint.

        Raises:
            ValueError: not such a name, or the device is not there.
            UnsupportedModelError: no model that can be pruned.
            MissingExtraError: the library is not installed.
            DownloadError: the weights cannot be fetched.
            UnsafeCheckpointError: the weights are a pickle of more than tensors.
        """
        place = resolve_device(device)
        made = cls._loaded(spec, Wanted(pretrained, size, dtype))
        return replace(made, model=made.model.eval().to(place), device=place)

    @classmethod
    @abstractmethod
    def _loaded(cls, spec: str, wanted: "Wanted") -> Self:
        """Load it, anywhere; :meth:`load` puts it in its place."""

    @classmethod
    @abstractmethod
    def holds(cls, model: nn.Module) -> bool:
        """Tell whether ``model`` is of this kind."""

    @classmethod
    def around(cls, model: nn.Module) -> Self:
        """Return a subject around a model that is there, without what prepares inputs."""
        return cls(model, next(model.parameters()).device, title=type(model).__name__)

    @classmethod
    def check(cls, spec: str, given: Mapping[str, Any]) -> None:
        """Refuse options that do not fit this kind of model.

        Args:
            spec: what the user typed.
            given: options by name, None or False where one was not typed.

        Raises:
            ValueError: one does not fit, with the reason.
        """
        wrong = [option for option in cls.refuses if given.get(option) not in (None, False)]
        if wrong:
            do = "does" if len(wrong) == 1 else "do"
            raise ValueError(f"{' and '.join(wrong)} {do} not fit {spec}, {cls.called}: {cls.refuses[wrong[0]]}")

    # -- what goes in -------------------------------------------------------------------------------------------------

    @classmethod
    @abstractmethod
    def items(cls, given: Given, limit: int | None, left: Left) -> tuple[list[Item], Bad]:
        """List what there is to look at, at most ``limit``, evenly spaced.

        Args:
            given: where it comes from.
            limit: None means all.
            left: gets what is left out of a folder: reason -> names.

        Returns:
            The items; where and why others could not be read.

        Raises:
            ValueError: nothing there, or options that exclude each other.
            OSError: a file cannot be read.
        """

    @classmethod
    def pictures(cls, given: Given, limit: int | None, left: Left) -> list[Item]:
        """List the images of ``given``; see :meth:`items`."""
        if given.images is None:
            raise ValueError(f"{cls.called} needs --images, an image or a folder of them")
        found = find_samples(str(given.images), labels=False, limit=limit)
        left.update(found.left_out)
        return found.items

    @abstractmethod
    def inputs(self, items: Sequence[Item], images: Sequence[Any]) -> Inputs:
        """Make the keyword arguments of ``model.forward`` from items and their images, on the model's device."""

    # -- what comes out -----------------------------------------------------------------------------------------------

    @abstractmethod
    def compared(self, output: Any, length: int = 1) -> Tensor:
        """Return what of ``model(...)`` is compared with the unpruned model's, detached from caches.

        Args:
            output: what the model returned.
            length: of a language model, how many of the last positions.
        """

    @abstractmethod
    def losses(self, base: Tensor, found: Tensor) -> list[float]:
        """Return what ``found`` lost against ``base``, in ``measure``, one number per sample; both as :meth:`compared` gives."""

    def asked(self, sample: Sample) -> tuple[Sample, int]:
        """Return the forward that shows what a sample loses, and how many of its last positions are compared."""
        return sample, 1

    @abstractmethod
    def answer(self, inputs: Inputs, length: int) -> Answered:
        """Run the model once, and return what a person looks at.

        Args:
            inputs: of one item.
            length: tokens at most, of a model that writes.
        """

    def prepared(self, image: Image.Image) -> Any:
        """Return what can be made of an image outside the model, in a thread of its own; :meth:`rows` takes it."""
        return image

    @contextmanager
    def rows(self, max_new_tokens: int) -> Iterator[Callable[[Sequence[str], Sequence[Any]], list[dict[str, Any]]]]:
        """Yield what makes a row of each image from questions and what :meth:`prepared` gave: an embedding, or an answer.

        Raises:
            ValueError: the model makes neither.
        """
        raise ValueError(f"{self.spec or self.title} is {self.called}, which makes no rows of images")
        yield

    # -- where tokens may leave ---------------------------------------------------------------------------------------

    @abstractmethod
    def layers(self) -> dict[str, list[int]]:
        """Return, by slot of a plan, the layers at which tokens can leave.

        Raises:
            UnsupportedModelError: a model that cannot be pruned.
        """

    @property
    @abstractmethod
    def plan(self) -> Plan | None:
        """The plan that suits the model where nobody names one; None where there is none."""

    @property
    def plans(self) -> dict[str, Plan]:
        """Return what a comparison holds against the unpruned model where nobody names a plan, by name."""
        return {"default": self.plan or Plan()}

    def planned(self, choice: Choice) -> Plan:
        """Return the plan that was asked for; of a share, one that is made for the model."""
        if choice.plan is not None:
            return choice.plan
        if choice.keep is not None:
            plan = plan_for(self.model, choice.keep)
            return plan if choice.pixels is None else plan.resized(choice.pixels)
        assert choice.pixels is not None, "a choice is a plan, a share, or smaller pictures"
        usual = self.plan.vision if self.plan is not None else ()  # a dense head needs what its own plan gives
        return Plan(vision=Stage(Resize(choice.pixels), output=usual[0].output if usual else "survivors"))

    def fitted(self, plan: Plan) -> tuple[Plan, Self]:
        """Return what of ``plan`` the model does, and the subject that makes inputs for it: where pictures cannot get smaller in
        the model, but its processor can make them smaller, they do in those inputs.
        """
        return plan, self

    @property
    def shrinks(self) -> dict[str, Any] | None:
        """Say, as plain data, how pictures are shrunk in its inputs; None where they are not."""
        return None

    @property
    def modes(self) -> dict[str, Plan]:
        """Return what is timed beside a plan where nobody names one, by name."""
        return {}

    @property
    @abstractmethod
    def counted(self) -> str:
        """Path of the module whose FLOPs a share of the work is about; "" for the whole model."""

    # -- what people see ----------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def grid(self) -> tuple[int, int] | None:
        """Rows and columns of the tokens of every image; None where each has its own.

        Raises:
            ValueError: the model shows none.
        """

    @abstractmethod
    def tiles(self, image: Image.Image, inputs: Mapping[str, Any]) -> list[Tile]:
        """Return what the model sees of an image, with the grids of its tokens.

        Raises:
            ValueError: the model shows no grid.
        """

    @abstractmethod
    def total(self, inputs: Mapping[str, Any]) -> int:
        """Return how many visual tokens the language model, or the encoder, has of one image."""

    @abstractmethod
    def facts(
        self, image: Image.Image, inputs: Mapping[str, Any], trace: Sequence[LayerTrace], reasons: Sequence[Any],
        side: int = 320, limit: int = 30_000,
    ) -> dict[str, Any]:  # fmt: skip
        """Return, as plain data for a record, what stayed of an image at each drop point.

        Args:
            image: the photograph.
            inputs: made of it alone.
            trace: of their forward.
            reasons: of each drop point and sample, see :class:`saint.lab.view.reasons.Reasons`.
            side: pixels of the longer sides of pictures at most.
            limit: length of a picture as text at most.
        """

    def told(self, prompt: str | None) -> dict[str, Any]:
        """Return, as plain data for a record, what all images of a run share: their size and grid, or what was asked."""
        return {}

    # -- times --------------------------------------------------------------------------------------------------------

    def bench(
        self, plans: Mapping[str, Plan], photos: Sequence[Image.Image], *, prompt: str | None = None,
        new_tokens: int | None = None, repeats: int | None = None, warmup: int = 3, extras: bool = True,
        batch: int | None = None, tick: Callable[[], None] = lambda: None,
    ) -> Any:  # fmt: skip
        """Measure the model with and without ``plans`` on a batch of photographs.

        Args:
            plans: by name; of an encoder one.
            photos: the batch, unless ``batch`` says otherwise.
            prompt: what is asked about each; None: to describe it.
            new_tokens: length of the answers; None: 32.
            repeats: timed rounds; None: 20, fewer where a round is several forwards.
            warmup: rounds before them.
            batch: pictures per forward, taken from ``photos``; with it what an encoder has left of each of them is counted too.
            extras: also measure what pruning itself costs, where that can be told.
            tick: called after each round, and after each picture that is counted.

        Returns:
            A :class:`saint.lab.bench.ForwardBench`, or a :class:`saint.lab.bench.GenerationBench` of a model that writes.

        Raises:
            ValueError: what the benchmark raises, or the model cannot be timed.
        """
        raise ValueError(f"{self.spec or self.title} is {self.called}, which is not timed on images")

    # -- files --------------------------------------------------------------------------------------------------------

    def exported(self, choice: Choice) -> Plan:
        """Return the plan of what is exported.

        Raises:
            ValueError: what is exported has no plan of its own, and none was given.
        """
        return self.planned(choice)

    def seen(self, inputs: Inputs) -> Inputs:
        """Return those of ``inputs`` that what is exported takes."""
        return inputs

    # -- proof --------------------------------------------------------------------------------------------------------

    @abstractmethod
    def contracts(self, tick: Callable[[], None] = lambda: None) -> Checked:
        """Run the contracts of :mod:`saint.testing` on the model; ``tick`` is called behind each."""


def shrunk_by(subjects: Mapping[str, Subject]) -> dict[str, Any]:
    """Return what conditions of a record say of subjects, by name of a plan, that shrink pictures in their inputs."""
    found = {name: one.shrinks for name, one in subjects.items() if one.shrinks is not None}
    return {"pictures": found} if found else {}


def dtype_and_place(model: nn.Module, device: torch.device, tensors: Mapping[str, Tensor]) -> Inputs:
    """Return ``tensors`` on ``device``, those of real numbers in the model's dtype."""
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    return {k: t.to(device, dtype if t.is_floating_point() else None) for k, t in tensors.items()}
