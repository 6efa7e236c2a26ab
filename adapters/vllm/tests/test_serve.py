"""`eagle-target serve --engine vllm` in a process of its own, its client in this one."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import psutil
import pytest

from eagle_target.client.remote import RemoteEagle3TargetModel
from eagle_target.errors import EngineDead
from eagle_target.testing.adapter_oracle import HFOracle, check_batches, padded_input
from eagle_target.testing.server import server_process
from eagle_target.testing.tiny import shuffled_mapping

from .models import save_model

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from eagle_target.testing.server import ServerProcess

AUX = (0, 3, 7)
ODD_VOCAB = 2011


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama-odd-vocabulary", tmp_path_factory.mktemp("odd"))


@pytest.fixture(scope="module")
def server(checkpoint: Path) -> Iterator[ServerProcess]:
    arguments = ["--engine", "vllm", "--model", str(checkpoint), "--aux-layer-ids", "0,3,7"]
    arguments += ["--max-restarts", "1", "-o", "tensor_parallel_size=2", "-o", "capture=connector"]
    arguments += ["-o", "kv_cache_memory_bytes=134217728"]
    # Traced and fixed as a compiled model is; inductor's minutes are left to test_connector.
    with server_process(arguments, environment={"VLLM_CPU_CI_ENV": "1"}, ready_timeout=180.0) as running:
        yield running


def train(url: str, oracle: HFOracle, seed: int, then: Callable[[], object] = lambda: None) -> None:
    """Take four batches and compare them; something happens after the first."""
    mapping = shuffled_mapping(ODD_VOCAB, 100 + seed, seed=seed)
    with RemoteEagle3TargetModel.from_urls([url], timeout=180.0) as client:
        client.set_vocab_mapping(mapping)
        inputs = [padded_input([40, 3, 300], ODD_VOCAB, seed=10 * seed + step) for step in range(4)]
        check_batches(
            client.prefetch([given.arguments() for given in inputs], depth=2),
            inputs,
            oracle,
            aux_layer_ids=AUX,
            selected_token_ids=mapping.selected_token_ids.tolist(),
            tolerance=1e-4,
            after_first=then,
        )


def kill_a_worker(server: ServerProcess) -> list[psutil.Process]:
    """SIGKILL for the largest process of the engine; returns all of them."""
    children = psutil.Process(server.process.pid).children(recursive=True)
    # Python's own, one for the whole life of the server's process.
    engine = [child for child in children if "resource_tracker" not in " ".join(child.cmdline())]
    max(engine, key=lambda child: child.memory_info().rss).kill()
    return engine


def test_supervision_of_two_clients_is_transformers(server: ServerProcess, checkpoint: Path) -> None:
    oracle = HFOracle(checkpoint)
    with ThreadPoolExecutor(2) as threads:
        for result in [threads.submit(train, server.url, oracle, seed) for seed in (1, 2)]:
            result.result(120.0)


def test_y_a_worker_killed_under_a_prefetch_costs_a_pause(server: ServerProcess, checkpoint: Path) -> None:
    killed: list[psutil.Process] = []
    train(server.url, HFOracle(checkpoint), 3, lambda: killed.extend(kill_a_worker(server)))
    assert killed
    _, alive = psutil.wait_procs(killed, timeout=30.0)
    assert not alive


def test_z_a_server_without_restarts_left_ends_with_all_its_processes(server: ServerProcess) -> None:
    children = kill_a_worker(server)

    # Nobody asks it for anything.
    assert server.process.wait(60.0) == EngineDead.exit_status
    _, alive = psutil.wait_procs(children, timeout=30.0)
    assert not alive
