"""Real processors and tokenizers, made here: from pictures and text to text, pruned as the oracle says."""

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

import saint
from support.families import FAMILIES, IMAGE, PAD, VIDEO
from support.oracles import Oracle, oracle_model, relative_error
from support.plans import CONNECTOR, LANGUAGE, SPECIAL, VISION

WORDS = [
    "what",
    "is",
    "in",
    "the",
    "picture",
    "and",
    "how",
    "many",
    "cats",
    "are",
    "there",
    "user",
    "assistant",
    ":",
    "?",
]


def tokenizer(image, video, **more):
    vocabulary = {"<pad>": PAD, "<unk>": 1, **{word: 2 + i for i, word in enumerate(WORDS)}, image: IMAGE, video: VIDEO}
    vocabulary |= {"<|vision_start|>": 102, "<|vision_end|>": 103}
    vocabulary |= {f"w{i}": i for i in range(128) if i not in vocabulary.values()}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    special = [image, video, "<|vision_start|>", "<|vision_end|>"]
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", unk_token="<unk>", padding_side="left",
        additional_special_tokens=special, **more,
    )  # fmt: skip


def llava():
    pixels = hf.CLIPImageProcessor(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
    return hf.LlavaProcessor(
        pixels, tokenizer("<image>", "<video>"), patch_size=4, vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )  # fmt: skip


def qwen2_vl():
    sizes = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
    size = {"shortest_edge": 24 * 24, "longest_edge": 48 * 48}
    return hf.Qwen2VLProcessor(
        hf.Qwen2VLImageProcessor(size=size, **sizes), tokenizer("<|image_pad|>", "<|video_pad|>"),
        hf.Qwen2VLVideoProcessor(size=size, **sizes),
    )  # fmt: skip


CASES = {
    "llava-llama": (llava, "<image>", [36, 36, 36], saint.Plan(vision=VISION, connector=CONNECTOR, language=LANGUAGE)),
    "qwen2-vl": (
        qwen2_vl,
        "<|vision_start|><|image_pad|><|vision_end|>",
        [24, 15, 36],
        saint.Plan(connector=CONNECTOR, language=LANGUAGE),
    ),
}


def picture(width, height, seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("name", CASES)
def test_pictures_and_text(name):
    make, place, counts, plan = CASES[name]
    family, processor = FAMILIES[name], make()
    model = family.build()
    twin = oracle_model(model)
    pictures = [picture(48, 32, 0), picture(24, 40, 1), picture(48, 48, 2)]  # three sizes
    text = [
        f"user : what is in the picture {place} ? assistant :",
        f"user : {place} and {place} how many cats are there ? assistant :",
        "user : what is the picture ? assistant :",
    ]
    inputs = dict(processor(images=pictures, text=text, padding=True, return_tensors="pt"))
    images = (inputs["input_ids"] == IMAGE).sum(1).tolist()
    assert images == [counts[0], counts[1] + counts[2], 0]
    length = inputs["input_ids"].shape[1]

    with saint.pruned(model, plan) as session, torch.no_grad():
        out = model.generate(
            **inputs, max_new_tokens=16, do_sample=False, suppress_tokens=SPECIAL, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
        trace = session.trace

    new = out.sequences[:, length:]
    assert [e.stage for e in trace][-3:] == ["connector", "language", "language"]
    assert trace[-3].tokens_out[0] < images[0]
    expected = Oracle(family, twin, trace, inputs).continued(new)
    assert relative_error(torch.stack(out.logits, 1), expected) < 1e-4
    # nothing about the prompt has become shorter for whoever decodes it
    assert torch.equal(out.sequences[:, :length], inputs["input_ids"])
    answers = processor.batch_decode(new, skip_special_tokens=True)
    assert len(answers) == 3
    assert all(answers)


@pytest.mark.parametrize("name", CASES)
def test_nothing_dropped_gives_the_same_text(name):
    make, place, _, _ = CASES[name]
    processor, model = make(), FAMILIES[name].build()
    inputs = processor(
        images=[picture(48, 32, 0)], text=[f"{place} how many cats ?"], padding=True, return_tensors="pt"
    )
    keep = saint.Stage(saint.Saint(threshold=1.0, keep=1.0), layers=[0, 2])

    def answer():
        return processor.batch_decode(model.generate(**inputs, max_new_tokens=8, do_sample=False))

    expected = answer()
    with saint.pruned(model, saint.Plan(connector=saint.SaintFullGraph(keep=1.0), language=keep)):
        assert answer() == expected


def test_a_placeholder_too_many_is_an_error():
    processor, model = llava(), FAMILIES["llava-llama"].build()
    inputs = processor(images=[picture(48, 32, 0)], text=["<image> how many cats ?"], return_tensors="pt")
    inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([[IMAGE]])], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    with saint.pruned(model, saint.Plan(language=LANGUAGE)), pytest.raises(ValueError, match="do not match"):
        model(**inputs)
