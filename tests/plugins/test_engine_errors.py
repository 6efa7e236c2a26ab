"""Whatever an engine raises leaves as an AdapterError that says what to do."""

from __future__ import annotations

import pytest
import torch

from eagle_target.errors import AdapterError, ContractError, EngineDead
from eagle_target.plugins.engine_errors import engine_call

CPU = torch.device("cpu")


class MotorGoneError(Exception):
    """As an engine says that its processes are gone."""


def run(error: BaseException, device: torch.device | None = None, *, exits: bool = False) -> None:
    with engine_call(
        "a forward",
        engine="motor 3",
        memory_remedy=lambda message: "lower the cache" if "cache" in message else "lower the batch",
        device=device,
        memory_words=("kv cache",),
        death_names=("MotorGoneError",),
        exits=exits,
    ):
        raise error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("no such thing"), r"^motor 3 failed in a forward: ValueError: no such thing$"),
        (torch.OutOfMemoryError("CUDA"), r"^out of memory in a forward: lower the batch \(CUDA\)$"),
        (MemoryError(), r"^out of memory in a forward: lower the batch \(\)$"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "lower the batch"),
        (RuntimeError("DefaultCPUAllocator: not enough memory"), "lower the batch"),
        (OSError("[Errno 12] Cannot allocate memory"), "lower the batch"),
        (ValueError("too few blocks of KV cache"), "lower the cache"),
    ],
)
def test_errors_of_an_engine_say_what_to_do(error: Exception, message: str) -> None:
    with pytest.raises(AdapterError, match=message) as caught:
        run(error)

    assert caught.value.__cause__ is error


def test_a_device_is_named() -> None:
    with pytest.raises(AdapterError, match="out of memory in a forward on cpu: "):
        run(torch.OutOfMemoryError("x"), CPU)


def test_our_own_errors_and_the_end_of_the_process_pass() -> None:
    with pytest.raises(ContractError, match="ours"):
        run(ContractError("ours"))
    with pytest.raises(KeyboardInterrupt):
        run(KeyboardInterrupt())
    with pytest.raises(SystemExit):
        run(SystemExit(1))


def test_an_engine_that_ends_the_process_is_an_error() -> None:
    with pytest.raises(AdapterError, match=r"^motor 3 ended in a forward: its log says why$") as caught:
        run(SystemExit(1), exits=True)

    assert not isinstance(caught.value, EngineDead)


def test_an_engine_whose_processes_are_gone_is_dead_whatever_its_message_says() -> None:
    with pytest.raises(EngineDead) as caught:
        run(MotorGoneError("see the cache"))

    assert str(caught.value) == (
        "motor 3 died in a forward: its log says why (MotorGoneError). Restart the server; if it ran out of memory, "
        "lower the batch"
    )


def test_neither_gradients_nor_autocast_reach_the_engine() -> None:
    weight = torch.ones(2, 2, requires_grad=True)
    arguments = {"engine": "motor", "memory_remedy": "none"}

    with torch.autocast("cpu", dtype=torch.bfloat16):
        with engine_call("a forward", device=CPU, **arguments):  # type: ignore[arg-type]
            product = weight @ weight
        with engine_call("a call", **arguments):  # type: ignore[arg-type]
            call = weight @ weight

    assert product.dtype == torch.float32
    assert call.dtype == torch.bfloat16
    assert not product.requires_grad
