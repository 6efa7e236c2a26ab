"""The adapter's face to eagle-target: its name, its options and how it loads a target."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, ClassVar

from eagle_target.errors import ConfigError
from eagle_target.plugins.adapter import Adapter
from eagle_target_hf.options import HFOptions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from eagle_target.plugins.options import PluginOptions
    from eagle_target_hf.runner import HFTargetRunner


class HFAdapter(Adapter):
    """Runs any causal language model of Hugging Face transformers."""

    name: ClassVar[str] = "hf"
    options_model: ClassVar[type[PluginOptions]] = HFOptions

    @classmethod
    def engine_version(cls) -> str | None:
        """Version of the installed transformers; None where it is not installed."""
        try:
            return version("transformers")
        except PackageNotFoundError:
            return None

    @classmethod
    def unusable_reason(cls) -> str | None:
        """Why transformers cannot run here, with the remedy; None where it can."""
        return None if cls.engine_version() else "transformers is not installed: pip install eagle-target-hf"

    @classmethod
    def load(cls, model: str, options: PluginOptions, aux_layer_ids: Sequence[int] | None = None) -> HFTargetRunner:
        """Load a path or a hub id.

        Raises:
            ConfigError: options of another adapter.
            AdapterError: transformers refused, with its message kept.
        """
        # Captured by hooks of a forward: nothing of them is fixed at load.
        del aux_layer_ids
        if not isinstance(options, HFOptions):
            raise ConfigError(f"adapter 'hf' takes HFOptions, got {type(options).__name__}")
        from eagle_target.checkpoints.digest import checkpoint_digest, digest_after_loading, hub_commit
        from eagle_target_hf.loading import load_model
        from eagle_target_hf.runner import HFTargetRunner

        before = checkpoint_digest(model, revision=options.revision)
        return HFTargetRunner(
            load_model(model, options),
            max_batch_tokens=options.max_batch_tokens,
            name=model,
            revision=hub_commit(model, options.revision),
            weights=digest_after_loading(before, model, revision=options.revision),
        )
