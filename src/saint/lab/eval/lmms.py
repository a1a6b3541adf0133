"""A model for lmms-eval: any supported vision-language model of transformers, with a plan applied.

python -m lmms_eval --model saint_hf --model_args pretrained=llava-hf/llava-1.5-7b-hf,plan=llava-1.5/hybrid --tasks pope
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from ...errors import MissingExtraError
from ...extras import install_hint
from ...plans import Plan
from ...session import apply
from ..kinds import kind_of
from ..loading import read_plan
from .loop import Processes

try:
    from lmms_eval.api.model import lmms
    from lmms_eval.protocol import ChatMessages
    from tqdm import tqdm
except ImportError as error:
    raise MissingExtraError(f"this is a model for lmms-eval: {install_hint('lmms')}") from error


class SaintHF(lmms):
    """A vision-language model of transformers in lmms-eval, unpruned or pruned.

    Args:
        pretrained: name or path, with or without ``hf:`` in front; or ``demo:small-llava``.
        plan: a recipe's name, a plan's JSON (text or data) or a ``.json`` file; "" means unpruned.
        device: auto, cpu, cuda, cuda:1; with several processes each takes its own GPU.
        dtype: auto (that of the checkpoint), float32, bfloat16 or float16.
        batch_size: prompts per forward.
        max_new_tokens: where the task does not say.

    Raises:
        ValueError: a bad plan or name, or an option that is not there.
        UnsupportedModelError: a model that cannot be pruned.
    """

    is_simple = False  # asks tasks for chat messages, so that the processor's own template is used

    def __init__(
        self,
        pretrained: str,
        plan: str | Mapping[str, Any] = "",
        device: str = "auto",
        dtype: str = "auto",
        batch_size: int | str = 1,
        max_new_tokens: int = 1024,
        **unknown: Any,
    ) -> None:
        super().__init__()
        if leftover := sorted(k for k, v in unknown.items() if k != "max_batch_size" or v is not None):
            raise ValueError(f"saint_hf has no option {', '.join(leftover)}")
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ValueError(f"batch_size must be a number >= 1, got {batch_size!r}")
        processes = Processes.here(cpu=device == "cpu")
        if processes.world > 1 and device in ("auto", "cuda") and torch.cuda.is_available():
            device = f"cuda:{processes.local}"
        spec = str(pretrained) if str(pretrained).startswith(("hf:", "demo:")) else f"hf:{pretrained}"
        loaded = kind_of(spec, "answers").load(spec, device, dtype=_dtype(dtype))
        made = _plan(plan)
        self._model, self.processor = loaded.model, loaded.processor
        self.session = None if made is None else apply(self._model, made)
        self._loaded = loaded
        self._rank, self._world_size = processes.rank, processes.world
        self.batch_size_per_gpu = int(batch_size)
        self.max_new_tokens = max_new_tokens

    @property
    def batch_size(self) -> int:
        """Prompts per forward."""
        return self.batch_size_per_gpu

    @property
    def model(self) -> Any:
        """The model, with the plan applied."""
        return self._model

    @property
    def device(self) -> torch.device:
        """Return where the model is."""
        return self._loaded.device

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Answers, in the order of the requests. What the model cannot do raises: no answer is made up."""
        answers: list[str] = []
        with tqdm(total=len(requests), disable=self.rank != 0, desc="saint_hf") as bar:
            for chunk in self._chunks([request.args for request in requests]):
                messages = [
                    ChatMessages(messages=to_messages(self.task_dict[task][split][doc]))
                    for _, to_messages, _, doc, task, split in chunk
                ]
                settings = dict(chunk[0][2])
                said = self._answer(messages, settings)
                for arguments, text in zip(chunk, said, strict=True):
                    self.cache_hook.add_partial("generate_until", (arguments[0], settings), text)
                answers += said
                bar.update(len(chunk))
        return answers

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        """Not supported."""
        raise NotImplementedError("saint_hf answers single turns; multi-round tasks are not supported")

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Not supported."""
        raise NotImplementedError("saint_hf generates; tasks that score given answers by likelihood are not supported")

    def _chunks(self, arguments: Sequence[tuple[Any, ...]]) -> Iterator[list[tuple[Any, ...]]]:
        """Neighbours with the same settings, at most a batch of them."""
        for _, group in itertools.groupby(arguments, key=lambda args: sorted(args[2].items(), key=str)):
            members = list(group)
            for start in range(0, len(members), self.batch_size):
                yield members[start : start + self.batch_size]

    def _answer(self, chats: list[Any], settings: dict[str, Any]) -> list[str]:
        media = [chat.extract_media() for chat in chats]
        if any(videos or audios for _, videos, audios in media):
            raise ValueError("saint_hf takes images; this task has video or audio")
        images = [pictures for pictures, _, _ in media]
        if len(chats) > 1 and not all(images):  # processors want images for all of a batch or for none
            return [text for chat in chats for text in self._answer([chat], settings)]
        texts = [self._prompt(chat) for chat in chats]
        pictures = {"images": images} if any(images) else {}
        made = self.processor(text=texts, return_tensors="pt", padding=len(texts) > 1, **pictures)
        dtype = next(p.dtype for p in self._model.parameters() if p.is_floating_point())
        inputs = {k: t.to(self.device, dtype if t.is_floating_point() else None) for k, t in made.items()}
        sampled = (settings.get("temperature") or 0) > 0 or bool(settings.get("do_sample"))
        more = {k: settings[k] for k in ("temperature", "top_p") if sampled and settings.get(k) is not None}
        with torch.no_grad():
            ids = self._model.generate(
                **inputs,
                max_new_tokens=settings.get("max_new_tokens") or self.max_new_tokens,
                do_sample=sampled,
                num_beams=settings.get("num_beams") or 1,
                **more,
            )
        said = [self._loaded.decode(row) for row in ids[:, inputs["input_ids"].shape[1] :]]
        stops = settings.get("until") or []
        for stop in [stops] if isinstance(stops, str) else stops:
            said = [text.split(stop)[0] if stop else text for text in said]
        return said

    def _prompt(self, chat: Any) -> str:
        if getattr(self.processor, "chat_template", None):
            turns = [
                {
                    "role": turn.role,
                    "content": [
                        {"type": "image"} if part.type == "image" else {"type": "text", "text": part.text}
                        for part in turn.content
                    ],
                }
                for turn in chat.messages
            ]
            return str(self.processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False))
        token = getattr(self.processor, "image_token", None)
        if not isinstance(token, str):
            raise ValueError(f"{type(self.processor).__name__} has neither a chat template nor an image token")
        parts = [part for turn in chat.messages for part in turn.content]
        return "\n".join(token if part.type == "image" else part.text for part in parts)


def _dtype(name: str) -> torch.dtype | None:
    known = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise ValueError(f"dtype must be one of {', '.join(known)}, got {name!r}")
    return known[name]


def _plan(plan: str | Mapping[str, Any]) -> Plan | None:
    if not plan:
        return None
    return Plan.from_dict(dict(plan)) if isinstance(plan, Mapping) else read_plan(str(plan))
