"""The toy adapter passes the suite, and what it can do beyond."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from eagle_target_toy.adapter import ToyAdapter, ToyOptions

from eagle_target.plugins import AdapterError
from eagle_target.testing import (
    AdapterConformance,
    BatchInvariantAdapter,
    BFloat16Adapter,
    ServedAdapterConformance,
    save_tiny_target,
)

if TYPE_CHECKING:
    from pathlib import Path


class TestToyAdapter(AdapterConformance, BFloat16Adapter, BatchInvariantAdapter):
    adapter = ToyAdapter


class TestToyAdapterServed(ServedAdapterConformance):
    adapter = ToyAdapter


def test_scaled_rotary_embeddings_are_refused(tmp_path: Path) -> None:
    folder = save_tiny_target(tmp_path / "scaled", layers=3)
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "yarn", "factor": 2.0}
    (folder / "config.json").write_text(json.dumps(config))

    with pytest.raises(AdapterError, match="'yarn'"):
        ToyAdapter.load(str(folder), ToyOptions())


def test_limit_of_a_sequence_can_be_set(tmp_path: Path) -> None:
    folder = save_tiny_target(tmp_path / "tiny", layers=3)

    assert ToyAdapter.load(str(folder), ToyOptions(max_seq_len=7)).info.max_seq_len == 7
