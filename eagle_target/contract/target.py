"""Facts about a served target: what it is, and which of its layers are captured."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field

from eagle_target.errors import ContractError

if TYPE_CHECKING:
    from collections.abc import Sequence

NUM_AUX_LAYERS = 3


class TargetInfo(BaseModel):
    """Facts about a loaded target; plain data, no tensor and no torch."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(description="Path or hub id the target was loaded from.")
    revision: str | None = Field(default=None, description="Hub revision, where one was asked for.")
    weights: str | None = Field(
        default=None,
        description="Digest of weights and config, see `checkpoints.digest`; None where not known.",
    )
    num_layers: int = Field(description="Decoder layers.")
    hidden_size: int = Field(description="Width of the residual stream.")
    vocab_size: int = Field(description="Rows of the LM head that are real tokens.")
    dtype: str = Field(description="dtype of the hidden states, as torch spells it without `torch.`.")
    device: str = Field(description="Device that holds the hidden states.")
    engine: str = Field(description="Name of the adapter.")
    engine_version: str = Field(description="Version of the engine behind it.")
    max_seq_len: int | None = Field(default=None, description="Longest sequence in tokens, where there is a limit.")


class ServedTarget(BaseModel):
    """A target together with the layers that are captured from it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    info: TargetInfo
    aux_layer_ids: tuple[int, int, int]

    @property
    def fingerprint(self) -> str:
        """First 16 hex digits of the SHA-256 over everything that decides the supervision's values.

        Where the weights are known, the name they were found under does not count.
        """
        ignored = {"device", "max_seq_len"} | (set() if self.info.weights is None else {"model"})
        facts = self.info.model_dump(exclude=ignored, mode="json")
        text = repr((sorted(facts.items()), self.aux_layer_ids))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def differences(self, other: ServedTarget) -> list[str]:
        """Name what makes two servers' supervision different, one `field: ours != theirs` each."""
        mine: dict[str, object] = self.info.model_dump() | {"aux_layer_ids": self.aux_layer_ids}
        theirs: dict[str, object] = other.info.model_dump() | {"aux_layer_ids": other.aux_layer_ids}
        compared = ["weights", "revision", "num_layers", "hidden_size", "vocab_size", "dtype", "aux_layer_ids"]
        if self.info.weights is None or other.info.weights is None:
            compared.insert(0, "model")
        return [f"{name}: {mine[name]} != {theirs[name]}" for name in compared if mine[name] != theirs[name]]


def default_eagle3_aux_layer_ids(num_layers: int) -> tuple[int, int, int]:
    """Return the low, middle and high layer EAGLE-3 captures by default.

    `[1, n//2 - 1, n - 4]` for n layers; id `i` is the output of decoder layer `i`.
    The recipe is that of the EAGLE-3 repository and NeMo AutoModel.

    Raises:
        ContractError: the target is too shallow for three distinct layers.
    """
    candidates = (1, num_layers // 2 - 1, num_layers - 4)
    if len(set(candidates)) < NUM_AUX_LAYERS or min(candidates) < 0:
        raise ContractError(
            f"a target of {num_layers} layers is too shallow for the default aux_layer_ids {list(candidates)}: "
            "name three distinct layers, e.g. aux_layer_ids=[0, 1, 2]"
        )
    return candidates


def validate_aux_layer_ids(aux_layer_ids: Sequence[int] | None, num_layers: int) -> tuple[int, int, int]:
    """Return the three ids ascending, or the default for None.

    Raises:
        ContractError: not three, not distinct, or out of range.
    """
    if aux_layer_ids is None:
        return default_eagle3_aux_layer_ids(num_layers)
    ids = [int(layer) for layer in aux_layer_ids]
    if len(ids) != NUM_AUX_LAYERS or len(set(ids)) != NUM_AUX_LAYERS:
        raise ContractError(f"aux_layer_ids must be three distinct layers, got {ids}")
    for layer in ids:
        if not 0 <= layer < num_layers:
            raise ContractError(
                f"aux_layer_ids has {layer}, but the target has layers 0 to {num_layers - 1} "
                "(id i is the output of decoder layer i)"
            )
    low, middle, high = sorted(ids)
    return low, middle, high
