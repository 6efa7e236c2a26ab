"""What a user can set for the `vllm` adapter."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from eagle_target.plugins.options import PluginOptions

# What the adapter decides itself, and which option to use instead.
RESERVED_ENGINE_ARGS = {
    "model": "--model",
    "worker_extension_cls": "nothing: it is how the adapter captures",
    "distributed_executor_backend": "-o process and -o tensor_parallel_size",
    "kv_transfer_config": "-o capture=connector",
    "speculative_config": "-o capture=connector",
    "data_parallel_size": "several servers, one a replica: a client takes the URLs of all of them",
    "pipeline_parallel_size": "-o tensor_parallel_size",
}


class VLLMOptions(PluginOptions):
    """Options of the `vllm` adapter."""

    capture: Literal["worker", "connector"] = Field(
        default="worker",
        description="How hidden states are taken: worker reads them from vLLM's model runner, in memory; connector "
        "uses vLLM's extract_hidden_states, with prefix caching.",
    )
    process: Literal["inline", "separate"] = Field(
        default="inline",
        description="Where the engine runs: inline in this process, with its worker where there is one only, or "
        "separate in its own.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="dtype of the weights; auto takes the checkpoint's, float32 included."
    )
    tensor_parallel_size: int = Field(default=1, gt=0, description="Workers that share each layer.")
    max_model_len: int | None = Field(
        default=None, gt=1, description="Context of the target in tokens; the longest sequence is one shorter."
    )
    max_num_batched_tokens: int | None = Field(
        default=None, gt=0, description="Tokens of one step of the engine; longer prompts are cut into chunks."
    )
    max_num_seqs: int | None = Field(default=None, gt=0, description="Sequences of one step of the engine.")
    gpu_memory_utilization: float | None = Field(
        default=None, gt=0, le=1, description="Share of the device's memory for weights and KV cache."
    )
    kv_cache_memory_bytes: int | None = Field(
        default=None, gt=0, description="Bytes of KV cache; on a CPU 1 GiB by default, for one context it must hold."
    )
    quantization: str | None = Field(default=None, description="How the weights are quantised, e.g. fp8, awq, gptq.")
    load_format: str | None = Field(default=None, description="Format of the weights, e.g. safetensors, dummy, gguf.")
    enforce_eager: bool | None = Field(
        default=None,
        description="Whether not to compile: starts sooner, runs slower, and layers can be changed after the start.",
    )
    enable_prefix_caching: bool | None = Field(
        default=None, description="Whether to reuse the KV cache of common prefixes; only with capture=connector."
    )
    self_check: bool = Field(
        default=True,
        description="Compare names and shapes of the checkpoint's weights with transformers' model before loading.",
    )
    trust_remote_code: bool = Field(default=False, description="Run model code that comes with the checkpoint.")
    revision: str | None = Field(default=None, description="Branch, tag or commit of a hub model.")
    hf_overrides: dict[str, Any] | None = Field(
        default=None, description='Changes to the config, e.g. {"head_dtype": "float32"} for an fp32 head.'
    )
    engine_args: dict[str, Any] = Field(
        default_factory=dict, description="Any other argument of vLLM's engine, as JSON; vLLM checks it."
    )

    @model_validator(mode="after")
    def _check_capture(self) -> VLLMOptions:
        if self.capture == "worker" and self.enable_prefix_caching:
            raise ValueError("capture=worker needs every token computed: use capture=connector for prefix caching")
        return self

    @model_validator(mode="after")
    def _check_engine_args(self) -> VLLMOptions:
        for name in self.engine_args:
            if name in RESERVED_ENGINE_ARGS:
                raise ValueError(f"engine_args may not have {name!r}: use {RESERVED_ENGINE_ARGS[name]}")
            if name in type(self).model_fields:
                raise ValueError(f"{name!r} is an option of its own: give it beside engine_args")
        return self
