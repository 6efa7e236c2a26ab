"""The conformance suite of adapters.

    class TestMine(AdapterConformance):
        adapter = MyAdapter
        options = {"dtype": "float32"}

What an engine need not be able to do stands in classes of its own, to be inherited beside the suite.
"""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
import torch

from eagle_target.colocated import RunnerEagle3TargetModel
from eagle_target.contract.target import default_eagle3_aux_layer_ids
from eagle_target.errors import AdapterError, ConfigError
from eagle_target.plugins.options import PluginOptions, build_model
from eagle_target.plugins.registry import load_plugins
from eagle_target.targets import load_runner
from eagle_target.testing.adapter_contract import AdapterContractConformance, AdapterServerConformance
from eagle_target.testing.adapter_oracle import HFOracle, assert_near, packed_input, padded_input, relative_error
from eagle_target.testing.adapter_suite import AUX, DRAFT_VOCAB, MANY_TOKENS, RAGGED, AdapterSuite, LoadedTarget
from eagle_target.testing.tiny import shuffled_mapping

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

ENGINES = ("torch", "transformers", "vllm", "sglang", "jax", "tensorflow", "tensorrt_llm")
IMPORT_CHECK = """
import importlib, sys
module = importlib.import_module(sys.argv[1])
for name in sys.argv[2].split(","):
    assert name not in sys.modules, f"importing {sys.argv[1]} imports {name}"
"""


