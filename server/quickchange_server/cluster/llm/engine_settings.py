"""Ray Serve LLM's `engine_kwargs` as this server's settings.

They may hold settings by their own names, and vLLM's options. Of those, what means the same is
translated, what only says how vLLM should work is accepted, and what would change an answer and is
not served is refused with a remedy. Ray is not known here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from quickchange_server.config import Settings
from quickchange_server.errors import SettingError
from quickchange_server.frontend.request_base import Unsupported
from quickchange_store.names import did_you_mean

Device = Literal["cpu", "cuda"]

MAX_QUEUE = 4096  # by default; as vLLM does, requests wait rather than get 429

# vLLM's options that are ours by another name.
TRANSLATED: Mapping[str, str] = {
    "tensor_parallel_size": "tensor_parallel",
    "max_num_seqs": "max_sequences",
    "max_num_batched_tokens": "max_batch_tokens",
    "enable_prefix_caching": "prefix_cache",
    "enable_lora": "adapters",
    "max_lora_rank": "max_adapter_rank",
    "lora_dtype": "adapter_dtype",
    "lora_extra_vocab_size": "extra_vocabulary",
    "kv_cache_memory_bytes": "kv_cache_bytes",
    "otlp_traces_endpoint": "otlp_endpoint",
}

# vLLM's options that say how it should work, and change no answer of ours.
HINTS = frozenset(
    # adapters are counted in bytes of each tier, tables made for any number
    {"max_loras", "max_cpu_loras", "fully_sharded_loras", "enable_lora_bias"}
    | {"specialize_active_lora"}
    # launches, kernels and graphs
    | {"enforce_eager", "compilation_config", "cuda_graph_sizes", "cudagraph_capture_sizes"}
    | {"max_cudagraph_capture_size", "max_seq_len_to_capture", "optimization_level"}
    | {"attention_backend", "attention_config", "kernel_config", "disable_custom_all_reduce"}
    | {"disable_cascade_attn", "use_v2_block_manager", "num_lookahead_slots"}
    # scheduling and processes
    | {"enable_chunked_prefill", "async_scheduling", "max_num_partial_prefills"}
    | {"max_long_partial_prefills", "long_prefill_token_threshold", "stream_interval"}
    | {"distributed_executor_backend", "max_parallel_loading_workers", "swap_space"}
    | {"ray_workers_use_nsight", "disable_async_output_proc", "num_gpu_blocks_override"}
    | {"prefix_caching_hash_algo", "preemption_mode", "use_tqdm_on_load", "download_dir"}
    | {"model_impl", "config_format", "ignore_patterns", "safetensors_load_strategy"}
    # logs and figures
    | {"disable_log_stats", "disable_log_requests", "enable_log_requests", "max_log_len"}
    | {"aggregate_engine_logging", "collect_detailed_traces", "show_hidden_metrics_for_version"}
    | {"enable_log_outputs", "uvicorn_log_level", "kv_cache_metrics", "cudagraph_metrics"}
    | {"enable_server_load_tracking", "enable_prompt_tokens_details"}
    # tools and structured output, which are always on
    | {"enable_auto_tool_choice", "tool_call_parser", "tool_parser_plugin"}
    | {"structured_outputs_config", "guided_decoding_backend", "guided_decoding_disable_fallback"}
    | {"generation_config", "limit_mm_per_prompt", "mm_processor_cache_gb", "language_model_only"}
)

_REMOVE = "remove it"
_MORE_REPLICAS = "use tensor_parallel_size, or more replicas (deployment_config.num_replicas)"
_OWN_CODE = "use a model whose code transformers has itself; remove it"
_OWN_CONFIG = "change the model's config.json, or remove it"

# vLLM's options that ask for something else than what is served, with the values that do not.
UNSUPPORTED: Mapping[str, Unsupported] = {
    "pipeline_parallel_size": Unsupported(_MORE_REPLICAS, (1,)),
    "data_parallel_size": Unsupported(_MORE_REPLICAS, (1,)),
    "data_parallel_rank": Unsupported(_MORE_REPLICAS),
    "decode_context_parallel_size": Unsupported(_MORE_REPLICAS, (1,)),
    "prefill_context_parallel_size": Unsupported(_MORE_REPLICAS, (1,)),
    "nnodes": Unsupported(_MORE_REPLICAS, (1,)),
    "enable_expert_parallel": Unsupported("experts are cut by tensor_parallel_size", (False,)),
    "kv_transfer_config": Unsupported("each replica both prefills and decodes; remove it"),
    "kv_events_config": Unsupported("no events of the KV cache are sent; remove it"),
    "speculative_config": Unsupported(
        "requests draft by Turbo heads or prompt lookup where they or their alias ask for it "
        '("turbo"); remove it'
    ),
    "kv_cache_dtype": Unsupported("the KV cache has the base's dtype; remove it", ("auto",)),
    "cpu_offload_gb": Unsupported("use quantization or tensor_parallel_size", (0, 0.0)),
    "enable_sleep_mode": Unsupported("scale to zero by autoscaling_config.min_replicas", (False,)),
    "trust_remote_code": Unsupported(_OWN_CODE, (False,)),
    "revision": Unsupported("give model_source as a folder of that revision", ("main",)),
    "code_revision": Unsupported(_OWN_CODE),
    "tokenizer": Unsupported("the model's own tokenizer is used; remove it"),
    "tokenizer_revision": Unsupported("the model's own tokenizer is used; remove it", ("main",)),
    "tokenizer_mode": Unsupported("the model's own tokenizer is used; remove it", ("auto", "hf")),
    "skip_tokenizer_init": Unsupported(_REMOVE, (False,)),
    "hf_config_path": Unsupported(_OWN_CONFIG),
    "hf_overrides": Unsupported(_OWN_CONFIG, ({},)),
    "rope_scaling": Unsupported(_OWN_CONFIG, ({},)),
    "rope_theta": Unsupported(_OWN_CONFIG),
    "disable_sliding_window": Unsupported("set max_model_len", (False,)),
    "override_generation_config": Unsupported("send them with the requests", ({},)),
    "load_format": Unsupported(
        "weights are read from safetensors or GGUF; remove it",
        ("auto", "hf", "safetensors", "pt", "gguf", "bitsandbytes"),
    ),
    "model_loader_extra_config": Unsupported(_REMOVE, ({},)),
    "task": Unsupported("text is made and embedded by one model; remove it", ("auto", "generate")),
    "runner": Unsupported(
        "text is made and embedded by one model; remove it", ("auto", "generate")
    ),
    "convert": Unsupported("text is made and embedded by one model; remove it", ("auto", "none")),
    "pooler_config": Unsupported('requests say "pooling" in their own; remove it'),
    "override_pooler_config": Unsupported('requests say "pooling" in their own; remove it'),
    "enable_prompt_embeds": Unsupported("give prompts as text or token ids", (False,)),
    "logits_processors": Unsupported(_REMOVE, ([],)),
    "logits_processor_pattern": Unsupported(_REMOVE),
    "logprobs_mode": Unsupported(_REMOVE, ("raw_logprobs",)),
    "scheduling_policy": Unsupported("requests are served fairly over adapters", ("fcfs",)),
    "default_mm_loras": Unsupported(_REMOVE, ({},)),
    "reasoning_parser": Unsupported("reasoning stays in the content; remove it", ("",)),
    "chat_template": Unsupported("put the template into the model's folder, or render it yourself"),
    "chat_template_content_format": Unsupported(_REMOVE, ("auto", "string")),
    "default_chat_template_kwargs": Unsupported(_REMOVE, ({},)),
    "response_role": Unsupported(_REMOVE, ("assistant",)),
    "return_tokens_as_token_ids": Unsupported(_REMOVE, (False,)),
    "api_key": Unsupported("use api_keys and database, or protect Ray Serve's own address"),
    "worker_cls": Unsupported(_REMOVE, ("auto",)),
    "worker_extension_cls": Unsupported(_REMOVE, ("",)),
    "scheduler_cls": Unsupported(_REMOVE),
    "additional_config": Unsupported(_REMOVE, ({},)),
}

# Set by Ray Serve LLM's own configuration.
ELSEWHERE: Mapping[str, str] = {
    "model": "model_loading_config.model_source says where the model is",
    "served_model_name": "model_loading_config.model_id is the model's name",
    "host": "Ray Serve listens (http_options)",
    "port": "Ray Serve listens (http_options)",
}

LORA_MODULES = "lora_modules"

_DTYPES = {"half": "float16", "float": "float32"}
_CHECKPOINTS_OWN = frozenset(
    {"compressed-tensors", "torchao", "bitsandbytes", "gguf"}  # read from the checkpoint itself
)


def engine_settings(
    engine_kwargs: Mapping[str, Any],
    *,
    model: str,
    model_id: str,
    device: Device,
    threads: int | None,
    store: Path,
) -> Settings:
    """The settings of one replica. `store`: where adapters are kept unless `engine_kwargs` say.

    Raises SettingError, which names the entry and the remedy.
    """
    names: dict[str, str] = {}  # each setting's name in engine_kwargs
    changed: dict[str, Any] = {}
    for given, value in engine_kwargs.items():
        name = _setting(given, value)
        if name is None or value is None:
            continue
        if name in names:
            raise _wrong(given, f"is {names[name]} under another name; give one of them")
        names[name] = given
        changed[name] = _VALUES.get(name, _same)(value)
    defaults = {"store": store, "max_queue": MAX_QUEUE, "device": device, "threads": threads}
    try:
        return Settings(**{**defaults, **changed, "model": model, "served_model_name": model_id})
    except ValidationError as error:
        finding = error.errors()[0]
        name = str(finding["loc"][0])
        raise _wrong(names.get(name, name), str(finding["msg"])) from error


def lora_modules(engine_kwargs: Mapping[str, Any]) -> dict[str, str]:
    """The adapters of vLLM's `lora_modules`, name to folder. Raises SettingError."""
    modules = engine_kwargs.get(LORA_MODULES) or []
    if isinstance(modules, Mapping):
        return {str(name): str(path) for name, path in modules.items()}
    if not isinstance(modules, list | tuple):
        raise _wrong(LORA_MODULES, 'must be a list of {"name": ..., "path": ...}')
    found: dict[str, str] = {}
    for module in modules:
        if not isinstance(module, Mapping) or not {"name", "path"} <= set(module):
            raise _wrong(LORA_MODULES, f'has {module!r}; write {{"name": ..., "path": ...}}')
        found[str(module["name"])] = str(module["path"])
    return found


