"""Two more oracles for tokens that leave in front of a language model: they are not there, or they are holes.

Neither shares code with the pruning path. Both run the model's own decoder, unpatched inside, on the input that the model made
for the whole prompt.

*Removed*: each sample alone, without a cache, without the places that were dropped and without its padding; survivors keep their
positions. The only right one for recurrent layers, for which a hidden key is still a token.

*Holes*: full length, and step by step with a cache: dropped places are in no mask.

Letters: B samples, L places, K survivors, T tokens of the answer, V vocabulary, C channels.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ..plans import Plan
from ..session import pruned
from ..tokens import LayerTrace
from ..upstream.names import ALL_STATES, CACHE, CACHING, EMBEDDINGS, MASK, POSITIONS, Parameters
from ..upstream.specs import FamilySpec
from ..vlm.locate import locate
from .hiding import HideKeys, stand_in, unfused
from .oracle import changed, hide_in_tower, visual_tokens
from .outputs import Inputs, run

Call = Callable[[dict[str, Any], Tensor, Tensor], Any]


def removal_oracle(
    model: nn.Module, plan: Plan, inputs: Inputs, prompt: Inputs | None = None
) -> tuple[dict[str, Tensor], list[LayerTrace]]:
    """The forward of each prompt without the places that ``plan`` drops in front of the language model.

    Args:
        model: a vision-language model, not patched; left as it was.
        plan: with vision and connector stages; decides, in a pruned forward run first.
        inputs: keyword inputs of the model, with ``attention_mask`` where prompts are padded.
        prompt: see :func:`saint.testing.masked_oracle`.

    Returns:
        The outputs, by name as in :func:`saint.testing.run`, and the trace. Rows of dropped places and of padding hold zeros
        of the decoder's width behind the head: compare the others.

    Raises:
        ValueError: the plan has a language stage.
    """
    _, vlm, facts = locate(model, "connector")
    trace = _decided(model, plan, {**(inputs if prompt is None else prompt), str(CACHING): False})
    decoder = vlm.get_submodule(facts.decoder)
    parameters = Parameters(type(decoder).forward)

    def remove(original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            given, mode.visible = parameters.named(args, kwargs), None
            x = EMBEDDINGS.read(given)
            visual, gone = _gone(x, seen, trace)
            real = _real(MASK.read(inputs), x)
            given = parameters.put(given, EMBEDDINGS, changed(x, seen, trace))
            rows, output = torch.zeros_like(x), dict[str, Any]()
            for sample in range(len(x)):
                stay = (real & ~gone)[sample].nonzero().flatten()
                output = original(**_of_sample(given, parameters, sample, stay, visual))
                rows[sample, stay] = output["last_hidden_state"][0]
            output["last_hidden_state"] = rows
            return output

        return forward

    mode = HideKeys()
    with ExitStack() as stack:
        stack.enter_context(unfused())
        hide_in_tower(stack, mode, vlm, facts, trace, plan)
        seen = visual_tokens(stack, vlm)
        stand_in(stack, decoder, "forward", remove)
        stack.enter_context(mode)
        return run(model, {**inputs, str(CACHING): False, str(ALL_STATES): False}), trace


def holes_oracle(model: Any, plan: Plan, inputs: Inputs, answer: Tensor, **generate: Any) -> Tensor:
    """The logits that chose ``answer`` when generation goes on at full length, step by step, over dropped places as holes.

    Args:
        model: a vision-language model that generates, not patched; left as it was.
        plan: with vision and connector stages; decides, in a pruned forward run first.
        inputs: keyword inputs of the model, with ``attention_mask`` where prompts are padded.
        answer: token ids, int64 [B, T].
        generate: further arguments of ``model.generate``.

    Returns:
        [B, T, V].

    Raises:
        ValueError: the plan has a language stage.
    """
    _, vlm, facts = locate(model, "connector")
    trace = _decided(model, plan, inputs)
    mode, start = HideKeys(), inputs["input_ids"].shape[1]

    def force(ids: Tensor, scores: Tensor) -> Tensor:
        step = ids.shape[1] - start
        return torch.full_like(scores, -torch.inf).scatter(1, answer[:, step : step + 1], 0.0)

    with ExitStack() as stack, torch.no_grad():
        stack.enter_context(unfused())
        hide_in_tower(stack, mode, vlm, facts, trace, plan)
        _holes(stack, mode, vlm, facts, trace)
        stack.enter_context(mode)
        made = model.generate(
            **inputs, max_new_tokens=answer.shape[1], do_sample=False, output_logits=True, return_dict_in_generate=True,
            logits_processor=[force], **generate,
        )  # fmt: skip
    return torch.stack(made.logits, 1)


def _holes(stack: ExitStack, mode: HideKeys, vlm: nn.Module, facts: FamilySpec, trace: list[LayerTrace]) -> None:
    decoder = vlm.get_submodule(facts.decoder)
    parameters = Parameters(type(decoder).forward)
    seen, hidden = visual_tokens(stack, vlm), list[Tensor]()

    def punch(original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            given, mode.visible = parameters.named(args, kwargs), None
            x, cache = EMBEDDINGS.read(given), CACHE.read(given)
            before = 0 if cache is None else int(cache.get_seq_length())
            if not hidden:
                hidden.append(_gone(x, seen, trace)[1])
                given = parameters.put(
                    given, EMBEDDINGS, changed(x, seen, trace).masked_fill(hidden[0].unsqueeze(-1), 0)
                )
            total = before + x.shape[1]
            gone = nn.functional.pad(hidden[0], (0, total - hidden[0].shape[1]))  # [B, total]
            mask = MASK.read(given)
            mask = torch.ones(x.shape[0], total, dtype=torch.long, device=x.device) if mask is None else mask
            if POSITIONS.read(given) is None:
                given = parameters.put(given, POSITIONS, torch.arange(before, total, device=x.device).unsqueeze(0))
            return original(**parameters.put(given, MASK, _punched(mask, gone, before)))

        return forward

    stand_in(stack, decoder, "forward", punch)


def _punched(mask: Any, gone: Tensor, before: int) -> Any:
    """A mask in which dropped places are seen by none but themselves."""
    if isinstance(mask, Mapping):
        return {kind: _punched(one, gone, before) for kind, one in mask.items()}
    if mask is None:
        return None
    if mask.ndim == 2:
        return mask * ~gone
    first = max(0, gone.shape[1] - mask.shape[3])  # a window shows the last columns
    more = nn.functional.pad(gone[:, first:], (0, mask.shape[3] - gone.shape[1] + first))
    rows = torch.arange(before - first, before - first + mask.shape[2], device=gone.device)[:, None]
    own = rows == torch.arange(mask.shape[3], device=gone.device)
    hide = more[:, None, None] & ~own
    return mask.masked_fill(hide, False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min)


def _decided(model: nn.Module, plan: Plan, inputs: Inputs) -> list[LayerTrace]:
    if plan.language:
        raise ValueError(
            "this oracle is of tokens that leave in front of the language model, and the plan has a language stage: use "
            "masked_oracle, or saint.Plan(vision=..., connector=...)"
        )
    with pruned(model, plan) as session:
        run(model, inputs)
        return session.trace


def _gone(x: Tensor, seen: list[Tensor], trace: list[LayerTrace]) -> tuple[Tensor, Tensor]:
    """Find visual tokens, and the places that were dropped, bool [B, L] each; rows of NaN are those of the vision stage."""
    visual = torch.stack(seen).any(0)
    gone = torch.isnan(x).any(-1)
    for entry in trace:
        if entry.stage == "connector":
            for sample, kept in enumerate(entry.kept):
                where = visual[sample].nonzero().flatten()
                lost = torch.ones(len(where), dtype=torch.bool, device=where.device)
                lost[kept] = False
                gone[sample, where[lost]] = True
    return visual, gone


def _real(mask: Tensor | None, x: Tensor) -> Tensor:
    return torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask.bool()


def _of_sample(
    given: dict[str, Any], parameters: Parameters, sample: int, stay: Tensor, visual: Tensor
) -> dict[str, Any]:
    """Arguments of the decoder for the places of one sample that stay."""
    batch, places = visual.shape
    kept = torch.zeros_like(visual)
    kept[sample, stay] = True

    def cut(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(cut(one) for one in value)
        if isinstance(value, Mapping):
            return {name: cut(one) for name, one in value.items()}
        if not isinstance(value, Tensor) or value.ndim < 2:
            return value
        if value.shape[:2] in ((batch, places), (1, places)):
            return value[min(sample, len(value) - 1)][None, stay]
        if value.ndim == 4:  # a mask
            return value[min(sample, len(value) - 1)][None, :, stay][..., stay]
        if len(value) == int(visual.sum()):  # a row per visual token
            return value[kept[visual]]
        return value

    own = {name: cut(value) for name, value in given.items()}
    ids = POSITIONS.read(given)
    if parameters.has(POSITIONS):
        ids = torch.arange(places, device=stay.device).unsqueeze(0) if ids is None else ids
        own = parameters.put(
            own, POSITIONS, ids.expand(*ids.shape[:-2], batch, places)[..., sample, stay].unsqueeze(-2)
        )
    if MASK.read(given) is None or (isinstance(MASK.read(given), Tensor) and MASK.read(given).ndim == 2):
        # none would take gaps in the positions for the ends of documents
        own = parameters.put(own, MASK, torch.ones(1, len(stay), dtype=torch.long, device=stay.device))
    return {name: value for name, value in own.items() if name not in CACHE.spellings}
