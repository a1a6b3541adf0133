"""A configuration of transformers, cut to a few layers and narrow widths: its model computes the same things in milliseconds.

Layers are chosen so that each kind of them is left (attention over everything or a window, recurrent, dense or sparse, with keys
of its own or shared ones). Widths are told by what fields are called; one that is a multiple of the width in its own
configuration stays that multiple.
"""

import copy
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from transformers import PretrainedConfig

from ..upstream.names import PINPOINTS

WIDTH, HEADS, VOCABULARY, FEW = 64, 2, 320, 4  # channels, attention heads, tokens, layers
_DIM = WIDTH // HEADS

_DEPTH = re.compile(r"(num_(hidden_|decoder_|global_)?|encoder_|decoder_|n_)?layers|depth")
_BY_LAYER = re.compile(
    r"layer_types|.*_layer_types|.*_block_type|no_rope_layers|layer_rope_theta|.*_pattern|indexer_types"
)
_OF_LAYERS = re.compile(r".*(_idxs|_indexes|_indices|_layers|_layer_ids|_layer|_layer_id|_index_start|_index_end)")
_HEADS = re.compile(r".*(num_(attention_|sliding_attention_|global_)?heads|n_heads|attention_heads)")
_KEY_HEADS = re.compile(r".*num_(global_)?key_value_heads")
_TOKEN = re.compile(r".*(token_id|token_index|token_ids|_patch_id|im_(start|end|newline)_id)")
_WIDTH = re.compile(
    r".*(hidden_size|_dim|dim|d_model|intermediate_size|ffn_size|_channels|embed_dim|output_size|intermediate_size_mlp|d_ff)"
)
_RANK = re.compile(r".*(_rank|lowrank|d_rel)")
_SIZE = 4  # pixels of a side of a patch

# what a width or a number of something becomes at most, by its name
_MOST: dict[str, int] = {
    "head_dim": _DIM, "global_head_dim": _DIM, "swa_head_dim": _DIM, "v_head_dim": _DIM, "index_head_dim": _DIM,
    "attention_head_dim": _DIM, "resampler_head_dim": _DIM, "d_kv": _DIM, "query_pre_attn_scalar": _DIM,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_head_dim": 16, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_num_heads": 2, "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 16,
    "n_groups": 2, "hidden_size_per_layer_input": 16, "num_experts": 4, "n_routed_experts": 4, "num_local_experts": 4,
    "moe_num_experts": 4, "num_experts_per_tok": 2, "top_k_experts": 2, "moe_k": 2, "moe_topk": 2, "n_group": 1, "topk_group": 1,
    "n_shared_experts": 1, "moe_num_shared_experts": 1, "sliding_window": 24, "sliding_window_size": 24,
    "attention_chunk_size": 40, "max_position_embeddings": 1024, "image_size": 8 * _SIZE, "patch_size": _SIZE,
    "num_position_embeddings": 64, "num_patches": 64, "mm_tokens_per_image": 16, "position_embedding_size": 64,
    "max_window_layers": FEW, "first_k_dense_replace": 1, "n_layers_per_attn_res_block": 2, "ngram_vocab_size_base": 1000,
    "split_ngram_parts": 4, "rel_extent": 64, "num_query_tokens": 8, "index_n_heads": 4, "max_img_size": 8 * _SIZE,
    "max_image_size": 8 * _SIZE, "min_image_size": 4 * _SIZE, "base_channels": 32, "projection_dim": WIDTH,
}  # fmt: skip


def shrunken(config: PretrainedConfig, narrow: bool = True) -> PretrainedConfig:
    """A copy of ``config`` of at most a few layers, narrow, with a small vocabulary; what is small already stays as it is.

    The configurations inside it are shrunken with it. ``narrow=False`` leaves the widths: for one whose widths depend on each
    other in a way that is not known here.
    """
    config = copy.deepcopy(config)
    known = {id(one): _Layers(one) for one in configs(config)}
    depths = {layers.depth: layers for layers in known.values()}
    grids = any("spatial_merge_size" in vars(one) for one in configs(config))
    for one in configs(config) if narrow else ():
        _narrow(one, grids)
    for one in configs(config):
        known[id(one)].cut(one, depths)
    for one in configs(config):
        if any(
            word in str(kind) for kind in vars(one).get("layer_types") or () for word in ("linear", "conv", "hybrid")
        ):
            for name in ("sliding_window", "sliding_window_size"):
                if vars(one).get(name):  # a window that ends within a prompt has no oracle beside a state
                    setattr(one, name, 1024)
    _vocabulary(config)
    return config


def configs(config: PretrainedConfig) -> Iterator[PretrainedConfig]:
    """``config`` and those inside it."""
    yield config
    for value in vars(config).values():
        if isinstance(value, PretrainedConfig):
            yield from configs(value)


def _fields(config: PretrainedConfig) -> Iterator[tuple[str, Any]]:
    return ((name, value) for name, value in list(vars(config).items()) if not name.startswith("_"))


# -- layers -----------------------------------------------------------------------------------------------------------


