"""From options to a running vLLM engine whose workers capture."""

from __future__ import annotations

import os
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
import vllm
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.v1.engine.llm_engine import LLMEngine
from vllm.v1.executor import Executor

from eagle_target.checkpoints.digest import checkpoint_digest, digest_after_loading
from eagle_target.checkpoints.loading import check_checkpoint
from eagle_target.contract.target import validate_aux_layer_ids
from eagle_target.errors import AdapterError, ConfigError
from eagle_target.plugins.options import nearest_name
from eagle_target_vllm.connector import connector_arguments
from eagle_target_vllm.executors import CONFIG_KEY, target_executor
from eagle_target_vllm.failures import engine_call
from eagle_target_vllm.inline import INLINE_LOCK, is_anything_running, register, shut_down

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from vllm.config import ModelConfig

    from eagle_target_vllm.options import VLLMOptions

EXTENSION = "eagle_target_vllm.worker.TargetWorkerExtension"
CPU_KV_CACHE_BYTES = 1 << 30
# Options that vLLM takes under the same name, where they are set.
_PASSED = (
    "max_model_len",
    "max_num_batched_tokens",
    "max_num_seqs",
    "gpu_memory_utilization",
    "kv_cache_memory_bytes",
    "quantization",
    "load_format",
    "enforce_eager",
    "enable_prefix_caching",
    "revision",
    "hf_overrides",
)
# Formats of transformers' own files.
_CHECKED_FORMATS = (None, "auto", "hf", "safetensors", "pt")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LoadedEngine:
    """A running engine.

    is_inline: whether the engine itself is in this process; has_inline_worker: whether its only worker is, too.
    weights: digest of the checkpoint, where its files are here.
    aux_layer_ids: layers it was loaded with, ascending; is_compiled: whether it can have no others.
    facts: what `TargetWorker.start` says.
    """

    name: str
    options: VLLMOptions
    engine: LLMEngine
    is_inline: bool
    has_inline_worker: bool
    weights: str | None
    aux_layer_ids: tuple[int, int, int] | None
    is_compiled: bool
    facts: dict[str, Any]


def load_engine(model: str, options: VLLMOptions, aux_layer_ids: Sequence[int] | None = None) -> LoadedEngine:
    """Start vLLM on a path or a hub id; see `Adapter.load`.

    Raises:
        ConfigError: an engine argument that vLLM does not have. ContractError: layers that the target has not.
        AdapterError: vLLM refused, with its message kept, cannot capture this model, or its checkpoint is not whole.
    """
    is_checked = _is_checked(model, options)
    inline = options.process == "inline"
    inline_worker = inline and options.tensor_parallel_size == 1
    if inline_worker and options.capture == "connector" and is_anything_running():
        raise AdapterError(
            "vLLM has one connector a process, and another engine runs in this one: close it, or use "
            "-o process=separate"
        )
    guard = INLINE_LOCK if inline else nullcontext()
    with engine_call(f"loading {model!r}"), guard, _environment(options, inline_worker=inline_worker):
        arguments = engine_arguments(model, options)
        known_by: dict[str, Any] = {"revision": options.revision, "options": _deciding_options(options)}
        before = checkpoint_digest(model, **known_by)
        model_config = arguments.create_model_config()
        arguments.dtype = _dtype(model_config, options)
        layers = _set_layers(arguments, options, aux_layer_ids, model_config)
        config = arguments.create_engine_config()
        engine = LLMEngine(
            vllm_config=config,
            executor_class=target_executor(Executor.get_class(config)),
            log_stats=False,
            multiprocess_mode=not inline,
        )
        if inline:
            register(engine)
        try:
            facts = engine.collective_rpc("eagle_target", args=("start", options.capture))[0]
            _check_facts(model, facts)
            if not is_checked:
                # Files of the Hub are here by now.
                _is_checked(model, options)
            weights = digest_after_loading(before, model, **known_by)
        except BaseException:
            end_engine(engine, inline=inline)
            raise
    return LoadedEngine(
        name=model,
        options=options,
        engine=engine,
        is_inline=inline,
        has_inline_worker=inline_worker,
        weights=weights,
        aux_layer_ids=layers,
        is_compiled=not config.model_config.enforce_eager,
        facts=facts,
    )


