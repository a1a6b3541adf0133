"""A model's processor whose prompts have fewer places per picture."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...methods.divprune import DivPrune
from . import budget, names, tower
from .budget import FIELD, KEY, VISION, Choice


class PruningInfo:
    """In front of the class that knows a model's sizes: the engine measures pruned prompts."""

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int] | None:
        """None, which makes vLLM count on dummy pictures, where the engine's plan prunes; else what the model says."""
        said = super().get_mm_max_tokens_per_item(seq_len, mm_counts)  # type: ignore[misc]
        return None if budget.default() is not None or budget.vision() else said


class PruningProcessor:
    """In front of the class of a processor."""

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        """Write out in full what a request asks for, so that the hash of its pictures says it."""
        kwargs, engine = dict(inputs.hf_processor_mm_kwargs), budget.default()
        config = self.info.ctx.get_mm_config()  # type: ignore[attr-defined]
        if KEY in (config.mm_processor_kwargs or {}):
            raise ValueError(
                f"--mm-processor-kwargs of the engine has {KEY!r}, which is for requests: give the engine's plan as "
                f"{budget.VARIABLE}, or start it with `saint serve --plan`"
            )
        method = budget.requested(kwargs.pop(KEY), engine) if KEY in kwargs else engine
        stages = budget.vision()
        kwargs.pop(VISION, None)
        if stages:
            kwargs[VISION] = [stage.to_dict() for stage in stages]
        if method is not None:
            if names.prunes_videos(config):
                raise ValueError(
                    "--video-pruning-rate is set, for which vLLM lays out positions anew from the features of videos; pictures "
                    f"cannot lose tokens beside it: start the engine without it, or without {budget.VARIABLE} and {KEY!r}"
                )
            kwargs[KEY] = method.to_dict()
        inputs = dataclasses.replace(inputs, hf_processor_mm_kwargs=kwargs)
        return super().apply(inputs, timing_ctx)  # type: ignore[misc]

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, Any]) -> Any:
        return super()._apply_hf_processor_main(mm_items, _without(hf_kwargs))  # type: ignore[misc]

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, Any]) -> Any:
        return super()._get_mm_fields_config(hf_inputs, _without(hf_processor_mm_kwargs))  # type: ignore[misc]

    def _get_mm_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, Any], out_mm_kwargs: Any
    ) -> Any:
        updates = super()._get_mm_prompt_updates(  # type: ignore[misc]
            mm_items, _without(hf_processor_mm_kwargs), out_mm_kwargs
        )
        asked, stages = hf_processor_mm_kwargs.get(KEY), budget.vision()
        if (asked is None and not stages) or "image" not in updates:
            return updates
        method = None if asked is None else budget.requested(asked, None)
        plan = tower.resolved(stages, self.info.get_hf_config()) if stages else None  # type: ignore[attr-defined]
        shorter = []
        for item, alternatives in enumerate(updates["image"]):
            seen = [_places(update.content) for update in alternatives]
            runs = _runs(seen[0])
            if any(_runs(places) != runs for places in seen):
                raise ValueError(f"picture {item} has several spellings in the prompt, of different numbers of places")
            inputs = out_mm_kwargs["image"][item]
            # features that come with a request have passed no tower
            there = runs if plan is None or names.PIXELS not in inputs else [tower.left(plan, run) for run in runs]
            goals = there if method is None else budget.shares(method.keep, there)
            inputs[FIELD] = names.element(Choice(method or DivPrune(), tuple(there), tuple(goals)).packed())
            pairs = zip(alternatives, seen, strict=True)
            shorter.append([update.with_content(_shortened(update.content, p, runs, goals)) for update, p in pairs])
        return {**updates, "image": shorter}


@functools.cache
def behind(front: Any, cls: Any) -> Any:
    """A subclass of ``cls`` in which methods of ``front`` come first."""
    return type(f"Pruning{cls.__name__}", (front, cls), {"__module__": __name__})


def factories(cls: Any, architecture: str) -> dict[str, Any]:
    """Find what makes the processor of model class ``cls``, pruning; ``architecture`` of its checkpoints."""
    own = getattr(cls, names.FACTORIES)

    def info(ctx: Any) -> Any:
        return behind(PruningInfo, own.info(ctx).__class__)(ctx)

    def processor(info: Any, dummy_inputs: Any) -> Any:
        if budget.vision():
            names.check_tower(architecture)  # here, where vLLM hands an error on as it is
        return behind(PruningProcessor, own.processor(info, dummy_inputs).__class__)(info, dummy_inputs)

    return {"info": info, "processor": processor, "dummy_inputs": own.dummy_inputs}


def _without(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments that the model's own processor knows."""
    return {name: value for name, value in kwargs.items() if name not in (KEY, VISION)}


def _places(content: Any) -> Tensor:
    """Mark the tokens of a placeholder that are replaced by features, bool [tokens]."""
    if content.is_embed is None:
        return torch.ones(len(content.full), dtype=torch.bool)
    return torch.as_tensor(content.is_embed(content.full)).bool()


def _runs(places: Tensor) -> list[int]:
    """Lengths of the uninterrupted runs of True."""
    values, lengths = torch.unique_consecutive(places, return_counts=True)
    return lengths[values].tolist()


def _shortened(content: Any, places: Tensor, runs: Sequence[int], goals: Sequence[int]) -> Any:
    """``content`` with as many places in each of ``runs`` as ``goals`` say; all other tokens stay."""
    starts = torch.cat([places.new_zeros(1), places[:-1]])  # the place before
    number = (places & ~starts).long().cumsum(0) - 1  # the run that each place belongs to, [tokens]
    kept = torch.tensor(goals)[number.clamp_min(0)]
    counted = places.long().cumsum(0)
    before = torch.tensor([0, *runs]).cumsum(0)[number.clamp_min(0)]
    stays = ~places | (counted - before <= kept)
    full = [token for token, stay in zip(content.full, stays.tolist(), strict=True) if stay]
    left = places[stays]
    if content.is_embed is None:
        return names.content()(full=full)
    if torch.equal(torch.as_tensor(content.is_embed(full)).bool(), left):
        return names.content()(full=full, is_embed=content.is_embed)  # it goes by token ids
    return names.content()(full=full, is_embed=lambda _full: left)
