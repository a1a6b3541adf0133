"""What language models share, with images and without: logits of the next token are compared."""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from ...extras import require
from ...samples import Sample
from ...upstream.names import IDS
from ...vlm.prompts import answered, placeholders
from ..loading.failures import explained
from .subject import ANSWER_KL, KL, Subject, Wanted

ANSWER = 16  # tokens of the unpruned model's answer that are compared


@dataclass(frozen=True)
class Generating(Subject):
    """A model that writes."""

    measure: ClassVar[str] = KL
    tuned_by: ClassVar[str] = ANSWER_KL
    slot: ClassVar[str] = "language"

    def compared(self, output: Any, length: int = 1) -> Tensor:
        """Return the logits of the last positions, [1, length, vocabulary]."""
        return output.logits[:, -length:].clone()

    def losses(self, base: Tensor, found: Tensor) -> list[float]:
        """Return the mean KL(base || found) over the positions, nat: one number, of one sample."""
        positions = zip(base.split(1, 1), found.split(1, 1), strict=True)
        return [float(np.mean([next_token_kl(one, other) for one, other in positions]))]

    def asked(self, sample: Sample) -> tuple[Sample, int]:
        """Return the sample with the unpruned model's greedy answer behind its prompt, and how many positions are compared.

        Logits behind the prompt and behind each token of the answer but the last are. Where an argument runs along the prompt in
        a way that is not known here, or the model does not generate, only what follows the prompt is.
        """
        ids = IDS.read(sample.kwargs)
        if ids is None or not hasattr(self.model, "generate") or not _grows(sample, ids):
            return sample, 1
        with torch.inference_mode():
            made = self.model.generate(
                **sample.kwargs,
                max_new_tokens=ANSWER,
                do_sample=False,
                num_beams=1,
                suppress_tokens=placeholders(self.model),
            )
        said = made[:, ids.shape[1] : -1]
        return Sample(sample.args, answered(self.model, sample.kwargs, said)), 1 + said.shape[1]


def next_token_kl(base: Tensor, found: Tensor) -> float:
    """``sum_t p(t) (ln p(t) - ln q(t))`` of the distributions behind the last token; logits [1, S, vocabulary], nat."""
    p, q = (torch.log_softmax(logits[0, -1].double(), -1) for logits in (base, found))
    return max(0.0, float((p.exp() * (p - q)).sum()))


def _grows(sample: Sample, ids: Tensor) -> bool:
    """Tell whether every tensor that runs along the prompt [1, L] has its shape."""
    length = ids.shape[1]
    others = (value for value in sample.tensors if value.shape != ids.shape and not value.is_floating_point())
    return not any(length in value.shape[1:] for value in others)


# -- from the hub -----------------------------------------------------------------------------------------------------

CPU = torch.device("cpu")


def config_of(spec: str) -> Any:
    """Return the config of ``hf:NAME_OR_PATH``; None of another name.

    Raises:
        DownloadError: it cannot be fetched.
    """
    library, _, name = spec.partition(":")
    if library != "hf" or not name:
        return None
    with explained(spec):
        return require("transformers", "transformers").AutoConfig.from_pretrained(name)


def on_hub(spec: str, expected: str) -> str:
    """Return the name behind ``hf:``.

    Raises:
        ValueError: another name; ``expected`` says what is.
    """
    library, _, name = spec.partition(":")
    if library != "hf" or not name:
        raise ValueError(f"{expected}; got {spec!r}")
    return name


def check_weights(wanted: Wanted) -> None:
    """Refuse a demo model with other weights than its own.

    Raises:
        ValueError: others are wanted.
    """
    if not wanted.pretrained:
        raise ValueError("a demo model is its weights: leave --no-pretrained out")


def built(auto: Any, name: str, config: Any, wanted: Wanted) -> nn.Module:
    """Return the model that a class of transformers makes of a name, or of its config with random weights."""
    if wanted.pretrained:
        model: nn.Module = auto.from_pretrained(name, dtype=wanted.dtype or "auto")
        return model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made: nn.Module = auto.from_config(config, dtype=wanted.dtype or torch.float32)
    return made
