"""Masked-oracle equality of prefill logits, and of greedy tokens, over families, stages and batches."""

from contextlib import ExitStack

import pytest
import torch
from transformers.vision_utils import get_vision_window_index
from vlm_models import FAMILIES, IMAGE, hide, hide_packed, members, missing, one_at_a_time, oracle_model, prompts

import saint
import saint.testing

ONE = [[4, "0", 7]]
PADDED = [[4, "0", 7], [3, "1", 2], [6, "0", 12]]  # left padding, images of two sizes
IMAGES = [[3, "0", 4, "1", 5]]
MIXED = [[4, "0", 3, "1", 2], [9], [2, "1", 3]]  # several images, none, one

SPECIAL = list(range(100, 104))  # a random model would write image placeholders
LANGUAGE = saint.Stage(saint.Saint(threshold=0.9, budget=0.4), layers=[1, 2])
CONNECTOR = saint.Stage(saint.SaintFullGraph(keep=0.6, step=4))
VISION = saint.Stage(saint.SaintFullGraph(keep=0.7, step=8), layers=[1])
MODES = {
    "language": saint.Plan(language=LANGUAGE),
    "connector": saint.Plan(connector=CONNECTOR),
    "vision": saint.Plan(vision=VISION),
    "hybrid": saint.Plan(vision=VISION, connector=CONNECTOR, language=LANGUAGE),
    "connector+language": saint.Plan(connector=CONNECTOR, language=LANGUAGE),
}
CASES = [
    (name, mode)
    for name, family in FAMILIES.items()
    for mode in MODES
    if (mode == "connector+language")
    == (family.tower is None and mode not in ("language", "connector", "vision", "hybrid"))
    and (family.tower is not None or mode not in ("vision", "hybrid"))
]


class Oracle:
    """The full-length forward with the tokens of a trace hidden."""

    def __init__(self, family, twin, trace, inputs):
        self.family, self.twin, self.inputs = family, twin, inputs
        self.entries = {stage: [e for e in trace if e.stage == stage] for stage in ("vision", "connector", "language")}
        self.places = inputs["input_ids"] == IMAGE

    def gone_before(self, layer):
        """Dropped in front of a layer of the language model, bool [B, L]."""
        gone = torch.zeros_like(self.places)
        for entry in self.entries["vision"]:
            gone |= self.unseen(entry)
        for entry in self.entries["connector"]:
            gone |= missing(entry.kept, self.places)
        for entry in self.entries["language"]:
            if entry.layer < layer:
                gone |= missing(entry.kept, self.places)
        return gone

    def unseen(self, entry):
        """Placeholders of features that the tower dropped."""
        flags = self.packed(entry) if self.family.name == "llava-next" else torch.cat(self.lost(entry))
        return torch.zeros_like(self.places).masked_scatter(self.places, flags)

    def lost(self, entry):
        """Visual tokens of each image that the tower dropped, a bool tensor per image."""
        totals = self.entries["vision"][0].tokens_in.tolist()
        ones = [torch.ones(1, n, dtype=torch.bool) for n in totals]
        return [missing([kept], all_of)[0] for kept, all_of in zip(entry.kept, ones, strict=True)]

    def packed(self, entry):
        """Where the features of the tiles end up: the model's own packing, applied to flags."""
        dropped = torch.stack(self.lost(entry)).float().unsqueeze(-1)
        sizes = self.inputs["image_sizes"]
        tiles = [3 if size.tolist() == [24, 48] else 5 for size in sizes]
        flags, _ = self.twin.model.pack_image_features(
            list(dropped.split(tiles)), sizes, vision_feature_select_strategy="default", image_newline=torch.zeros(1)
        )
        return torch.cat(flags).flatten().bool()

    def hide_in_tower(self, stack):
        for entry in self.entries["vision"]:
            layers = self.twin.get_submodule(self.family.tower)
            attentions = [layer.get_submodule(self.family.attention) for layer in layers]
            if "image_grid_thw" in self.inputs:
                inside = self.in_sequence(torch.cat(self.lost(entry)))
                hide_packed(stack, attentions, lambda i, e=entry, gone=inside: gone if i > e.layer else None)
                continue
            gone = torch.stack(self.lost(entry))
            inside = torch.zeros(len(gone), gone.shape[1] * self.family.merge_size**2, dtype=torch.bool)
            for row, lost in zip(inside, gone, strict=True):
                row[members(self.family, gone.shape[1])[lost].flatten()] = True
            inside = torch.nn.functional.pad(inside, (self.family.prefix, 0))
            hide(stack, attentions, lambda i, e=entry, gone=inside: gone if i > e.layer else None)

    def in_sequence(self, flags):
        """Flags of patches, from flags of groups, in the order in which a packed tower holds them."""
        if self.family.name == "qwen2.5-vl":
            tower = self.twin.model.visual
            order, _ = get_vision_window_index(
                self.inputs["image_grid_thw"], tower.spatial_merge_size, tower.window_size, tower.patch_size
            )
            flags = flags[order]
        return flags.repeat_interleave(self.family.merge_size**2)

    def __call__(self, **changes):
        with ExitStack() as stack, torch.no_grad():
            hide(stack, self.twin.get_submodule(self.family.decoder), self.gone_before)
            self.hide_in_tower(stack)
            return self.twin(**{**self.inputs, **changes}, use_cache=False)

    def continued(self, tokens):
        """Logits that must have chosen ``tokens`` [B, T], from one forward over prompt and tokens.

        By induction over the steps this is what recomputing everything at every step gives.
        """
        grown = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        if self.family.types:  # PaliGemma: 1 marks what is not part of the bidirectional prefix
            grown[self.family.types] = torch.full_like(tokens, 1 if self.family.name == "paligemma" else 0)
        grown = {name: torch.cat([self.inputs[name], more], 1) for name, more in grown.items()}
        length = self.inputs["input_ids"].shape[1]
        return self(**grown).logits[:, length - 1 : -1]