def _deciding_options(options: VLLMOptions) -> dict[str, Any]:
    """Options that give other values for the same weights."""
    return {name: getattr(options, name) for name in ("quantization", "load_format", "hf_overrides")}


def end_engine(engine: LLMEngine, *, inline: bool) -> None:
    """Stop an engine and its processes."""
    if inline:
        shut_down(engine)
    else:
        engine.engine_core.shutdown()


def engine_arguments(model: str, options: VLLMOptions) -> EngineArgs:
    """The arguments of vLLM's engine.

    Raises:
        ConfigError: one that vLLM does not have.
    """
    known = [field.name for field in fields(EngineArgs)]
    for name in options.engine_args:
        if name not in known:
            raise ConfigError(
                f"engine_args has {name!r}, which vLLM {vllm.__version__} has not, {nearest_name(name, known)}"
            )
    given = {name: getattr(options, name) for name in _PASSED if getattr(options, name) is not None}
    if options.capture == "worker":
        given["enable_prefix_caching"] = False
    if current_platform.is_cpu() and "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
        # vLLM would claim 92 % of the memory.
        given.setdefault("kv_cache_memory_bytes", CPU_KV_CACHE_BYTES)
    return EngineArgs(
        **{
            "model": model,
            "tensor_parallel_size": options.tensor_parallel_size,
            "trust_remote_code": options.trust_remote_code,
            "dtype": options.dtype,
            # Prompts are token ids and nothing is generated, so a model without a tokenizer will do.
            "skip_tokenizer_init": True,
            "disable_log_stats": True,
            "worker_extension_cls": EXTENSION,
            **given,
            **options.engine_args,
        }
    )


def _set_layers(
    arguments: EngineArgs, options: VLLMOptions, aux_layer_ids: Sequence[int] | None, model_config: ModelConfig
) -> tuple[int, int, int] | None:
    """Tell the engine which layers to start with; None where they come later and an eager model can take them then."""
    uses_connector = options.capture == "connector"
    if aux_layer_ids is None and model_config.enforce_eager and not uses_connector:
        return None
    num_layers = model_config.get_total_num_hidden_layers()
    layers = validate_aux_layer_ids(aux_layer_ids, num_layers)
    if uses_connector:
        for name, value in connector_arguments(layers, num_layers).items():
            setattr(arguments, name, value)
    else:
        arguments.additional_config = {**arguments.additional_config, CONFIG_KEY: {"aux_layer_ids": list(layers)}}
    return layers


def _dtype(model_config: ModelConfig, options: VLLMOptions) -> Any:
    """The checkpoint's dtype for auto: vLLM would halve a float32 checkpoint."""
    if options.dtype != "auto":
        return options.dtype
    dtype = getattr(model_config.hf_text_config, "dtype", None)
    return "float32" if dtype in (torch.float32, "float32") else "auto"


def _is_checked(model: str, options: VLLMOptions) -> bool:
    """Whether the checkpoint was found to be whole; False where it is not here yet.

    Raises:
        AdapterError: it is not whole.
    """
    if not options.self_check or options.hf_overrides or options.load_format not in _CHECKED_FORMATS:
        return True
    return check_checkpoint(
        model,
        revision=options.revision,
        trust_remote_code=options.trust_remote_code,
        remedy="Set self_check=false if vLLM knows better",
    )


def _check_facts(model: str, facts: dict[str, Any]) -> None:
    if facts["obstacle"]:
        raise AdapterError(f"cannot capture {model!r}: {facts['obstacle']}")
    if not facts["has_embedding"]:
        raise AdapterError(f"vLLM {vllm.__version__} has no plain input embedding for {model!r}: use --engine hf")


@contextmanager
def _environment(options: VLLMOptions, *, inline_worker: bool) -> Iterator[None]:
    """What vLLM takes from the environment alone, for the time it starts."""
    wanted = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0" if inline_worker else "1"}
    if current_platform.is_cpu() and not inline_worker:
        cores = len(os.sched_getaffinity(0))
        # vLLM 0.32 binds each worker to a NUMA node of its own by default, and there may be one only.
        wanted["VLLM_CPU_OMP_THREADS_BIND"] = os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        share = max(1, cores // options.tensor_parallel_size)
        wanted["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", str(share))
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
