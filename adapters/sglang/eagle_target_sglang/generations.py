"""All that differs between versions of SGLang, 0.5.9 to 0.5.23: server arguments, the ModelRunner, requests, the head.

Each function looks for what the installed version has, not at its number. Everything here imports SGLang.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from typing import TYPE_CHECKING, Any

from eagle_target.errors import AdapterError, ConfigError
from eagle_target.plugins.options import nearest_name
from eagle_target_sglang.versions import installed_version

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

OFFICIAL_ARGUMENTS = ("enable_return_aux_hidden_states", "return_aux_hidden_state_layer_ids")


def server_argument_names() -> set[str]:
    """Fields of the installed `ServerArgs`."""
    from sglang.srt.server_args import ServerArgs

    # A dataclass up to 0.5.21, assembled from namespaces afterwards: the signature has the fields in both.
    return {name for name in inspect.signature(ServerArgs).parameters if name not in ("self", "args", "kwargs")}


def build_server_args(wanted: Mapping[str, Any], preferred: Mapping[str, Any]) -> Any:
    """Build `ServerArgs` from what a user set and from what we prefer where the version knows it.

    Raises:
        ConfigError: the installed version has no such argument.
    """
    from sglang.srt.server_args import ServerArgs

    names = server_argument_names()
    for name in wanted:
        if name not in names:
            raise ConfigError(
                f"ServerArgs of SGLang {installed_version('sglang')} has no {name!r}, {nearest_name(name, names)}"
            )
    known = {name: value for name, value in preferred.items() if name in names}
    return ServerArgs(**{**known, **wanted})


def start_model_runner(server_args: Any, *, rank: int, gpu_id: int, port: int) -> Any:
    """Load the model and its memory pools as rank `rank`, the process group over TCP port `port`."""
    ranks = _publish(server_args, rank, gpu_id)
    _initialize_kernels_config(server_args)
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.model_executor.model_runner import ModelRunner

    model_config = ModelConfig.from_server_args(server_args)
    _start_parallel_runtime(server_args, model_config, port)
    arguments: dict[str, Any] = {
        "model_config": model_config,
        "mem_fraction_static": _resolved(server_args, "mem_fraction_static"),
        "gpu_id": gpu_id,
        "nccl_port": port,
        "server_args": server_args,
        **ranks,
    }
    accepted = inspect.signature(ModelRunner.__init__).parameters
    if "ps" in accepted:
        arguments["ps"] = _parallel_state(ranks, gpu_id)
    runner = ModelRunner(**{name: value for name, value in arguments.items() if name in accepted})
    # Steps of their own from 0.5.14; before, the constructor took them.
    for step in ("alloc_memory_pool", "init_attention_backends", "init_cuda_graphs"):
        if hasattr(runner, step):
            getattr(runner, step)()
    return runner


def run_extend(model_runner: Any, rows: Sequence[Sequence[int]], *, return_hidden_states: bool) -> Any:
    """One prefill of sequences that share no prefix, by SGLang's own bench helpers; its `LogitsProcessorOutput`.

    Sampling is left out. The caller frees the pools with `free_pools`.
    """
    bench = _one_batch()
    requests = bench.prepare_synthetic_inputs_for_latency_test(len(rows), 0, custom_inputs=[list(row) for row in rows])
    for request in requests:
        request.return_hidden_states = return_hidden_states
    unsampled = _WithoutSampling(model_runner)
    bench.extend(requests, unsampled)
    return unsampled.logits_output


def free_pools(model_runner: Any) -> None:
    """Give every slot of the request and KV pools back."""
    model_runner.req_to_token_pool.clear()
    model_runner.token_to_kv_pool_allocator.clear()


def pool_limits(model_runner: Any) -> tuple[int, int, int]:
    """Sequences and tokens that one prefill may hold, and the page its sequences are rounded up to; pools are free."""
    allocator = model_runner.token_to_kv_pool_allocator
    page_size = int(_resolved(model_runner.server_args, "page_size") or 1)
    return int(model_runner.req_to_token_pool.available_size()), int(allocator.available_size()), page_size


def kv_pool_gib(model_runner: Any) -> float | None:
    """Memory of the KV pool on this rank; None where SGLang does not say."""
    pool = model_runner.token_to_kv_pool_allocator.get_kvcache()
    size = getattr(pool, "mem_usage", None)
    return float(size) if isinstance(size, int | float) else None


def one_row_metadata() -> Any:
    """Metadata under which a LogitsProcessor takes the rows it is given, prunes none and captures nothing."""
    from sglang.srt.layers.logits_processor import LogitsMetadata
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    return LogitsMetadata(forward_mode=ForwardMode.DECODE)


def project(processor: Any, hidden: torch.Tensor, lm_head: Any) -> torch.Tensor:
    """`[n, hidden]` -> float32 `[n, vocab]` by SGLang's own head: quantised, sharded, scaled, soft-capped."""
    logits: torch.Tensor = processor._get_logits(hidden, lm_head, one_row_metadata())  # noqa: SLF001
    return logits


