"""Tensors of another process, on the CPU and on a GPU (CUDA IPC)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from eagle_target_shm import client
from eagle_target_shm.client import open_channel

from eagle_target.contract.sinks import PackedTensors
from eagle_target.errors import ConnectError, TransferTimeout
from eagle_target.testing.comparison import assert_same_bits
from eagle_target.testing.transport_harness import MemoryBody
from tests.server.cases import wait_until
from tests.transports.shm_peer import Peer, peer, tensors_of

if TYPE_CHECKING:
    from eagle_target_shm.client import ShmClientChannel

DEVICES = ["cpu", pytest.param("cuda:0", marks=pytest.mark.gpu)]
ROUNDS = 20


def fetch(running: Peer, channel: ShmClientChannel, seed: int) -> PackedTensors:
    received = PackedTensors()
    assert channel.receive(MemoryBody(*running.ask("send", seed)), received) == {"seed": str(seed)}
    return received


@pytest.mark.parametrize("device", DEVICES)
def test_tensors_of_another_process(device: str) -> None:
    with peer(device, max_bytes=64 << 20, cuda_bytes=64 << 20) as running:
        channel = open_channel(running.ask("offer"), running)
        for seed in range(ROUNDS):
            received = fetch(running, channel, seed)
            assert_same_bits(received, tensors_of(seed))
            assert received["large"].device == torch.device(device)
        held = [fetch(running, channel, seed) for seed in range(3)]
        for seed, each in enumerate(held):
            assert_same_bits(each, tensors_of(seed))
        received.clear()
        held.clear()
        del each
        wait_until(lambda: running.ask("used") == 0, "the memory that was let go of")
        channel.close()


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_read_on_a_stream_is_not_written_over(device: str) -> None:
    with peer(device, max_bytes=32 << 20, cuda_bytes=32 << 20) as running:
        channel = open_channel(running.ask("offer"), running)
        copies = []
        for seed in range(ROUNDS):
            received = fetch(running, channel, seed)
            copies.append(received["large"].to("cpu", copy=True) if device == "cpu" else received["large"].clone())
            received.clear()
        for seed, copy in enumerate(copies):
            assert_same_bits({"large": copy}, {"large": tensors_of(seed)["large"]})
        channel.close()


@pytest.mark.parametrize("device", DEVICES)
def test_a_full_channel_of_another_process(device: str) -> None:
    with peer(device, max_bytes=16 << 20, cuda_bytes=16 << 20, send_timeout=0.2) as running:
        channel = open_channel(running.ask("offer"), running)
        held = [fetch(running, channel, 0)]
        with pytest.raises(TransferTimeout, match="max_bytes"):
            held += [fetch(running, channel, seed) for seed in range(1, 4)]
        assert_same_bits(held[0], tensors_of(0))
        held.clear()
        assert_same_bits(fetch(running, channel, 5), tensors_of(5))
        channel.close()


@pytest.mark.parametrize("device", DEVICES)
def test_another_process_that_is_killed(device: str) -> None:
    with peer(device, max_bytes=64 << 20, cuda_bytes=64 << 20) as running:
        channel = open_channel(running.ask("offer"), running)
        ticket = running.ask("send", 7)
        running.kill()
        assert channel.broken
        received = PackedTensors()
        if device == "cpu":
            channel.receive(MemoryBody(*ticket), received)
            assert_same_bits(received, tensors_of(7))
        else:
            # A device's memory ends with the process that made it.
            with pytest.raises(ConnectError):
                channel.receive(MemoryBody(*ticket), received)
        channel.close()


@pytest.mark.gpu
def test_a_gpu_that_is_not_seen_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with peer("cuda:0", cuda_bytes=1 << 20) as running:
        monkeypatch.setattr("eagle_target_shm.cuda.device_name", lambda _: "GPU-of-another-machine")
        with pytest.raises(ConnectError, match="not among the"):
            open_channel(running.ask("offer"), running)
        monkeypatch.undo()
        client.open_channel(running.ask("offer"), running).close()