def relative_error(actual, expected):
    return ((actual - expected).abs().max() / expected.abs().max()).item()


@pytest.fixture(scope="module")
def models():
    def make(name):
        model = FAMILIES[name].build()
        return model, oracle_model(model)

    return one_at_a_time(make)


@pytest.mark.parametrize(("name", "mode"), CASES)
@pytest.mark.parametrize("samples", [PADDED, IMAGES, MIXED], ids=["padded", "images", "mixed"])
def test_prefill_logits(models, name, mode, samples):
    family = FAMILIES[name]
    model, twin = models(name)
    inputs = prompts(family, model, samples)

    with saint.pruned(model, MODES[mode]) as session, torch.no_grad():
        actual = model(**inputs).logits
        trace = session.trace

    oracle = Oracle(family, twin, trace, inputs)
    assert all(int((e.tokens_in - e.tokens_out).sum()) > 0 for e in trace)
    assert [e.stage for e in trace] == sorted((e.stage for e in trace), key=["vision", "connector", "language"].index)
    here = inputs["attention_mask"].bool() & ~oracle.gone_before(99)
    assert actual.shape[:2] == inputs["input_ids"].shape
    assert relative_error(actual[here], oracle().logits[here]) < 1e-4
    with torch.no_grad():
        assert relative_error(model(**inputs).logits[here], actual[here]) > 1e-3, "the plan changes nothing"


@pytest.mark.parametrize(("name", "mode"), CASES)
@pytest.mark.parametrize("samples", [ONE, PADDED], ids=["one", "padded"])
def test_greedy_tokens(models, name, mode, samples):
    family = FAMILIES[name]
    model, twin = models(name)
    inputs = prompts(family, model, samples, seed=1)
    steps = 32

    with saint.pruned(model, MODES[mode]) as session, torch.no_grad():
        out = model.generate(
            **inputs,
            max_new_tokens=steps,
            do_sample=False,
            suppress_tokens=SPECIAL,
            output_logits=True,
            return_dict_in_generate=True,
        )
        trace = session.trace

    assert all(int((e.tokens_in - e.tokens_out).sum()) > 0 for e in trace)
    new = out.sequences[:, inputs["input_ids"].shape[1] :]
    assert new.shape[1] == steps
    expected = Oracle(family, twin, trace, inputs).continued(new)
    assert relative_error(torch.stack(out.logits, 1), expected) < 1e-4
    expected[..., SPECIAL] = -torch.inf
    assert torch.equal(new, expected.argmax(-1))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("samples", [ONE, MIXED], ids=["one", "mixed"])
def test_the_public_oracle_agrees(models, name, samples):
    family = FAMILIES[name]
    model, twin = models(name)
    inputs = prompts(family, model, samples)
    plan = MODES["hybrid" if family.tower else "connector+language"]
    outputs, trace = saint.testing.masked_oracle(model, plan, inputs)
    oracle = Oracle(family, twin, trace, inputs)
    here = inputs["attention_mask"].bool() & ~oracle.gone_before(99)
    with torch.no_grad():
        unpruned = model(**inputs).logits
    expected = oracle().logits[here]
    assert saint.status(model) is None
    assert relative_error(unpruned[here], expected) > 1e-3
    assert relative_error(outputs["logits"][here], expected) < 1e-4
