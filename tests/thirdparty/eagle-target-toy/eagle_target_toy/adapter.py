"""The adapter `toy`: its options and how it loads a target."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from eagle_target.plugins import Adapter, ConfigError, PluginOptions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from eagle_target.plugins import TargetRunner


class ToyOptions(PluginOptions):
    """Options of the `toy` adapter."""

    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="dtype of the weights; auto takes the checkpoint's."
    )
    max_seq_len: int | None = Field(
        default=None, gt=0, description="Longest sequence in tokens; by default what the checkpoint was made for."
    )


class ToyAdapter(Adapter):
    """Runs Llama checkpoints under the engine of this package."""

    name: ClassVar[str] = "toy"
    options_model: ClassVar[type[PluginOptions]] = ToyOptions

    @classmethod
    def engine_version(cls) -> str | None:
        """The engine comes with the plugin."""
        try:
            return version("eagle-target-toy")
        except PackageNotFoundError:
            return None

    @classmethod
    def load(cls, model: str, options: PluginOptions, aux_layer_ids: Sequence[int] | None = None) -> TargetRunner:
        """Load a folder with config.json and safetensors."""
        # `set_aux_layers` names them before the first forward.
        del aux_layer_ids
        from eagle_target_toy.runner import ToyRunner

        if not isinstance(options, ToyOptions):
            raise ConfigError(f"adapter 'toy' takes ToyOptions, got {type(options).__name__}")
        return ToyRunner.load(model, options)
