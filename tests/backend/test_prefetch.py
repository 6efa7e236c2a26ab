"""A few batches on their way while the trainer works on one."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any

import pytest
import torch

from eagle_target.backend import Eagle3TargetBackend
from eagle_target.colocated import RunnerEagle3TargetModel
from eagle_target.contract.batch import Eagle3TargetBatch
from eagle_target.errors import AdapterError, ContractError
from eagle_target.testing.tiny import EmbeddingRunner, shuffled_mapping

if TYPE_CHECKING:
    from collections.abc import Iterator

    from eagle_target.contract.model_info import ModelInfo
    from eagle_target.contract.vocab_mapping import VocabMapping

Item = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def item(number: int) -> Item:
    rows = torch.ones(1, 3, dtype=torch.int64)
    return rows * number, rows, rows


def batch_of(number: int) -> Eagle3TargetBatch:
    ids, mask, loss = item(number)
    return Eagle3TargetBatch(
        aux_hidden_states=torch.zeros(1, 3, 3), input_ids=ids, attention_mask=mask, loss_mask=loss, logits=mask
    )


class Handle:
    def __init__(self, number: int, fails: bool) -> None:
        self.number, self.fails, self.cancelled, self.taken = number, fails, False, False

    def result(self, timeout: float | None = None) -> Eagle3TargetBatch:
        assert not self.cancelled
        self.taken = True
        if self.fails:
            raise AdapterError(f"batch {self.number} failed")
        return batch_of(self.number)

    def cancel(self) -> bool:
        self.cancelled = True
        return not self.taken


class Recorder(Eagle3TargetBackend):
    """Records what is asked for; batch n is asked for with ids n."""

    def __init__(self, failing: tuple[int, ...] = (), refused: tuple[int, ...] = ()) -> None:
        self.failing, self.refused = failing, refused
        self.handles: list[Handle] = []
        self.arguments: list[dict[str, Any]] = []

    def generate_batch(self, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Eagle3TargetBatch:
        raise AssertionError("prefetch does not wait")

    def generate_batch_async(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, loss_mask: torch.Tensor, **packing: Any
    ) -> Handle:
        number = int(input_ids[0, 0])
        if number in self.refused:
            raise ContractError(f"rows {number} are bad")
        self.arguments.append(packing)
        self.handles.append(Handle(number, number in self.failing))
        return self.handles[-1]

    def model_info(self) -> ModelInfo:
        raise NotImplementedError

    def input_embedding_weight(self) -> torch.Tensor:
        return torch.zeros(1)

    def _use_mapping(self, mapping: VocabMapping) -> None:
        """No mapping is needed."""

    def close(self) -> None:
        """Nothing is open."""

    @property
    def on_their_way(self) -> int:
        return sum(not (handle.taken or handle.cancelled) for handle in self.handles)


class Counter:
    """Items 0 to n - 1, and how many were taken."""

    def __init__(self, total: int, failing: int | None = None) -> None:
        self.total, self.failing, self.taken = total, failing, 0

    def __iter__(self) -> Iterator[Item]:
        for number in range(self.total):
            if number == self.failing:
                raise OSError(f"item {number} cannot be read")
            self.taken += 1
            yield item(number)


def number_of(batch: Eagle3TargetBatch) -> int:
    return int(batch.input_ids[0, 0])


@pytest.mark.parametrize("depth", [1, 2, 3, 10])
def test_batches_come_in_order_with_depth_of_them_on_their_way(depth: int) -> None:
    backend, items = Recorder(), Counter(7)
    seen = []
    for batch in backend.prefetch(items, depth=depth):
        seen.append(number_of(batch))
        assert backend.on_their_way == min(depth, 7 - len(seen))
        assert items.taken == min(depth + len(seen), 7)
    assert seen == list(range(7))


def test_nothing_is_asked_for_before_the_first_batch_is() -> None:
    backend = Recorder()
    prefetch = backend.prefetch(Counter(3))
    assert backend.handles == []
    next(prefetch)
    assert len(backend.handles) == 3


def test_no_items_give_no_batches() -> None:
    assert list(Recorder().prefetch([])) == []


@pytest.mark.parametrize("depth", [0, -1])
def test_depth_below_one_is_refused(depth: int) -> None:
    with pytest.raises(ContractError, match=f"depth must be at least 1, got {depth}"):
        Recorder().prefetch([], depth=depth)
    gc.collect()


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_failed_batch_is_raised_at_its_turn_and_the_rest_is_cancelled(depth: int) -> None:
    backend = Recorder(failing=(2,))
    prefetch = backend.prefetch(Counter(9), depth=depth)
    assert [number_of(next(prefetch)) for _ in range(2)] == [0, 1]
    with pytest.raises(AdapterError, match="batch 2 failed"):
        next(prefetch)
    assert all(handle.cancelled for handle in backend.handles[3:])
    assert backend.on_their_way == 0
    assert list(prefetch) == []


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_failing_items_are_raised_at_their_turn(depth: int) -> None:
    prefetch = Recorder().prefetch(Counter(9, failing=2), depth=depth)
    assert [number_of(next(prefetch)) for _ in range(2)] == [0, 1]
    with pytest.raises(OSError, match="item 2 cannot be read"):
        next(prefetch)
    assert list(prefetch) == []


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_bad_rows_are_raised_at_their_turn(depth: int) -> None:
    prefetch = Recorder(refused=(2,)).prefetch(Counter(9), depth=depth)
    assert [number_of(next(prefetch)) for _ in range(2)] == [0, 1]
    with pytest.raises(ContractError, match="rows 2 are bad"):
        next(prefetch)
    assert list(prefetch) == []


@pytest.mark.parametrize("how", ["close", "with", "del"])
def test_stopping_early_cancels_what_is_on_its_way(how: str) -> None:
    backend = Recorder()
    prefetch = backend.prefetch(Counter(9), depth=3)
    next(prefetch)
    if how == "close":
        prefetch.close()
        prefetch.close()
        assert list(prefetch) == []
    elif how == "with":
        with prefetch:
            next(prefetch)
    else:
        del prefetch
        gc.collect()
    assert backend.on_their_way == 0


def test_items_are_mappings_or_sequences() -> None:
    backend = Recorder()
    ids, mask, loss = item(4)
    seq_lens = torch.tensor([[1, 2]])
    mapping = {"input_ids": ids, "attention_mask": mask, "loss_mask": loss, "seq_lens": seq_lens, "labels": ids}
    batches = list(backend.prefetch([mapping, [ids, mask, loss], (ids, mask, loss, "more")]))  # type: ignore[list-item]
    assert [number_of(batch) for batch in batches] == [4, 4, 4]
    assert [set(arguments) for arguments in backend.arguments] == [{"seq_lens"}, set(), set()]


@pytest.mark.parametrize("bad", [{"input_ids": torch.ones(1, 3)}, (torch.ones(1, 3),)])
def test_item_that_lacks_rows_is_refused(bad: Any) -> None:
    with pytest.raises(ContractError, match=r"lacks \['attention_mask', 'loss_mask'\]"):
        list(Recorder().prefetch([bad]))


def test_real_batches_are_those_of_waiting() -> None:
    with RunnerEagle3TargetModel(EmbeddingRunner(delay=0.002)) as target:
        target.set_vocab_mapping(shuffled_mapping(211, 30))
        for number, batch in enumerate(target.prefetch((item(number) for number in range(6)), depth=3)):
            expected = target.generate_batch(*item(number)).tensors()
            assert all(torch.equal(tensor, expected[name]) for name, tensor in batch.tensors().items())


def test_real_batches_that_were_given_up_do_not_run() -> None:
    runner = EmbeddingRunner(delay=0.1)
    with RunnerEagle3TargetModel(runner, encoding="logits") as target:
        with target.prefetch(Counter(9), depth=4) as batches:
            next(batches)
        target.generate_batch_async(*item(0)).result()
    assert len(runner.forwards) <= 3
