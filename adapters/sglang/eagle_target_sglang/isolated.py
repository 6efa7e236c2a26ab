"""A target whose engine runs in processes of its own, one a rank."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from typing_extensions import override

from eagle_target.contract.runner import DraftHead, TargetForward, TargetRunner
from eagle_target.contract.target import TargetInfo, validate_aux_layer_ids
from eagle_target.errors import AdapterError
from eagle_target.protocol.messages import encode_mapping, encode_request
from eagle_target_sglang.batching import PoolLimits
from eagle_target_sglang.loading import free_port
from eagle_target_sglang.ranks import RankGroup

if TYPE_CHECKING:
    from collections.abc import Sequence

    from eagle_target.contract.request import SupervisionRequest
    from eagle_target.contract.sinks import Sink
    from eagle_target_sglang.options import SGLangOptions


def load_isolated(model: str, options: SGLangOptions) -> IsolatedTargetRunner:
    """Start the ranks and have each load its part of the target.

    Raises:
        AdapterError: a rank refused or ended; none is left behind.
    """
    group = RankGroup(options.tp_size)
    try:
        port = free_port()
        settings = options.model_dump(mode="json")
        header, _ = group.call(
            [
                {"command": "load", "model": model, "options": settings, "rank": rank, "port": port}
                for rank in range(options.tp_size)
            ]
        )
        return IsolatedTargetRunner(group, header)
    except BaseException:
        group.close()
        raise


class IsolatedTargetRunner(TargetRunner):
    """Hands everything to the ranks; see `TargetRunner.supervise`. Tensors come back on the CPU, in shared memory.

    Args:
        group: the ranks, loaded. loaded: what rank 0 said of the target.
    """

    def __init__(self, group: RankGroup, loaded: dict[str, Any]) -> None:
        self._group = group
        # Where the tensors are, which is not where the ranks compute.
        self._info = TargetInfo(**{**loaded["info"], "device": "cpu"})
        self.limits = PoolLimits(**loaded["limits"])
        self._has_layers = False

    @property
    def info(self) -> TargetInfo:
        """See `TargetRunner.info`."""
        return self._info

    @property
    def rank_pids(self) -> list[int]:
        """Process ids of the ranks."""
        return self._group.pids

    def set_aux_layers(self, aux_layer_ids: Sequence[int]) -> None:
        """See `TargetRunner.set_aux_layers`."""
        layers = validate_aux_layer_ids(aux_layer_ids, self._info.num_layers)
        self._group.call({"command": "set_aux_layers", "aux_layer_ids": layers})
        self._has_layers = True

    def forward_eagle3(self, input_ids: torch.Tensor, seq_lens: Sequence[int]) -> TargetForward:
        """See `TargetRunner.forward_eagle3`.

        Raises:
            AdapterError: no layers were set, a sequence is over a limit, a rank died, or the engine failed.
        """
        self._check(seq_lens)
        _, given = self._group.call({"command": "forward", "seq_lens": list(seq_lens)}, {"input_ids": input_ids})
        return TargetForward(aux_hidden_states=given["aux"], last_hidden_states=given["last"])

    @override
    def supervise(self, requests: Sequence[SupervisionRequest], sinks: Sequence[Sink]) -> dict[str, float]:
        """See `TargetRunner.supervise`: one forward for all requests, projected where the head is.

        Raises:
            AdapterError: as for `forward_eagle3`.
        """
        self._check([length for request in requests for length in request.seq_lens])
        bodies: dict[str, torch.Tensor] = {}
        for index, request in enumerate(requests):
            bodies[str(index)] = _as_tensor(encode_request(request))
            if request.mapping is not None and request.mapping.sha256 not in bodies:
                bodies[request.mapping.sha256] = _as_tensor(encode_mapping(request.mapping))
        header, given = self._group.call({"command": "supervise", "requests": len(requests)}, bodies)
        for name, tensor in given.items():
            number, _, plain_name = name.partition(".")
            sinks[int(number)].put(plain_name, tensor)
        timings: dict[str, float] = header["timings"]
        return timings

    def compute_logits(self, last_hidden_states: torch.Tensor) -> torch.Tensor:
        """See `TargetRunner.compute_logits`; float32."""
        _, given = self._group.call({"command": "logits"}, {"hidden": last_hidden_states})
        return given["logits"]

    @override
    def token_capacity(self) -> int | None:
        """See `TargetRunner.token_capacity`: one prefill fills the KV pool at most; more would be several."""
        return self.limits.tokens

    @override
    def check_alive(self) -> None:
        """See `TargetRunner.check_alive`."""
        self._group.check_alive()

    def input_embedding_weight(self) -> torch.Tensor:
        """See `TargetRunner.input_embedding_weight`; a copy."""
        _, given = self._group.call({"command": "embedding"})
        return given["weight"]

    def draft_head(self, token_ids: torch.Tensor) -> DraftHead | None:
        """See `TargetRunner.draft_head`; a copy of the rows."""
        header, given = self._group.call({"command": "draft_head"}, {"token_ids": token_ids})
        if not header["plain"]:
            return None
        return DraftHead(weight=given["weight"], logit_scale=header["logit_scale"], soft_cap=header["soft_cap"])

    def close(self) -> None:
        """End the ranks."""
        self._group.close()

    def _check(self, seq_lens: Sequence[int]) -> None:
        """Refuse here what every rank would refuse."""
        if not self._has_layers:
            raise AdapterError("no layers to capture: call set_aux_layers first")
        self.limits.check(seq_lens)


def _as_tensor(body: list[memoryview]) -> torch.Tensor:
    return torch.frombuffer(bytearray(b"".join(body)), dtype=torch.uint8)
