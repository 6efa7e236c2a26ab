"""What a user can set for the `hf` adapter."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from eagle_target.plugins.options import PluginOptions

DEFAULT_MAX_BATCH_TOKENS = 16384


class HFOptions(PluginOptions):
    """Options of the `hf` adapter."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="dtype of the weights; auto takes the checkpoint's."
    )
    device: str | None = Field(
        default=None, description="Device of the target, e.g. cuda:1; by default cuda where there is one, else cpu."
    )
    device_map: str | dict[str, int | str] | None = Field(
        default=None, description="Spread the target over devices as accelerate does, e.g. auto; instead of device."
    )
    attn_implementation: str | None = Field(
        default=None, description="sdpa, eager, flash_attention_2, ...; by default the model's own choice."
    )
    trust_remote_code: bool = Field(default=False, description="Run model code that comes with the checkpoint.")
    revision: str | None = Field(default=None, description="Branch, tag or commit of a hub model.")
    local_files_only: bool = Field(default=False, description="Never ask the hub, use what is on this machine.")
    max_batch_tokens: int = Field(
        default=DEFAULT_MAX_BATCH_TOKENS,
        gt=0,
        description="Tokens of one forward of the target, pads included; a longer sequence runs alone.",
    )

    @model_validator(mode="after")
    def _check_placement(self) -> HFOptions:
        if self.device is not None and self.device_map is not None:
            raise ValueError("give device or device_map, not both")
        return self
