"""All that a plugin needs: what a third party may import, beside `eagle_target.testing` for its tests.

Names are loaded on first use, so that importing a plugin imports no torch.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from eagle_target.lazy import load_name

if TYPE_CHECKING:
    from eagle_target.checkpoints.digest import checkpoint_digest, digest_after_loading, hub_commit
    from eagle_target.contract.request import SupervisionRequest
    from eagle_target.contract.runner import DraftHead, TargetForward, TargetRunner
    from eagle_target.contract.sinks import PackedTensors, RowStore, Sink
    from eagle_target.contract.target import TargetInfo, validate_aux_layer_ids
    from eagle_target.contract.vocab_mapping import VocabMapping
    from eagle_target.errors import (
        AdapterError,
        ConfigError,
        ConnectError,
        ContractError,
        EngineDead,
        ProtocolError,
        TransferTimeout,
        TransportError,
    )
    from eagle_target.plugins.adapter import Adapter
    from eagle_target.plugins.engine_errors import engine_call
    from eagle_target.plugins.hookspecs import hookimpl
    from eagle_target.plugins.options import PluginOptions
    from eagle_target.plugins.transport import (
        ClientChannel,
        ControlPlane,
        IncomingBody,
        Reply,
        ServerChannel,
        ServerEndpoint,
        Transport,
    )
    from eagle_target.protocol.tensors import (
        PREFIX_BYTES,
        decode_header,
        decode_tensors,
        encode_tensors,
        header_length,
        writable_bytes,
    )

_HOMES = {
    "Adapter": "plugins.adapter",
    "AdapterError": "errors",
    "ClientChannel": "plugins.transport",
    "ConfigError": "errors",
    "ConnectError": "errors",
    "ContractError": "errors",
    "ControlPlane": "plugins.transport",
    "DraftHead": "contract.runner",
    "EngineDead": "errors",
    "IncomingBody": "plugins.transport",
    "PREFIX_BYTES": "protocol.tensors",
    "PackedTensors": "contract.sinks",
    "PluginOptions": "plugins.options",
    "ProtocolError": "errors",
    "Reply": "plugins.transport",
    "RowStore": "contract.sinks",
    "ServerChannel": "plugins.transport",
    "ServerEndpoint": "plugins.transport",
    "Sink": "contract.sinks",
    "SupervisionRequest": "contract.request",
    "TargetForward": "contract.runner",
    "TargetInfo": "contract.target",
    "TargetRunner": "contract.runner",
    "TransferTimeout": "errors",
    "Transport": "plugins.transport",
    "TransportError": "errors",
    "VocabMapping": "contract.vocab_mapping",
    "checkpoint_digest": "checkpoints.digest",
    "decode_header": "protocol.tensors",
    "decode_tensors": "protocol.tensors",
    "digest_after_loading": "checkpoints.digest",
    "encode_tensors": "protocol.tensors",
    "engine_call": "plugins.engine_errors",
    "header_length": "protocol.tensors",
    "hookimpl": "plugins.hookspecs",
    "hub_commit": "checkpoints.digest",
    "validate_aux_layer_ids": "contract.target",
    "writable_bytes": "protocol.tensors",
}

__all__ = [
    "Adapter",
    "AdapterError",
    "ClientChannel",
    "ConfigError",
    "ConnectError",
    "ContractError",
    "ControlPlane",
    "DraftHead",
    "EngineDead",
    "IncomingBody",
    "PREFIX_BYTES",
    "PackedTensors",
    "PluginOptions",
    "ProtocolError",
    "Reply",
    "RowStore",
    "ServerChannel",
    "ServerEndpoint",
    "Sink",
    "SupervisionRequest",
    "TargetForward",
    "TargetInfo",
    "TargetRunner",
    "TransferTimeout",
    "Transport",
    "TransportError",
    "VocabMapping",
    "checkpoint_digest",
    "decode_header",
    "decode_tensors",
    "digest_after_loading",
    "encode_tensors",
    "engine_call",
    "header_length",
    "hookimpl",
    "hub_commit",
    "validate_aux_layer_ids",
    "writable_bytes",
]

__getattr__ = partial(load_name, __name__, _HOMES, root="eagle_target")
