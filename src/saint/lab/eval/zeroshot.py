"""CLIP models with both towers: images against class names."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...extras import require
from ...presets import recipe
from ..kinds import kind_of
from ..loading.failures import explained

if TYPE_CHECKING:
    from ..kinds import Encoder

TEMPLATES = ("a photo of a {}.",)
# sets that open_clip keeps, by the name that stands for all of them: CLIP's 80 for ImageNet, and the best 7 of them
TEMPLATE_SETS = {"openai-80": "OPENAI_IMAGENET_TEMPLATES", "openai-7": "SIMPLE_IMAGENET_TEMPLATES"}

# texts -> embeddings [T, C]
Embed = Callable[[list[str]], Tensor]


class ImageTower(nn.Module):
    """A two-tower model of transformers that answers with its image embeddings."""

    def __init__(self, both: nn.Module) -> None:
        super().__init__()
        self.both = both

    def forward(self, **inputs: Any) -> Tensor:
        """[B, C], in the space that the texts are embedded in."""
        return _tensor(self.both.get_image_features(**inputs))  # type: ignore[operator]


def load_both_towers(
    spec: str, device: str | torch.device = "cpu", pretrained: bool = True, *, size: int | None = None
) -> tuple["Encoder", Embed]:
    """An image encoder that answers in the space of its text tower, and that text tower.

    Args:
        spec: ``open_clip:NAME/TAG`` or ``hf:NAME_OR_PATH`` of a CLIP or SigLIP model.
        device: where to put them.
        pretrained: False gives random weights.
        size: side of the pictures in pixels.

    Raises:
        ValueError: no text tower there.
    """
    library, _, name = spec.partition(":")
    if library == "open_clip":
        loaded = kind_of(spec, "embeddings").load(spec, device, pretrained, size=size)
        return loaded, _open_clip_text(spec, name, pretrained, loaded.device)
    if library == "hf":
        return _hf_both(spec, name, device, pretrained, size)
    raise ValueError(f"zero-shot needs a model with a text tower: open_clip:NAME/TAG or hf:NAME_OR_PATH, got {spec!r}")


def read_templates(given: Sequence[str]) -> list[str]:
    """Templates in which each name of ``TEMPLATE_SETS`` is replaced by the templates of that set.

    Raises:
        MissingExtraError: a set is named and open_clip is not installed.

    Example:
        >>> read_templates(["a {}"]), len(read_templates(["openai-80", "a {}"]))
        (['a {}'], 81)
    """
    out: list[str] = []
    for text in given:
        if text in TEMPLATE_SETS:
            functions = getattr(require("open_clip", "open-clip"), TEMPLATE_SETS[text])
            out += [function("{}") for function in functions]
        else:
            out.append(text)
    return out


def class_embeddings(embed: Embed, names: Sequence[str], templates: Sequence[str] = TEMPLATES) -> Tensor:
    """Unit embeddings of class names, each the mean over its templates.

    Args:
        embed: the text tower.
        names: of the classes.
        templates: with ``{}`` where the name goes, or names of ``TEMPLATE_SETS``.

    Returns:
        [classes, C], float32, on the CPU.

    Raises:
        ValueError: a template without ``{}``.
        MissingExtraError: a set is named and open_clip is not installed.
    """
    templates = read_templates(templates)
    wrong = [t for t in templates if "{}" not in t]
    if wrong or not templates:
        raise ValueError(
            f"a template needs {{}} where the class name goes, or is one of {', '.join(TEMPLATE_SETS)}; "
            f"got {wrong[0] if wrong else 'none'!r}"
        )
    rows = []
    for name in names:
        made = embed([template.replace("{}", name.replace("_", " ")) for template in templates]).float().cpu()
        rows.append(torch.nn.functional.normalize(made, dim=-1).mean(0))
    return torch.nn.functional.normalize(torch.stack(rows), dim=-1)


def _open_clip_text(spec: str, name: str, pretrained: bool, device: torch.device) -> Embed:
    open_clip: Any = require("open_clip", "open-clip")
    architecture, _, tag = name.partition("/")
    with explained(spec), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # random weights: those that belong to the image tower of Encoder.load
        both = open_clip.create_model(architecture, pretrained=tag if pretrained and tag != "none" else None)
        tokenizer = open_clip.get_tokenizer(architecture)
    both = both.eval().to(device)

    def embed(texts: list[str]) -> Tensor:
        with torch.inference_mode():
            return both.encode_text(tokenizer(texts).to(device))

    return embed


def _hf_both(
    spec: str, name: str, device: str | torch.device, pretrained: bool, size: int | None
) -> tuple["Encoder", Embed]:
    transformers: Any = require("transformers", "transformers")
    tower = kind_of(spec, "embeddings").load(spec, device, pretrained, size=size)
    with explained(spec), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if pretrained:
            both = transformers.AutoModel.from_pretrained(name)
        else:
            both = transformers.AutoModel.from_config(transformers.AutoConfig.from_pretrained(name))
        if not (hasattr(both, "get_text_features") and hasattr(both, "get_image_features")):
            raise ValueError(f"{spec} is a {type(both).__name__}, which has no text tower for zero-shot scores")
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    both = both.eval().to(tower.device)
    # SigLIP was trained on texts padded to full length
    padding = "max_length" if "siglip" in type(both).__name__.lower() else True

    def embed(texts: list[str]) -> Tensor:
        made = tokenizer(texts, padding=padding, truncation=True, return_tensors="pt").to(tower.device)
        with torch.inference_mode():
            return _tensor(both.get_text_features(**made))

    loaded = dataclasses.replace(tower, model=ImageTower(both), usual=recipe("vit/published"))
    return loaded, embed


def _tensor(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.pooler_output
