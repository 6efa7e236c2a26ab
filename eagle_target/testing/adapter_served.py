"""The conformance suite of an adapter behind `eagle-target serve`: its engine in one process, the client in another.

class TestMineServed(ServedAdapterConformance):
adapter = MyAdapter
options = {"dtype": "float32"}
"""

from __future__ import annotations

import contextlib
import json
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
import torch
import urllib3

from eagle_target.client.remote import RemoteEagle3TargetModel
from eagle_target.contract.target import default_eagle3_aux_layer_ids
from eagle_target.errors import ContractError
from eagle_target.testing.adapter_oracle import HFOracle, check_batch, packed_input, padded_input
from eagle_target.testing.adapter_suite import DRAFT_VOCAB, RAGGED, AdapterSuite
from eagle_target.testing.server import ServerNotReady, server_process
from eagle_target.testing.tiny import shuffled_mapping

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from eagle_target.testing.adapter_oracle import TrainerInput
    from eagle_target.testing.server import ServerProcess

# Any order, and the last layer, which is before the final norm.
SERVED_AUX = (7, 0, 4)
REQUEST_SECONDS = 120.0


@dataclass(frozen=True, slots=True)
class ServedCheckpoint:
    """A checkpoint behind the server of a url, and under transformers. aux_layer_ids: what it captures, ascending."""

    checkpoint: Path
    url: str
    oracle: HFOracle
    aux_layer_ids: tuple[int, ...]

    @contextlib.contextmanager
    def client(self, **settings: Any) -> Iterator[RemoteEagle3TargetModel]:
        """A client in this process, with a vocabulary mapping; settings are those of `from_urls`."""
        settings = {"transport": "wire", "timeout": REQUEST_SECONDS, **settings}
        with RemoteEagle3TargetModel.from_urls([self.url], **settings) as client:
            client.set_vocab_mapping(shuffled_mapping(self.oracle.vocab_size, DRAFT_VOCAB))
            yield client

    def describe(self) -> dict[str, Any]:
        """What the server says about itself."""
        answer: dict[str, Any] = urllib3.request("GET", f"{self.url}/v1/target", timeout=30.0).json()
        return answer


