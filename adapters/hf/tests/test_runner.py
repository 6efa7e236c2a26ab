"""What the runner promises about a loaded model, its memory and its failures."""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from eagle_target_hf import HFTargetRunner

from eagle_target.contract.runner import TargetForward, TargetRunner
from eagle_target.errors import AdapterError, ContractError

from . import tiny

if TYPE_CHECKING:
    from eagle_target_hf.batching import Layout

AUX = (0, 2, 3)


def runner_of(model: Any, **options: Any) -> HFTargetRunner:
    runner = HFTargetRunner(model, **options)
    runner.set_aux_layers(AUX)
    return runner


def assert_same(given: TargetForward, expected: TargetForward, tolerance: float = 1e-5) -> None:
    pairs = (
        (given.aux_hidden_states, expected.aux_hidden_states),
        (given.last_hidden_states, expected.last_hidden_states),
    )
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)


def test_is_a_target_runner() -> None:
    assert isinstance(runner_of(tiny.build("llama")), TargetRunner)


def test_the_head_may_run_beside_a_forward() -> None:
    runner = runner_of(tiny.build("llama"))
    assert runner.concurrent_head
    requests = [tiny.random_request(9, 4, 12, seed=seed) for seed in range(8)]
    expected = [runner.forward_eagle3(*request) for request in requests]
    logits = [runner.compute_logits(forward.last_hidden_states) for forward in expected]

    with ThreadPoolExecutor(1) as other:
        beside = other.submit(lambda: [runner.forward_eagle3(*request) for request in requests * 4])
        rounds = 0
        while not beside.done() or not rounds:
            rounds += 1
            for forward, head_alone in zip(expected, logits, strict=True):
                assert torch.equal(runner.compute_logits(forward.last_hidden_states), head_alone)
        for given, alone in zip(beside.result(), expected * 4, strict=True):
            assert torch.equal(given.aux_hidden_states, alone.aux_hidden_states)


def test_a_head_whose_weights_accelerate_moves_must_not() -> None:
    model = tiny.build("llama")
    model.lm_head._hf_hook = object()

    assert not runner_of(model).concurrent_head


def test_pads_are_counted() -> None:
    runner = runner_of(tiny.build("llama"))
    before = runner.computed_tokens

    runner.forward_eagle3(torch.arange(1, 14), [5, 5, 3])

    assert before == 0
    assert runner.computed_tokens == 15


