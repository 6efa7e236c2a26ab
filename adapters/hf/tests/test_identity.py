"""A target is its weights: others are another target, wherever they come from and whenever they change."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from eagle_target_hf import HFAdapter, HFEagle3TargetModel, HFOptions, HFTargetRunner
from eagle_target_hf.loading import load_model

from eagle_target import RemoteEagle3TargetModel, VocabMapping
from eagle_target.errors import AdapterError, ContractError, EngineDead, ProtocolError, ServerError
from eagle_target.testing.server import loopback_server
from eagle_target.testing.tiny import save_tiny_target

from . import tiny

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from eagle_target.contract.batch import Eagle3TargetBatch
    from eagle_target.contract.runner import TargetForward

VOCAB = 211
IDS = torch.arange(3, 36)[None]


def save(path: Path, seed: int = 0) -> Path:
    return save_tiny_target(path, layers=8, seed=seed)


def runner_of(path: Path) -> HFTargetRunner:
    return HFAdapter.load(str(path), HFOptions(device="cpu"))


def remote(*urls: str, **options: Any) -> RemoteEagle3TargetModel:
    options = {"encoding": "probs", "transport": "wire", "max_retries": 1, "retry_timeout": 5.0, **options}
    return RemoteEagle3TargetModel.from_urls(urls, **options)


def batch_of(target: RemoteEagle3TargetModel) -> Eagle3TargetBatch:
    target.set_vocab_mapping(VocabMapping.identity(VOCAB))
    return target.generate_batch(IDS, torch.ones_like(IDS), torch.ones_like(IDS))


class DyingRunner(HFTargetRunner):
    """Its engine is gone at the second forward."""

    forwards = 0

    def forward_eagle3(self, input_ids: torch.Tensor, seq_lens: Sequence[int]) -> TargetForward:
        self.forwards += 1
        if self.forwards > 1:
            raise EngineDead("gone")
        return super().forward_eagle3(input_ids, seq_lens)


def test_copies_of_a_checkpoint_are_one_target(tmp_path: Path) -> None:
    first = save(tmp_path / "a")
    second = shutil.copytree(first, tmp_path / "b")
    with (
        loopback_server(lambda: runner_of(first)) as one,
        loopback_server(lambda: runner_of(second)) as other,
        remote(one.url, other.url) as target,
    ):
        assert one.engine.served.fingerprint == other.engine.served.fingerprint
        assert batch_of(target).aux_hidden_states.any()


def test_one_relative_path_with_other_weights_is_two_targets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def loading(seed: int) -> Callable[[], HFTargetRunner]:
        place = save(tmp_path / str(seed) / "target", seed).parent

        def load() -> HFTargetRunner:
            before = Path.cwd()
            os.chdir(place)
            try:
                return HFAdapter.load("./target", HFOptions(device="cpu"))
            finally:
                os.chdir(before)

        return load

    with (
        loopback_server(loading(0)) as one,
        loopback_server(loading(1)) as other,
        pytest.raises(ContractError, match=r"serve different targets: weights: [0-9a-f]+ != [0-9a-f]+$"),
    ):
        remote(one.url, other.url)


def test_an_engine_that_comes_back_with_other_weights_is_not_served(tmp_path: Path) -> None:
    path = save(tmp_path / "target")
    loads: list[HFTargetRunner] = []

    def load() -> HFTargetRunner:
        runner = runner_of(path)
        runner.__class__ = HFTargetRunner if loads else DyingRunner
        loads.append(runner)
        return runner

    with loopback_server(load) as server, remote(server.url, timeout=20.0) as target:
        batch_of(target)
        save(path, seed=1)
        with pytest.raises(ServerError, match=r"loaded again is another: .*weights: "):
            batch_of(target)


@pytest.mark.parametrize("what", ["batch", "embedding", "head"])
def test_a_server_that_comes_back_with_other_weights_is_refused(tmp_path: Path, what: str) -> None:
    path = save(tmp_path / "target")
    with loopback_server(lambda: runner_of(path)) as first:
        port = first.port
        target = remote(first.url, encoding="hidden" if what == "head" else "probs", retry_timeout=0.0)
        target.get_input_embeddings()
        batch_of(target)
    save(path, seed=1)

    def ask() -> object:
        match what:
            case "batch":
                return batch_of(target)
            case "embedding":
                return target.input_embedding_weight()
            case _:
                return target.set_vocab_mapping(VocabMapping.from_ids(torch.arange(9), VOCAB))

    with (
        loopback_server(lambda: runner_of(path), port=port),
        target,
        pytest.raises(ProtocolError, match="another target"),
    ):
        ask()


def test_files_that_change_while_they_are_loaded_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "target")

    def load_and_change(*arguments: Any) -> Any:
        loaded = load_model(*arguments)
        save(path, seed=1)
        return loaded

    monkeypatch.setattr("eagle_target_hf.loading.load_model", load_and_change)
    with pytest.raises(AdapterError, match="changed while they were loaded: load it again"):
        runner_of(path)


def test_files_written_over_change_no_loaded_target(tmp_path: Path) -> None:
    path, other = save(tmp_path / "target"), save(tmp_path / "other", seed=1)
    runner = runner_of(path)
    runner.set_aux_layers((0, 1, 2))
    before = runner.forward_eagle3(IDS[0], [IDS.numel()])

    with (path / "model.safetensors").open("r+b") as file:
        file.write((other / "model.safetensors").read_bytes())
    after = runner.forward_eagle3(IDS[0], [IDS.numel()])

    assert torch.equal(after.aux_hidden_states, before.aux_hidden_states)
    assert torch.equal(
        runner.compute_logits(after.last_hidden_states), runner.compute_logits(before.last_hidden_states)
    )


def test_a_model_in_memory_is_its_weights() -> None:
    def fingerprint(change: Callable[[Any], object] = lambda model: None) -> str:
        model = tiny.build("llama")
        change(model)
        return str(HFEagle3TargetModel(model, (0, 2, 3)).model_info()["fingerprint"])

    assert fingerprint() == fingerprint()
    assert fingerprint(lambda model: model.lm_head.weight.data[-1].add_(1)) != fingerprint()
