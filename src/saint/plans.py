"""Plans: where tokens may go, and by which method. Pure data; knows no model."""

import dataclasses
import json
import os
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, get_args

from . import methods
from .methods.base import Method, check_number, check_possible, survivors
from .needs import PROVIDES, TOWER_ATTENTION

VERSION = 1  # of the format in which plans are written
STAGES = ("vision", "connector", "language")

Layers = str | range | list[int] | tuple[int, ...] | None
LAYERS = ("first_half", "all")  # words whose meaning depends on the depth of the model
_DEEPEST = 10_000  # layers; a range beyond it is a slip, and would fill the memory before a model can say so
Placement = Literal["input", "mid", "post"] | None
# candidates that come at least to the first stage of a plan, and to a later one, which sees what is left: fewer are no picture
_MANY, _FEW = 16, 4
Output = Literal["survivors", "nearest", "similar", "carried"]
OUTPUTS: tuple[Output, ...] = get_args(Output)


@dataclasses.dataclass(frozen=True)
class Stage:
    """A method at some layers of one stage.

    Attributes:
        method: what decides.
        layers: 0-based drop points: "first_half", "all", text as the command line takes it ("0-5", both ends included; "0,2,4"),
            a range, a list, or None for the method's own default. None with ``placement="input"`` and in the connector slot,
            which have no layers.
        placement: "mid" drops between attention and MLP of the layer, "post" after the layer; None means "mid" for
            vision (as published; "post" where a block has no place between the two) and "post" for language. "input", in
            the vision slot only, drops in front of block 0; methods that work on pixels have no other.
        output: what a vision encoder hands on. "survivors": the shortened sequence, batches padded to the longest
            sample with the mean of its survivors (an average pool averages the survivors). Full length, every dropped
            token standing for its survivor: "nearest" (closest on the patch grid; for dense heads) or "similar" (most
            similar key when it was dropped; an average pool then weights each survivor by the tokens it covers), or
            "carried": its own old state plus what that survivor has changed by since.
        guard: vision stage only. The share of its candidates that a picture full of fine detail, such as a page of text, keeps at
            least, in [0, 1]; the plainer, the less of it, and photographs mostly nothing (see docs/matching.md). Samples then
            keep their own numbers, whatever the budget.
        logn: vision stage only. Attention logits behind the first drop point are multiplied by (ln n / ln N) ** logn where n of N
            tokens are left (log-n scaling: arXiv 2202.12172), in [0, 2]: a softmax over fewer keys is sharper than the model
            is used to. 0: not at all; 0.5 is worth trying where 60 % or fewer are left (see docs/which-lever.md).
        evict: language stage only. After the prompt, throw the tokens dropped at later layers out of the KV caches of the
            earlier layers too. Prompt and first token are as without it; later tokens no longer see those in any layer.

    Raises:
        ValueError: a wrong value, with the accepted ones.
        TypeError: ``method`` is not a method.
    """

    method: Method
    layers: Layers = None
    placement: Placement = None
    output: Output = "survivors"
    evict: bool = False
    guard: float = 0.0
    logn: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.method, Method):
            raise TypeError(f"Stage needs a method such as saint.Saint(), got {self.method!r}")
        if self.layers is not None and self.layers not in LAYERS:
            object.__setattr__(self, "layers", _read_layers(self.layers))
        if self.placement not in (None, "input", "mid", "post"):
            raise ValueError(f'placement must be "input", "mid" or "post", got {self.placement!r}')
        if self.method.needs & {"pixels", "resized"} and self.placement != "input":
            if self.placement is not None:
                raise ValueError(
                    f"{type(self.method).__name__} works on pixels, in front of block 0: leave placement out, or "
                    f'give "input"; got {self.placement!r}'
                )
            object.__setattr__(self, "placement", "input")
        if self.placement == "input" and self.layers not in (None, (0,)):
            raise ValueError(
                f'placement="input" drops tokens in front of layer 0 only: leave layers out, got layers={self.layers!r}'
            )
        if self.placement == "input":
            object.__setattr__(self, "layers", None)  # [0] says the same
        if self.output not in OUTPUTS:
            raise ValueError(f"output must be one of {', '.join(OUTPUTS)}, got {self.output!r}")
        if not isinstance(self.evict, bool):
            raise ValueError(f"evict must be True or False, got {self.evict!r}")
        check_number("guard", self.guard, 0, 1, "the share that a page of text keeps at least")
        check_number("logn", self.logn, 0, 2, "0 leaves attention as it is, 0.5 softens it where tokens are missing")

    def resolve_layers(
        self, slot: str, depth: int, used_layers: int | None = None, shown: Sequence[int] | None = None
    ) -> list[int]:
        """The drop points in a model of ``depth`` layers, ascending; of ``placement="input"`` the layer it is in front of.

        Where the method itself says which, and of "all", those of the first ``used_layers`` layers: behind them nothing is used.
        Where not all layers show keys to choose by, ``shown`` are those that do, ascending: of layers that were not named by
        number those among them, or the nearest one behind.

        Raises:
            ValueError: a layer beyond the depth, or named by number and without keys.
        """
        if self.placement == "input":
            return [0]
        if self.layers == "first_half":
            return _showing(list(range(depth // 2 or 1)), shown)
        if self.layers == "all":
            return _showing(list(range(depth if used_layers is None else used_layers)), shown)
        if self.layers is None:
            usual = self.method.layers(slot, depth)
            chosen = [layer for layer in usual if used_layers is None or layer < used_layers] or usual[:1]
        else:
            chosen = [int(i) for i in self.layers]
        if chosen[-1] >= depth:
            raise ValueError(f"layer {chosen[-1]} is out of range: this model's {slot} stage has layers 0..{depth - 1}")
        if self.layers is None:
            return _showing(chosen, shown)
        if shown is not None and (blind := [layer for layer in chosen if layer not in shown]):
            near = sorted({layer for one in blind for layer in _nearest(one, shown)})
            raise ValueError(
                f"no tokens can be chosen at layers {blind} of this model's {slot} stage, which keep no keys of their own "
                f"(recurrent layers, layers that read an earlier one's keys, layers without attention); the nearest that do: "
                f"{near}"
            )
        return chosen

    def to_dict(self) -> dict[str, Any]:
        layers = list(self.layers) if isinstance(self.layers, tuple) else self.layers
        settings = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {**settings, "method": self.method.to_dict(), "layers": layers}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Stage":
        """Rebuild a stage.

        Raises:
            ValueError: not such data, or an unknown or wrong setting.
        """
        if not isinstance(data, Mapping):
            raise ValueError(
                f'a stage is an object with an entry "method", as Stage.to_dict() makes it; got {data!r:.80}'
            )
        settings = dict(data)
        try:
            return cls(methods.from_dict(settings.pop("method")), **settings)
        except KeyError as error:
            raise ValueError(f"a stage needs {error}, got {dict(data)!r}") from error
        except TypeError as error:
            raise ValueError(f"not a stage: {error}") from error


def _showing(chosen: list[int], shown: Sequence[int] | None) -> list[int]:
    """Those of ``chosen`` that are among ``shown``; where none is, the nearest one behind, or else in front."""
    if shown is None or not shown:
        return chosen
    return [layer for layer in chosen if layer in shown] or _nearest(chosen[0], shown)[-1:]


def _nearest(layer: int, shown: Sequence[int]) -> list[int]:
    """The last of ``shown`` in front of ``layer`` and the first behind it."""
    return [one for one in shown if one < layer][-1:] + [one for one in shown if one > layer][:1]


def _read_layers(layers: Any) -> tuple[int, ...]:
    """The numbers of layers, ascending, from text such as "0-5" or from a collection of ints.

    Raises:
        ValueError: neither, or no layers of any model.
    """
    chosen = _layers_of_text(layers) if isinstance(layers, str) else layers
    if not isinstance(chosen, Collection) or not all(isinstance(i, int) and not isinstance(i, bool) for i in chosen):
        raise ValueError(
            f'layers must be "first_half", "all", numbers as text ("0-5" or "0,2,4"), a range or a list of ints, 0-based; '
            f"got {layers!r}"
        )
    found = sorted(set(chosen))
    if not found:
        raise ValueError("layers is empty: leave the stage out of the plan instead")
    if len(found) != len(chosen):
        raise ValueError(f"layers names a layer twice: {list(chosen)}")
    if found[0] < 0:
        raise ValueError(
            f"layers are counted from 0 at the input and are not negative, got {found[0]}: the last of a model of 12 is 11"
        )
    return tuple(found)


def _layers_of_text(text: str) -> list[int] | None:
    """The layers that ``text`` lists, as numbers and ranges of which both ends are included; None where it is no such list."""
    chosen: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*(-?\d+)(?:\s*-\s*(\d+))?\s*", part)
        if (
            found is None
            or max(map(abs, (numbers := [int(number) for number in found.groups() if number]))) >= _DEEPEST
        ):
            return None
        chosen += range(numbers[0], numbers[-1] + 1)
    return chosen


def _check_stage(name: str, stage: Stage) -> None:
    if not isinstance(stage, Stage):
        raise TypeError(f"Plan({name}=...) takes a Stage or a method, or a list of these, got {stage!r}")
    method = type(stage.method).__name__
    if name not in stage.method.stages:
        raise ValueError(
            f"{method} is not defined for the {name} stage; it works in: {', '.join(sorted(stage.method.stages))}"
        )
    if missing := stage.method.asks(name) - PROVIDES[name]:
        raise ValueError(
            f"{method} needs {', '.join(sorted(missing))}, which the {name} stage does not show; it shows: "
            f"{', '.join(sorted(PROVIDES[name])) or 'keys and features only'}"
        )
    if name != "vision" and stage.output != "survivors":
        raise ValueError(f"output={stage.output!r} is for the vision stage only")
    if name != "vision" and stage.guard:
        raise ValueError(f"guard={stage.guard:g} is for the vision stage only, which sees the pixels")
    if name != "vision" and stage.logn:
        raise ValueError(f"logn={stage.logn:g} is for the vision stage only, where every token attends to all others")
    if name != "language" and stage.evict:
        raise ValueError(
            "evict=True is for the language stage only: behind the other stages no cache holds a dropped token"
        )
    if name != "vision" and stage.placement == "input":
        raise ValueError(
            f'placement="input" is for the vision stage only, got it in the {name} stage; in front of a language model tokens '
            "are dropped by the connector stage"
        )
    if name == "vision" and stage.placement == "input" and stage.method.asks(name) & TOWER_ATTENTION:
        raise ValueError(
            f'{method} looks at the attention of the layer where tokens leave, and placement="input" is in front of all layers: '
            'use "mid" or "post"'
        )
    if name == "connector":
        _check_connector(stage)


def _check_connector(stage: Stage) -> None:
    if stage.layers is not None:
        raise ValueError("the connector stage lies in front of the language model and has no layers: leave layers out")
    if stage.placement == "mid":
        raise ValueError(
            'placement="mid" means nothing in the connector stage, which lies in front of the language model: leave placement out'
        )
    if stage.method.merges:
        raise ValueError(
            f"{type(stage.method).__name__} merges tokens, and the connector stage only drops them: use a method that drops, or "
            "merge in the vision stage"
        )
    check_possible(stage.method, 1, _FEW)


def _check_together(name: str, stages: tuple[Stage, ...]) -> None:
    """Check what the stages of one slot must agree on, as far as a plan can tell without a model."""
    if name == "connector" and len(stages) > 1:
        raise ValueError(f"the connector stage is one place and takes one stage, got {len(stages)}")
    for setting in ("output", "evict", "guard", "logn"):
        if len({getattr(stage, setting) for stage in stages}) > 1:
            values = ", ".join(repr(getattr(stage, setting)) for stage in stages)
            raise ValueError(f"{setting} is a property of the {name} slot: give all its stages the same, got {values}")
    _check_order(name, [(s, list(s.layers) if isinstance(s.layers, tuple) else None) for s in stages])


def _check_order(name: str, layers: list[tuple[Stage, list[int] | None]]) -> None:
    """Each stage must lie behind the one before; layers of None are not known yet."""
    last, explicit = -1, False
    for position, (stage, chosen) in enumerate(layers):
        if stage.placement == "input":
            if "resized" in stage.method.needs and position:
                raise ValueError(
                    f"a picture gets smaller in front of everything, once: make {type(stage.method).__name__} the first stage "
                    f"of the {name} slot, it is number {position + 1}"
                )
            if any(before.placement != "input" for before, _ in layers[:position]):
                raise ValueError(
                    f'placement="input" is in front of every layer: put stage {position + 1} of the {name} slot before those '
                    "at layers"
                )
        elif chosen is not None:
            if explicit and chosen[0] <= last:
                raise ValueError(
                    f"the stages of the {name} slot must be listed in the order in which tokens pass them, each at layers of its "
                    f"own: stage {position + 1} starts at layer {chosen[0]}, a stage before it ends at layer {last}"
                )
            last, explicit = chosen[-1], True


def _stages(name: str, value: Any) -> tuple[Stage, ...]:
    """The stages of a slot, checked; () where there are none."""
    if value is None:
        return ()
    if isinstance(value, list) and not value:
        raise ValueError(f"Plan({name}=...) got an empty list: leave {name} out instead")
    several = value if isinstance(value, (list, tuple)) else [value]
    stages = tuple(Stage(one) if isinstance(one, Method) else one for one in several)
    for stage in stages:
        _check_stage(name, stage)
    _check_together(name, stages)
    return stages


Slot = Stage | Method | Sequence[Stage | Method] | None


@dataclasses.dataclass(frozen=True, init=False)
class Plan:
    """What happens at each stage; any combination.

    A slot (``vision``, ``connector``, ``language``) takes a :class:`Stage`, or a list of stages in the order in which tokens pass
    them. A bare method stands for ``Stage(method)``.

    Attributes:
        vision: the stages of the slot, a tuple of :class:`Stage`; () where nothing leaves.
        connector: likewise.
        language: likewise.
        tuned: what :func:`saint.tune` found the plan on, and what it reached; None for other plans. Plans that differ in this
            alone are equal, and only :meth:`save` writes it.

    Raises:
        ValueError: a stage that its slot cannot have, or stages of one slot that cannot go together.
        TypeError: neither stage nor method.

    Example:
        >>> import saint
        >>> plan = saint.Plan(vision=saint.Saint(threshold=0.8))
        >>> saint.Plan.from_dict(plan.to_dict()) == plan
        True
        >>> twice = [saint.Stage(saint.Saint(), layers=[0, 1]), saint.Stage(saint.SaintFullGraph(keep=64), layers=[8])]
        >>> len(saint.Plan(vision=twice).vision)
        2
    """

    vision: tuple[Stage, ...]
    connector: tuple[Stage, ...]
    language: tuple[Stage, ...]
    tuned: Mapping[str, Any] | None = dataclasses.field(default=None, init=False, compare=False, repr=False)

    def __init__(
        self, vision: Slot = None, connector: Slot = None, language: Slot = None, *, pixels: int | float | None = None
    ) -> None:
        for name, value in zip(STAGES, (vision, connector, language), strict=True):
            object.__setattr__(self, name, _stages(name, value))
        if pixels is not None:
            object.__setattr__(self, "vision", self.resized(pixels).vision)

    @property
    def pixels(self) -> int | float | None:
        """Share of the pixels that pictures are shrunk to, or how many patches they have at most; None: they stay as they are."""
        first = self.vision[0].method if self.vision else None
        return first.fixed if first is not None and "resized" in first.needs else None

    def resized(self, pixels: int | float) -> "Plan":
        """The same plan with smaller pictures in front of everything.

        Raises:
            ValueError: neither a share in (0, 1] nor a number of patches; or the plan has them already.
        """
        if self.pixels is not None:
            raise ValueError(f"pictures get smaller in this plan already, to {self.pixels}")
        method = methods.get("resize")(keep=pixels)
        first = Stage(method)
        if self.vision:  # what holds for the slot
            first = dataclasses.replace(self.vision[0], method=method, placement="input", layers=None)
        return dataclasses.replace(self, vision=(first, *self.vision))

    @property
    def slots(self) -> dict[str, tuple[Stage, ...]]:
        """The slots in use and their stages, in the order tokens pass them."""
        return {name: stages for name in STAGES if (stages := getattr(self, name))}

    def resolve_layers(
        self,
        slot: str,
        depth: int,
        used_layers: int | None = None,
        total: int | None = None,
        shown: Sequence[int] | None = None,
    ) -> list[list[int]]:
        """The drop points of each stage of ``slot`` in a model of ``depth`` layers; see :meth:`Stage.resolve_layers`.

        Args:
            slot: "vision" or "language".
            depth: layers of the module.
            used_layers: of them, those whose output is used.
            total: candidates of every sample, where the model fixes their number.
            shown: those that show keys; None: all.

        Raises:
            ValueError: a layer beyond the depth, stages that are not one behind the other in this model, or a budget that cannot
                be had of the tokens that reach its stage: of their number, where it is known, or of any.
        """
        stages = self.slots.get(slot, ())
        layers = [stage.resolve_layers(slot, depth, used_layers, shown) for stage in stages]
        _check_order(slot, list(zip(stages, layers, strict=True)))
        for stage, chosen in zip(stages, layers, strict=True):
            first = slot == next(iter(self.slots)) and stage is stages[0]
            check_possible(stage.method, len(chosen), _MANY if first else _FEW)
            if total is not None:
                stage.method.validate(total, len(chosen))
            total = None if stage.guard else survivors(stage.method, total)
        return layers

    @property
    def behind_connector(self) -> int | None:
        """Visual tokens of each prompt that has some, behind the connector, where its budget is a number of tokens."""
        return survivors(self.connector[0].method, None) if self.connector else None

    def to_dict(self) -> dict[str, Any]:
        """Plain data (JSON-ready) from which :meth:`from_dict` rebuilds an equal plan."""
        written = {name: [stage.to_dict() for stage in stages] for name, stages in self.slots.items()}
        return {"version": VERSION, **written}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Plan":
        """Rebuild a plan. A slot may be one stage or a list of them.

        Raises:
            ValueError: not such data, another version, or an unknown stage or setting.
        """
        if not isinstance(data, Mapping):
            raise ValueError(
                f'a plan is an object like {{"version": 1, "vision": {{...}}}}, as Plan.to_dict() makes it; got {data!r:.80}'
            )
        version = data.get("version")
        if type(version) is not int or version != VERSION:
            raise ValueError(f"plan version {version!r:.80} is not {VERSION}, the one there is")
        unknown = sorted(str(name) for name in set(data) - {"version", "tuned", *STAGES})
        if unknown:
            raise ValueError(f"unknown plan entries {unknown}; known: {', '.join(STAGES)}")
        entries = {name: data[name] for name in STAGES if data.get(name) is not None}
        plan = cls(*(_read_slot(entries[name]) if name in entries else None for name in STAGES))
        return plan if data.get("tuned") is None else plan.with_tuned(data["tuned"])

    def with_tuned(self, tuned: Mapping[str, Any]) -> "Plan":
        """The same plan with the record of how it was found; see :attr:`tuned`.

        Raises:
            ValueError: not an object.
        """
        if not isinstance(tuned, Mapping):
            raise ValueError(f"tuned must be an object, as saint.tune makes it, got {tuned!r:.80}")
        plan = Plan(self.vision, self.connector, self.language)
        object.__setattr__(plan, "tuned", dict(tuned))
        return plan

    def guarded(self, guard: float) -> "Plan":
        """The same plan with a guard in its vision stages; see :attr:`Stage.guard`.

        Raises:
            ValueError: no vision stage, or not in [0, 1].
        """
        if not self.vision:
            raise ValueError("a guard is of the vision stage, and this plan has none")
        return dataclasses.replace(self, vision=tuple(dataclasses.replace(stage, guard=guard) for stage in self.vision))

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """Like :meth:`from_dict`, from JSON text."""
        try:
            data = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"a plan in JSON is expected: {error}") from error
        return cls.from_dict(data)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON, with :attr:`tuned`, from which :meth:`load` reads it; readers never see half a file.

        Args:
            path: the file; its folder is made.

        Raises:
            OSError: it cannot be written; what was there before is still there.
        """
        from .files import write_whole

        data = self.to_dict() if self.tuned is None else {**self.to_dict(), "tuned": self.tuned}
        write_whole(path, (json.dumps(data, indent=2) + "\n").encode())

    @classmethod
    def load(cls, source: str | os.PathLike[str]) -> "Plan":
        """The plan that ``source`` is (JSON text), names (a recipe) or holds (a file), looked up in this order.

        Args:
            source: a path is always a file; so is text that ends in ``.json``.

        Raises:
            ValueError: none of these, or no plan in it; the message names the file, or close matches.
            OSError: the file is not there or cannot be read.
            TypeError: neither text nor path.

        Example:
            >>> import saint
            >>> saint.Plan.load("vit/published").vision[0].method.threshold
            0.75
        """
        from .presets import load  # recipes are plans

        return load(source)


def _read_slot(entry: Any) -> list[Stage]:
    return [Stage.from_dict(one) for one in (entry if isinstance(entry, list) else [entry])]


def plan(source: str | os.PathLike[str]) -> Plan:
    """The plan that ``source`` is (JSON text), names (a recipe) or holds (a file): :meth:`Plan.load`."""
    return Plan.load(source)
