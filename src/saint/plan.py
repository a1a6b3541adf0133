"""Plans: where tokens may go, and by which method. Pure data; knows no model."""

import dataclasses
import json
from collections.abc import Collection, Mapping
from typing import Any, Literal

from . import methods
from .methods.base import Method

VERSION = 2  # what `evict` needs; plans without it are written as version 1, which older releases read
STAGES = ("vision", "connector", "language")

Layers = Literal["first_half"] | range | list[int] | tuple[int, ...] | None
PROVIDES = {"vision": frozenset[str](), "connector": frozenset[str](), "language": frozenset({"last_query"})}
OUTPUTS = ("survivors", "nearest", "similar")


@dataclasses.dataclass(frozen=True)
class Stage:
    """A method at some layers of one stage.

    Attributes:
        method: what decides.
        layers: 0-based drop points: "first_half", a range, a list, or None for the method's own default.
        placement: "mid" drops between attention and MLP of the layer, "post" after the layer; None means "mid" for
            vision (as published; "post" where a block has no place between the two) and "post" for language.
        output: what a vision encoder hands on. "survivors": the shortened sequence, batches padded to the longest
            sample with the mean of its survivors (an average pool averages the survivors). Full length, every dropped
            token standing for its survivor: "nearest" (closest on the patch grid; for dense heads) or "similar" (most
            similar key when it was dropped; an average pool then weights each survivor by the tokens it covers).
        evict: language stage only. After the prompt, throw the tokens dropped at later layers out of the KV caches of the
            earlier layers too. Prompt and first token are as without it; later tokens no longer see those in any layer.

    Raises:
        ValueError: a wrong value, with the accepted ones.
        TypeError: ``method`` is not a method.
    """

    method: Method
    layers: Layers = None
    placement: Literal["mid", "post"] | None = None
    output: Literal["survivors", "nearest", "similar"] = "survivors"
    evict: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.method, Method):
            raise TypeError(f"Stage needs a method such as saint.Saint(), got {self.method!r}")
        if isinstance(self.layers, str):
            if self.layers != "first_half":
                raise ValueError(f'layers must be "first_half", a range or a list of ints, got {self.layers!r}')
        elif self.layers is not None:
            if not isinstance(self.layers, Collection) or not all(
                isinstance(i, int) and not isinstance(i, bool) for i in self.layers
            ):
                raise ValueError(f'layers must be "first_half", a range or a list of ints, got {self.layers!r}')
            chosen = sorted(set(self.layers))
            if not chosen:
                raise ValueError("layers is empty: leave the stage out of the plan instead")
            if len(chosen) != len(self.layers):
                raise ValueError(f"layers names a layer twice: {list(self.layers)}")
            if chosen[0] < 0:
                raise ValueError(f"layers are 0-based and not negative, got {chosen[0]}")
            object.__setattr__(self, "layers", tuple(chosen))
        if self.placement not in (None, "mid", "post"):
            raise ValueError(f'placement must be "mid" or "post", got {self.placement!r}')
        if self.output not in OUTPUTS:
            raise ValueError(f"output must be one of {', '.join(OUTPUTS)}, got {self.output!r}")
        if not isinstance(self.evict, bool):
            raise ValueError(f"evict must be True or False, got {self.evict!r}")

    def resolve_layers(self, stage: str, depth: int) -> list[int]:
        """The drop points in a model of ``depth`` layers, ascending.

        Raises:
            ValueError: a layer beyond the depth.
        """
        if self.layers == "first_half":
            return list(range(depth // 2 or 1))
        chosen = self.method.layers(stage, depth) if self.layers is None else [int(i) for i in self.layers]
        if chosen[-1] >= depth:
            raise ValueError(
                f"layer {chosen[-1]} is out of range: this model's {stage} stage has layers 0..{depth - 1}"
            )
        return chosen

    def to_dict(self) -> dict[str, Any]:
        layers = list(self.layers) if isinstance(self.layers, tuple) else self.layers
        data = {"method": self.method.to_dict(), "layers": layers, "placement": self.placement, "output": self.output}
        return {**data, "evict": True} if self.evict else data

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


def _check_stage(name: str, stage: Stage) -> None:
    if not isinstance(stage, Stage):
        raise TypeError(f"Plan({name}=...) takes a Stage or a method, got {stage!r}")
    if name not in stage.method.stages:
        raise ValueError(
            f"{type(stage.method).__name__} is not defined for the {name} stage; "
            f"it works in: {', '.join(sorted(stage.method.stages))}"
        )
    if missing := stage.method.needs - PROVIDES[name]:
        raise ValueError(
            f"{type(stage.method).__name__} needs {', '.join(sorted(missing))}, which the {name} stage does not show; it shows: "
            f"{', '.join(sorted(PROVIDES[name])) or 'keys and features only'}"
        )
    if name != "vision" and stage.output != "survivors":
        raise ValueError(f"output={stage.output!r} is for the vision stage only")
    if name != "language" and stage.evict:
        raise ValueError(
            "evict=True is for the language stage only: behind the other stages no cache holds a dropped token"
        )


@dataclasses.dataclass(frozen=True, init=False)
class Plan:
    """What happens at each stage; any combination. A bare method stands for ``Stage(method)``.

    Example:
        >>> import saint
        >>> plan = saint.Plan(vision=saint.Saint(threshold=0.8))
        >>> saint.Plan.from_dict(plan.to_dict()) == plan
        True
    """

    vision: Stage | None
    connector: Stage | None
    language: Stage | None

    def __init__(
        self,
        vision: Stage | Method | None = None,
        connector: Stage | Method | None = None,
        language: Stage | Method | None = None,
    ) -> None:
        for name, value in zip(STAGES, (vision, connector, language), strict=True):
            stage = Stage(value) if isinstance(value, Method) else value
            if stage is not None:
                _check_stage(name, stage)
            object.__setattr__(self, name, stage)

    @property
    def stages(self) -> dict[str, Stage]:
        """The stages in use, by name, in the order tokens pass them."""
        return {name: stage for name in STAGES if (stage := getattr(self, name)) is not None}

    def to_dict(self) -> dict[str, Any]:
        """Plain data (JSON-ready) from which :meth:`from_dict` rebuilds an equal plan."""
        version = VERSION if any(stage.evict for stage in self.stages.values()) else 1
        return {"version": version, **{name: stage.to_dict() for name, stage in self.stages.items()}}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Plan":
        """Rebuild a plan.

        Raises:
            ValueError: not such data, another version, or an unknown stage or setting.
        """
        if not isinstance(data, Mapping):
            raise ValueError(
                f'a plan is an object like {{"version": 1, "vision": {{...}}}}, as Plan.to_dict() makes it; got {data!r:.80}'
            )
        version = data.get("version")
        if isinstance(version, bool) or not isinstance(version, int) or version not in range(1, VERSION + 1):
            raise ValueError(f"plan version {version!r:.80} is not one of 1..{VERSION}, which this release reads")
        unknown = sorted(str(name) for name in set(data) - {"version", *STAGES})
        if unknown:
            raise ValueError(f"unknown plan entries {unknown}; known: {', '.join(STAGES)}")
        entries = {name: data[name] for name in STAGES if data.get(name) is not None}
        if version == 1 and any(isinstance(entry, Mapping) and "evict" in entry for entry in entries.values()):
            raise ValueError("a plan of version 1 has no entry evict; write version 2")
        return cls(**{name: Stage.from_dict(entry) for name, entry in entries.items()})

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """Like :meth:`from_dict`, from JSON text."""
        try:
            data = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"a plan in JSON is expected: {error}") from error
        return cls.from_dict(data)
