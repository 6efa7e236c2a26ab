"""The plugin module and its pure parts: nothing here starts an engine."""

from __future__ import annotations

from pathlib import Path

import eagle_target_vllm
import pytest
import torch
from eagle_target_vllm import VLLMAdapter
from eagle_target_vllm.connector import NUM_STATES, state_ids
from eagle_target_vllm.memory import BlockSink, EngineBlock, Layout, Slot

from eagle_target.errors import ConfigError
from eagle_target.plugins.options import PluginOptions


def test_every_public_name_is_there() -> None:
    for name in eagle_target_vllm.__all__:
        assert getattr(eagle_target_vllm, name).__name__ == name
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = eagle_target_vllm.no_such_name


def test_without_vllm_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(VLLMAdapter, "engine_version", classmethod(lambda cls: None))

    reason = VLLMAdapter.unusable_reason()

    assert reason is not None
    assert reason.startswith("vllm is not installed: pip install 'eagle-target-vllm[cuda]'")


def test_options_of_another_adapter_are_refused() -> None:
    with pytest.raises(ConfigError, match="takes VLLMOptions, got PluginOptions"):
        VLLMAdapter.load("somewhere", PluginOptions())


@pytest.mark.parametrize(
    ("layers", "expected"),
    [((0, 3, 5), (1, 4, 6, 8)), ((0, 3, 7), (0, 1, 4, 8)), ((5, 6, 7), (0, 6, 7, 8)), ((0, 1, 7), (0, 1, 2, 8))],
)
def test_states_are_always_four_and_end_with_the_last_layers(
    layers: tuple[int, int, int], expected: tuple[int, ...]
) -> None:
    states = state_ids(layers, 8)

    assert states == expected
    assert len(states) == NUM_STATES
    assert {layer + 1 for layer in layers} <= set(states)


def test_a_block_is_the_same_memory_for_whoever_opens_it() -> None:
    layout = Layout()
    slots = [layout.add("a", (3, 5), torch.bfloat16), layout.add("b", (0, 4), torch.float32)]
    slots.append(layout.add("c", (7,), torch.int32))
    mine = EngineBlock.create(layout.size)
    theirs = EngineBlock.open_address(mine.address)
    mine.release()

    sink = BlockSink(theirs, [Slot.read(slot.plain()) for slot in slots])
    sink.put("a", torch.full((3, 5), 2.0, dtype=torch.bfloat16))
    sink.allocate("c", (7,), torch.int32).write(2, torch.arange(5))
    a, b, c = (mine.tensor(slot) for slot in slots)

    assert a.eq(2).all()
    assert b.shape == (0, 4)
    assert c.tolist() == [0, 0, 0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="was placed as"):
        sink.allocate("c", (8,), torch.int32)


def test_a_block_leaves_no_descriptor_and_outlives_its_owner() -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    block = EngineBlock.create(64)
    tensor = block.tensor(Slot("x", 0, (4,), torch.int64))
    block.release()
    block.release()
    del block

    tensor += 1

    assert tensor.tolist() == [1, 1, 1, 1]
    del tensor
    assert len(list(Path("/proc/self/fd").iterdir())) <= before
