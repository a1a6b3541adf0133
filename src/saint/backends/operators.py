"""What the exporter of PyTorch does not translate to ONNX as ONNX Runtime runs it."""

from collections.abc import Callable
from typing import Any

import torch

from ..extras import require


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """A ``custom_translation_table`` for ``torch.onnx.export``.

    Raises:
        MissingExtraError: onnxscript is not installed.
    """
    op = require("onnxscript", "export").opset18
    ir = require("onnx_ir", "export")

    def elu(x: Any, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> Any:
        """ONNX Runtime computes Elu of float32 only, and energies of PiToMe are float64."""
        if x.dtype != ir.DataType.DOUBLE:
            x = x if input_scale == 1.0 else op.Mul(x, op.CastLike(input_scale, x))
            y = op.Elu(x, alpha=alpha)
            return y if scale == 1.0 else op.Mul(y, op.CastLike(scale, y))
        zero, a, s, i = (op.CastLike(op.Constant(value_float=value), x) for value in (0.0, alpha, scale, input_scale))
        low = op.Mul(a, op.Sub(op.Exp(op.Mul(x, i)), op.CastLike(op.Constant(value_float=1.0), x)))
        return op.Mul(s, op.Where(op.Greater(x, zero), x, low))

    return {torch.ops.aten.elu.default: elu}