class AdapterPluginConformance(AdapterSuite):
    """The adapter as a plugin: found, cheap to import, and described."""

    def test_is_registered_under_its_name(self) -> None:
        assert load_plugins().adapters.get(self.adapter.name) is self.adapter

    def test_importing_its_package_imports_no_engine(self) -> None:
        package = self.adapter.__module__.partition(".")[0]
        result = subprocess.run(
            [sys.executable, "-c", IMPORT_CHECK, package, ",".join(ENGINES)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stderr

    def test_says_its_version_and_that_it_can_run_here(self) -> None:
        assert self.adapter.unusable_reason() is None
        assert self.adapter.engine_version()
        assert self.adapter.name == self.adapter.name.strip().lower()

    def test_every_option_is_described(self) -> None:
        assert issubclass(self.adapter.options_model, PluginOptions)
        for name, field in self.adapter.options_model.model_fields.items():
            assert field.description, f"option {name} has no description"

    def test_an_unknown_option_is_refused(self) -> None:
        with pytest.raises(ConfigError, match="no_such_option"):
            build_model(self.adapter.options_model, {**self.options, "no_such_option": 1}, "options")

    def test_a_checkpoint_that_is_not_there_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(AdapterError):
            load_runner(self.adapter.name, str(tmp_path / "absent"), self.options)


class AdapterParityConformance(AdapterSuite):
    """Hidden states and logits are those of transformers."""

    @pytest.fixture(scope="class", params=["untied", "tied"])
    @classmethod
    def either_head(
        cls, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, target: LoadedTarget
    ) -> Iterator[LoadedTarget]:
        """The target of the class, then one whose LM head is the input embedding."""
        if request.param == "untied":
            yield target
            return
        loaded = cls.load_both(cls.make_checkpoint(tmp_path_factory.mktemp("tied"), tied=True))
        yield loaded
        loaded.runner.close()

    def test_ragged_sequences(self, either_head: LoadedTarget) -> None:
        self.check_states(either_head, RAGGED)

    def test_many_sequences(self, target: LoadedTarget) -> None:
        self.check_states(target, [1 + (7 * index) % 23 for index in range(64)])

    def test_one_token(self, target: LoadedTarget) -> None:
        self.check_states(target, [1])

    @pytest.mark.parametrize("aux_layer_ids", [(0, 1, 2), (5, 2, 6), (1, 4, 7), (7, 6, 0)])
    def test_layers_in_any_order_and_the_last_before_the_final_norm(
        self, target: LoadedTarget, aux_layer_ids: tuple[int, int, int]
    ) -> None:
        self.check_states(target, [9, 4, 1], aux_layer_ids)

    def test_default_layers(self, target: LoadedTarget) -> None:
        RunnerEagle3TargetModel(target.runner)
        given = target.sequences([6, 3])
        ids = torch.tensor(given[0] + given[1]).to(target.runner.info.device)
        with torch.no_grad():
            forward = target.runner.forward_eagle3(ids, [6, 3])
        chosen = default_eagle3_aux_layer_ids(target.oracle.num_layers)
        aux = torch.cat([target.oracle.run(sequence).aux(chosen) for sequence in given])
        assert_near(forward.aux_hidden_states, aux, self.tolerance, "aux_hidden_states of the default layers")

    @pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
    def test_padded_rows(self, either_head: LoadedTarget, left: bool) -> None:
        self.check_rows(either_head, padded_input([12, 5, 17, 1], either_head.oracle.vocab_size, left=left))

    def test_packed_rows(self, either_head: LoadedTarget) -> None:
        rows = [[5, 1, 7], [4, 9], [13], [2, 2, 2]]
        self.check_rows(either_head, packed_input(rows, either_head.oracle.vocab_size))

    def test_logits_for_the_trainer(self, target: LoadedTarget) -> None:
        self.check_rows(target, padded_input([12, 5, 17], target.oracle.vocab_size), encoding="logits")

    def test_a_sequence_alone_is_as_in_a_batch(self, target: LoadedTarget) -> None:
        sequences = target.sequences(RAGGED)
        together = target.forward(sequences)
        parts = torch.split(together.aux_hidden_states, list(RAGGED))
        for sequence, part in zip(sequences, parts, strict=True):
            alone = target.forward([sequence]).aux_hidden_states
            assert_near(part, alone.cpu().float(), self.tolerance, f"a sequence of {len(sequence)} tokens")

    def test_input_embeddings(self, either_head: LoadedTarget) -> None:
        weight = either_head.runner.input_embedding_weight()
        assert torch.equal(weight.cpu(), either_head.oracle.input_embedding())

    def test_what_is_handed_out_is_a_copy(self, either_head: LoadedTarget) -> None:
        vocab_size = either_head.oracle.vocab_size
        backend = RunnerEagle3TargetModel(either_head.runner, AUX)
        head = either_head.runner.draft_head(torch.arange(vocab_size))
        given = [] if head is None else [tensor for tensor in (head.weight, head.bias) if tensor is not None]
        with torch.no_grad():
            for tensor in (backend.get_input_embeddings().weight, *given):
                tensor.zero_()
        assert torch.equal(backend.get_input_embeddings().weight.cpu(), either_head.oracle.input_embedding())
        self.check_rows(either_head, padded_input([5, 3], vocab_size))

    def test_draft_head_is_the_engines_columns(self, either_head: LoadedTarget) -> None:
        ids = shuffled_mapping(either_head.oracle.vocab_size, DRAFT_VOCAB).selected_token_ids
        head = either_head.runner.draft_head(ids)
        if head is None:
            return
        forward = either_head.forward(either_head.sequences([11, 4]))
        with torch.no_grad():
            drafted = head.compute_logits(forward.last_hidden_states.to(head.weight.device))
        columns = either_head.logits(forward).cpu()[:, ids].float()
        assert_near(drafted, columns, self.tolerance, "logits of the draft's rows of the head")


class AdapterConformance(
    AdapterPluginConformance, AdapterParityConformance, AdapterContractConformance, AdapterServerConformance
):
    """Everything an adapter must do."""


class BFloat16Adapter(AdapterSuite):
    """Optional: the target runs in bfloat16, and no further from transformers' float32 than transformers in bfloat16.

    The measure is transformers itself, on the same tokens: the larger error of its two implementations of attention,
    for two computations that round equally well differ by as much.

    bfloat16_options: over `options`, where the engine needs to be told.
    """

    bfloat16_options: ClassVar[Mapping[str, Any]] = {}

    def test_bfloat16_is_kept_and_no_further_from_float32_than_transformers(self, tmp_path: Path) -> None:
        checkpoint = self.make_checkpoint(tmp_path / "bfloat16", dtype="bfloat16")
        runner = self.load(checkpoint, aux_layer_ids=AUX, **self.bfloat16_options)
        loaded = LoadedTarget(checkpoint, runner, HFOracle(checkpoint))
        try:
            assert runner.info.dtype == "bfloat16"
            sequences = loaded.sequences(MANY_TOKENS)
            forward = loaded.forward(sequences)
            assert forward.aux_hidden_states.dtype == torch.bfloat16
            given = (forward.aux_hidden_states, forward.last_hidden_states, loaded.logits(forward))
        finally:
            runner.close()
        exact, *rounded = (
            _packed_states(HFOracle(checkpoint, dtype=dtype, attention=attention), sequences)
            for dtype, attention in (("float32", None), ("bfloat16", "sdpa"), ("bfloat16", "eager"))
        )
        for index, name in enumerate(("aux_hidden_states", "last_hidden_states", "logits")):
            ours = relative_error(given[index], exact[index])
            theirs = [relative_error(states[index], exact[index]) for states in rounded]
            print(f"{name} in bfloat16: relative error {ours:.2e}, of transformers {min(theirs):.2e}-{max(theirs):.2e}")
            assert ours <= max(theirs), f"{name}: {ours:.3e} from float32, transformers is {max(theirs):.3e}"


def _packed_states(
    oracle: HFOracle, sequences: Sequence[Sequence[int]]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    states = [oracle.run(sequence) for sequence in sequences]
    return (
        torch.cat([state.aux(AUX) for state in states]),
        torch.cat([state.last for state in states]),
        torch.cat([state.logits for state in states]),
    )


class BatchInvariantAdapter(AdapterSuite):
    """Optional: a sequence has the same bits whatever shares its forward."""

    def test_a_sequence_has_the_same_bits_alone_and_in_a_batch(self, target: LoadedTarget) -> None:
        sequences = target.sequences(RAGGED)
        parts = torch.split(target.forward(sequences).aux_hidden_states, list(RAGGED))
        for sequence, part in zip(sequences, parts, strict=True):
            assert torch.equal(part, target.forward([sequence]).aux_hidden_states)
