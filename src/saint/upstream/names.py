"""Names of other libraries' arguments, methods and fields: where a release renames one, one line here is edited.

A :class:`Role` is what this library means; its spellings are what releases have called it, newest first. Which one holds is
read off the signatures and attributes of the modules at hand when a plan is applied, never off a version number.

Hooks and overridden forwards run in front of upstream's own renaming shims: callers may still use an older spelling. So
reading accepts every spelling, and writing leaves exactly one.
"""

import inspect
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary

T = TypeVar("T")


@dataclass(frozen=True)
class Role:
    """One thing of upstream's and its spellings, newest first."""

    spellings: tuple[str, ...]

    def __init__(self, *spellings: str) -> None:
        object.__setattr__(self, "spellings", spellings)

    def __str__(self) -> str:
        return " or ".join(self.spellings)

    def among(self, names: Container[str]) -> str | None:
        """The newest spelling that is one of ``names``, or None."""
        for name in self.spellings:
            if name in names:
                return name
        return None

    def read(self, given: Mapping[str, Any], default: Any = None) -> Any:
        """The value under whatever spelling; where several are given the newest wins, as it does upstream."""
        for name in self.spellings:  # a loop: this runs several times in every step of an answer
            if name in given:
                return given[name]
        return default

    def of(self, holder: Any) -> str | None:
        """The newest spelling that ``holder`` has as an attribute, or None."""
        for name in self.spellings:
            if hasattr(holder, name):
                return name
        return None

    def get(self, holder: Any, default: Any = None) -> Any:
        """The attribute of ``holder`` under whatever spelling."""
        name = self.of(holder)
        return default if name is None else getattr(holder, name)


class PerClass(dict[type, T], Generic[T]):
    """Answers about classes, by class: each is asked for once, and a model of many modules has few classes.

    Args:
        ask: answers.
    """

    def __init__(self, ask: Callable[[type], T]) -> None:
        super().__init__()
        self._ask = ask

    def __missing__(self, cls: type) -> T:
        self[cls] = answer = self._ask(cls)
        return answer


# layers of one class have one forward, whose signature takes longer to read than all else that is done with a layer
_NAMES: "WeakKeyDictionary[Callable[..., Any], tuple[str, ...]]" = WeakKeyDictionary()


