"""What a trace kept, as plain data for records and pages."""

from collections.abc import Sequence
from typing import Any

from ..tokens import LayerTrace


def layer_facts(trace: LayerTrace, sample: int = 0) -> dict[str, Any]:
    """One sample's survivors at one drop point, as plain data."""
    return {
        "layer": trace.layer,
        "tokens_in": int(trace.tokens_in[sample]),
        "tokens_out": int(trace.tokens_out[sample]),
        "kept": trace.kept[sample].tolist(),
    }


def steps_of(trace: Sequence[LayerTrace]) -> list[dict[str, Any]]:
    """Every sample of every drop point of a vision-language model: its stage and its place among the tiles besides."""
    return [
        {"stage": t.stage, **layer_facts(t, sample), "sample": sample} for t in trace for sample in range(len(t.kept))
    ]