def all_reduce(tensor: torch.Tensor) -> torch.Tensor:
    """Sum over the ranks."""
    from sglang.srt.distributed import tensor_model_parallel_all_reduce

    result: torch.Tensor = tensor_model_parallel_all_reduce(tensor)
    return result


def choose_layers(model: Any, layer_ids: Sequence[int]) -> None:
    """Have the model capture the outputs of these layers, none of which is the last, and of no others."""
    for module in model.modules():
        # Mixture-of-experts models mark layers, and do not clear the marks of an earlier choice.
        if getattr(module, "_is_layer_to_capture", False):
            module._is_layer_to_capture = False  # noqa: SLF001
    model.set_eagle3_layers_to_capture(list(layer_ids))


def has_official_capture() -> bool:
    """Whether the installed version returns aux hidden states without a draft (from 0.5.23)."""
    return set(OFFICIAL_ARGUMENTS) <= server_argument_names()


class _WithoutSampling:
    """A ModelRunner to SGLang's bench helpers, but sampling only keeps what was to be sampled from."""

    def __init__(self, model_runner: Any) -> None:
        self._model_runner = model_runner
        self.logits_output: Any = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model_runner, name)

    def sample(self, logits_output: Any, forward_batch: Any) -> None:
        del forward_batch
        self.logits_output = logits_output


def _one_batch() -> Any:
    # Moved in 0.5.17; the old name is gone from 0.5.22.
    for name in ("sglang.benchmark.one_batch", "sglang.bench_one_batch"):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name not in (name, "sglang.benchmark"):
                raise
    raise AdapterError(
        f"SGLang {installed_version('sglang')} has no one_batch helpers: the adapter takes 0.5.9 to 0.5.23"
    )


def _publish(server_args: Any, rank: int, gpu_id: int) -> dict[str, int]:
    """Make the arguments known to the process, where the version wants it, and return the ranks' arguments."""
    try:
        context = importlib.import_module("sglang.srt.runtime_context")
    except ModuleNotFoundError:
        context = None
    if hasattr(context, "publish"):
        # From 0.5.22 the ranks are part of the published context.
        spawn_ranks = getattr(context, "SpawnRanks", None)
        ranks = {} if spawn_ranks is None else {"ranks": spawn_ranks(world_rank=rank, gpu_id=gpu_id)}
        context.publish(server_args, role="scheduler", **ranks)  # type: ignore[union-attr]
    tp_size = int(_resolved(server_args, "tp_size"))
    ep_size = int(_resolved(server_args, "ep_size"))
    return {
        "tp_rank": rank,
        "tp_size": tp_size,
        "moe_ep_rank": rank // (tp_size // ep_size),
        "moe_ep_size": ep_size,
        "pp_rank": 0,
        "pp_size": 1,
    }


def _initialize_kernels_config(server_args: Any) -> None:
    bench = _one_batch()
    # One function from 0.5.22.
    if hasattr(bench, "_init_process_global_configs"):
        bench._init_process_global_configs()  # noqa: SLF001
        return
    for name in ("initialize_moe_config", "initialize_fp8_gemm_config", "initialize_fp4_gemm_config"):
        function = getattr(bench, name)
        # Without an argument from 0.5.20, where it reads what was published.
        function(*(server_args,)[: len(inspect.signature(function).parameters)])


def _start_parallel_runtime(server_args: Any, model_config: Any, port: int) -> None:
    """The process groups, where they are no longer built by the ModelRunner (from 0.5.22)."""
    try:
        bootstrap = importlib.import_module("sglang.srt.distributed.bootstrap")
    except ModuleNotFoundError:
        return
    if hasattr(bootstrap, "init_parallel_runtime"):
        device = _resolved(server_args, "device")
        bootstrap.init_parallel_runtime(server_args=server_args, device=device, dist_port=port)
        bootstrap.init_layer_runtime(model_config=model_config)


def _parallel_state(ranks: Mapping[str, int], gpu_id: int) -> Any:
    """`ParallelState` of 0.5.15 to 0.5.21, without data or context parallelism."""
    from sglang.srt.distributed.parallel_state_wrapper import ParallelState

    values: dict[str, int | None] = {
        **ranks,
        "attn_tp_rank": ranks["tp_rank"],
        "attn_tp_size": ranks["tp_size"],
        "dp_rank": None,
        "moe_dp_rank": None,
        "gpu_id": gpu_id,
    }
    for field in dataclasses.fields(ParallelState):
        values.setdefault(field.name, 0 if field.name.endswith("_rank") else 1)
    names = {field.name for field in dataclasses.fields(ParallelState)}
    return ParallelState(**{name: value for name, value in values.items() if name in names})


def _resolved(server_args: Any, name: str) -> Any:
    """An argument after SGLang has filled in its defaults, which from 0.5.20 are kept beside the raw ones."""
    try:
        from sglang.srt.arg_groups.overrides import resolving_view
    except ImportError:
        return getattr(server_args, name)
    return getattr(resolving_view(server_args), name)