class Parameters:
    """How one function spells its arguments.

    Args:
        function: unbound; decorators that set ``__wrapped__`` are seen through.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        names = _NAMES.get(function)
        if names is None:
            own = list(inspect.signature(function).parameters.values())[1:]  # behind self
            names = tuple(p.name for p in own if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD))
            _NAMES[function] = names
        self.names = names

    def has(self, role: Role) -> bool:
        """Tell whether the function takes it by name."""
        return role.among(self.names) is not None

    def spelling(self, role: Role) -> str:
        """Give what the function calls it; the newest spelling where it does not take it by name."""
        return role.among(self.names) or role.spellings[0]

    def missing(self, *roles: Role) -> list[str]:
        """The roles that the function does not take by name, for messages."""
        return [str(role) for role in roles if not self.has(role)]

    def named(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], skip: int = 0) -> dict[str, Any]:
        """The arguments of a call by name, without the first ``skip`` parameters, which ``args`` must not hold."""
        # cut to equal length: the compiler of older torch takes every zip for a strict one
        return {**dict(zip(self.names[skip : skip + len(args)], args, strict=True)), **kwargs}

    def put(self, given: Mapping[str, Any], role: Role, value: Any) -> dict[str, Any]:
        """``given`` with ``value`` under the one spelling that the function takes."""
        name = role.among(self.names) or role.among(given) or role.spellings[0]
        out = dict(given)
        for spelling in role.spellings:
            out.pop(spelling, None)
        out[name] = value
        return out


# -- arguments --------------------------------------------------------------------------------------------------------

CACHE = Role("cache", "past_key_values")  # also a field of outputs
HIDDEN = Role("hidden_states")
MASK = Role("attention_mask")
ROTARY = Role("position_embeddings")
POSITIONS = Role("position_ids")
EMBEDDINGS = Role("inputs_embeds")
IDS = Role("input_ids")
CACHING = Role("use_cache")  # also a field of configs
SEEN_STATES = Role("encoder_hidden_states")  # of decoders that attend to another sequence
SEEN_MASK = Role("encoder_attention_mask")
ALL_STATES = Role("output_hidden_states")  # also a field of configs
JOINED = Role(
    "deepstack_visual_embeds", "deepstack_features"
)  # added behind the first layers, or in front of those named
LAST_ROWS = Role("logits_to_keep")  # of decoders: how many of the last tokens the last layers run on
PAIRWISE = Role("relative_distance", "alibi", "position_bias")  # of decoder layers: a value per pair of places
PIXELS = Role("pixel_values")
IMAGE_PATCHES = Role("image_patches")
VIDEOS = Role("pixel_values_videos")
FRAMES = Role("pixel_values_videos", "pixel_values")  # the same, of the method that encodes them
IMAGE_GRID = Role("image_grid_thw")  # the same of each image
KINDS_OF_TOKENS = (Role("mm_token_type_ids", "moe_mm_token_type_ids"), Role("token_type_ids"))  # 1 at images
VIDEO_GRID = Role("video_grid_thw")  # frames, rows and columns of patches of each video
ENCODED = Role("mm_encoder_outputs")  # features computed earlier, in place of pixels
GRID = Role("grid_thw")  # packed towers: rows and columns of patches of each image
PICTURE_SIZES = Role("image_sizes")  # height and width of each picture in pixels
SEGMENTS = Role("cu_seqlens")  # packed towers: ends of the segments that attend to themselves
LONGEST = Role("max_seqlen")
TIMM_MASK = Role("attn_mask")
KEYS_FROM = Role("key", "x")  # of nn.MultiheadAttention and of timm's: what keys are made from
TIMM_ROTARY = Role("rope")
TIMM_PAIRS = Role("shared_rel_pos", "shared_rel_pos_bias")  # a bias over all pairs of tokens, of two classes
TIMM_VALID = Role("patch_valid")  # NaFlex: which patches are none of the padding
TIMM_PLACES = Role("patch_coord")  # NaFlex: row and column of each patch
SHAPES = Role("spatial_shapes")  # SigLIP 2: rows and columns of patches of each picture

# -- methods ----------------------------------------------------------------------------------------------------------

PLACEHOLDER_MASK = Role("get_placeholder_mask")  # returns where features go; called when there are features to merge
IMAGE_FEATURES = Role("get_image_features")  # takes pixels, returns what the language model receives of them
VIDEO_FEATURES = Role("get_video_features")  # takes pixels of videos, returns what the language model receives of them
TEXT_FEATURES = Role("get_text_features")  # of dual encoders
MERGER = Role("inputs_merger")  # merges features into embeddings itself
DECODER = Role("get_decoder")  # returns the language model, or what puts a head on it
ENCODER = Role("get_encoder")  # returns the tower of a modality, or the model itself
WINDOW_ORDER = Role("permute_input_for_window_attn")  # reorders groups of patches, given their order
PROMPT_COUNTS = Role("_get_num_multimodal_tokens")  # of processors: tokens of prompts, from sizes of pictures alone

PREFILL = Role("_prefill")  # of `generate`: runs a prompt, in pieces where the generation config says so
GENERATE = Role("generate")
DRAFTS = Role("_get_candidate_generator")  # of `generate`: from now on a forward brings drafts, the prompt's too
BATCHING = (Role("generate_batch"), Role("init_continuous_batching"))  # an engine of its own, in a thread

# -- fields -----------------------------------------------------------------------------------------------------------

PIECE = Role("prefill_chunk_size")  # of generation configs
IMPLEMENTATION = Role("_attn_implementation")  # of configs
POOLED = Role("pooler_output")
DEEPSTACK_FEATURES = Role("deepstack_features")  # beside those: one for each layer that they enter at
IMAGE_TOKEN = Role("image_token_id", "image_token_index", "image_patch_id")  # of configs
VIDEO_TOKEN = Role("video_token_id", "video_token_index")  # of configs
AUDIO_TOKEN = Role("audio_token_id", "audio_token_index")  # of configs
VISION_CONFIG = Role("vision_config")  # of configs: that of the tower
MERGE_SIDE = Role("spatial_merge_size", "merge_kernel_size", "merge_size")  # of configs of towers
JOINED_SIDE = Role(  # of configs and of their towers': the same, under the names of towers that are not packed
    *MERGE_SIDE.spellings, "downsample_factor", "scale_factor", "hidden_stride", "projector_pooling_ratio",
)  # fmt: skip
STARTS = Role("vision_start_token_id", "image_start_token_id")  # of configs: in front of an image
ENDS = Role("vision_end_token_id", "image_end_token_id")  # of configs: behind an image
DEEPSTACK_OF = Role("deepstack_visual_indexes")  # of configs of towers: layers whose features enter later as well
DEEPSTACK_MAP = Role("deepstack_layer_map")  # of configs: the same, with the layers of the language model they enter at
ATTENTION = Role("self_attn")  # of decoder layers
STREAMS = Role("altup")  # of decoder layers whose hidden states are several streams, [streams, B, L, C]
SCALED_FROM = Role("floor_scale")  # of attention that scales queries by place from there on, where it does:
SCALES = Role("attn_temperature_tuning")
TURNS = Role("use_rope")  # of the same: only layers without rotary tables do
MLP = Role("mlp", "feed_forward", "block_sparse_moe", "moe")  # of decoder layers
LAYERS = Role("layers")  # of decoders
EXPERTS_USED = Role("num_experts_per_tok")  # of configs of mixtures of experts
LAYER_KINDS = Role("layer_types", "layers_block_type")  # of configs of decoders
SHARING = Role("kv_sharing_modes")  # of the same: "store" and "reuse" by layer
STATES = Role("conv_states", "recurrent_states")  # of layers of a cache
WINDOWLESS = Role("fullatt_block_indexes")  # of configs of towers: layers whose patches attend beyond their window
WINDOW = Role("window_size")  # of the same, in pixels
PINPOINTS = Role("image_grid_pinpoints")  # of configs that cut pictures into tiles
IMAGE_LENGTH = Role(
    "image_seq_length", "mm_tokens_per_image", "vision_soft_tokens_per_image", "num_image_tokens"
)  # of configs
PATCH = Role("patch_size")  # of configs of towers, in pixels
IMAGE_SIDE = Role("image_size")  # of configs of towers, in pixels
IMAGE_PROCESSOR = Role("image_processor")  # of processors
IMAGE_COUNTS = Role("num_image_tokens")  # of what those say they will make of pictures
CALL_OPTIONS = Role("valid_kwargs")  # of image processors: a class whose annotations are the options of a call
PICTURE_SIZE = Role("size")  # of image processors, and an option of theirs: sides or areas by name
LONGEST_EDGE = Role("longest_edge")  # of those: of sides, or (Qwen) pixels, at most
SHORTEST_EDGE = Role("shortest_edge")  # and at least

# -- parts of blocks of towers ----------------------------------------------------------------------------------------

BLOCK_ATTENTIONS = Role("self_attn", "attention", "attn")
BLOCK_MLPS = Role("mlp", "ffn", "feed_forward")
BLOCK_KEYS = Role("k_proj", "key", "wk", "k")  # of their attentions: emits the keys
BLOCK_PACKED_KEYS = Role("qkv", "qkv_proj", "wqkv")  # likewise: queries, keys and values side by side
BLOCK_HEADS = Role("num_key_value_heads", "num_heads", "num_attention_heads", "n_heads")
