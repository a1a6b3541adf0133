"""What an encoder is given: the candidates of a forward, and what is noted of a call in front of the first block.

Letters: B batch, P prefix tokens, N candidates, C channels, D head dim.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..frames import NONE, numbered
from ..gathers import visible
from ..patch import Uncopyable, override, refuse_tracing
from ..runtime.forwards import Forwards
from ..runtime.state import Forward, LayerState, all_tokens, packed_groups, packed_squares, squares
from ..tokens import Facts, TokenMap
from ..upstream.names import GRID, PATCH, PICTURE_SIZES, Parameters
from ..upstream.specs import EncoderSpec, part
from .guard import min_keep, shares
from .pixels import laid_out, patcher
from .resizing import Resizing, spread_out


def own_size(encoder: Any) -> tuple[int, int] | None:
    """Height and width in pixels of the pictures that an encoder is made for; None where it takes any."""
    embeds: Any = getattr(encoder, "embeds", None)
    grid = getattr(embeds, "pos_embed_grid_size", None)  # of the position table of timm's NaFlex embeddings
    size = (
        getattr(getattr(encoder, "config", None), "image_size", None)
        or getattr(encoder, "image_size", None)
        or getattr(getattr(encoder, "patch_embed", None), "img_size", None)
        or (grid and (grid[0] * embeds.patch_size[0], grid[1] * embeds.patch_size[1]))
    )
    if not size:
        return None
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


@dataclass(frozen=True)
class Glance:
    """What a layer showed of the candidates that were in front of it.

    Attributes:
        tokens: the candidates.
        shown: by what was asked for, see ``needs.TOWER``, float32 [B, N, D]; D is 1 but for keys.
    """

    tokens: TokenMap
    shown: dict[str, Tensor]


@dataclass
class EncoderForward(Forward):
    """What one forward of an encoder knows besides.

    Attributes:
        captured_keys: what showed the keys of a layer, until they are scored.
        grid: rows and columns of patches.
        grids: frames, rows and columns of patches of each image or video: packed, or of rows behind which padding may come.
        order: packed: group at each place.
        pixels: what enters the layer that makes the tokens, until their pixels are read.
        resized: a smaller picture entered it.
        canvas: rows and columns of patches of what came to it, of a picture or of the largest one.
        shows: for each patch the one of the smaller picture that it shows, see ``resizing.py``; None where nothing got smaller.
        part: tokens of the samples that a layer runs on, where it does not run on all together.
        shares: of its candidates that each picture keeps at least; empty without a guard.
        full: every layer's output is to be of full length.
        glances: by layer, what a method there or in front of a language model asked of it.
        shortened: by tokens and form of the block, those tokens, and the arguments of a block as they came and as it took them.
    """

    captured_keys: dict[int, Any] = field(default_factory=dict)
    grid: tuple[int, int] | None = None
    grids: list[list[int]] = field(default_factory=list)
    order: Tensor | None = None
    pixels: Tensor | None = None
    resized: bool = False
    canvas: tuple[int, int] | None = None
    shows: Tensor | None = None
    part: TokenMap | None = None
    shares: tuple[float, ...] = ()
    full: bool = False
    glances: dict[int, "Glance"] = field(default_factory=dict)
    shortened: dict[tuple[int, int], tuple[TokenMap, dict[str, Any], dict[str, Any]]] = field(default_factory=dict)

    def told(self) -> Self:
        return replace(super().told(), captured_keys={}, order=None, pixels=None, shows=None, glances={}, shortened={})

    def keys_of(self, tokens: TokenMap, prefix: int) -> Tensor | None:
        """:func:`visible` of survivors, once for all layers behind a drop point and what stands behind the last."""
        return None if tokens.valid is None else self.once("visible", partial(visible, tokens, prefix), tokens)

    @property
    def samples(self) -> list[int]:
        """Packed: tokens per image or frame."""
        return [rows * columns for frames, rows, columns in self.grids for _ in range(frames)]


class Inputs(Uncopyable):
    """Notes the patch grid, and in packed encoders the samples and their order; says what the candidates of a forward are.

    Args:
        encoder: the module that owns the blocks.
        spec: what is known of its class.
        merge_size: see :class:`saint.vision.encoder.PrunedEncoder`.
        forwards: of the encoder.
        guard: see :class:`saint.Stage`.
        frames: note which groups show the same place of a video at different times.
        pixels: note what the candidates show.
        channels: tell the channels of their pixels apart.
        resize: what :class:`saint.methods.Resize` keeps; None: pictures stay as they are.

    Raises:
        ValueError: a guard, and the encoder is not given pictures.
        UnsupportedModelError: pixels or resize, and the encoder does not show the pixels of its tokens, or not their channels.
    """

    def __init__(
        self,
        encoder: nn.Module,
        spec: EncoderSpec,
        merge_size: int | None,
        forwards: Forwards[EncoderForward],
        guard: float,
        *,
        frames: bool,
        pixels: bool,
        channels: bool,
        resize: int | float | None,
    ) -> None:
        if guard and (spec.packed or (spec.patch is None and spec.rows is None)):
            raise ValueError(
                f"guard={guard:g} looks at pictures [B, C, H, W] in front of the patch embedding, and {type(encoder).__name__} "
                "is given patches: leave guard out"
            )
        whole = resize is not None or (guard > 0 and spec.rows is not None)  # what the picture is must be known
        layer = patcher(encoder, spec, channels=channels or whole) if pixels or whole else None
        self.patcher, self.resizing = layer if pixels else None, None
        rows = spec.rows if layer is not None and layer.rows and (channels or whole) else None
        self.told = None if rows is None or rows.grid is None else rows
        self.guarded = layer if guard and rows is not None else None
        if resize is not None and layer is not None:
            raster = spec.raster or not merge_size or not spec.packed
            self.resizing = Resizing(layer, resize, merge_size or 1, forwards, packed=spec.packed, raster=raster)
        self.guard, self.frames = guard, frames
        self.module, self.spec, self.merge_size, self.forwards = encoder, spec, merge_size, forwards
        self.prefix = spec.prefix(encoder)
        self.parameters = Parameters(type(encoder).forward)

    def install(self, stack: ExitStack) -> None:
        """Listen in front of the blocks; ``stack`` undoes it."""
        if self.spec.packed:
            stack.callback(self.module.register_forward_pre_hook(self._note_samples, with_kwargs=True).remove)
        if self.spec.order is not None and (reorder := self.spec.order.of(self.module)) is not None:
            override(stack, self.module, reorder, self._note_order)
        if self.told is not None:
            holder = part(self.module, self.told.linear.rpartition(".")[0])
            stack.callback(holder.register_forward_pre_hook(self._note_shapes, with_kwargs=True).remove)
        if self.guarded is not None:
            stack.callback(self.guarded.layer.register_forward_pre_hook(self._note_detail_of_rows).remove)
        if self.resizing is not None:
            self.resizing.install(stack)  # first: the others see what the layer sees, and the grid that comes of it
        if self.spec.patch is not None:
            patch = part(self.module, self.spec.patch)
            stack.callback(patch.register_forward_hook(self._note_grid).remove)
            if self.guard and self.guarded is None:
                stack.callback(patch.register_forward_pre_hook(self._note_detail, with_kwargs=True).remove)
        if self.patcher is not None:
            stack.callback(self.patcher.layer.register_forward_pre_hook(self._note_pixels).remove)

    def _note_pixels(self, _module: nn.Module, args: tuple[Any, ...]) -> None:
        self.forwards.prelude().pixels = args[0].detach()

    def _note_detail(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        pixels = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
        if pixels is None or pixels.ndim != 4:
            got = "nothing" if pixels is None else f"shape {tuple(pixels.shape)}"
            raise ValueError(f"guard looks at pictures [B, C, H, W] in front of the patch embedding, got {got}")
        self._note_shares([pixels])

    def _note_detail_of_rows(self, _module: nn.Module, args: tuple[Any, ...]) -> None:
        assert self.guarded is not None
        forward, rows = self.forwards.prelude(), args[0]
        if forward.grids:
            sizes = [(high, wide) for _, high, wide in forward.grids]
        else:
            assert forward.grid is not None
            sizes = [forward.grid] * len(rows)
        self._note_shares([self.guarded.picture(own, *size) for own, size in zip(rows, sizes, strict=True)])

    def _note_shares(self, pictures: list[Tensor]) -> None:
        """Note what pictures [B, C, H, W] keep at least, one batch of a size after another."""
        if torch.compiler.is_exporting():
            raise ValueError(
                "a guard gives every picture its own number of tokens, which an exported graph cannot have: leave guard out"
            )
        self.forwards.prelude().shares = tuple(share for one in pictures for share in shares(one, self.guard))

    def _note_samples(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = self.parameters.named(args, kwargs)
        forward = self.forwards.prelude()
        if (grid := GRID.read(given)) is not None:
            forward.grids = grid.tolist()
        else:
            patch = PATCH.get(self.module)
            forward.grids = [[1, int(h) // patch, int(w) // patch] for h, w in PICTURE_SIZES.read(given)]
        forward.order = None

    def _note_shapes(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert self.told is not None
        assert self.told.grid is not None
        names = Parameters(type(module).forward)
        given = names.named(args, kwargs)
        forward, shapes = self.forwards.prelude(), self.told.grid(module, given)
        if isinstance(shapes, tuple):
            forward.grid, forward.grids = shapes, []
            return
        forward.grid, forward.grids = None, [[1, rows, columns] for rows, columns in shapes]
        most = given[names.names[0]].shape[1]
        if max(forward.samples, default=0) > most:
            raise ValueError(
                f"a picture of {max(forward.samples)} patches is announced, and there are {most} rows for each"
            )

    def _note_order(self, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def permute(x: Tensor, order: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            self.forwards.prelude().order = order
            return original(x, order, *args, **kwargs)

        return permute

    def _note_grid(self, _module: nn.Module, _args: Any, output: Any) -> None:
        if isinstance(output, tuple):
            self.forwards.prelude().grid = output[1] and tuple(output[1])  # None: every sample has its own
        elif output.ndim == 4:
            self.forwards.prelude().grid = (output.shape[-2], output.shape[-1])

    def begin(self, forward: EncoderForward, x: Tensor, mask: Tensor | None) -> LayerState:
        """The state in which nothing is missing, in front of the first block.

        Args:
            forward: begins.
            x: enters the first block, [B, P + N, C].
            mask: given to it; hides padding.
        """
        refuse_tracing()
        if not torch.compiler.is_exporting() and x.shape[0] == 0:
            raise ValueError("empty batch: got 0 samples, expected at least one image")
        count = x.shape[1] - self.prefix
        if count < 1:
            raise ValueError(f"no candidates: {x.shape[1]} tokens of which {self.prefix} are protected")
        forward.origin = origin = self._origin(forward, x, count, mask)
        grid, candidates = forward.grid, origin.candidates
        forward.facts = Facts(
            columns=grid[1] if grid is not None and grid[0] * grid[1] == candidates.width else None,
            min_keep=min_keep(forward.shares, candidates.total) if forward.shares else None,
            cells=_cells(forward.grids, self.merge_size, x.device) if self.frames and self.merge_size else None,
            pixels=self._pixels(forward, origin) if self.patcher is not None else None,
            grids=self.grids(forward) if self.patcher is not None or self.resizing is not None else None,
        )
        if self.told is not None and forward.grids and self.merge_size is None:
            _check_padding(forward.samples, candidates)
        if self.resizing is not None and not forward.resized:
            raise ValueError(
                f"pictures get smaller in front of the {self.resizing.patcher.kind} of {type(self.module).__name__}, "
                "which did not run: call the encoder as a whole, or leave pixels out of the plan"
            )
        forward.shows = None
        return origin

    def _pixels(self, forward: EncoderForward, origin: LayerState) -> Tensor:
        assert self.patcher is not None
        x, forward.pixels = forward.pixels, None
        if x is None:
            raise ValueError(
                f"the pixels of {type(self.module).__name__} are read in front of its {self.patcher.kind}, which did "
                "not run: call the encoder as a whole, or use a method that looks at keys"
            )
        places = origin.places
        if forward.order is not None and self.merge_size is not None:  # pixels come in the order of the pictures
            places = packed_groups(forward.samples, self.merge_size**2, None, x.device).places
        rows = self.patcher.patches(x)
        if forward.shows is not None:
            flat = forward.shows.ndim == 1 and self.spec.packed  # one row for each patch
            rows = rows[forward.shows] if flat else spread_out(rows, forward.shows)
        return laid_out(rows, origin.tokens.index.shape, places)

    def grids(self, forward: EncoderForward) -> tuple[tuple[int, int], ...] | None:
        """Rows and columns of the candidates of each sample of a forward; None where no grid shows."""
        assert forward.origin is not None
        side, candidates = self.merge_size or 1, forward.origin.candidates
        if self.spec.packed or forward.grids:
            return tuple((rows // side, columns // side) for t, rows, columns in forward.grids for _ in range(t))
        if forward.grid is None or forward.grid[0] * forward.grid[1] != candidates.width * side**2:
            return None
        return ((forward.grid[0] // side, forward.grid[1] // side),) * len(candidates.lengths)

    def _origin(self, forward: EncoderForward, x: Tensor, count: int, mask: Tensor | None) -> LayerState:
        if self.merge_size is not None:
            if mask is not None and mask.ndim != 4:
                raise ValueError(
                    f"{type(self.module).__name__} masks the padding of its images in a way that cannot follow dropped tokens; "
                    'load the model with attn_implementation="sdpa"'
                )
            # padding of an image is a candidate as well: the language model would receive it
            if not self.spec.packed:
                return squares(x.shape[0], count, self.merge_size, x.device)
            samples = forward.samples
            if sum(samples) != count:
                raise ValueError(f"grid_thw announces {sum(samples)} patches, and there are {count}")
            if self.spec.raster:
                frames = [(rows, columns) for frames, rows, columns in forward.grids for _ in range(frames)]
                return packed_squares(frames, self.merge_size, x.device)
            return packed_groups(samples, self.merge_size**2, forward.order, x.device)
        valid = None
        if mask is not None and mask.ndim == 4:
            seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
            seen = seen.any(2).any(1)[:, self.prefix :].expand(x.shape[0], -1)  # [B, N]: keys that some query may see
            # no graph for both: the exported one is for inputs without padding, and asserts it
            if torch.compiler.is_exporting():
                torch._assert_async(seen.all(), "exported for inputs without padding, and the mask hides some tokens")
            else:
                valid = None if bool(seen.all()) else seen
        return all_tokens(x.shape[0], count, x.device, valid)


def _check_padding(counts: list[int], candidates: TokenMap) -> None:
    """Refuse grids of other numbers of patches than are no padding, or padding in front of some; ``counts`` by picture."""
    slots = torch.arange(candidates.width, device=candidates.index.device)
    announced = slots < torch.tensor(counts, device=slots.device).unsqueeze(1)
    real = torch.ones_like(announced) if candidates.valid is None else candidates.valid
    if not torch.equal(announced, real):
        raise ValueError(
            f"pictures of {counts} patches are announced, and {list(candidates.total)} rows are no padding: "
            "the mask is to show as many, with padding behind them"
        )


def _cells(grids: list[list[int]], side: int, device: torch.device) -> Tensor | None:
    """The cells of squares of patches, int64 [frames, squares of the largest]; None where no video has several frames."""
    videos = [(frames, rows * columns // side**2) for frames, rows, columns in grids]
    cells, every = numbered(videos)
    rows = [one for one, (frames, _) in zip(cells, videos, strict=True) for _ in range(frames)]
    return pad_sequence(rows, batch_first=True, padding_value=NONE).to(device) if every else None
