"""What an adapter promises beside its values: facts, memory, errors, its end, and to be served."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest
import torch

from eagle_target.checkpoints.digest import checkpoint_digest
from eagle_target.client.remote import RemoteEagle3TargetModel
from eagle_target.colocated import RunnerEagle3TargetModel
from eagle_target.contract.runner import TargetRunner
from eagle_target.errors import AdapterError, ContractError, EagleTargetError
from eagle_target.testing.adapter_oracle import assert_near, check_batch, padded_input
from eagle_target.testing.adapter_suite import AUX, DRAFT_VOCAB, AdapterSuite
from eagle_target.testing.server import loopback_server
from eagle_target.testing.tiny import shuffled_mapping

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from eagle_target.contract.runner import TargetForward
    from eagle_target.testing.adapter_oracle import TrainerInput
    from eagle_target.testing.adapter_suite import LoadedTarget


class AdapterContractConformance(AdapterSuite):
    """What a runner says about itself, and what it promises about its tensors, its errors and its end."""

    def test_is_a_target_runner(self, target: LoadedTarget) -> None:
        assert isinstance(target.runner, TargetRunner)

    def test_facts_are_the_checkpoints(self, target: LoadedTarget) -> None:
        info, oracle = target.runner.info, target.oracle
        assert (info.num_layers, info.hidden_size, info.vocab_size) == (
            oracle.num_layers,
            oracle.hidden_size,
            oracle.vocab_size,
        )
        assert info.model == str(target.checkpoint)
        assert info.engine == self.adapter.name
        assert info.engine_version == self.adapter.engine_version()
        assert info.weights in (None, checkpoint_digest(info.model)), "another digest than docs/plugins.md asks for"
        torch.empty(0, dtype=getattr(torch, info.dtype), device=info.device)

    def test_tensors_are_what_the_facts_say_and_carry_no_gradient(self, target: LoadedTarget) -> None:
        info, forward = target.runner.info, target.forward(target.sequences([6, 2]))
        for tensor, width in (
            (forward.aux_hidden_states, 3 * info.hidden_size),
            (forward.last_hidden_states, info.hidden_size),
        ):
            assert tuple(tensor.shape) == (8, width)
            assert tensor.dtype == getattr(torch, info.dtype)
            assert tensor.device.type == torch.device(info.device).type
            assert not tensor.requires_grad

    def test_logits_of_some_rows_are_those_rows(self, target: LoadedTarget) -> None:
        forward = target.forward(target.sequences([6, 2]))
        assert tuple(target.logits(forward, slice(0, 0)).shape) == (0, target.oracle.vocab_size)
        every = target.logits(forward)
        assert tuple(every.shape) == (8, target.oracle.vocab_size)
        assert_near(
            target.logits(forward, slice(3, 6)), every[3:6].cpu().float(), self.tolerance, "logits of three rows"
        )

    def test_same_request_gives_the_same_bits(self, target: LoadedTarget) -> None:
        sequences = target.sequences([6, 2, 19])
        first, second = target.forward(sequences), target.forward(sequences)
        assert torch.equal(first.aux_hidden_states, second.aux_hidden_states)
        assert torch.equal(first.last_hidden_states, second.last_hidden_states)
        assert torch.equal(target.logits(first), target.logits(second))

    def test_a_later_forward_leaves_earlier_tensors_alone(self, target: LoadedTarget) -> None:
        forward = target.forward(target.sequences([6, 2]))
        kept = [forward.aux_hidden_states.clone(), forward.last_hidden_states.clone()]
        logits = target.logits(forward)
        kept_logits = logits.clone()
        other = target.forward(target.sequences([4, 4], seed=1))
        target.logits(other)
        assert torch.equal(forward.aux_hidden_states, kept[0])
        assert torch.equal(forward.last_hidden_states, kept[1])
        assert torch.equal(logits, kept_logits)

    def test_another_thread_may_run_it(self, target: LoadedTarget) -> None:
        sequences = target.sequences([6, 2])
        results: list[TargetForward] = []
        thread = threading.Thread(target=lambda: results.append(target.forward(sequences)))
        thread.start()
        thread.join(60.0)
        assert results, "no result from another thread"
        assert torch.equal(results[0].aux_hidden_states, target.forward(sequences).aux_hidden_states)

    @pytest.mark.parametrize("aux_layer_ids", [(0, 1, 99), (-1, 0, 1), (1, 1, 2), (0, 1)])
    def test_layers_the_target_has_not_are_refused(self, target: LoadedTarget, aux_layer_ids: tuple[int, ...]) -> None:
        with pytest.raises(ContractError):
            RunnerEagle3TargetModel(target.runner, aux_layer_ids)
        with pytest.raises(EagleTargetError):
            target.runner.set_aux_layers(aux_layer_ids)

    def test_a_shallow_target_needs_its_layers_named(self, tmp_path: Path) -> None:
        loaded = self.load_both(self.make_checkpoint(tmp_path / "shallow", layers=3), (0, 1, 2))
        try:
            with pytest.raises(ContractError, match="too shallow"):
                RunnerEagle3TargetModel(loaded.runner)
            self.check_states(loaded, [5, 2], (0, 1, 2))
        finally:
            loaded.runner.close()

    def test_a_sequence_over_the_limit_is_refused_and_one_at_it_is_not(self, target: LoadedTarget) -> None:
        limit = target.runner.info.max_seq_len
        if limit is None:
            return
        backend = RunnerEagle3TargetModel(target.runner, AUX, encoding="logits")
        too_long = padded_input([limit + 1], target.oracle.vocab_size)
        with pytest.raises(ContractError, match=str(limit)):
            backend.generate_batch(**too_long.arguments())
        self.check_states(target, [limit])

    def test_ids_outside_the_vocabulary_are_refused(self, target: LoadedTarget) -> None:
        given = padded_input([4], target.oracle.vocab_size)
        given.input_ids[0, 2] = target.oracle.vocab_size
        with pytest.raises(ContractError, match=str(target.oracle.vocab_size)):
            RunnerEagle3TargetModel(target.runner, AUX, encoding="logits").generate_batch(**given.arguments())

    def test_close_twice_and_then_nothing_runs(self, tmp_path: Path) -> None:
        runner = self.load(self.make_checkpoint(tmp_path / "closing", layers=3), aux_layer_ids=(0, 1, 2))
        runner.set_aux_layers((0, 1, 2))
        runner.close()
        runner.close()
        with pytest.raises(AdapterError):
            runner.forward_eagle3(torch.tensor([1, 2, 3]), [3])


class AdapterServerConformance(AdapterSuite):
    """The adapter behind a real server."""

    def test_two_clients_with_their_own_mappings_at_a_time(self, target: LoadedTarget) -> None:
        vocab_size = target.oracle.vocab_size
        failures: list[BaseException] = []
        start = threading.Barrier(2)

        def train(url: str, seed: int) -> None:
            mapping = shuffled_mapping(vocab_size, DRAFT_VOCAB + 5 * seed, seed=seed)
            try:
                with RemoteEagle3TargetModel.from_urls([url], transport="wire", timeout=60.0) as client:
                    client.set_vocab_mapping(mapping)
                    start.wait(60.0)
                    inputs = [padded_input([9, 4, 14], vocab_size, seed=10 * seed + step) for step in range(4)]
                    batches = client.prefetch([given.arguments() for given in inputs], depth=3)
                    for given, batch in zip(inputs, batches, strict=True):
                        self._check(target, batch.tensors(), given, mapping.selected_token_ids.tolist())
            except BaseException as failure:  # noqa: BLE001 - shown by the test's own thread
                failures.append(failure)

        with loopback_server(lambda: self.load(target.checkpoint, aux_layer_ids=AUX), aux_layer_ids=AUX) as server:
            threads = [threading.Thread(target=train, args=(server.url, seed)) for seed in (1, 2)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(120.0)
            assert not any(thread.is_alive() for thread in threads), "a client still waits"
        if failures:
            raise failures[0]

    def test_every_encoding_the_server_offers(self, target: LoadedTarget) -> None:
        given = padded_input([9, 4, 14], target.oracle.vocab_size)
        mapping = shuffled_mapping(target.oracle.vocab_size, DRAFT_VOCAB)
        with loopback_server(lambda: self.load(target.checkpoint, aux_layer_ids=AUX), aux_layer_ids=AUX) as server:
            for encoding in server.engine.encodings:
                with RemoteEagle3TargetModel.from_urls([server.url], encoding=encoding, transport="wire") as client:
                    client.set_vocab_mapping(mapping)
                    tensors = client.generate_batch(**given.arguments()).tensors()
                    assert torch.equal(client.input_embedding_weight(), target.oracle.input_embedding())
                self._check(target, tensors, given, mapping.selected_token_ids.tolist())

    def _check(
        self, target: LoadedTarget, tensors: Mapping[str, torch.Tensor], given: TrainerInput, selected: list[int]
    ) -> None:
        check_batch(
            tensors, given, target.oracle, aux_layer_ids=AUX, selected_token_ids=selected, tolerance=self.tolerance
        )
