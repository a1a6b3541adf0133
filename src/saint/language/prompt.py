"""A language model without images: which tokens of a prompt are the candidates of its language stage.

Letters: B batch, L positions of the forward.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..patch import Uncopyable
from ..upstream.names import CACHE, EMBEDDINGS, IDS, MASK, Parameters

if TYPE_CHECKING:  # imports transformers
    from .doorway import Doorway, Handover


def candidates(mask: Tensor) -> Tensor:
    """All real tokens but the first and the last of each prompt: mask [B, L], not 0 where a token is real -> bool [B, L]."""
    real = mask.bool()
    before, behind = real.cumsum(1) > 1, real.flip(1).cumsum(1).flip(1) > 1
    return real & before & behind


def candidates_seen(mask: Tensor) -> Tensor:
    """The same from who sees whom: tokens that see an earlier one and are seen by a later one, and themselves.

    The first and the last of each of several texts packed into one row stay, too.

    Args:
        mask: bool, or added to the logits of attention, [B, 1 or H, L, L].

    Returns:
        bool [B, L].
    """
    from .masks import lets_through  # imports transformers

    sees = lets_through(mask).any(1)
    real = sees.diagonal(dim1=1, dim2=2)  # [B, L]; padding may see tokens, and is seen by none
    earlier = sees.tril(-1) & real.unsqueeze(2)  # [B, L, L]
    return real & earlier.any(2) & earlier.any(1)


class PrunedText(Uncopyable):
    """Tells the door which tokens of a prompt are candidates; the counterpart of ``vlm.model.PrunedVLM``.

    A prompt is a forward that fills an empty cache, or has none; forwards on a filled cache add tokens that all stay.

    Args:
        model: the decoder.
        door: of the language model.
        handover: between this and the door.
        root: the user's model, which holds ``model``.
    """

    def __init__(self, model: nn.Module, door: "Doorway", handover: "Handover", root: nn.Module) -> None:
        self.model, self.alone = model, model
        self.patched, self.marked, self.stacks = root, (model,), door.stacks
        self.door, self.handover = door, handover
        self.parameters = Parameters(type(model).forward)

    def install(self, stack: ExitStack) -> None:
        """Patch the instance; ``stack`` undoes it."""
        from .generation import watch

        stack.callback(self.model.register_forward_pre_hook(self._begin, with_kwargs=True).remove)
        self.door.install(stack)
        watch(stack, self.patched, self.door, lambda ids, given: None)

    def _begin(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        from .cache import check_cache, filled  # these import transformers
        from .shortening import documents

        note = self.handover.new()
        given = self.parameters.named(args, kwargs)
        cache, mask, embedded = CACHE.read(given), MASK.read(given), EMBEDDINGS.read(given)
        tokens = IDS.read(given) if embedded is None else embedded[..., 0]
        drops = self.door.decoder is not None and self.door.decoder.drops
        if cache is not None and drops:
            # some bring masks of their own, which would be refused in their place
            check_cache(cache, self.door.token)
        if tokens is None or filled(cache):
            return
        batch, length = tokens.shape
        if isinstance(mask, Mapping):  # by kind of layer, as `generate` makes them for a static cache
            mask = next((one for one in mask.values() if isinstance(one, Tensor)), None)
        if mask is None or (isinstance(mask, Tensor) and mask.shape == tokens.shape):
            real = torch.ones_like(tokens) if mask is None else mask.clone()
            if self.handover.prompt is not None:
                real[:, self.handover.prompt :] = 0  # drafts
            found = candidates(real)
        elif (
            isinstance(mask, Tensor)
            and mask.ndim == 4
            and mask.shape[2] == length
            and (mask.shape[3] == length or (mask.shape[3] > length and getattr(cache, "is_compileable", False)))
            and len(mask) in (1, batch)
        ):
            own = mask[..., :length]  # behind these columns is what a static cache has not filled
            found = candidates_seen(own).expand(batch, -1)
        elif not drops:
            return
        else:
            shown = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(
                f"{MASK} must be [B, L] = {tuple(tokens.shape)} or [B, 1, L, L], which show the first and last token of each "
                f"prompt, got {shown}"
            )
        packed = documents(given, self.model.config)
        if packed is not None:  # of every document the first and the last
            edge = packed.diff(dim=-1) != 0
            found[:, 1:] &= ~edge
            found[:, :-1] &= ~edge
        if length > 2:
            note.visual = found.to(tokens.device)
