"""What a user can set for the `sglang` adapter."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from eagle_target.plugins.options import PluginOptions

DEFAULT_MAX_TOTAL_TOKENS = 16384

# Set from fields of their own, or decided by how the adapter captures.
OWN_ARGUMENTS = frozenset({"model_path", "skip_tokenizer_init", "enable_return_hidden_states"})


class SGLangOptions(PluginOptions):
    """Options of the `sglang` adapter."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="dtype of the weights; auto takes the checkpoint's."
    )
    device: str | None = Field(
        default=None, description="Device type SGLang runs on; by default cuda where there is one, else cpu."
    )
    tp_size: int = Field(default=1, ge=1, description="Tensor parallel ranks, a process and a device each.")
    base_gpu_id: int = Field(default=0, ge=0, description="Device of rank 0; the other ranks take those after it.")
    in_process: bool | None = Field(
        default=None,
        description="Run the engine in this process, which can hold one, or in its own; by default in this "
        "one where tp_size is 1.",
    )
    capture: Literal["hook", "official"] = Field(
        default="hook",
        description="How hidden states are taken: a hook before SGLang's logits processor, or SGLang's own "
        "return_aux_hidden_state_layer_ids (0.5.23 and newer; not the last layer).",
    )
    self_check: bool = Field(
        default=True, description="Compare a short prompt with the checkpoint's transformers modules at start."
    )
    max_total_tokens: int = Field(
        default=DEFAULT_MAX_TOTAL_TOKENS,
        gt=0,
        description="Tokens the KV pool holds: the longest sequence, and the most one forward takes.",
    )
    max_running_requests: int = Field(default=64, gt=0, description="Sequences that one forward takes.")
    mem_fraction_static: float | None = Field(
        default=None, gt=0, lt=1, description="Share of the memory for weights and KV pool; by default SGLang's."
    )
    attention_backend: str | None = Field(
        default=None, description="SGLang's attention backend; by default SGLang's choice, on a CPU torch_native."
    )
    context_length: int | None = Field(
        default=None, gt=0, description="Longest sequence of the model; by default what its config says."
    )
    quantization: str | None = Field(default=None, description="SGLang's quantisation, e.g. fp8, awq, gptq_marlin.")
    page_size: int | None = Field(default=None, gt=0, description="Tokens of a page of the KV pool.")
    load_format: str | None = Field(default=None, description="How SGLang reads the weights, e.g. safetensors, gguf.")
    revision: str | None = Field(default=None, description="Branch, tag or commit of a hub model.")
    trust_remote_code: bool = Field(default=False, description="Run model code that comes with the checkpoint.")
    log_level: str = Field(default="warning", description="SGLang's log level.")
    server_args: dict[str, Any] = Field(
        default_factory=dict, description="Further arguments of SGLang's ServerArgs, by name; they win over ours."
    )

    @model_validator(mode="after")
    def _check(self) -> SGLangOptions:
        own = sorted((OWN_ARGUMENTS | set(type(self).model_fields)) & set(self.server_args))
        if own:
            raise ValueError(f"server_args has {', '.join(own)}, which the adapter sets itself or has as an option")
        if self.in_process and self.tp_size > 1:
            raise ValueError(f"in_process=true takes one rank, got tp_size={self.tp_size}: leave in_process out")
        return self

    @property
    def runs_in_process(self) -> bool:
        """Whether the engine shares the caller's process."""
        return self.tp_size == 1 if self.in_process is None else self.in_process
