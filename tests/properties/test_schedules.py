"""Random schedules of clients, cancellations and restarts against real servers: every batch is the oracle's."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, multiple, precondition, rule

from eagle_target.client import balancer
from eagle_target.testing.server import loopback_server
from tests.faults.processes import ServerUnderFault, faulty_server
from tests.properties.schedules import Stream, Trainer, many_rows, mappings, rows

if TYPE_CHECKING:
    from collections.abc import Iterator

    from eagle_target.contract.vocab_mapping import VocabMapping
    from tests.properties.schedules import Rows

MOST_TRAINERS = 5
# Several forwards for a request, and several requests for a forward; channels soon found dead.
SETTINGS: dict[str, Any] = {"max_batch_tokens": 40, "channel_lease": 2.0, "max_mappings": 2}
forms = st.fixed_dictionaries(
    {
        "encoding": st.sampled_from(["probs", "probs", "hidden", "logits"]),
        "rows": st.sampled_from(["supervised", "all"]),
        "probs_dtype": st.sampled_from([torch.float32, torch.bfloat16]),
        "checksum": st.booleans(),
    }
)


class Schedules(RuleBasedStateMachine):
    """Trainers come and go, ask at the same time, change their minds, and the server is restarted under them."""

    trainers = Bundle("trainers")
    streams = Bundle("streams")
    process: ServerUnderFault
    here_url: str

    def __init__(self) -> None:
        super().__init__()
        self.open: list[Trainer] = []

    @precondition(lambda self: len(self.open) < MOST_TRAINERS)
    @rule(
        target=trainers,
        transport=st.sampled_from(["wire", "shm", "nccl", "inprocess", "auto", "nccl,shm,wire"]),
        mapping=mappings,
        form=forms,
    )
    def connect(self, transport: str, mapping: VocabMapping, form: dict[str, Any]) -> Trainer:
        url = self.here_url if transport == "inprocess" else self.process.url
        self.open.append(Trainer.connect(url, transport, mapping, **form))
        return self.open[-1]

    @rule(trainer=trainers, mapping=mappings)
    def change_mapping(self, trainer: Trainer, mapping: VocabMapping) -> None:
        trainer.choose(mapping)

    @rule(trainer=trainers, items=many_rows)
    def ask(self, trainer: Trainer, items: list[Rows]) -> None:
        for item in items:
            trainer.ask(item)

    @precondition(lambda self: self.open)
    @rule(item=rows)
    def ask_everywhere(self, item: Rows) -> None:
        for trainer in self.open:
            trainer.ask(item)

    @precondition(lambda self: self.open)
    @rule()
    def collect(self) -> None:
        for trainer in self.open:
            trainer.collect()

    @rule(target=streams, trainer=trainers, items=many_rows, depth=st.integers(1, 4))
    def prefetch(self, trainer: Trainer, items: list[Rows], depth: int) -> Stream:
        return Stream(trainer, items, depth)

    @rule(stream=streams, count=st.integers(1, 4))
    def take(self, stream: Stream, count: int) -> None:
        stream.take(count)

    @rule(stream=consumes(streams))
    def drop(self, stream: Stream) -> None:
        stream.drop()

    @rule(target=trainers, trainer=consumes(trainers))
    def close(self, trainer: Trainer) -> Any:
        trainer.close()
        self.open.remove(trainer)
        return multiple()

    @precondition(lambda self: self.open)
    @rule(is_killed=st.booleans())
    def restart_the_server(self, is_killed: bool) -> None:
        if is_killed:
            self.process.kill()
        else:
            self.process.terminate()
            assert self.process.join() == 0
        self.process.start()

    def teardown(self) -> None:
        for trainer in self.open:
            trainer.collect()
            trainer.close()


@pytest.fixture
def servers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(balancer, "FIRST_PAUSE_SECONDS", 0.02)
    with ExitStack() as running:
        Schedules.process = running.enter_context(faulty_server({"delay": 0.002}, **SETTINGS))
        Schedules.here_url = running.enter_context(loopback_server(**SETTINGS)).url
        yield


@pytest.mark.usefixtures("servers")
@pytest.mark.slow
def test_every_batch_of_every_schedule_is_right() -> None:
    from hypothesis.stateful import run_state_machine_as_test

    profile = settings.default or settings()
    run_state_machine_as_test(
        Schedules,
        settings=settings(
            profile,
            # One takes about half a second.
            max_examples=max(profile.max_examples // 10, 30),
            stateful_step_count=20,
            # What depends on the moment is not found again by trying less of it.
            phases=[Phase.explicit, Phase.generate],
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
        ),
    )
