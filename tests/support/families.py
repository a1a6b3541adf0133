"""The tiny random vision-language models that the specs of families bring, and upstream's spellings."""

from collections.abc import Callable

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicLayer

from saint.upstream.names import CACHE, Parameters, Role
from saint.upstream.registry import FAMILIES as SPECS
from saint.upstream.tiny import IMAGE, LAYERS, PAD, VIDEO, prompts

__all__ = ["FAMILIES", "IMAGE", "LAYERS", "PAD", "VIDEO", "prompts"]  # names of the package that tests read here

FAMILIES = {tiny.name: tiny for spec in SPECS for tiny in spec.tiny}


def one_at_a_time(make: Callable[[str], object]) -> Callable[[str], object]:
    """What ``make`` makes of a family's name, the last one kept: cases come family by family."""
    made: dict[str, object] = {}

    def get(name: str) -> object:
        if name not in made:
            made.clear()
            made[name] = make(name)
        return made[name]

    return get


# -- upstream's spellings -------------------------------------------------------------------------------------------------


def cache_of(output) -> object:
    """The cache in what a model returned."""
    return CACHE.get(output)


def cached(model: nn.Module, cache) -> dict:
    """The keyword argument that hands ``cache`` to ``model``."""
    return Parameters(type(model).forward).put({}, CACHE, cache)


def foreign_cache(config) -> Cache:
    """A cache of a class that keeps its entries in another form, as quantised ones do."""

    class QuantizedLayer(DynamicLayer):
        pass

    return Cache(layers=[QuantizedLayer() for _ in range(config.num_hidden_layers)])


def checkpoint(model: nn.Module) -> None:
    """Switch on gradient checkpointing, without re-entrance."""
    enable = Role("activation_checkpointing_enable", "gradient_checkpointing_enable").get(model)
    enable({"use_reentrant": False})


# -- inputs --------------------------------------------------------------------------------------------------------------

SAMPLES = [[4, "0", 7], [3, "0", 12]]


def maker(family, model):
    """Inputs whose samples are the same alone and together."""

    def make(which):
        seeds = [prompts(family, model, [SAMPLES[i]], seed=i) for i in which]
        both = prompts(family, model, [SAMPLES[i] for i in which])
        length = both["input_ids"].shape[1]
        for row, one in enumerate(seeds):
            for name in ("input_ids", "attention_mask", family.types):
                if name in one:
                    both[name][row] = torch.nn.functional.pad(one[name][0], (length - one[name].shape[1], 0))
        for name in both:
            if name.startswith("pixel"):  # of pictures of one size, one for each sample
                both[name] = torch.cat([one[name] for one in seeds])
        return both

    return make


def layers_of(model):
    """The layers of the language model."""
    ends = ("language_model.layers", "text_model.layers")
    return next(module for name, module in model.named_modules() if name.endswith(ends))
