"""Builds targets from settings: a runner, a co-located target, or whatever a client's settings name."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from eagle_target.errors import AdapterError, ConfigError, EagleTargetError
from eagle_target.plugins.options import build_model
from eagle_target.plugins.registry import load_plugins, unusable_reason

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from eagle_target.backend import Eagle3TargetBackend
    from eagle_target.colocated import RunnerEagle3TargetModel
    from eagle_target.config import ClientConfig
    from eagle_target.contract.runner import TargetRunner


def load_runner(
    engine: str, model: str, options: Mapping[str, Any], aux_layer_ids: Sequence[int] | None = None
) -> TargetRunner:
    """Load a target under an engine.

    Args:
        engine: an adapter's name. model: a path or a hub id. options: the adapter's.
        aux_layer_ids: layers that will be captured; None for the default. `set_aux_layers` is still to be called.

    Raises:
        PluginError: no such adapter. ConfigError: wrong options. AdapterError: the engine cannot run or refused.
    """
    adapter = load_plugins().adapters.get(engine)
    checked = build_model(adapter.options_model, options, f"options of engine {engine!r}")
    reason = unusable_reason(adapter)
    if reason is not None:
        raise AdapterError(reason)
    try:
        runner = adapter.load(model, checked, aux_layer_ids)
    except EagleTargetError:
        raise
    except Exception as error:
        raise AdapterError(f"engine {engine!r} could not load {model!r}: {type(error).__name__}: {error}") from error
    from eagle_target.contract.runner import TargetRunner  # torch is loaded by now

    if not isinstance(runner, TargetRunner):
        raise AdapterError(
            f"engine {engine!r} loaded a {type(runner).__name__}, which is no TargetRunner: make it a subclass"
        )
    return runner


def load_target(
    engine: str,
    model: str,
    *,
    aux_layer_ids: Sequence[int] | None = None,
    engine_options: Mapping[str, Any] | None = None,
    **target_options: Any,
) -> RunnerEagle3TargetModel:
    """Load a target into this process; `target_options` are those of `RunnerEagle3TargetModel`."""
    from eagle_target.colocated import RunnerEagle3TargetModel

    runner = load_runner(engine, model, engine_options or {}, aux_layer_ids)
    try:
        return RunnerEagle3TargetModel(runner, aux_layer_ids, **target_options)
    except BaseException:
        runner.close()
        raise


def open_target(config: ClientConfig) -> Eagle3TargetBackend:
    """Open what a client's settings name, with its vocabulary mapping set.

    Raises:
        ConfigError: neither servers nor a model, or both.
    """
    if bool(config.urls) == bool(config.model):
        raise ConfigError(
            f"give either urls of servers or a model for this process, got urls={list(config.urls)}, "
            f"model={config.model!r}"
        )
    if not config.model:
        from eagle_target.client.remote import RemoteEagle3TargetModel

        return RemoteEagle3TargetModel.from_config(config)
    return _load_colocated(config, config.model)


def _load_colocated(config: ClientConfig, model: str) -> RunnerEagle3TargetModel:
    import torch

    from eagle_target.contract.vocab_mapping import VocabMapping

    if config.transport not in ("auto", "inprocess"):
        raise ConfigError(f"a target in this process has transport 'inprocess', got {config.transport!r}")
    target = load_target(
        config.engine,
        model,
        aux_layer_ids=config.aux_layer_ids,
        engine_options=config.engine_options,
        # Nothing travels, and the head is here.
        encoding="probs" if config.encoding == "auto" else config.encoding,
        rows=config.rows,
        probs_dtype=getattr(torch, config.probs_dtype),
        device=config.device,
    )
    with ExitStack() as undone:
        undone.callback(target.close)
        if config.vocab_mapping is not None:
            target.set_vocab_mapping(VocabMapping.from_file(config.vocab_mapping))
        undone.pop_all()
    return target
