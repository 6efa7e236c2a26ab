"""Tables that a model computes when it is built, in code that came with the checkpoint.

transformers 5 builds a model without memory. Its own classes compute their tables once more after loading; those of a
checkpoint's code are left with whatever was in memory.
"""

from __future__ import annotations

from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch

from eagle_target.errors import AdapterError

if TYPE_CHECKING:
    from collections.abc import Iterator


def restore_tables(model: Any) -> None:
    """Give buffers that are in no checkpoint the values that the model's own constructor computes.

    Raises:
        AdapterError: the constructor cannot be run again.
    """
    stored = set(model.state_dict())
    tables = {name: buffer for name, buffer in model.named_buffers() if name not in stored}
    if not tables:
        return
    name = type(model).__name__
    if find_spec("accelerate") is None:
        raise AdapterError(f"the code of {name} has tables of its own: pip install 'eagle-target-hf[device-map]'")
    from accelerate import init_empty_weights

    try:
        with _default_dtype(model.dtype), init_empty_weights(include_buffers=False):
            built = dict(type(model)(model.config).named_buffers())
        for key, buffer in tables.items():
            buffer.copy_(built[key])
    except Exception as error:
        raise AdapterError(f"the tables that {name} computes cannot be computed again: {error}") from error


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
