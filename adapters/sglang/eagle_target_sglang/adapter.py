"""The adapter's face to eagle-target: its name, its options and how it loads a target."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from eagle_target.errors import ConfigError
from eagle_target.plugins.adapter import Adapter
from eagle_target_sglang.options import SGLangOptions
from eagle_target_sglang.versions import installed_version

if TYPE_CHECKING:
    from collections.abc import Sequence

    from eagle_target.contract.runner import TargetRunner
    from eagle_target.plugins.options import PluginOptions

# Formats of transformers' own files.
_CHECKED_FORMATS = (None, "auto", "safetensors", "pt")


class SGLangAdapter(Adapter):
    """Runs the models of SGLang that can capture layers."""

    name: ClassVar[str] = "sglang"
    options_model: ClassVar[type[PluginOptions]] = SGLangOptions

    @classmethod
    def engine_version(cls) -> str | None:
        """Version of the installed SGLang; None where it is not installed."""
        return installed_version("sglang")

    @classmethod
    def unusable_reason(cls) -> str | None:
        """Why SGLang cannot run here, with the remedy; None where it can."""
        if cls.engine_version():
            return None
        return 'sglang is not installed: pip install "eagle-target-sglang[sglang]"'

    @classmethod
    def load(cls, model: str, options: PluginOptions, aux_layer_ids: Sequence[int] | None = None) -> TargetRunner:
        """Load a path or a hub id, in this process or in processes of its own.

        Raises:
            ConfigError: options of another adapter, or an argument that the installed SGLang has not.
            AdapterError: the checkpoint is not whole, SGLang refused, a rank ended, or the self-check failed.
        """
        # Layers can be changed before any forward: nothing of them is fixed at load.
        del aux_layer_ids
        if not isinstance(options, SGLangOptions):
            raise ConfigError(f"adapter 'sglang' takes SGLangOptions, got {type(options).__name__}")
        is_checked = _is_checked(model, options)
        if options.runs_in_process:
            from eagle_target_sglang.loading import load_in_process

            runner: TargetRunner = load_in_process(model, options)
        else:
            from eagle_target_sglang.isolated import load_isolated

            runner = load_isolated(model, options)
        if not is_checked:
            # Files of the Hub are here by now.
            try:
                _is_checked(model, options)
            except BaseException:
                runner.close()
                raise
        return runner


def _is_checked(model: str, options: SGLangOptions) -> bool:
    """Whether the checkpoint was found to be whole; False where it is not here yet.

    Raises:
        AdapterError: it is not whole.
    """
    if not options.self_check or options.load_format not in _CHECKED_FORMATS:
        return True
    from eagle_target.checkpoints.loading import check_checkpoint

    return check_checkpoint(
        model,
        revision=options.revision,
        trust_remote_code=options.trust_remote_code,
        remedy="Set self_check=false if SGLang knows better",
    )