class _Layers:
    """Which layers of a configuration are left: two of each kind, and a few."""

    def __init__(self, config: PretrainedConfig) -> None:
        self.names = [name for name, value in _fields(config) if _DEPTH.fullmatch(name) and type(value) is int]
        self.depth = max((vars(config)[name] for name in self.names), default=0)
        shared = vars(config).get("num_kv_shared_layers") or 0
        lists = [value for _, value in self._by_layer(config)]
        dense = vars(config).get("first_k_dense_replace") or 0
        self.own = _own_settings(config)

        def kind(layer: int) -> tuple[Any, ...]:
            own = str(self.own.get(layer))
            return (layer >= self.depth - shared, layer < dense, own, *(str(one[layer]) for one in lists))

        kinds: dict[Any, list[int]] = {}
        for layer in range(self.depth):
            kinds.setdefault(kind(layer), []).append(layer)
        every = max(layers[0] for layers in kinds.values()) if kinds else 0
        # the first of each kind, and one behind them all: what a layer gets may be the work of any other
        kept = sorted({layer for layers in kinds.values() for layer in _first_and_later(layers, every)})
        more = [layer for layer in range(self.depth) if layer not in kept]
        self.kept = sorted([*kept, *more[: max(0, FEW - len(kept))]])
        self.shared = sum(layer >= self.depth - shared for layer in self.kept)

    def _by_layer(self, config: PretrainedConfig) -> list[tuple[str, Sequence[Any]]]:
        return [
            (name, value)
            for name, value in _fields(config)
            if isinstance(value, (list, tuple))
            and self.depth
            and len(value) == self.depth
            and _BY_LAYER.fullmatch(name)
        ]

    def place(self, layer: int) -> int:
        """Find where a layer is among those that are left: the last one at or in front of it."""
        if layer < 0:
            return -min(len(self.kept), 1 + (-layer - 1) * len(self.kept) // max(1, self.depth))
        return max(0, sum(one <= layer for one in self.kept) - 1)

    def cut(self, config: PretrainedConfig, depths: dict[int, "_Layers"]) -> None:
        """Leave these layers in ``config``; ``depths``: the layers of all configurations by how many there were."""
        by_layer = dict(self._by_layer(config))
        for name, value in by_layer.items():
            setattr(config, name, _like(value, [value[layer] for layer in self.kept]))
        for name, value in _fields(config):
            if name in by_layer or name in self.names or not _OF_LAYERS.fullmatch(name):
                continue
            if isinstance(value, (list, tuple)) and value and all(type(one) is int for one in value):
                own = self if self.depth else depths.get(_tower_depth(config), self)
                new = [own.place(one) for one in value]
                new = [new[layer] for layer in own.kept] if len(new) == own.depth else list(dict.fromkeys(new))
                setattr(config, name, _like(value, new))
            elif type(value) is int and name.startswith(("vision_feature", "spatial_vision")):
                own = depths.get(_tower_depth(config), self)
                setattr(config, name, own.place(value) if own.depth else value)
            elif type(value) is int and (name.endswith(("_start", "_end")) or name == "insert_layer_id"):
                setattr(config, name, self.place(value))
        for name in self.names:
            was = vars(config)[name]
            setattr(config, name, len(self.kept) if was == self.depth else min(was, len(self.kept)))
        if vars(config).get("num_kv_shared_layers"):
            config.num_kv_shared_layers = self.shared
        if self.own:
            setattr(
                config, _OWN, {place: self.own[layer] for place, layer in enumerate(self.kept) if layer in self.own}
            )


def _first_and_later(layers: list[int], every: int) -> list[int]:
    return [layers[0], *([one for one in layers[1:] if one > every] or layers[1:])[:1]]


def _like(value: Sequence[Any], new: list[Any]) -> Sequence[Any]:
    return tuple(new) if isinstance(value, tuple) else new


_OWN = "per_layer_config"  # of configurations in which single layers have other settings


def _own_settings(config: PretrainedConfig) -> dict[int, dict[str, Any]]:
    """Settings of single layers, narrowed, by layer."""
    if not getattr(config, "is_heterogeneous", False):
        return {}
    spec: Any = vars(config)["_heterogeneity_spec"]
    given = _numbers(config)
    return {
        layer: {
            name: min(value, _narrowed(name, value, 0, {**given, **settings})) if type(value) is int else value
            for name, value in settings.items()
        }
        for layer, settings in spec.per_layer_overrides.items()
    }


def _tower_depth(config: PretrainedConfig) -> int:
    """Layers that the tower had; it was not cut yet, or has so many."""
    tower = getattr(config, "vision_config", None)
    return (
        0 if tower is None else max((v for n, v in _fields(tower) if _DEPTH.fullmatch(n) and type(v) is int), default=0)
    )


# -- widths -----------------------------------------------------------------------------------------------------------


def _narrow(config: PretrainedConfig, grids: bool) -> None:
    given = _numbers(config)
    width = next(
        (given[name] for name in ("hidden_size", "embed_dim", "d_model", "vision_hidden_size") if name in given), 0
    )
    dim = given.get("head_dim", 0) or (width // given["num_attention_heads"] if "num_attention_heads" in given else 0)
    for name, value in _fields(config):
        most = {"hidden_sizes": WIDTH, "image_size": 8 * _SIZE, "patch_size": _SIZE}.get(name)
        if name in PINPOINTS.spellings and value:
            side = 8 * _SIZE
            setattr(config, name, [[side, 2 * side], [2 * side, side], [2 * side, 2 * side]])
        if most is not None and isinstance(value, (list, tuple)):
            setattr(config, name, _like(value, [min(most, one) for one in value]))
    for name, value in given.items():
        if name in vars(config) and value > (new := _narrowed(name, value, width, given)):
            setattr(config, name, new)
    new = vars(config)
    if given.get("qk_head_dim") and "qk_nope_head_dim" in given:
        config.qk_head_dim = new["qk_nope_head_dim"] + new["qk_rope_head_dim"]
    if dim:
        _rotary(config, dim, grids)


def _numbers(config: PretrainedConfig) -> dict[str, int]:
    """The numbers in a configuration, and which share of a head is rotated, in percent, where it says so."""
    given = {name: value for name, value in _fields(config) if type(value) is int}
    rope = vars(config).get("rope_parameters")
    every = [rope, *rope.values()] if isinstance(rope, dict) else []
    shares = [
        one["partial_rotary_factor"] for one in every if isinstance(one, dict) and one.get("partial_rotary_factor")
    ]
    return {**given, "rotated_share": round(100 * shares[0])} if shares else given


def _narrowed(name: str, value: int, width: int, given: dict[str, int]) -> int:
    rotated, rest = given.get("qk_rope_head_dim", 0), given.get("qk_nope_head_dim", 0)
    if rotated and name.endswith(
        "head_dim"
    ):  # the two are a head, in the same proportion; some call the first one a head
        share = given.get("rotated_share", 0) or 100 * rotated // (rotated + rest)
        new = max(2, _DIM * share // 100 // 2 * 2)
        own = {"qk_rope_head_dim": new, "qk_nope_head_dim": _DIM - new}
        if name in own or (name == "head_dim" and value == rotated):
            return own.get(name, new)
    if name in _MOST:
        return _MOST[name]
    if _HEADS.fullmatch(name):
        return HEADS
    if _KEY_HEADS.fullmatch(name):
        heads = given.get(name.replace("key_value_heads", "attention_heads"), given.get("num_attention_heads"))
        return HEADS if value == heads else 1
    if _RANK.fullmatch(name):
        return 16
    if _WIDTH.fullmatch(name):
        times = value // width if width and value % width == 0 and value // width <= 16 else 1
        return WIDTH * times
    return value


def _rotary(config: PretrainedConfig, dim: int, grids: bool) -> None:
    """Cut what is told for each pair of channels of a head, of which there were ``dim``; ``grids``: positions may be of these."""
    fields = vars(config)
    new = fields.get("head_dim") or _DIM
    if fields.get("rotary_dim"):
        config.rotary_dim = max(2, fields["rotary_dim"] * new // dim)
    rope = fields.get("rope_parameters")
    if not isinstance(rope, dict):
        return
    if grids and "rope_type" in rope:
        rope.setdefault("mrope_section", [20, 20, 24])  # what classes have by default is of wide heads
    for one in [rope, *(value for value in rope.values() if isinstance(value, dict))]:
        pairs = int(new * (one.get("partial_rotary_factor") or 1.0)) // 2
        if section := one.get("mrope_section"):
            one["mrope_section"] = _shares(section, pairs)
        for name in ("short_factor", "long_factor"):
            if name in one:
                one[name] = one[name][:pairs]


def _shares(parts: Sequence[int], total: int) -> list[int]:
    """``parts`` in the same order of size, with sum ``total``."""
    if sum(parts) <= total:
        return list(parts)
    new = [max(1, part * total // sum(parts)) for part in parts]
    new[-1] += total - sum(new)
    return new


# -- vocabulary -------------------------------------------------------------------------------------------------------


def is_token(name: str) -> bool:
    """Tell whether a field of a configuration is called like one that holds a token's number, or several."""
    return _TOKEN.fullmatch(name) is not None


def _vocabulary(config: PretrainedConfig) -> None:
    """Make the vocabulary small, and give every special token a number in it; the same number where it was the same."""
    numbers: dict[int, int] = {}
    new: Callable[[int], int] = lambda token: numbers.setdefault(token, VOCABULARY - 64 + len(numbers))  # noqa: E731
    for one in configs(config):
        for name, value in _fields(one):
            if is_token(name):
                if type(value) is int and value >= VOCABULARY - 64:
                    setattr(one, name, new(value))
                elif isinstance(value, (list, tuple)):
                    setattr(
                        one, name, type(value)(new(v) if type(v) is int and v >= VOCABULARY - 64 else v for v in value)
                    )
            elif name in ("vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size") and value:
                setattr(one, name, min(value, VOCABULARY))
