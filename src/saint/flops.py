"""FLOPs of a run: torch's counter, with formulas of our own where the installed torch has none.

A multiply-add is two. Only products of matrices count (attention, linear layers, convolutions), as in torch's own formulas; a
mask or causality takes nothing off, since dense kernels compute what they then hide.

Letters: B batch, H heads, N tokens, Q queries, K keys, Dk and Dv head dims of keys and values, C channels, F hidden channels.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.module_tracker import ModuleTracker

T = TypeVar("T")
Shape = Sequence[int]

# what makes an operator without a formula worth a word: a part of its name, unless it resamples or lays out anew
_EXPENSIVE = re.compile(
    r"^(?!.*(upsample|convert|reorder))"
    r".*((mm|mv|dot)(?![a-z])|conv|attention|attn|transformer|linear|einsum|matmul|gemm|rnn|lstm|gru|cdist|fft)"
)


# -- formulas ---------------------------------------------------------------------------------------------------------


def _attention(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    """QK^T and AV of [B, H, Q, Dk], [B, H or fewer, K, Dk] and [B, H or fewer, K, Dv]: 2 B H Q K (Dk + Dv).

    B, H and Q are the query's: heads that share keys count one by one.
    """
    return 2 * prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _row_product(left: Shape, *_: Any, out_shape: Shape, **__: Any) -> int:
    """Every number of the output is a product with a row of ``left`` [..., C]: 2 C times their count."""
    return 2 * left[-1] * prod(out_shape)


def _vote(keys: Shape, *_: Any, **__: Any) -> int:
    """Cosines of one half of the tokens [B, N, D] with the other."""
    return 2 * keys[0] * ((keys[1] + 1) // 2) * (keys[1] // 2) * keys[2]


def _lengths(x: Tensor) -> list[int]:
    """N of every sample of [B, N, C], also of a nested tensor, which has no shape."""
    return [len(sample) for sample in x.unbind()]


def _multihead(query: Tensor, key: Tensor, value: Tensor, embed_dim: int, *_: Any, **__: Any) -> int:
    """q, k, v, the output projection and both products of attention, of ``nn.MultiheadAttention``'s fused path."""
    pairs = list(zip(_lengths(query), _lengths(key), strict=True))
    return sum(4 * (n + m) * embed_dim**2 + 4 * n * m * embed_dim for n, m in pairs)


def _encoder_layer(src: Tensor, embed_dim: int, *rest: Any, **_: Any) -> int:
    """The same and the MLP of C -> F -> C, of ``nn.TransformerEncoderLayer``'s fused path."""
    hidden = len(rest[12])  # the 15th argument: the first weight of the MLP, [F, C]
    return _multihead(src, src, src, embed_dim) + 4 * sum(_lengths(src)) * embed_dim * hidden


_multihead._get_raw = _encoder_layer._get_raw = True  # type: ignore[attr-defined]  # FlopCounterMode: tensors, not shapes

# torch 2.15 knows CPU flash attention, 2.14 does not; 2.11 refuses heads that share keys. One formula for all of them counts
# the same everywhere.
_FORMULAS: dict[Callable[..., int], tuple[str, ...]] = {
    _attention: (
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_fused_attention_overrideable",
        "_scaled_dot_product_attention_math_for_mps",
    ),
    _row_product: (
        "mv",
        "dot",
        "_int_mm",
        "_weight_int8pack_mm",
        "_weight_int4pack_mm",
        "_weight_int4pack_mm_for_cpu",
    ),
    _multihead: ("_native_multi_head_attention",),
    _encoder_layer: ("_transformer_encoder_layer_fwd",),
}


def _mapping() -> dict[Any, Callable[..., int]]:
    """Our formulas, by those of the operators that the installed torch has."""
    found = {getattr(torch.ops.aten, name, None): formula for formula, names in _FORMULAS.items() for name in names}
    found[getattr(torch.ops.saint, "vote", None)] = _vote  # of this library
    return {operator: formula for operator, formula in found.items() if operator is not None}


# -- counting ---------------------------------------------------------------------------------------------------------


class _Forwards(ModuleTracker):
    """Knows which modules are running, forwards only.

    To follow the backward, torch's tracker hooks the tensors that modules pass on, and fails under ``no_grad`` where one is a
    parameter (the latent of an attention pool). It is shown none.
    """

    def _fw_pre_hook(self, mod: Any, input: Any) -> None:
        super()._fw_pre_hook(mod, ())

    def _fw_post_hook(self, mod: Any, input: Any, output: Any) -> None:
        super()._fw_post_hook(mod, (), ())


class _Seen(TorchDispatchMode):
    """Notes the operators that are executed."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: set[Any] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators.add(func._overloadpacket)
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Flops:
    """FLOPs of one run.

    Attributes:
        by_module: FLOPs by torch's name of the module (class of the outermost, then path; "Global": the run), then by operator.
        uncounted: operators that ran, look expensive and have no formula: the FLOPs are without them.
    """

    by_module: dict[str, dict[str, int]]
    uncounted: list[str]

    @property
    def by_operator(self) -> dict[str, int]:
        """FLOPs of the run, by operator."""
        return self.by_module.get("Global", {})

    @property
    def total(self) -> int:
        """FLOPs of the run."""
        return sum(self.by_operator.values())


def count_flops(run: Callable[[], T]) -> tuple[T, Flops]:
    """Run once, in the caller's grad mode, and count.

    Args:
        run: does the work, eagerly.

    Returns:
        What ``run`` returned, and the FLOPs.

    Example:
        >>> a = torch.ones(2, 3)
        >>> count_flops(lambda: a @ a.T)[1].total
        24
    """
    counter = FlopCounterMode(display=False, custom_mapping=_mapping())
    counter.mod_tracker = _Forwards()
    # the counter inside: it takes composite operators apart (inference mode leaves them in one piece), only what is left is noted
    with _Seen() as seen, counter:
        output = run()
    by_module = {
        module: {str(operator): int(n) for operator, n in operators.items()}
        for module, operators in counter.get_flop_counts().items()
    }
    names = {str(operator) for operator in seen.operators if operator not in counter.flop_registry}
    return output, Flops(by_module, sorted(filter(_EXPENSIVE.search, names)))


def left_out(*uncounted: Sequence[str]) -> str:
    """Say what must stand behind a printed number that rests on FLOPs: the operators it leaves out.

    Args:
        uncounted: :attr:`Flops.uncounted` of all counts that the number is made of.

    Returns:
        Text with a space in front; "" when everything was counted.

    Example:
        >>> print("bound 1.5x" + left_out(["aten.fft"], []))
        bound 1.5x (without aten.fft: no FLOP formula)
    """
    names = sorted({name for found in uncounted for name in found})
    return f" (without {', '.join(names)}: no FLOP formula)" if names else ""
