"""What an adapter plugin is: a name, options and a way to load a target."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

from eagle_target.plugins.options import PluginOptions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from eagle_target.contract.runner import TargetRunner


class Adapter(ABC):
    """Runs targets under one engine. The class is cheap: the engine is imported in `load`.

    name: what `--engine` takes. options_model: the engine's options, a `PluginOptions` with described fields.
    """

    name: ClassVar[str]
    options_model: ClassVar[type[PluginOptions]] = PluginOptions

    @classmethod
    @abstractmethod
    def engine_version(cls) -> str | None:
        """Version of the installed engine without importing it; None where it is not installed."""

    @classmethod
    def unusable_reason(cls) -> str | None:
        """Why the engine cannot run here, with the remedy; None where it can."""
        return None if cls.engine_version() else f"the engine of adapter {cls.name!r} is not installed"

    @classmethod
    @abstractmethod
    def load(cls, model: str, options: PluginOptions, aux_layer_ids: Sequence[int] | None = None) -> TargetRunner:
        """Load a target.

        Args:
            model: a path or a hub id.
            options: an instance of `options_model`.
            aux_layer_ids: the layers `set_aux_layers` will be called with, for an engine that compiles them in; None
                for the default of `layers.default_eagle3_aux_layer_ids`. Other engines leave them to `set_aux_layers`.

        Raises:
            AdapterError: the engine refused, with its message kept.
            ContractError: layers that are to be compiled in and that the target has not.
        """