class ServedAdapterConformance(AdapterSuite):
    """What can be seen of an adapter through a server of its own process, once a model.

    serve_python: interpreter of the engine's environment. serve_environment: variables over this process's own.
    serve_timeout: seconds that loading may take.
    """

    serve_python: ClassVar[str] = sys.executable
    serve_environment: ClassVar[Mapping[str, str]] = {}
    serve_timeout: ClassVar[float] = 240.0

    @classmethod
    @contextlib.contextmanager
    def serve(cls, checkpoint: Path, aux_layer_ids: Sequence[int] | None = None) -> Iterator[ServerProcess]:
        """Run `eagle-target serve` on a checkpoint with the options of the class."""
        arguments = ["--engine", cls.adapter.name, "--model", str(checkpoint)]
        if aux_layer_ids is not None:
            arguments += ["--aux-layer-ids", ",".join(map(str, aux_layer_ids))]
        for name, value in cls.options.items():
            arguments += ["-o", f"{name}={value if isinstance(value, str) else json.dumps(value)}"]
        environment = {"OMP_NUM_THREADS": "1", **cls.serve_environment}
        with server_process(
            arguments, python=cls.serve_python, environment=environment, ready_timeout=cls.serve_timeout
        ) as server:
            yield server

    @pytest.fixture(scope="class")
    @classmethod
    def served(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedCheckpoint]:
        """A target with an LM head of its own that captures named layers."""
        checkpoint = cls.make_checkpoint(tmp_path_factory.mktemp("served"))
        with cls.serve(checkpoint, SERVED_AUX) as server:
            yield ServedCheckpoint(checkpoint, server.url, HFOracle(checkpoint), tuple(sorted(SERVED_AUX)))

    @pytest.fixture(scope="class")
    @classmethod
    def served_tied(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedCheckpoint]:
        """A target whose LM head is the input embedding, with the default layers."""
        checkpoint = cls.make_checkpoint(tmp_path_factory.mktemp("served-tied"), tied=True)
        with cls.serve(checkpoint) as server:
            oracle = HFOracle(checkpoint)
            yield ServedCheckpoint(checkpoint, server.url, oracle, default_eagle3_aux_layer_ids(oracle.num_layers))

    def test_served_facts_are_the_checkpoints(self, served: ServedCheckpoint) -> None:
        with served.client() as client:
            info = client.model_info()
        oracle = served.oracle
        assert (info["num_layers"], info["hidden_size"], info["vocab_size"], info["dtype"]) == (
            oracle.num_layers,
            oracle.hidden_size,
            oracle.vocab_size,
            oracle.dtype,
        )
        assert (info["model"], info["engine"]) == (str(served.checkpoint), self.adapter.name)
        assert info["aux_layer_ids"] == list(served.aux_layer_ids)
        if self.serve_python == sys.executable:
            assert info["engine_version"] == self.adapter.engine_version()

    def test_served_ragged_rows(self, served: ServedCheckpoint) -> None:
        self.check_served(served, [padded_input(RAGGED, served.oracle.vocab_size)])

    def test_served_rows_of_a_tied_head_and_default_layers(self, served_tied: ServedCheckpoint) -> None:
        vocab_size = served_tied.oracle.vocab_size
        inputs = [padded_input([12, 5, 17, 1], vocab_size), packed_input([[5, 1, 7], [4, 9], [13]], vocab_size)]
        self.check_served(served_tied, inputs)
        with served_tied.client() as client:
            assert torch.equal(client.input_embedding_weight(), served_tied.oracle.input_embedding())

    def test_served_many_rows_and_one_token(self, served: ServedCheckpoint) -> None:
        vocab_size = served.oracle.vocab_size
        many = padded_input([1 + (7 * index) % 23 for index in range(64)], vocab_size)
        self.check_served(served, [many, padded_input([1], vocab_size)])

    @pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
    def test_served_padded_rows(self, served: ServedCheckpoint, left: bool) -> None:
        self.check_served(served, [padded_input([12, 5, 17, 1], served.oracle.vocab_size, left=left)])

    def test_served_packed_rows(self, served: ServedCheckpoint) -> None:
        self.check_served(served, [packed_input([[5, 1, 7], [4, 9], [13], [2, 2, 2]], served.oracle.vocab_size)])

    def test_served_in_every_encoding_it_offers(self, served: ServedCheckpoint) -> None:
        encodings = served.describe()["encodings"]
        assert {"probs", "logits"} <= {*encodings}
        for encoding in encodings:
            self.check_served(served, [padded_input([9, 4, 14], served.oracle.vocab_size)], encoding=encoding)

    def test_served_input_embedding(self, served: ServedCheckpoint) -> None:
        with served.client() as client:
            assert torch.equal(client.input_embedding_weight(), served.oracle.input_embedding())

    def test_served_twice_gives_the_same_bits_and_leaves_earlier_batches_alone(self, served: ServedCheckpoint) -> None:
        given, other = (padded_input([6, 2, 19], served.oracle.vocab_size, seed=seed) for seed in (0, 1))
        with served.client() as client:
            first = client.generate_batch(**given.arguments()).tensors()
            kept = {name: tensor.clone() for name, tensor in first.items()}
            client.generate_batch(**other.arguments())
            again = client.generate_batch(**given.arguments()).tensors()
        for name, tensor in kept.items():
            assert torch.equal(tensor, first[name]), f"{name} has changed"
            assert torch.equal(tensor, again[name]), f"{name} differs the second time"

    def test_served_to_two_clients_with_their_own_mappings(self, served: ServedCheckpoint) -> None:
        vocab_size = served.oracle.vocab_size
        start = threading.Barrier(2)

        def train(seed: int) -> None:
            mapping = shuffled_mapping(vocab_size, DRAFT_VOCAB + 5 * seed, seed=seed)
            inputs = [padded_input([9, 4, 14], vocab_size, seed=10 * seed + step) for step in range(4)]
            with served.client() as client:
                client.set_vocab_mapping(mapping)
                start.wait(60.0)
                batches = client.prefetch([given.arguments() for given in inputs], depth=3)
                for given, batch in zip(inputs, batches, strict=True):
                    self._check(served, batch.tensors(), given, mapping.selected_token_ids.tolist())

        with ThreadPoolExecutor(2) as threads:
            for result in [threads.submit(train, seed) for seed in (1, 2)]:
                result.result(REQUEST_SECONDS)

    def test_served_refuses_what_the_target_cannot_do_and_goes_on(self, served: ServedCheckpoint) -> None:
        vocab_size = served.oracle.vocab_size
        unknown = padded_input([4], vocab_size)
        unknown.input_ids[0, 2] = vocab_size
        with served.client() as client:
            with pytest.raises(ContractError, match=str(vocab_size)):
                client.generate_batch(**unknown.arguments())
            limit = client.info.max_seq_len
            if limit is not None:
                with pytest.raises(ContractError, match=str(limit)):
                    client.generate_batch(**padded_input([limit + 1], vocab_size).arguments())
                self.check_served(served, [padded_input([limit], vocab_size)])
        assert urllib3.request("GET", f"{served.url}/ready", timeout=30.0).status == 200

    def test_served_layers_the_target_has_not_end_the_server_with_the_reason(self, tmp_path: Path) -> None:
        checkpoint = self.make_checkpoint(tmp_path / "shallow", layers=3)
        with (
            pytest.raises(ServerNotReady, match=r"exit status 1(.|\n)*layers 0 to 2"),
            self.serve(checkpoint, (0, 1, 99)),
        ):
            pass

    def check_served(self, served: ServedCheckpoint, inputs: Sequence[TrainerInput], **settings: Any) -> None:
        """Compare batches that a client gets with transformers."""
        mapping = shuffled_mapping(served.oracle.vocab_size, DRAFT_VOCAB)
        with served.client(**settings) as client:
            for given in inputs:
                tensors = client.generate_batch(**given.arguments()).tensors()
                self._check(served, tensors, given, mapping.selected_token_ids.tolist())

    def _check(
        self, served: ServedCheckpoint, tensors: Mapping[str, torch.Tensor], given: TrainerInput, selected: list[int]
    ) -> None:
        check_batch(
            tensors,
            given,
            served.oracle,
            aux_layer_ids=served.aux_layer_ids,
            selected_token_ids=selected,
            tolerance=self.tolerance,
        )
