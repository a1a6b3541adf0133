"""Which tokens of a prompt are asked what they attend to.

Letters: B batch, L places of what entered the language model, S tokens of the sequence by now, N visual tokens, R askers of the
sample that has most, C channels.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..needs import FIRST, LAST, QUERIES, QUESTION, RATERS
from ..runtime.state import LayerState
from ..tokens import Selection


class Askers(NamedTuple):
    """Tokens whose attention is looked at.

    Attributes:
        slots: in the sequence, those of all names once, int64 [B, R].
        weights: by name, the share of each in the mean, float32 [B, R], 0 of padding; None where each sample has one alone.
    """

    slots: Tensor
    weights: Mapping[str, Tensor | None]

    @staticmethod
    def of(masks: dict[str, Tensor]) -> "Askers":
        """The tokens of each mask [B, S], at least one of each sample."""
        some = torch.stack(list(masks.values())).any(0)
        if masks.keys() == {FIRST}:  # one of each sample: the device is not asked how many
            return Askers(some.long().argmax(1, keepdim=True), {FIRST: None})
        chosen = Selection.from_mask(some, tuple(some.sum(1).tolist()))
        slots, weights = chosen.slots, dict[str, Tensor | None]()
        if chosen.valid is not None:  # instead of padding a token whose row is a number
            slots = torch.where(chosen.valid, slots, slots[:, :1])
        for name, mask in masks.items():
            own = mask.gather(1, slots)
            own = own if chosen.valid is None else own & chosen.valid
            weights[name] = own / own.sum(1, keepdim=True)
        return Askers(slots, weights)


def askers(
    needs: frozenset[str], real: Tensor, state: LayerState, origin: LayerState, near: Callable[[Tensor], Tensor]
) -> Askers:
    """Those that a drop point needs.

    Text is behind the visual tokens where it is behind the last one that entered the language model; where none is, the last
    token stands for it.

    Args:
        needs: of the drop point, one of :data:`saint.needs.QUERIES` among them.
        real: tokens of the sequence that are no padding, bool [B, S].
        state: the sequence.
        origin: what entered the language model.
        near: of the places of text behind the visual tokens, bool [B, L], gives the raters among them.
    """
    place = torch.arange(real.shape[1], device=real.device)
    end = torch.where(real, place, -1).amax(1, keepdim=True).clamp_min(0)  # [B, 1]
    if needs & QUERIES == {LAST}:
        return Askers(end, {LAST: None})
    last, index = place == end, state.tokens.index
    masks = {LAST: last} if LAST in needs else {}
    text = real & (index > _last_visual(origin))
    text = torch.where(text.any(1, keepdim=True), text, last)
    if QUESTION in needs:
        masks[QUESTION] = text
    if FIRST in needs:
        masks[FIRST] = text & (text.cumsum(1) == 1)
    if RATERS in needs:
        places = origin.tokens.slots  # and one more, for what is no text
        whole = torch.zeros(len(real), places + 1, dtype=torch.bool, device=real.device)
        whole = whole.scatter_(1, index.masked_fill(~text, places), True)[:, :places]
        rate = near(whole).gather(1, index) & text
        masks[RATERS] = rate | (text & ~rate.any(1, keepdim=True))  # a last token in place of text may have left
    return Askers.of(masks)


def raters(x: Tensor, origin: LayerState, text: Tensor) -> Tensor:
    """Tokens of the text that the visual tokens are nearest to: SparseVLM, arXiv 2410.04417.

    With v and t the embeddings of visual tokens and of the text, token j of the text rates where the mean over v of
    softmax_j(v . t_j) is at least the mean of these over the text.

    Args:
        x: embeddings that entered the language model, [B, L, C].
        origin: what entered.
        text: the text, at least one token of each sample, bool [B, L].

    Returns:
        bool [B, L].
    """
    x, valid = x.detach().float(), origin.candidates.valid
    with torch.autocast(x.device.type, enabled=False):
        logits = origin.of_candidates(x) @ x.mT  # [B, N, L]
    share = logits.masked_fill(~text.unsqueeze(1), -torch.inf).softmax(-1)
    share = share if valid is None else share.masked_fill(~valid.unsqueeze(-1), 0)
    found = share.sum(1)  # each sample's own number of visual tokens divides both sides
    return text & (found >= found.sum(1, keepdim=True) / text.sum(1, keepdim=True))


def _last_visual(origin: LayerState) -> Tensor:
    """The last place with a visual token, int64 [B, 1]; -1 where there is none."""
    assert origin.places is not None
    place, valid = origin.places[..., 0] % origin.tokens.slots, origin.candidates.valid  # [B, N]
    place = place if valid is None else place.masked_fill(~valid, -1)
    return torch.nn.functional.pad(place, (1, 0), value=-1).amax(1, keepdim=True)
