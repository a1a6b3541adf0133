"""Contracts of the vision stage of a family that no spec was written for: pictures go in, logits come out.

Letters: B prompts, L positions of the longest prompt.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModelError
from ..methods.saint_full_graph import SaintFullGraph
from ..plans import Plan, Stage
from ..session import pruned
from ..upstream.names import ENDS, IMAGE_FEATURES, IMAGE_TOKEN, KINDS_OF_TOKENS, MASK, POOLED, STARTS, Parameters
from ..upstream.pictures import pictures
from ..vision.derive import with_tower
from ..vlm.locate import locate
from .oracle import masked_oracle
from .outputs import Inputs, run
from .removal import removal_oracle
from .vlm import is_recurrent, sees_within

TOWER = Plan(vision=Stage(SaintFullGraph(keep=0.6), layers=[0, 1]))
_WORDS = (4, 5), (9, 3)  # in front of and behind the picture of each prompt


def pictured(model: Any) -> Inputs:
    """A left-padded batch of two prompts with a random picture each, of two sizes where the tower takes such.

    Args:
        model: a vision-language model, not patched.

    Returns:
        Keyword inputs of the model, ``input_ids`` and ``attention_mask`` int64 [B, L] among them.

    Raises:
        UnsupportedModelError: it runs on no form of pictures that is known.
    """
    _, vlm, spec = locate(model, "vision")
    errors: list[str] = []
    for given in pictures(vlm, vlm.get_submodule(spec.tower)):
        try:
            return _around(model, vlm, given.inputs)
        except Exception as error:  # whatever a class says of a form that it does not take
            errors.append(f"{type(error).__name__}: {error}")
    raise UnsupportedModelError(f"{type(model).__name__} runs on no known form of pictures: {'; '.join(errors)}")


def _around(model: Any, vlm: Any, given: dict[str, Any]) -> Inputs:
    """Prompts around pictures that are given."""
    with torch.no_grad():
        output = IMAGE_FEATURES.get(vlm)(**given, return_dict=True)
    generator = torch.Generator().manual_seed(0)
    image = IMAGE_TOKEN.get(model.config)
    around = [[] if token is None else [token] for token in (_token(model, STARTS), _token(model, ENDS))]
    special = {image, *around[0], *around[1]}
    known = torch.tensor([token for token in range(5, 60) if token not in special])

    def words(count: int) -> list[int]:
        return list(known[torch.randint(len(known), (count,), generator=generator)].tolist())

    rows = [
        [*words(before), *around[0], *[image] * own[..., 0].numel(), *around[1], *words(behind)]
        for own, (before, behind) in zip(POOLED.get(output, output), _WORDS, strict=True)
    ]
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    names = Parameters(type(model).forward).names
    kinds = {name: (ids == image).long() for role in KINDS_OF_TOKENS if (name := role.among(names)) is not None}
    return {"input_ids": ids, str(MASK): mask, **given, **kinds}


def _token(model: Any, role: Any) -> int | None:
    token = role.get(model.config)
    return token if isinstance(token, int) else None


def check_tower(model: nn.Module, plan: Plan, inputs: Inputs) -> dict[str, float]:
    """Logits of words equal those of the oracles that are right for the language model: by oracle, what they are off.

    Args:
        model: a vision-language model, not patched.
        plan: with a vision stage.
        inputs: of :func:`pictured`.

    Raises:
        AssertionError: they differ, or nothing was dropped.
    """
    _, vlm, spec = locate(model, "vision")
    decoder = vlm.get_submodule(spec.decoder)
    words = (inputs["input_ids"] != IMAGE_TOKEN.get(model.config)) & inputs[str(MASK)].bool()
    base = run(model, inputs)["logits"]
    with pruned(model, plan) as session:
        got, trace = run(model, inputs)["logits"], session.trace
    assert bool((trace[-1].tokens_out < trace[0].tokens_in).all()), "nothing was dropped"
    assert _off(got[words], base[words]) > 1e-3, "pruning changes no logit"
    oracles = {
        "removal": None if sees_within(decoder, inputs["input_ids"].shape[1]) else removal_oracle,
        "masked": None if is_recurrent(decoder) else masked_oracle,
    }
    errors = {}
    for name, oracle in oracles.items():
        if oracle is not None:
            errors[name] = _off(got[words], oracle(model, plan, inputs)[0]["logits"][words])
            assert errors[name] <= 1e-4, f"{name} oracle: logits are off by {errors[name]:.1e} of their size"
    assert errors, "no oracle is right for its language model"
    return errors


def try_tower(model: nn.Module) -> str:
    """Hold the vision stage of a small model to its oracles: "", or why it has none."""
    _, vlm, spec = locate(model, "vision")
    spec = with_tower(vlm, spec)
    if spec.no_vision is not None:
        return spec.no_vision
    try:
        check_tower(model, TOWER, pictured(model))
    except Exception as error:  # an oracle that did not hold, or a forward that ended in whatever error
        return f"oracles: {error}" if isinstance(error, AssertionError) else f"oracles: {type(error).__name__}: {error}"
    return ""


def _off(got: Tensor, want: Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max().clamp_min(1e-12))
