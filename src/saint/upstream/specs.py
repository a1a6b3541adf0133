"""What is known of another library's class: one frozen spec of plain facts each. The tables of specs are the other files here."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import nn

from .names import PIXELS, TIMM_MASK, Role
from .tiny import TinyVLM


def part(module: nn.Module, path: str) -> Any:
    """Attribute at a dotted path, or None where any step is missing."""
    node: Any = module
    for name in path.split("."):
        node = getattr(node, name, None)
    return node


@dataclass(frozen=True)
class BlockSpec:
    """Names of the parts of a residual block, relative to the block.

    ``first(x) = x + branch1(attn(norm1(x)))`` and ``second(x) = x + branch2(mlp(norm2(x)))``. A branch is a chain of
    modules or per-channel parameters; parts that are None or absent in an instance are skipped, so one spec covers blocks
    with and without LayerScale, DropPath or post-norm.

    Attributes:
        attn: attribute, may be a method of the block. Without ``attn`` and ``mlp`` the block has no seam (it computes both
            from one input, or does more than call its parts), and tokens go behind it.
        mlp: attribute.
        norm1: attribute in front of ``attn``.
        norm2: attribute in front of ``mlp``.
        branch1: attributes behind ``attn``, in order.
        branch2: attributes behind ``mlp``, in order.
        keys: what shows the keys: a module whose output is K ([B, H, N, D] or [B, N, H*D]), or a packed ``in_proj_weight``
            from which they are recomputed. The first candidate that exists is used; none where a cache shows them.
        keys_by_token: the module's output is [B, N, H, D].
        heads: attribute with the number of heads of the keys, needed for 3-D keys; the first candidate that exists is used.
        mask: the block's attention-mask argument.
        padding: nn.MultiheadAttention that takes ``key_padding_mask`` instead of ``mask``.
        tables: block arguments that hold positional tables over the patch tokens (RoPE).
        fused: what ``keys`` names emits queries, keys and values side by side.
        units: lists of modules, parallel attentions and parallel MLPs, whose branches are added; the names of the parts,
            ``keys`` and ``heads`` are then relative to a member.
        bias: (method, what it reads): methods that return a bias over all pairs of tokens, [1, H, P + N, P + N], which the
            attention adds to its logits; what is read is None in instances without. ``mask`` then is an argument for such a
            bias ([H, P + N, P + N] or with a batch axis), shared by all blocks.
        segments: of a block on packed sequences [N, C]: the argument with the cumulative lengths of the segments that
            attend to themselves.
    """

    attn: str | None
    mlp: str | None
    norm1: str | None = "norm1"
    norm2: str | None = "norm2"
    branch1: tuple[str, ...] = ()
    branch2: tuple[str, ...] = ()
    keys: tuple[str, ...] = ("attn.k_norm",)
    keys_by_token: bool = False
    heads: tuple[str, ...] = ()
    mask: Role | None = TIMM_MASK
    padding: str | None = None
    tables: tuple[Role, ...] = ()
    fused: bool = False
    units: tuple[str, str] | None = None
    bias: tuple[tuple[str, str], ...] = ()
    segments: Role | None = None

    @property
    def seam(self) -> bool:
        """Tell whether tokens can go between attention and MLP."""
        return self.attn is not None and self.mlp is not None


class RowLayout(NamedTuple):
    """How the pixels of a patch lie in a row: (P, P, C) with the channels last, else (C, P, P)."""

    channels: int
    high: int
    wide: int
    channels_last: bool


Layout = Callable[[Any, Any], RowLayout | None]


@dataclass(frozen=True)
class RowSpec:
    """Patches that arrive as rows of a linear layer.

    Attributes:
        linear: dotted path of the layer. An instance may have a convolution there, to which pictures arrive.
        layout: from the module that holds the layer and the layer, or None where it is not known.
        grid: from that module and its arguments by name, of which the first are the rows: rows and columns of patches, of
            all pictures where none is padded, else of each. None where grids are told to the encoder (packed), or not known.
    """

    linear: str
    layout: Layout = lambda _holder, _linear: None
    grid: Callable[[Any, Mapping[str, Any]], tuple[int, int] | list[list[int]]] | None = None


@dataclass(frozen=True)
class EncoderSpec:
    """One supported encoder class.

    Attributes:
        title: name in tables and messages.
        library: import name of the library that the class comes from.
        encoder: qualified name (module and class) of the class that holds the blocks; subclasses are found by it, too.
        blocks: dotted path to the ModuleList of blocks.
        block_specs: block class name -> anatomy. Blocks of another class are refused from the first drop point on.
        prefix: protected tokens in front (CLS, distillation, registers), from the instance.
        patch: dotted path to the module whose output shows the patch grid (a map [B, C, rows, columns], or a pair of which
            the grid is the second), or None.
        rows: how patches arrive that are no part of a picture, or None.
        final: dotted path to the norm behind the last block, or None when it comes behind the pool or not at all.
        pools: paths of modules that read the full sequence behind the last block (attention pools).
        pool_with_prefix: whether an average pool also averages the prefix.
        masked_pools: methods that pool behind the last block, and their argument that marks padding.
        dense_calls: methods whose maps must be full length (they reshape to the grid).
        packed: samples lie one behind the other in one sequence without batch axis, told by an argument with their grids.
        raster: of a packed encoder: the patches of a picture lie row by row, not square by square of those that are joined.
        order: of a packed encoder: method that reorders groups of tokens and is given their order, or None.
        candidates: how many the instance always has, or None where the size of the pictures decides.
        usual: side in pixels of the pictures that its preprocessing makes at most, where the config tells the size of the
            position table instead; None where the config tells it.
        refuse: reason why this instance cannot be pruned, or None.
        tiny: builders of small random models that hold such an encoder, by a short name. A builder imports its library when
            it is called.
    """

    title: str
    library: str
    encoder: str
    blocks: str
    block_specs: dict[str, BlockSpec]
    prefix: Callable[[Any], int]
    patch: str | None
    rows: RowSpec | None = None
    final: str | None = None
    pools: tuple[str, ...] = ()
    pool_with_prefix: Callable[[Any], bool] = lambda _: False
    masked_pools: dict[str, Role] = field(default_factory=dict)
    dense_calls: tuple[str, ...] = ()
    packed: bool = False
    raster: bool = False
    order: Role | None = None
    candidates: Callable[[Any], int | None] = lambda _: None
    usual: int | None = None
    refuse: Callable[[Any], str | None] = field(default=lambda _: None)
    tiny: Mapping[str, Callable[[], nn.Module]] = field(default_factory=dict)


@dataclass(frozen=True)
class ReaderSpec:
    """A class around an encoder that reads rows of its tokens, beside or instead of what is pooled from them.

    Attributes:
        model: qualified name (module and class) of the class.
        dense: its forward lays the rows on the grid, or gives back one for each patch: they must be full length.
        decoder: path of a module that attends to the rows, and takes a mask of them by name.
        projection: path of a module that the rows may go through on their way there.
        needs: why only an output of full length works, where the class cannot be given one; None otherwise.
    """

    model: str
    dense: bool = False
    decoder: str | None = None
    projection: str | None = None
    needs: str | None = None


class Clip(NamedTuple):
    """What a language model receives of one video: ``frames`` times ``tokens``, then ``behind`` more."""

    frames: int
    tokens: int
    behind: int = 0


@dataclass(frozen=True)
class FamilySpec:
    """One supported family of vision-language models.

    Attributes:
        title: name in tables and messages.
        model: qualified name (module and class) of the class that merges image features into the text: the model without its
            head. Subclasses are found by it, too.
        tower: path of the vision tower; "" where there is none.
        connector: path of the module between tower and language model; "": the method that computes features stands for it.
        decoder: path of the language model.
        pixels: arguments of the model's forward that bring images or videos.
        no_vision: why the vision stage is not possible, or None.
        merge_size: side of the square of patches that is joined into one token between tower and language model, from the
            instance; None where every patch becomes a token.
        feature_layer: index into the tower's hidden states (0 = embeddings) of the features used, from the instance; None
            where the features of several layers are joined.
        reads: indices into the tower's hidden states (0 = embeddings) of those that further features are made of, from the
            instance (DeepStack).
        clips: from the instance and the arguments of the method that computes the features of videos: what each video becomes.
            None where a family has no videos.
        library: import name of the library that the class comes from.
        tower_spec: the encoder in ``tower``, where no other model can read its output (the family joins groups of its
            tokens); None where it is a registered encoder.
        tiny: small random models of the family.
        derived: read off the instance, not written: see :mod:`saint.upstream.derive`.
    """

    title: str
    model: str
    tower: str = "vision_tower"
    connector: str = "multi_modal_projector"
    decoder: str = "language_model"
    pixels: tuple[Role, ...] = (PIXELS,)
    no_vision: str | None = None
    merge_size: Callable[[Any], int | None] = lambda _: None
    feature_layer: Callable[[nn.Module, int], int | None] = lambda _, depth: depth
    reads: Callable[[Any], Iterable[int]] = lambda _: ()
    clips: Callable[[Any, Mapping[str, Any]], list[Clip]] | None = None
    library: str = "transformers"
    tower_spec: EncoderSpec | None = None
    tiny: tuple[TinyVLM, ...] = ()
    derived: bool = False

    @property
    def sees_tower(self) -> bool:
        """Tell whether the encoder in its tower is understood; tokens of some that are cannot leave there all the same."""
        return not self.derived or self.no_vision is None

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages of a plan that the family has."""
        return ("vision", "connector", "language") if self.no_vision is None else ("connector", "language")
