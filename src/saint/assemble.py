"""From a model and a plan to what runs: which encoder and decoder, and where their drop points are. Touches nothing."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import nn

from .admission import admit
from .errors import UnsupportedModelError
from .language.locate import find as find_text
from .needs import TOWER
from .plans import Plan, Stage
from .runtime.observe import Observers
from .runtime.points import DropPoint
from .upstream.names import LAYERS
from .upstream.specs import EncoderSpec, FamilySpec, part
from .upstream.verify import verify_encoder, verify_family, verify_text
from .upstream.versions import warn_if_untested
from .vision.derive import with_tower
from .vision.encoder import PrunedEncoder, Settings
from .vision.locate import locate, locate_tower
from .vision.readers import Reader, check_readers, find_reader
from .vlm.locate import alone, refuse_second, refuse_unknown
from .vlm.locate import find as find_vlm
from .vlm.locate import locate as locate_vlm

if TYPE_CHECKING:  # imports transformers
    from .language.doorway import Doorway, Handover
    from .language.prompt import PrunedText
    from .vlm.model import PrunedVLM


def assemble(model: nn.Module, plan: Plan, observers: Observers) -> "PrunedVLM | PrunedText | PrunedEncoder | None":
    """Make what a session installs; None where nothing is to be done.

    Raises:
        UnsupportedModelError, ParityError, ValueError: see :func:`saint.apply`.
    """
    if not plan.slots and not observers:
        return None
    text = find_text(model)
    if text is not None:
        return _text(model, *text, plan, observers)
    if not plan.connector and not plan.language and find_vlm(model) is None:
        refuse_unknown(model)
        path, encoder, spec = locate(model)
        verify_encoder(encoder, spec)
        reader, stages = find_reader(model, path), plan.vision
        if stages:
            ragged = any(stage.method.votes or stage.guard for stage in stages)
            check_readers(model, path, spec, reader, stages[0].output, ragged)
        return _encoder(plan, path, encoder, spec, observers, reader=reader)
    return _vlm(model, plan, observers)


def drop_points(
    slot: str,
    stages: Sequence[Stage],
    layers: Sequence[Sequence[int]],
    depth: int,
    observers: Observers,
    idle: bool,
    glances: Mapping[int, frozenset[str]] = {},
) -> list[DropPoint]:
    """The drop points of one slot in a model of ``depth`` layers, and what observers want to see of its other layers.

    Args:
        slot: "vision", "connector" or "language".
        stages: of the slot.
        layers: of each stage.
        depth: layers of the module.
        observers: of the session.
        idle: the plan drops nowhere.
        glances: by layer, what methods of a later slot ask of it.

    Raises:
        UnsupportedModelError: some stages of the slot merge tokens and others drop them.
    """
    if len({stage.method.merges for stage in stages if "resized" not in stage.method.needs}) > 1:
        raise UnsupportedModelError(
            f"some stages of the {slot} slot merge tokens and others drop them, and a dropped token may hold others: give "
            "methods of one kind"
        )
    points: dict[tuple[str, int], DropPoint] = {}  # by layer, and those in front of all by stage
    for group, (stage, chosen) in enumerate(zip(stages, layers, strict=True)):
        placement = "input" if slot == "connector" else stage.placement or ("" if slot == "vision" else "post")
        for step, layer in enumerate(chosen):
            points["input" if placement == "input" else "", group if placement == "input" else layer] = DropPoint(
                slot, layer, placement, stage.method, step, len(chosen), stage.method.asks(slot), group=group
            )
    if observers.candidates:
        needs = observers.needs if slot == "language" else frozenset[str]()
        layers_of = [point.layer for point in points.values()]
        shown = [] if slot == "connector" else observers.layers(depth, layers_of, idle)
        for key in [key for key in points if key[0]] + [("", layer) for layer in shown]:
            point = points.get(key) or DropPoint(slot, key[1], "post", None)
            points[key] = replace(point, needs=point.needs | needs, shown=True)
    for layer, asked in glances.items():
        point = points.get(("", layer)) or DropPoint(slot, layer, "post", None)
        points["", layer] = replace(point, needs=point.needs | asked)
    return sorted(points.values(), key=lambda point: (point.placement != "input", point.layer, point.group))


def _encoder(
    plan: Plan,
    path: str,
    encoder: nn.Module,
    spec: EncoderSpec,
    observers: Observers,
    merge_size: int | None = None,
    restored: frozenset[int] = frozenset(),
    used_layers: int | None = None,
    reader: Reader | None = None,
    glances: Mapping[int, frozenset[str]] = {},
) -> PrunedEncoder:
    """The vision stage of an encoder that was verified; only the first ``used_layers`` layers are of use to whoever reads it."""
    warn_if_untested("torch", spec.library)
    stages, depth = plan.vision, _depth(encoder, spec)
    layers = plan.resolve_layers("vision", depth, used_layers, spec.candidates(encoder))
    return PrunedEncoder(
        path,
        encoder,
        spec,
        drop_points("vision", stages, layers, depth, observers, not plan.slots, glances),
        settings=Settings(stages[0].output, stages[0].guard, stages[0].logn) if stages else Settings(),
        observers=observers,
        merge_size=merge_size,
        restored=restored,
        reader=reader,
    )


def _vlm(model: nn.Module, plan: Plan, observers: Observers) -> "PrunedVLM":
    from .language.doorway import Handover
    from .vlm.glances import Glances
    from .vlm.model import PrunedVLM, read_features

    path, vlm, spec = locate_vlm(model, next(reversed(plan.slots), "language"))
    asks = any(stage.method.asks("connector") & TOWER for stage in plan.connector)
    looks = bool(plan.vision) or asks or _looks_everywhere(plan, observers)
    spec = with_tower(vlm, spec) if looks else spec
    verify_family(vlm, spec)
    refuse_second(model, path)
    if plan.vision and spec.no_vision is not None:
        smaller = f"saint.smaller_pictures(processor, images, {plan.pixels}) has its processor make them smaller"
        raise UnsupportedModelError(
            f"{spec.title} cannot do the vision stage: {spec.no_vision}{alone(vlm, path, spec)}"
            + ("" if plan.pixels is None else f"; {smaller}")
        )
    if asks and not spec.sees_tower:
        raise UnsupportedModelError(
            f"a method of the connector stage looks at the vision tower of {spec.title}, which is unknown: {spec.no_vision}"
        )
    if spec.derived:
        # the vision stage shows that features follow each other as the candidates of the tower do
        admit(model, vlm, spec, (*plan.slots, "vision") if asks else tuple(plan.slots))
    warn_if_untested("torch", "transformers", vlm=True)
    prefix = f"{path}." if path else ""
    encoder, features, handover, glances = None, None, Handover(), None
    if looks and spec.sees_tower:
        merge_size = _check_vision(plan, vlm, spec)
        inner, tower, tower_spec = locate_tower(vlm, spec)
        place = f"{prefix}{spec.tower}" + (f".{inner}" if inner else "")
        verify_encoder(tower, tower_spec)
        depth = _depth(tower, tower_spec)
        features = read_features(vlm, spec, depth) if plan.vision else None
        restored = frozenset[int]()
        if features is not None and (merge_size is not None or not spec.connector):
            restored = frozenset({features, *spec.reads(vlm)})
        read = max(0, (spec.feature_layer(vlm, depth) or depth) - 1)
        asked = _glances(plan, depth, read, tower_spec.prefix(tower))
        encoder = _encoder(plan, place, tower, tower_spec, observers, merge_size, restored, features, glances=asked)
        glances = Glances(encoder, read) if asked else None
    connector = drop_points("connector", plan.connector, [[0]] if plan.connector else [], 1, observers, False)
    door = _door(
        f"{prefix}{spec.decoder}",
        vlm.get_submodule(spec.decoder),
        plan,
        observers,
        handover,
        connector,
    )
    return PrunedVLM(path, vlm, spec, door, encoder, features, handover, model, glances)


def _glances(plan: Plan, depth: int, read: int, prefix: int) -> dict[int, frozenset[str]]:
    """By layer of the vision tower, of ``depth``, what the connector stage asks of it; ``read``, ``prefix``: see its methods."""
    asked: dict[int, frozenset[str]] = {}
    for method in (stage.method for stage in plan.connector):
        needs = method.asks("connector") & TOWER
        for layer in method.tower_layers(depth, read, prefix) if needs else ():
            asked[layer] = asked.get(layer, frozenset()) | needs
    return asked


def _text(root: nn.Module, path: str, text: nn.Module, plan: Plan, observers: Observers) -> "PrunedText":
    from .language.doorway import Handover
    from .language.locate import title
    from .language.prompt import PrunedText

    name = title(text)
    if wrong := [slot for slot in plan.slots if slot != "language"]:
        raise UnsupportedModelError(
            f"{name} is a language model without images and has no {' and no '.join(wrong)} stage: tokens of its prompt leave "
            "with saint.Plan(language=...)"
        )
    verify_text(text, name)
    warn_if_untested("torch", "transformers", vlm=True)
    handover = Handover()
    return PrunedText(text, _door(path or "the model", text, plan, observers, handover), handover, root)


def _door(
    path: str,
    text: nn.Module,
    plan: Plan,
    observers: Observers,
    handover: "Handover",
    points: Sequence[DropPoint] = (),
) -> "Doorway":
    """The door of a language model: ``points`` of the connector in front of it, the language stage behind it."""
    from .language.decoder import PrunedDecoder
    from .language.doorway import Doorway
    from .language.entries import SessionToken
    from .language.layers import read_layers, with_keys

    layers: list[nn.Module] = list(LAYERS.get(text).children())
    language = plan.language
    decoder, token = None, SessionToken()
    if language or observers.everywhere or _looks_everywhere(plan, observers):
        keeps = read_layers(text.config, len(layers))
        chosen = plan.resolve_layers("language", len(layers), total=plan.behind_connector, shown=with_keys(keeps))
        own = drop_points("language", language, chosen, len(layers), observers, idle=not plan.slots)
        decoder = PrunedDecoder(
            path,
            text,
            layers,
            own,
            observers=observers,
            token=token,
            keeps=keeps,
            evict=bool(language) and language[0].evict,
        )
    return Doorway(
        path,
        text,
        points,
        observers=observers,
        handover=handover,
        decoder=decoder,
        token=token,
        in_front=[stage.method for stage in (*plan.vision, *plan.connector)],
    )


def _looks_everywhere(plan: Plan, observers: Observers) -> bool:
    """Tell whether an observer wants to see stages in which nothing is dropped."""
    looks = bool(observers.candidates or observers.layer_time or observers.pruning_time)
    return looks and observers.choosy if plan.slots else looks or observers.everywhere


def _check_vision(plan: Plan, vlm: nn.Module, spec: FamilySpec) -> int | None:
    """Side of the squares of patches that the model joins; refuses what the vision stage cannot do in front of it."""
    stages = plan.vision
    if stages and stages[0].output != "survivors":
        raise ValueError(
            f"output={stages[0].output!r} gives back full-length features; in front of a language model only "
            '"survivors" saves anything'
        )
    merge_size = spec.merge_size(vlm)
    merging = next((stage.method for stage in stages if stage.method.merges), None)
    if merge_size is not None and merging is not None:
        raise UnsupportedModelError(
            f"{spec.title} joins squares of {merge_size} x {merge_size} patches behind its tower, and {type(merging).__name__} "
            "merges patches of different squares; use a method that drops"
        )
    return merge_size


def _depth(encoder: nn.Module, spec: EncoderSpec) -> int:
    return len(part(encoder, spec.blocks))
