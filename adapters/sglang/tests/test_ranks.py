"""Supervision of ranks, with stand-in ranks that have no engine: real processes, sockets and shared memory."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from eagle_target_sglang import ranks
from eagle_target_sglang.ranks import RankGroup

from eagle_target.errors import ContractError, EngineDead

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE = Path(__file__).resolve().parent
# Far less than the ten minutes that a rank waits here.
SECONDS = 60.0


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> Iterator[RankGroup]:
    monkeypatch.setenv("PYTHONPATH", str(HERE), prepend=os.pathsep)
    group = RankGroup(2, "stand_in_rank")
    yield group
    group.close()


def is_running(pid: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 0)
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    return False


def wait_until_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + SECONDS
    while any(is_running(pid) for pid in pids):
        assert time.monotonic() < deadline, "a rank was left behind"
        time.sleep(0.05)


def test_tensors_go_and_come_back_as_they_were(group: RankGroup) -> None:
    sent = {
        "bfloat16": torch.randn(5, 7).bfloat16(),
        "int64": torch.arange(3),
        "empty": torch.empty(0, 4),
        "large": torch.randn(1 << 20),
    }

    header, received = group.call({"command": "echo"}, sent)

    assert header["pid"] == group.pids[0]
    assert received.keys() == sent.keys()
    for name, tensor in sent.items():
        assert torch.equal(received[name], tensor + 1)


def test_what_all_ranks_refuse_is_raised_and_they_go_on(group: RankGroup) -> None:
    with pytest.raises(ContractError, match="not like this"):
        group.call({"command": "raise"})

    group.call({"command": "echo"})


@pytest.mark.parametrize(("command", "how"), [("die", "signal SIGKILL"), ("exit", "exit status 3")])
def test_a_dead_rank_is_an_error_within_seconds(group: RankGroup, command: str, how: str) -> None:
    started = time.monotonic()

    with pytest.raises(EngineDead, match=rf"rank 1 of 2 ended \({how}\)"):
        group.call([{"command": "wait"}, {"command": command}])

    assert time.monotonic() - started < SECONDS
    wait_until_gone(group.pids)
    with pytest.raises(EngineDead, match="the engine is gone"):
        group.call({"command": "echo"})


def test_a_rank_killed_between_calls_is_an_error_of_the_next(group: RankGroup) -> None:
    group.call({"command": "echo"})
    os.kill(group.pids[1], signal.SIGKILL)
    wait_until_gone(group.pids[1:])

    with pytest.raises(EngineDead, match="rank 1 of 2 ended"):
        group.call({"command": "echo"})


def test_a_rank_killed_while_nobody_calls_is_noticed_when_asked(group: RankGroup) -> None:
    group.check_alive()
    os.kill(group.pids[1], signal.SIGKILL)
    wait_until_gone(group.pids[1:])

    for _ in range(2):
        with pytest.raises(EngineDead, match="rank 1 of 2 ended"):
            group.check_alive()


def test_a_rank_that_fails_alone_ends_those_that_wait_for_it(group: RankGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "GRACE_SECONDS", 1.0)

    with pytest.raises(EngineDead, match=r"rank 1: not like this; ranks \[0\] did not answer"):
        group.call([{"command": "wait"}, {"command": "raise"}])

    wait_until_gone(group.pids)


def test_close_twice_leaves_no_process(group: RankGroup) -> None:
    group.close()
    group.close()

    wait_until_gone(group.pids)
    with pytest.raises(EngineDead, match="closed"):
        group.call({"command": "echo"})


def test_ranks_end_with_the_process_that_started_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(HERE), prepend=os.pathsep)
    script = (
        "import os, signal\n"
        "from eagle_target_sglang.ranks import RankGroup\n"
        "group = RankGroup(2, 'stand_in_rank')\n"
        "group.call({'command': 'echo'})\n"
        "print(*group.pids, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )

    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)

    wait_until_gone([int(pid) for pid in result.stdout.split()])
