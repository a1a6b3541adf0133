"""Prompts of vision-language models, as the arguments of a forward.

Letters: B prompts, L positions of the longest prompt, T tokens of the answers.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..upstream.names import IDS, IMAGE_TOKEN, VIDEO_TOKEN
from .locate import find


def placeholders(model: nn.Module) -> list[int]:
    """Tokens that stand for images and videos; none in a language model that reads text alone."""
    found = find(model)
    config = None if found is None else found[1].config
    return [token for role in (IMAGE_TOKEN, VIDEO_TOKEN) if (token := role.get(config)) is not None]


def visual_places(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """Mark where images and videos stand in prompts, bool [B, L]."""
    ids = IDS.read(inputs)
    return torch.isin(ids, torch.tensor(placeholders(model), device=ids.device))


def answered(model: nn.Module, inputs: Mapping[str, Any], answer: Tensor) -> dict[str, Any]:
    """``inputs`` with ``answer`` behind the prompts: one forward gives what generating it step by step gave.

    Args:
        model: whose prompts they are.
        inputs: keyword arguments; tensors of the shape of the token ids [B, L] run along the prompt.
        answer: token ids, int64 [B, T].
    """
    ids = IDS.read(inputs)
    grown = dict(inputs)
    for name, value in inputs.items():
        if isinstance(value, Tensor) and value.shape == ids.shape:
            more = value[:, -1:].expand(-1, answer.shape[1])
            config: Any = model.config
            if name == "token_type_ids" and config.model_type == "paligemma":
                more = torch.ones_like(more)  # what is not part of the bidirectional prefix
            grown[name] = torch.cat([value, answer if value is ids else more], 1)
    return grown


def with_picture(processor: Any, prompt: str) -> str:
    """``prompt`` behind one picture, as the text that a processor of transformers takes.

    Raises:
        ValueError: the processor says neither how a chat looks nor what stands for an image.
    """
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        chat = [{"role": "user", "content": content}]
        return str(processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False))
    if isinstance(token := getattr(processor, "image_token", None), str):
        return f"{token}\n{prompt}"
    raise ValueError(
        f"{type(processor).__name__} has neither a chat template nor an image token, so it is unknown where the image "
        "goes in the prompt"
    )
