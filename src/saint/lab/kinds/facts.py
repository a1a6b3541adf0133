"""What a trace kept, as plain data for records and pages."""

from collections.abc import Mapping, Sequence
from typing import Any

from ...tokens import LayerTrace


def layer_facts(trace: LayerTrace, sample: int = 0, why: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """One sample's survivors at one drop point, as plain data.

    Args:
        trace: of the drop point.
        sample: its number in the batch.
        why: what :class:`saint.lab.view.reasons.Reasons` found; None: not looked for.
    """
    facts = {
        "layer": trace.layer,
        "placement": trace.placement,
        "group": trace.group,
        "tokens_in": int(trace.tokens_in[sample]),
        "tokens_out": int(trace.tokens_out[sample]),
        "kept": trace.kept[sample].tolist(),
    }
    if trace.stage == "vision" and trace.placement == "input" and trace.into is not None:  # a smaller picture, maybe
        facts["into"] = trace.into[sample].tolist()
    return facts if why is None else {**facts, "why": dict(why)}


def steps_of(
    trace: Sequence[LayerTrace], reasons: Sequence[Sequence[Mapping[str, Any]]] | None = None
) -> list[dict[str, Any]]:
    """Every sample of every drop point of a vision-language model: its stage and its place among the tiles besides.

    Args:
        trace: of one forward.
        reasons: of each drop point and sample, see :func:`layer_facts`; None: not looked for.
    """
    return [
        {
            "stage": t.stage,
            **layer_facts(t, sample, None if reasons is None else reasons[point][sample]),
            "sample": sample,
        }
        for point, t in enumerate(trace)
        for sample in range(len(t.kept))
    ]