def test_last_layer_is_captured_before_the_final_norm() -> None:
    model = tiny.build("llama")
    runner = runner_of(model)
    runner.set_aux_layers((tiny.LAYERS - 1, 0, 1))
    raw: list[torch.Tensor] = []
    input_ids, seq_lens = tiny.random_request(6)

    aux = runner.forward_eagle3(input_ids, seq_lens).aux_hidden_states

    with model.model.layers[-1].register_forward_hook(lambda module, args, output: raw.append(output)):
        expected, last, _ = tiny.oracle(model, input_ids, seq_lens, (0, 1))
    torch.testing.assert_close(aux, torch.cat([expected, raw[0][0]], dim=-1), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(aux[:, -tiny.HIDDEN :], last)


def test_layers_can_be_set_again() -> None:
    model = tiny.build("llama")
    runner = runner_of(model)
    input_ids, seq_lens = tiny.random_request(6, 4)
    runner.forward_eagle3(input_ids, seq_lens)

    runner.set_aux_layers((3, 1, 0))

    expected, _, _ = tiny.oracle(model, input_ids, seq_lens, (0, 1, 3))
    aux = runner.forward_eagle3(input_ids, seq_lens).aux_hidden_states
    torch.testing.assert_close(aux, expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(ContractError, match="three distinct"):
        runner.set_aux_layers((1, 1, 2))


@pytest.mark.parametrize("limit", [1, 8, 13, 40])
def test_split_batches_give_the_same_as_one(limit: int) -> None:
    model = tiny.build("qwen3")
    input_ids, seq_lens = tiny.random_request(5, 11, 2, 7, 7, 9)

    split = runner_of(model, max_batch_tokens=limit).forward_eagle3(input_ids, seq_lens)

    assert_same(split, runner_of(model).forward_eagle3(input_ids, seq_lens))


@pytest.mark.parametrize("layout", ["packed", "padded", "masked", "equal"])
@pytest.mark.parametrize("name", ["llama", "mistral-window", "qwen3-moe", "gpt2"])
def test_every_way_of_sharing_a_batch_gives_the_same(name: str, layout: Layout) -> None:
    model = tiny.build(name)
    runner = runner_of(model)
    proven = runner._proven
    assert proven is not None
    input_ids, seq_lens = tiny.random_request(5, 11, 2, 7, 7, 9)
    expected = runner.forward_eagle3(input_ids, seq_lens)

    runner._proven = replace(proven, execution=replace(proven.execution, layout=layout))

    assert_same(runner.forward_eagle3(input_ids, seq_lens), expected)


def test_eager_and_sdpa_are_equal() -> None:
    input_ids, seq_lens = tiny.random_request(5, 11, 2)
    sdpa, eager = (
        runner_of(tiny.build("llama", attn_implementation=implementation)).forward_eagle3(input_ids, seq_lens)
        for implementation in ("sdpa", "eager")
    )

    assert_same(sdpa, eager)


def test_same_request_gives_the_same_bits() -> None:
    runner = runner_of(tiny.build("llama"))
    input_ids, seq_lens = tiny.random_request(5, 11, 2)

    first, second = runner.forward_eagle3(input_ids, seq_lens), runner.forward_eagle3(input_ids, seq_lens)

    assert torch.equal(first.aux_hidden_states, second.aux_hidden_states)
    assert torch.equal(first.last_hidden_states, second.last_hidden_states)


def test_head_sees_no_more_rows_than_asked_for() -> None:
    model = tiny.build("llama")
    runner = runner_of(model)
    rows: list[int] = []
    input_ids, seq_lens = tiny.random_request(30, 12)

    with model.lm_head.register_forward_hook(lambda module, args, output: rows.append(args[0].numel() // tiny.HIDDEN)):
        last = runner.forward_eagle3(input_ids, seq_lens).last_hidden_states
        assert rows == []
        runner.compute_logits(last[:4])

    assert rows == [4]


def test_model_is_left_as_it_was_except_for_eval_mode() -> None:
    model = tiny.build("llama").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attributes = {name: dict(vars(module)) for name, module in model.named_modules()}

    runner = runner_of(model)
    input_ids, seq_lens = tiny.random_request(5, 3)
    runner.compute_logits(runner.forward_eagle3(input_ids, seq_lens).last_hidden_states)

    assert not model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    for name, module in model.named_modules():
        assert vars(module).keys() == attributes[name].keys()
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert all(parameter.requires_grad for parameter in model.parameters())
    copy.deepcopy(model)


def test_training_mode_set_later_does_not_reach_the_supervision() -> None:
    model = tiny.build("gpt2")
    runner = runner_of(model)
    input_ids, seq_lens = tiny.random_request(9)
    expected = runner.forward_eagle3(input_ids, seq_lens)

    model.train()

    assert_same(runner.forward_eagle3(input_ids, seq_lens), expected, tolerance=0.0)


def test_autocast_of_the_caller_does_not_reach_the_target() -> None:
    runner = runner_of(tiny.build("llama"))
    input_ids, seq_lens = tiny.random_request(9)
    expected = runner.forward_eagle3(input_ids, seq_lens)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        forward = runner.forward_eagle3(input_ids, seq_lens)

    assert_same(forward, expected, tolerance=0.0)


def test_outputs_can_be_trained_on() -> None:
    runner = runner_of(tiny.build("llama"))
    input_ids, seq_lens = tiny.random_request(9)
    aux = runner.forward_eagle3(input_ids, seq_lens).aux_hidden_states
    weight = torch.ones(aux.shape[1], requires_grad=True)

    torch.autograd.backward((aux @ weight).sum())

    assert not aux.requires_grad
    assert weight.grad is not None


def test_forwards_of_other_threads_are_not_captured() -> None:
    model = tiny.build("llama")
    runner = runner_of(model)
    input_ids, seq_lens = tiny.random_request(5, 11, 2, 7)
    others, _ = tiny.random_request(40, seed=2)
    expected = runner.forward_eagle3(input_ids, seq_lens)
    stop = threading.Event()

    def train_meanwhile() -> None:
        while not stop.is_set():
            model(input_ids=others[None])

    thread = threading.Thread(target=train_meanwhile)
    thread.start()
    try:
        for _ in range(20):
            assert_same(runner.forward_eagle3(input_ids, seq_lens), expected, tolerance=0.0)
    finally:
        stop.set()
        thread.join()


def test_two_runners_of_one_model_do_not_mix() -> None:
    model = tiny.build("llama")
    first, second = runner_of(model), HFTargetRunner(model)
    second.set_aux_layers((0, 1, 4))
    input_ids, seq_lens = tiny.random_request(5, 3)
    expected = first.forward_eagle3(input_ids, seq_lens)

    second.forward_eagle3(input_ids, seq_lens)
    second.close()

    assert_same(first.forward_eagle3(input_ids, seq_lens), expected, tolerance=0.0)


def test_bfloat16_is_kept_and_near_float32() -> None:
    input_ids, seq_lens = tiny.random_request(5, 11, 2)
    exact = runner_of(tiny.build("llama")).forward_eagle3(input_ids, seq_lens)
    runner = runner_of(tiny.build("llama").to(torch.bfloat16))

    forward = runner.forward_eagle3(input_ids, seq_lens)

    assert runner.info.dtype == "bfloat16"
    assert forward.aux_hidden_states.dtype == forward.last_hidden_states.dtype == torch.bfloat16
    assert runner.compute_logits(forward.last_hidden_states).dtype == torch.bfloat16
    error = (forward.last_hidden_states.float() - exact.last_hidden_states).norm() / exact.last_hidden_states.norm()
    assert error < 0.05


def test_compiled_model_is_taken_apart() -> None:
    model = tiny.build("llama")
    input_ids, seq_lens = tiny.random_request(5, 3)

    compiled = runner_of(torch.compile(model, backend="eager")).forward_eagle3(input_ids, seq_lens)

    assert_same(compiled, runner_of(model).forward_eagle3(input_ids, seq_lens))


def test_close_twice_and_then_nothing_runs() -> None:
    model = tiny.build("llama")
    runner = runner_of(model)
    input_ids, seq_lens = tiny.random_request(5)

    runner.close()
    runner.close()

    for call in (
        lambda: runner.forward_eagle3(input_ids, seq_lens),
        lambda: runner.compute_logits(torch.zeros(1, tiny.HIDDEN)),
        runner.input_embedding_weight,
        lambda: runner.draft_head(input_ids),
    ):
        with pytest.raises(AdapterError, match="closed"):
            call()
    model(input_ids=input_ids[None])


def test_forward_without_layers_is_refused() -> None:
    input_ids, seq_lens = tiny.random_request(5)

    with pytest.raises(AdapterError, match="set_aux_layers"):
        HFTargetRunner(tiny.build("llama")).forward_eagle3(input_ids, seq_lens)


@pytest.mark.parametrize(
    ("raised", "message"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"), "lower max_batch_tokens, now 77"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "lower max_batch_tokens, now 77"),
        (RuntimeError("device-side assert"), "RuntimeError: device-side assert"),
        (IndexError("index out of range in self"), "IndexError: index out of range in self"),
    ],
)
def test_engine_failures_are_adapter_errors(raised: Exception, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.build("llama")
    runner = runner_of(model, max_batch_tokens=77)
    input_ids, seq_lens = tiny.random_request(5)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise raised

    with monkeypatch.context() as patch:
        patch.setattr(model.model.layers[3], "forward", fail)
        with pytest.raises(AdapterError, match=message) as caught:
            runner.forward_eagle3(input_ids, seq_lens)

    assert caught.value.__cause__ is raised
    assert not model.model.layers[0]._forward_hooks
    runner.forward_eagle3(input_ids, seq_lens)


def test_layer_that_does_not_run_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.build("llama")
    runner = runner_of(model)
    input_ids, seq_lens = tiny.random_request(5)

    monkeypatch.setattr(model.model.config, "num_hidden_layers", 2)

    with pytest.raises(AdapterError, match="did not run"):
        runner.forward_eagle3(input_ids, seq_lens)


def test_model_without_a_head_is_refused() -> None:
    with pytest.raises(AdapterError, match="no causal language model"):
        HFTargetRunner(transformers.LlamaModel(tiny.LAYOUTS["llama"][1]()))


def test_module_dict_of_layers_is_found() -> None:
    model = tiny.build("llama")
    input_ids, seq_lens = tiny.random_request(5)
    expected = runner_of(model).forward_eagle3(input_ids, seq_lens)

    class Layers(torch.nn.ModuleDict):
        def __getitem__(self, key: Any) -> Any:
            return list(self.values())[key]

    model.model.layers = Layers({str(number): layer for number, layer in enumerate(model.model.layers)})

    assert_same(runner_of(model).forward_eagle3(input_ids, seq_lens), expected)
