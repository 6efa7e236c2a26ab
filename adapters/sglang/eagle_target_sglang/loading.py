"""From options to a loaded engine in this process."""

from __future__ import annotations

import logging
import socket
import threading
from typing import TYPE_CHECKING, Any

import torch

from eagle_target.checkpoints.digest import checkpoint_digest, digest_after_loading
from eagle_target.errors import AdapterError, ConfigError
from eagle_target_sglang.failures import engine_call

if TYPE_CHECKING:
    from eagle_target_sglang.options import SGLangOptions
    from eagle_target_sglang.runner import SGLangTargetRunner

logger = logging.getLogger(__name__)

# SGLang's own guess is negative on a CPU; max_total_tokens bounds the pool anyway.
CPU_MEMORY_FRACTION = 0.8

_started = threading.Lock()


def load_in_process(
    model: str, options: SGLangOptions, *, rank: int = 0, port: int | None = None
) -> SGLangTargetRunner:
    """Load a target as one rank, in this process.

    Args:
        rank: of `options.tp_size`. port: the process group's; None for a free one.

    Raises:
        AdapterError: this process has had an engine, SGLang refused, or the self-check failed.
    """
    from eagle_target_sglang.runner import SGLangTargetRunner

    if not _started.acquire(blocking=False):
        raise AdapterError(
            "this process has had an SGLang engine, and SGLang allows one a process: use in_process=false for another"
        )
    device = torch.device(choose_device(options))
    try:
        with engine_call("starting the engine", device=device):
            dtype = checkpoint_dtype(model, options)
            known_by = _known_by(options)
            # One rank speaks for all.
            before = checkpoint_digest(model, **known_by) if rank == 0 else None
            model_runner = _start(model, options, dtype, rank=rank, port=port or free_port())
            weights = digest_after_loading(before, model, **known_by) if rank == 0 else None
            runner = SGLangTargetRunner(model_runner, model=model, options=options, weights=weights)
            _log_memory(model_runner, runner, rank)
    except ConfigError:
        _started.release()
        raise
    if options.self_check:
        from eagle_target_sglang.self_check import check_parity

        check_parity(runner, model, options, dtype, rank)
    return runner


def choose_device(options: SGLangOptions) -> str:
    """The device type SGLang is told."""
    return options.device or ("cuda" if torch.cuda.is_available() else "cpu")


def checkpoint_dtype(model: str, options: SGLangOptions) -> str:
    """The dtype the target runs in; SGLang's own `auto` would turn float32 into float16.

    Raises:
        AdapterError: the checkpoint has no readable config.
    """
    if options.dtype != "auto":
        return options.dtype
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(
        model, revision=options.revision, trust_remote_code=options.trust_remote_code
    ).get_text_config()
    dtype = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None) or "bfloat16"
    return str(dtype).removeprefix("torch.")


def free_port() -> int:
    """A TCP port of this machine that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _known_by(options: SGLangOptions) -> dict[str, Any]:
    """What tells the digest which weights these are, and what else decides their values."""
    deciding = {"quantization": options.quantization, "load_format": options.load_format}
    return {"revision": options.revision, "options": deciding}


def _start(model: str, options: SGLangOptions, dtype: str, *, rank: int, port: int) -> Any:
    from eagle_target_sglang import generations

    wanted = _wanted_arguments(model, options, dtype)
    server_args = generations.build_server_args(wanted, _preferred_arguments(options))
    return generations.start_model_runner(server_args, rank=rank, gpu_id=options.base_gpu_id + rank, port=port)


def _log_memory(model_runner: Any, runner: SGLangTargetRunner, rank: int) -> None:
    from eagle_target_sglang import generations

    size = generations.kv_pool_gib(model_runner)
    logger.info(
        "rank %d: KV pool of %d tokens%s, sequences of up to %d tokens",
        rank,
        runner.limits.tokens,
        "" if size is None else f" in {size:.2f} GiB",
        runner.limits.max_seq_len,
    )


def _wanted_arguments(model: str, options: SGLangOptions, dtype: str) -> dict[str, Any]:
    """Arguments that must be there."""
    device = choose_device(options)
    on_cpu = device == "cpu"
    optional: dict[str, Any] = {
        "mem_fraction_static": options.mem_fraction_static or (CPU_MEMORY_FRACTION if on_cpu else None),
        "attention_backend": options.attention_backend or ("torch_native" if on_cpu else None),
        "sampling_backend": "pytorch" if on_cpu else None,
        "context_length": options.context_length,
        "quantization": options.quantization,
        "page_size": options.page_size,
        "load_format": options.load_format,
        "revision": options.revision,
    }
    return {
        "model_path": model,
        "device": device,
        "dtype": dtype,
        "tp_size": options.tp_size,
        "trust_remote_code": options.trust_remote_code,
        "max_total_tokens": options.max_total_tokens,
        "max_running_requests": options.max_running_requests,
        **{name: value for name, value in optional.items() if value is not None},
        **_official_arguments(options),
        **options.server_args,
    }


def _preferred_arguments(options: SGLangOptions) -> dict[str, Any]:
    """Arguments that a prefill of whole sequences wants, where the version has them."""
    return {
        "skip_tokenizer_init": True,
        "disable_radix_cache": True,
        "disable_cuda_graph": True,
        "disable_piecewise_cuda_graph": True,
        "disable_overlap_schedule": True,
        "chunked_prefill_size": -1,
        "enable_return_hidden_states": True,
        "log_level": options.log_level,
    }


def _official_arguments(options: SGLangOptions) -> dict[str, Any]:
    if options.capture != "official":
        return {}
    from eagle_target_sglang import generations
    from eagle_target_sglang.versions import engine_versions

    if not generations.has_official_capture():
        raise ConfigError(f"{engine_versions()} has no return_aux_hidden_state_layer_ids: use capture=hook")
    # Which layers is said to the model later, by set_aux_layers.
    return {
        "speculative_algorithm": "EAGLE3",
        "enable_return_aux_hidden_states": True,
        "return_aux_hidden_state_layer_ids": [0, 1, 2],
    }
