"""Which decoder layers are captured."""

from __future__ import annotations

from typing import TYPE_CHECKING

from eagle_target.errors import ContractError

if TYPE_CHECKING:
    from collections.abc import Sequence

NUM_AUX_LAYERS = 3


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