def _setting(given: str, value: Any) -> str | None:
    """The setting's name; None for what is accepted and changes nothing. Raises SettingError."""
    if given in ELSEWHERE:
        raise _wrong(given, f"does not belong here: {ELSEWHERE[given]}")
    if given in TRANSLATED:
        return TRANSLATED[given]
    if given in Settings.model_fields:
        return None if given == "quantization" and value in _CHECKPOINTS_OWN else given
    if given in HINTS or given == LORA_MODULES:
        return None
    unsupported = UNSUPPORTED.get(given)
    if unsupported is None:
        known = (*Settings.model_fields, *TRANSLATED, *UNSUPPORTED, *HINTS, LORA_MODULES)
        hint = did_you_mean(given, known, otherwise="remove it;")
        raise _wrong(
            given, f"unknown; {hint} docs/settings.md and docs/ray-serve-llm.md list what there is"
        )
    if value is not None and unsupported.asks(value):
        raise _wrong(given, f"{value!r} is not supported; {unsupported.remedy}")
    return None


def _same(value: Any) -> Any:
    return value


def _dtype(value: Any) -> Any:
    return _DTYPES.get(value, value) if isinstance(value, str) else value


def _adapter_dtype(value: Any) -> Any:
    return "model" if value == "auto" else _dtype(value)


def _length(value: Any) -> Any:
    return None if value in (-1, "auto") else value


_VALUES: Mapping[str, Callable[[Any], Any]] = {
    "dtype": _dtype,
    "adapter_dtype": _adapter_dtype,
    "max_model_len": _length,
}


def _wrong(name: str, problem: str) -> SettingError:
    return SettingError(f"engine_kwargs.{name}: {problem}", param=name)
