"""The vision stage of a model that no spec was written for: what its tower is, and what stands behind it, found by effect.

Blocks are read by the names of their parts, and the reading is proved as that of a known class is. What happens behind them is
measured: two small pictures go through the method that computes features, with blocks that hand their input on. Where
one of them spoils some tokens, the spoiled features tell which layer is read, which tokens are joined, and in what order.

Letters: T tokens of a sequence with its prefix, R features.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..errors import ParityError, SaintError
from ..gathers import DROPPED, is_dropped
from ..patch import override
from ..runtime.blocks import Block
from ..runtime.state import grid_squares
from ..upstream.names import (
    BLOCK_ATTENTIONS,
    BLOCK_HEADS,
    BLOCK_KEYS,
    BLOCK_MLPS,
    BLOCK_PACKED_KEYS,
    DEEPSTACK_FEATURES,
    IMAGE_FEATURES,
    MASK,
    PICTURE_SIZES,
    POOLED,
    ROTARY,
    SEGMENTS,
    WINDOW_ORDER,
    Parameters,
)
from ..upstream.pictures import Pictures, merge_side, pictures
from ..upstream.registry import row_layouts
from ..upstream.specs import BlockSpec, EncoderSpec, FamilySpec, RowSpec, part
from .checks import prove_block
from .locate import find, lineage

_measured: WeakKeyDictionary[nn.Module, dict[str, Any] | str] = WeakKeyDictionary()  # of models that are alive
_CONNECTOR = "use the connector or language stage"


@dataclass(frozen=True)
class _Layout:
    """What stands behind the blocks.

    Attributes:
        connector: path of the module whose output holds a row for each group; "": the method that computes features.
        layer: index into the hidden states (0 = embeddings) of the features.
        side: of the squares that are joined.
        raster: packed patches lie row by row.
        reads: hidden states that are read behind the blocks, among them those.
        prefix: tokens in front of the patches.
    """

    connector: str
    layer: int
    side: int
    raster: bool
    reads: frozenset[int]
    prefix: int


def with_tower(model: Any, spec: FamilySpec) -> FamilySpec:
    """``spec`` with what the vision stage needs to know, or with the reason why there is none.

    Args:
        model: the module of the family, with weights; not patched when it is first asked for.
        spec: of the family; one that was not read off the instance is returned as it is.
    """
    if not spec.derived:
        return spec
    facts = _measured.get(model)
    if facts is None:
        if any(parameter.is_meta for parameter in model.parameters()):  # asked again when it has some
            facts = "its tower is measured by what it computes, and it has no weights yet"
        else:
            facts = _facts(model, spec.tower) if spec.tower else "it has no tower: its patches enter the language model"
            _measured[model] = facts
    if isinstance(facts, str):
        return replace(spec, no_vision=f"{facts}; {_CONNECTOR}")
    return replace(spec, no_vision=None, **facts)


def _facts(model: Any, path: str) -> dict[str, Any] | str:
    tower = model.get_submodule(path)
    known = find(tower)
    inside, spec = ("", None) if len(known) != 1 else (known[0][0], known[0][2])
    encoder = tower.get_submodule(inside)
    blocks = _blocks(encoder) if spec is None else (spec.blocks, part(encoder, spec.blocks))
    if blocks is None:
        return f"{type(tower).__name__} has no list of blocks with an attention and an MLP"
    probe = _Probe(model, encoder, list(blocks[1]))
    layout = probe.layout(None if spec is None else spec.prefix(encoder))
    if isinstance(layout, str):
        return layout
    if spec is None:
        spec = _encoder_spec(encoder, blocks[0], blocks[1], layout, probe.flat)
        if (linear := probe.rows_enter()) is not None:
            layouts = row_layouts()
            told = next((layouts[name] for name in lineage(type(encoder)) if name in layouts), None)
            spec = replace(spec, rows=RowSpec(linear) if told is None else RowSpec(linear, told))
    return {
        "connector": layout.connector,
        "merge_size": lambda _: layout.side if layout.side > 1 or probe.flat else None,
        "feature_layer": lambda _model, _depth: layout.layer,
        "reads": lambda _: layout.reads,
        "tower_spec": spec,
    }


# -- the tower --------------------------------------------------------------------------------------------------------


def _blocks(tower: nn.Module) -> tuple[str, nn.ModuleList] | None:
    """The longest list of modules with an attention and an MLP each, and its path."""
    lists = [
        (path, module)
        for path, module in tower.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module)
        and all(BLOCK_ATTENTIONS.of(block) and BLOCK_MLPS.of(block) for block in module)
    ]
    return max(lists, key=lambda one: len(one[1]), default=None)


def _encoder_spec(tower: nn.Module, path: str, blocks: nn.ModuleList, layout: _Layout, packed: bool) -> EncoderSpec:
    cls = type(tower)
    specs = {type(block).__name__: block for block in blocks}
    patch = next((name for name, module in tower.named_modules() if isinstance(module, nn.Conv2d)), None)
    return EncoderSpec(
        title=cls.__name__,
        library=cls.__module__.partition(".")[0],
        encoder=f"{cls.__module__}.{cls.__qualname__}",
        blocks=path,
        block_specs={name: block_spec(block, f"{path} ({name})", layout.prefix) for name, block in specs.items()},
        prefix=lambda _: layout.prefix,
        patch=None if packed else patch,
        packed=packed,
        order=WINDOW_ORDER if packed and WINDOW_ORDER.of(tower) is not None else None,
        raster=layout.raster,
    )


def block_spec(block: nn.Module, name: str, prefix: int) -> BlockSpec:
    """The anatomy of a block, proved: its parts by their names, in the order in which they make what the block makes.

    One that is not the sum of its parts has no seam, and tokens go behind it.

    Args:
        block: with an attention and an MLP.
        name: for messages.
        prefix: tokens in front of the patches.
    """
    attention, mlp = BLOCK_ATTENTIONS.of(block), BLOCK_MLPS.of(block)
    assert attention is not None
    keys, fused = _keys(getattr(block, attention))
    known = BlockSpec(
        attn=None,
        mlp=None,
        keys=(f"{attention}.{keys}",),
        heads=tuple(f"{attention}.{heads}" for heads in BLOCK_HEADS.spellings),
        mask=MASK if Parameters(type(block).forward).has(MASK) else None,
        tables=(ROTARY,),
        fused=fused,
        segments=SEGMENTS if Parameters(type(block).forward).has(SEGMENTS) else None,
    )
    for norm1, norm2, branch1, branch2 in _branches(block):
        whole = replace(
            known, attn=attention, mlp=mlp, norm1=norm1, norm2=norm2, branch1=branch1, branch2=branch2
        )  # fmt: skip
        try:
            prove_block(Block(block, whole, name), prefix)
        except (ParityError, SaintError):
            continue
        return whole
    return known


def _keys(attention: nn.Module) -> tuple[str, bool]:
    """Find what shows the keys of an attention, and whether it shows queries and values beside them."""
    own = BLOCK_KEYS.of(attention)
    return (own, False) if own is not None else (BLOCK_PACKED_KEYS.of(attention) or "", True)


def _branches(block: nn.Module) -> Iterator[tuple[str, str, tuple[str, ...], tuple[str, ...]]]:
    """Norms in front of the halves, and what stands behind their attention and their MLP, likely readings first."""
    norms = [name for name, child in block.named_children() if "norm" in type(child).__name__.lower()]
    scales = [name for name, value in block.named_parameters(recurse=False) if value.ndim == 1]
    scales += [name for name, child in block.named_children() if "scale" in type(child).__name__.lower()]
    behind1, behind2 = (tuple(scales[:1]), tuple(scales[1:2])) if len(scales) >= 2 else ((), ())
    if len(norms) == 2:
        yield norms[0], norms[1], behind1, behind2
        yield norms[1], norms[0], behind1, behind2
    if len(norms) == 4:  # one in front of and one behind each
        yield norms[0], norms[2], (norms[1], *behind1), (norms[3], *behind2)


# -- behind the tower -------------------------------------------------------------------------------------------------


class _Probe:
    """Small pictures that go through a model whose blocks hand their input on.

    Args:
        model: the module of the family.
        encoder: owns the blocks.
        blocks: of its tower.
    """

    def __init__(self, model: Any, encoder: nn.Module, blocks: Sequence[nn.Module]) -> None:
        self.model, self.encoder, self.blocks = model, encoder, blocks
        self.method = IMAGE_FEATURES.of(model) or ""
        self.shape: torch.Size | None = None  # of what enters the blocks, without channels
        self.order: Tensor | None = None
        self.deep: list[Tensor] = []  # features for later layers, of the last run
        self.flat = Parameters(type(blocks[0]).forward).has(SEGMENTS)
        self.given: Pictures | None = None  # a form of pictures that the model takes

    def layout(self, prefix: int | None) -> _Layout | str:
        """Find what stands behind the blocks, or why it is not known; ``prefix`` None: to be found."""
        if not self.method:
            return "no method of it computes features of images alone"
        given, errors = None, list[str]()
        for given in pictures(self.model, self.encoder):
            try:
                clean = self.run(given, (), None)
            except Exception as error:  # whatever a class says of a form that it does not take
                errors.append(f"{type(error).__name__}: {error}")
                continue
            break
        else:
            return "no form of pictures is known that it takes" + (f" ({errors[0]})" if errors else "")
        self.given = given
        if any(bool(torch.isnan(rows).any()) for rows in clean.values()):
            return "its features are NaN for random pictures"
        layer = self._read(given)
        return layer if isinstance(layer, str) else self._grouping(given, layer, clean, prefix)

    def _read(self, given: Pictures) -> int | str:
        """The block whose output becomes the features, or why there is not one."""
        depth = range(len(self.blocks))
        last = next((one for one in reversed(depth) if _spoiled(self.run(given, {one}, None)[""]).any()), None)
        if last is None:
            return "what its blocks compute does not reach its features"
        if _spoiled(self.run(given, set(depth) - {last}, None)[""]).any():
            return "its features are joined from several layers of its tower, which would hold different tokens"
        return last

    def rows_enter(self) -> str | None:
        """Path of the linear layer of the encoder that rows of patches enter as the model is given them; None: there is none."""
        assert self.given is not None
        found: list[str] = []
        given = [value for value in self.given.inputs.values() if isinstance(value, Tensor)]
        pixels = [value.flatten() for value in given if value.is_floating_point()]

        def listen(path: str) -> Callable[..., None]:
            def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
                x = args[0].flatten()
                if any(len(x) == len(value) and torch.equal(x, value.to(x)) for value in pixels):
                    found.append(path)

            return hook

        with ExitStack() as stack:
            for path, module in self.encoder.named_modules():
                if isinstance(module, nn.Linear):
                    stack.callback(module.register_forward_pre_hook(listen(path)).remove)
            self.run(self.given, (), None)
        return found[0] if found else None

    def run(
        self, given: Pictures, spoil: Collection[int], rows: Tensor | None, marked: tuple[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Rows by place, [R, C]: "" for the features, else the path of a module outside of the blocks.

        Args:
            given: pictures.
            spoil: the blocks that spoil tokens.
            rows: which tokens, bool, of the shape of the sequence without channels; None: all.
            marked: a place, and which of the rows that leave it are marked as dropped, bool [R].
        """
        seen: dict[str, Tensor] = {}
        with ExitStack() as stack, torch.no_grad():
            for index, block in enumerate(self.blocks):
                override(stack, block, "forward", self._hand_on(index in spoil, index == 0, rows))
            if (order := WINDOW_ORDER.of(self.encoder)) is not None:
                override(stack, self.encoder, order, self._note_order)
            for path, module in self._places():
                stack.callback(module.register_forward_hook(_watch(seen, path, marked)).remove)
            training = [module for module in self.model.modules() if module.training]
            for module in training:
                module.training = False
                stack.callback(setattr, module, "training", True)
            output = getattr(self.model, self.method)(**given.inputs, return_dict=True)
        deep = getattr(output, field) if (field := DEEPSTACK_FEATURES.of(output)) is not None else None
        self.deep = [rows_of(one) for one in deep or ()]
        return {**seen, "": rows_of(output)}

    def _places(self) -> Iterator[tuple[str, nn.Module]]:
        inside = {id(module) for block in self.blocks for module in block.modules()}
        for path, module in self.model.named_modules():
            if path and id(module) not in inside and not isinstance(module, nn.ModuleList):
                yield path, module

    def _hand_on(self, spoils: bool, first: bool, rows: Tensor | None) -> Callable[..., Any]:
        def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
            def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
                if first:
                    self.base, self.shape = x, x.shape[:-1]
                if not spoils:
                    return self.base
                gone = torch.ones(x.shape[:-1], dtype=torch.bool) if rows is None else rows
                return self.base.masked_fill(gone.to(x.device).unsqueeze(-1), torch.nan)

            return forward

        return wrap

    def _note_order(self, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def permute(x: Tensor, order: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            self.order = order
            return original(x, order, *args, **kwargs)

        return permute

    # -- which tokens make which features -----------------------------------------------------------------------------

    def _grouping(self, given: Pictures, block: int, clean: dict[str, Tensor], known: int | None) -> _Layout | str:
        assert self.shape is not None
        patches = sum(rows * columns for rows, columns in given.grids)
        prefix = 0
        if self.shape == (1, patches) and PICTURE_SIZES.among(Parameters(type(self.encoder).forward).names) is not None:
            self.flat = True  # with a mask that shows where each picture ends
        elif not self.flat:
            if len(self.shape) != 2 or self.shape[0] != len(given.grids) or len(set(given.grids)) > 1:
                return "its pictures do not lie in a row each, of one length"
            prefix = self.shape[1] - given.grids[0][0] * given.grids[0][1]
            if prefix < 0 or (known is not None and prefix != known):
                return f"{self.shape[1]} tokens of a picture are not its patches and tokens in front of them"
        elif self.shape.numel() != patches or len(self.shape) != 1:
            return f"{self.shape.numel()} tokens of {patches} patches"
        sides = [s for s in range(1, 9) if all(rows % s == 0 and columns % s == 0 for rows, columns in given.grids)]
        told = merge_side(self.model.config)
        ways = [(side, raster) for side in sorted(sides, key=lambda s: s != told) for raster in self._orders(side)]
        every = {way: groups for way in ways if (groups := self._groups(given, *way, prefix)) is not None}
        for look in (self._in_features, self._in_a_module):
            for (side, raster), groups in every.items():
                place = look(given, block, clean, groups)
                if place is not None:
                    reads = frozenset({block + 1, *self._deepstack(given, block)})
                    return _Layout(place, block + 1, side, raster and self.flat, reads, prefix)
        return "no squares of patches were found of which each makes one feature, in the order of its picture"

    def _orders(self, side: int) -> tuple[bool, ...]:
        """In which orders patches may lie: square by square (False), row by row."""
        return (False, True) if self.flat and side > 1 else (not self.flat,)

    def _groups(self, given: Pictures, side: int, raster: bool, prefix: int) -> Tensor | None:
        """Flat indices of the tokens of each group, in the order of the features, int64 [groups, side * side].

        None where an order is known of other groups.
        """
        if raster:
            places, start = list[Tensor](), 0
            for rows, columns in given.grids:
                start += prefix
                places.append(start + grid_squares(rows, columns, side))
                start += rows * columns
            return torch.cat(places)
        assert self.shape is not None
        groups = torch.arange(self.shape.numel()).view(-1, side * side)
        if self.order is None:
            return groups
        return groups[torch.argsort(self.order.cpu())] if len(self.order) == len(groups) else None

    def _lose(self, groups: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Half of the groups, bool [groups], and the tokens of those, bool, of the shape of the sequence."""
        assert self.shape is not None
        lost = torch.rand(len(groups), generator=torch.Generator().manual_seed(seed)) < 0.5
        gone = torch.zeros(self.shape.numel(), dtype=torch.bool)
        gone[groups[lost].flatten()] = True
        return lost, gone.view(self.shape)

    def _in_features(self, given: Pictures, block: int, clean: dict[str, Tensor], groups: Tensor) -> str | None:
        """Return "" where each group makes one row of the features, in order."""
        for seed in range(3):
            lost, gone = self._lose(groups, seed)
            if len(clean[""]) != len(lost) or not torch.equal(_spoiled(self.run(given, {block}, gone)[""]), lost):
                return None
        return ""

    def _in_a_module(self, given: Pictures, block: int, clean: dict[str, Tensor], groups: Tensor) -> str | None:
        """Path of the last module whose rows are those of the groups, and behind which rows are moved alone."""
        lost, gone = self._lose(groups, 0)
        shown = self.run(given, {block}, gone)
        fits = [path for path, rows in shown.items() if path and len(rows) == len(lost)]
        for path in reversed([path for path in fits if torch.equal(_spoiled(shown[path]), lost)]):
            travelled = self.run(given, (), None, (path, lost))[""]
            marked = is_dropped(travelled)
            if bool(marked.any()) and torch.equal(travelled[~marked], clean[""][~marked]):
                return path
        return None

    def _deepstack(self, given: Pictures, block: int) -> Iterator[int]:
        """Hidden states (0 = embeddings) that features for later layers are made of."""
        for layer in range(len(self.blocks)) if self.deep else ():
            self.run(given, {layer}, None)
            if any(bool(_spoiled(rows).any()) for rows in self.deep):
                yield layer + 1


def rows_of(output: Any) -> Tensor:
    """The rows of features in what a method or module returned, one tensor [R, C]."""
    field = POOLED.of(output)
    value = output if field is None else getattr(output, field)
    if isinstance(value, Tensor):
        return value.reshape(-1, value.shape[-1])
    return torch.cat([one.reshape(-1, one.shape[-1]) for one in value])


def _watch(seen: dict[str, Tensor], path: str, marked: tuple[str, Tensor] | None) -> Callable[..., Any]:
    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        if not isinstance(output, Tensor) or output.ndim < 2 or not output.is_floating_point():
            return None
        seen[path] = output.reshape(-1, output.shape[-1])
        if marked is None or marked[0] != path:
            return None
        lost = marked[1].view(output.shape[:-1]).to(output.device)
        return output.masked_fill(lost.unsqueeze(-1), DROPPED)

    return hook


def _spoiled(rows: Tensor) -> Tensor:
    return torch.isnan(rows).any(-1).cpu()
