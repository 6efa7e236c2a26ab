"""What a review of the CUDA paths found, a test each; docs/gpu.md has the list."""

from __future__ import annotations

import sys
import threading
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from eagle_target_nccl.device_tensors import DeviceTensors
from eagle_target_nccl.groups import SERVER, PairGroup
from eagle_target_nccl.options import NcclOptions
from eagle_target_nccl.outbox import Parcel
from eagle_target_nccl.proofs import DIGESTS
from eagle_target_nccl.transport import NcclTransport
from eagle_target_shm.cuda import SegmentPool
from eagle_target_shm.hosts import this_host
from eagle_target_shm.memory import SharedTensors
from eagle_target_shm.options import ShmOptions
from eagle_target_shm.segment import PROBE_BYTES
from eagle_target_shm.server import ShmServerEndpoint
from eagle_target_shm.transport import ShmTransport

from eagle_target.backend import BatchForm, RequestingBackend
from eagle_target.client.remote import RemoteEagle3TargetModel
from eagle_target.colocated import RunnerEagle3TargetModel
from eagle_target.compute.assembly import StagedSink
from eagle_target.contract.sinks import PackedTensors, RowStore
from eagle_target.errors import ConnectError, ContractError
from eagle_target.memory import PinnedPool
from eagle_target.server.engine.pipeline import DeviceOrder, HiddenPart, Pipeline, SupervisedPart
from eagle_target.testing.tiny import EmbeddingRunner, shuffled_mapping
from eagle_target.testing.transport_harness import ChannelPair, MemoryBody, MemoryControl
from tests.cuda_sim.device import PURE, Spin, Stuck
from tests.cuda_sim.patches import fake_cuda
from tests.cuda_sim.targets import DeviceRunner, SupervisingDeviceRunner, served
from tests.server.cases import assert_same_tensors, engine, expected_of, request_of, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from eagle_target.plugins.transport import ServerEndpoint
    from eagle_target.server.engine.job import Part
    from eagle_target.server.engine.pipeline import ForwardedPart
    from tests.cuda_sim.device import Gate, Machine
    from tests.cuda_sim.tensors import World

SIZES = ([14], [3, 3, 8])
# Where an order changes nothing, or a server comes and goes with each.
IN_ONE_ORDER = pytest.mark.parametrize("seed", [0])
IN_PLAIN_ORDERS = pytest.mark.parametrize("seed", range(len(PURE)))


def rows_of_a_trainer(seed: int = 0) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 211, (2, 12), generator=draw)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "loss_mask": torch.ones_like(ids)}


# F1: what a runner put is read after it may be written again.


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_f1_what_a_supervising_runner_puts_is_kept_until_it_is_copied(world: World, sizes: list[int]) -> None:
    with engine(SupervisingDeviceRunner, max_batch_tokens=64) as server:
        for encoding in ("probs", "hidden", "logits"):
            requests = [request_of(sizes, seed=seed, encoding=encoding) for seed in range(2)]
            answers = [server.submit(request) for request in requests]
            for request, answer in zip(requests, answers, strict=True):
                assert_same_tensors(answer.result(30).tensors, expected_of(request))


def test_f1_what_shm_lends_by_a_copy_is_kept_until_the_client_is_done(machine: Machine, peers: None) -> None:
    pair, tensors = shm_channel(), PackedTensors()
    side = torch.cuda.Stream("cuda:0")  # type: ignore[no-untyped-call]
    with torch.cuda.stream(side):
        tensors.put("rows", torch.ones(64, 64, device="cuda:0"))
    side.synchronize()
    reply = pair.server.send("t", tensors, {})
    tensors.clear()
    with torch.cuda.stream(side):
        torch.zeros(64, 64, device="cuda:0")
    side.synchronize()
    received = PackedTensors()
    with machine.in_process("trainer"):
        pair.client.receive(MemoryBody.of(reply), received)
        assert bool((received["rows"].cpu() == 1).all())
    received.clear()
    pair.close()


def test_f1_room_that_an_answer_steps_out_of_is_given_to_others_when_it_is_copied(
    machine: Machine, peers: None
) -> None:
    pair = shm_channel()
    side, (first, second) = torch.cuda.Stream("cuda:0"), (pair.server.new_tensors() for _ in range(2))  # type: ignore[no-untyped-call]
    with torch.cuda.stream(side):
        first.put("rows", torch.ones(3 << 16, device="cuda:0"))
    side.synchronize()
    assert isinstance(first, SharedTensors)
    first.step_out()
    with torch.cuda.stream(side):
        second.put("rows", torch.zeros(3 << 16, device="cuda:0"))
    side.synchronize()
    assert bool((first["rows"].cpu() == 1).all())
    first.clear()
    second.clear()
    pair.close()


def test_f1_memory_of_a_channel_that_ended_is_not_written_for_it_any_more(machine: Machine, peers: None) -> None:
    pool, device = SegmentPool(), torch.device("cuda:0")
    side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    first = pool.take(device, 1 << 16)
    address = first.handle
    with torch.cuda.stream(side):
        first.used_on.add(side)
        first.tensor(0, (64,), torch.uint8, int).fill_(7)
    del first
    second = pool.take(device, 1 << 16)
    assert second.handle == address
    second.write_probe(bytes(range(PROBE_BYTES)))
    machine.drain()
    assert second.read_probe() == bytes(range(PROBE_BYTES))
    del second
    pool.close()


def test_f1_what_fails_is_over_when_its_memory_goes_back(machine: Machine) -> None:
    order = DeviceOrder(torch.device("cuda:0"), is_beside=True)
    pinned = torch.empty(64, pin_memory=True)

    def fail() -> None:
        with order.following(None, order.forwarded()):
            pinned.copy_(torch.ones(64, device="cuda:0"), non_blocking=True)
            raise MemoryError

    with pytest.raises(MemoryError):
        fail()
    pinned.fill_(2)
    machine.drain()
    assert bool((pinned == 2).all())


def shm_channel() -> ChannelPair:
    return ChannelPair(ShmTransport, _shm_endpoint(), {}, device="cuda:0")


def _shm_endpoint() -> ShmServerEndpoint:
    return ShmServerEndpoint(ShmOptions(max_bytes=1 << 20, cuda_bytes=1 << 20))


# F3: no wait for a whole device, beside which a send may spin for as long as its client likes.


def spin(machine: Machine, process: str = "main") -> Spin:
    """A send to a client that does not come, on a stream of its own of the process's first device."""
    with machine.in_process(process):
        gate = Spin("a send to a slow client", lambda: False)
        machine.launch(machine.new_queue(0), gate.name, gate=gate)
    return gate


def device_waits(machine: Machine) -> list[str]:
    return [sync.site for sync in machine.syncs if sync.kind == "device"]


@pytest.fixture
def vllm_worker(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module that runs in vLLM's workers, with as much of vLLM as importing it takes."""
    stand_ins: dict[str, dict[str, Any]] = {
        "vllm": {"__version__": "0.0"},
        "vllm.distributed": {"get_tensor_model_parallel_rank": lambda: 0},
        "vllm.distributed.kv_transfer": {"get_kv_transfer_group": lambda: None},
        "eagle_target_vllm.capture": dict.fromkeys(("CapturedSequence", "ForwardCapture", "StepObserver")),
        "eagle_target_vllm.compatibility": {"find_obstacle": None},
        "eagle_target_vllm.weights": dict.fromkeys(("find_embedding", "find_final_norm", "find_head_form")),
    }
    for name, content in stand_ins.items():
        module = ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "eagle_target_vllm.worker", raising=False)
    import eagle_target_vllm.worker

    yield eagle_target_vllm.worker
    del sys.modules["eagle_target_vllm.worker"]


def test_f3_a_vllm_worker_waits_for_its_own_stream(machine: Machine, vllm_worker: Any) -> None:
    spin(machine)
    made = PackedTensors()
    aux = torch.ones(4, 6, device="cuda:0")
    worker = object.__new__(vllm_worker.TargetWorker)
    worker._device = torch.device("cuda:0")
    worker._observer = SimpleNamespace(capture=SimpleNamespace(shortfall=lambda: (), problem=None), end=lambda: None)
    pinned = torch.empty(4, 6, pin_memory=True)
    worker._jobs = [
        vllm_worker.Job(
            aux=aux,
            last=torch.ones(4, 2, device="cuda:0"),
            seq_lens=[4],
            request=None,
            rows=None,
            sink=_PinnedSink(made, pinned),
        )
    ]
    assert worker.finish() == {"problem": None, "shortfall": []}
    assert bool((pinned == 1).all())
    assert device_waits(machine) == []


class _PinnedSink:
    """Copies what is put to pinned memory without waiting, as a block that other processes map."""

    def __init__(self, made: PackedTensors, pinned: torch.Tensor) -> None:
        self._made = made
        self._pinned = pinned

    def allocate(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> RowStore:
        return self._made.allocate(name, shape, dtype)

    def put(self, name: str, rows: torch.Tensor) -> None:
        if name == "aux_hidden_states":
            RowStore(self._pinned, non_blocking=True).write(0, rows)


def test_f3_a_parcel_waits_for_the_streams_that_make_it(machine: Machine) -> None:
    spin(machine)
    tensors = PackedTensors()
    tensors.put("rows", torch.ones(4, device="cuda:0"))
    parcel = Parcel(tensors)
    with parcel.on_stream(torch.device("cpu")):
        assert tensors["rows"].inner.tolist() == [1.0] * 4  # type: ignore[attr-defined]
    assert device_waits(machine) == []


def test_f3_a_parcel_of_a_device_is_sent_after_what_makes_it(machine: Machine) -> None:
    spin(machine)
    tensors, side = DeviceTensors(torch.device("cuda:0")), torch.cuda.Stream("cuda:0")  # type: ignore[no-untyped-call]
    with torch.cuda.stream(side):
        tensors.put("rows", torch.ones(4, device="cuda:0"))
    parcel = Parcel(tensors)
    with parcel.on_stream(torch.device("cuda:0")):
        assert tensors["rows"].clone().tolist() == [1.0] * 4
    assert device_waits(machine) == []


def test_f3_a_channel_of_shared_device_memory_never_waits_for_the_device(machine: Machine, peers: None) -> None:
    endpoint = _shm_endpoint()
    sends = [spin(machine, process) for process in ("main", "trainer")]
    for _ in range(2):
        pair = ChannelPair(ShmTransport, endpoint, {}, device="cuda:0")
        received = PackedTensors()
        reply = pair.server.send("t", {"rows": torch.ones(64, 64, device="cuda:0")}, {})
        with machine.in_process("trainer"):
            pair.client.receive(MemoryBody.of(reply), received)
            assert bool((received["rows"].cpu() == 1).all())
            # The memory goes back when the last of it is let go of.
            received.clear()
        pair.close()
        del pair, reply
        wait_until(lambda: endpoint._reserved == 0, "the end of the channel")
    assert device_waits(machine) == []
    for send in sends:
        machine.open(send)
    endpoint.close()


def test_f3_memory_of_another_process_goes_back_when_it_is_read(machine: Machine, peers: None) -> None:
    pair = shm_channel()
    received = PackedTensors()
    reply = pair.server.send("t", {"rows": torch.ones(3 << 16, device="cuda:0")}, {})
    with machine.in_process("trainer"):
        pair.client.receive(MemoryBody.of(reply), received)
        # Read on the stream that it was received on, by work that is only queued when the memory is let go of.
        read = received["rows"].clone()
        received.clear()
    wait_until(lambda: pair.server._arenas["cuda"].loans == 0, "the memory")  # type: ignore[attr-defined]
    side = torch.cuda.Stream("cuda:0")  # type: ignore[no-untyped-call]
    with torch.cuda.stream(side):
        pair.server.new_tensors().put("rows", torch.zeros(3 << 16, device="cuda:0"))
    side.synchronize()
    with machine.in_process("trainer"):
        assert bool((read.cpu() == 1).all())
    pair.close()


# F4: a device without a number is the current one of the thread that names it, for all threads.


def mapping_of_50() -> Any:
    return shuffled_mapping(211, 50)


def expected_batch(rows: Mapping[str, Any], encoding: Any = "probs") -> dict[str, torch.Tensor]:
    with RunnerEagle3TargetModel(EmbeddingRunner(), encoding=encoding) as colocated:
        colocated.set_vocab_mapping(mapping_of_50())
        return dict(colocated.generate_batch(**rows).tensors())


@IN_PLAIN_ORDERS
@pytest.mark.parametrize("transport", ["wire", "shm", "nccl"])
def test_f4_all_threads_of_a_client_use_the_device_that_was_current_when_it_was_made(
    machine: Machine, peers: None, transport: str
) -> None:
    rows = rows_of_a_trainer()
    with served(machine) as url, machine.in_process("trainer"):
        torch.cuda.set_device(2)
        with RemoteEagle3TargetModel.from_urls([url], device="cuda", encoding="probs", transport=transport) as client:
            client.set_vocab_mapping(mapping_of_50())
            batches = [client.generate_batch(**rows), *client.prefetch([rows, rows])]
            assert client.input_embedding_weight().device == torch.device("cuda:2")
            for batch in batches:
                torch.cuda.current_stream("cuda:2").synchronize()
                assert {tensor.device for tensor in batch.tensors().values()} == {torch.device("cuda:2")}
                on_cpu = {name: tensor.cpu() for name, tensor in batch.tensors().items()}
                assert_same_tensors(on_cpu, expected_batch(rows))
    touched = {device for process, device in machine.contexts if process == "trainer"}
    # shm maps the memory of the target's device.
    assert touched == ({0, 2} if transport == "shm" else {2})


@IN_PLAIN_ORDERS
def test_f4_all_threads_of_a_colocated_target_use_the_device_that_was_current_when_it_was_made(
    machine: Machine,
) -> None:
    rows = rows_of_a_trainer()
    torch.cuda.set_device(2)
    with RunnerEagle3TargetModel(DeviceRunner("cuda:3"), device="cuda", encoding="hidden") as target:
        target.set_vocab_mapping(mapping_of_50())
        assert target.form.device == torch.device("cuda:2")
        batches = [target.generate_batch(**rows), *target.prefetch([rows])]
        torch.cuda.current_stream("cuda:2").synchronize()
        for batch in batches:
            assert {tensor.device for tensor in batch.tensors().values()} == {torch.device("cuda:2")}
            on_cpu = {name: tensor.cpu() for name, tensor in batch.tensors().items()}
            assert_same_tensors(on_cpu, expected_batch(rows, "hidden"))
    assert ("main", 0) not in machine.contexts


@IN_ONE_ORDER
def test_f4_threads_of_a_backend_have_its_device_as_their_current_one(machine: Machine) -> None:
    seen: list[int] = []

    class Looking(DeviceRunner):
        def forward_eagle3(self, input_ids: torch.Tensor, seq_lens: Sequence[int]) -> Any:
            seen.append(torch.cuda.current_device())
            return super().forward_eagle3(input_ids, seq_lens)

    torch.cuda.set_device(2)
    with RunnerEagle3TargetModel(Looking("cuda:2"), device="cuda", encoding="logits") as target:
        for _ in target.prefetch([rows_of_a_trainer()]):
            pass
    assert seen == [2]


@IN_PLAIN_ORDERS
@pytest.mark.parametrize("supervises", [False, True])
def test_f4_threads_of_a_server_are_on_its_targets_device(
    machine: Machine, supervises: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = SupervisingDeviceRunner if supervises else DeviceRunner
    seen: dict[str, int] = {}
    kind = SupervisedPart if supervises else HiddenPart
    forward, project = Pipeline.forward, kind.project

    def look(pipeline: Pipeline, parts: Sequence[Part]) -> list[ForwardedPart]:
        seen["engine"] = torch.cuda.current_device()
        return forward(pipeline, parts)

    def look_again(part: Any, *arguments: Any) -> Any:
        seen["projection"] = torch.cuda.current_device()
        return project(part, *arguments)

    monkeypatch.setattr(Pipeline, "forward", look)
    monkeypatch.setattr(kind, "project", look_again)
    with machine.in_process("server"), engine(lambda: runner("cuda:3")) as server:
        for sizes in ([5], [5, 7]):
            server.submit(request_of(sizes)).result(30)
    assert machine.contexts == {("server", 3)}
    assert seen == {"engine": 3, "projection": 3}


@IN_ONE_ORDER
def test_f4_the_thread_that_sends_over_nccl_is_on_the_targets_device(
    machine: Machine, peers: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    prove = PairGroup.prove

    def look(group: PairGroup, deadline: float) -> None:
        if group.rank == SERVER:
            seen.append(torch.cuda.current_device())
        prove(group, deadline)

    monkeypatch.setattr(PairGroup, "prove", look)
    endpoint = NcclTransport.listen(NcclOptions())
    client = NcclTransport.connect(
        NcclOptions(), endpoint.offer(), MemoryControl(endpoint, device="cuda:1", target_device="cuda:3")
    )
    assert seen == [3]
    client.close()
    endpoint.close()


@IN_ONE_ORDER
def test_f4_below_the_entrances_a_device_without_a_number_is_refused(machine: Machine, peers: None) -> None:
    somewhere = torch.device("cuda")
    form = BatchForm("logits", "supervised", torch.float32, somewhere)
    with pytest.raises(ContractError, match="'cuda', another device in each thread"):
        RequestingBackend.__init__(object.__new__(RunnerEagle3TargetModel), EmbeddingRunner().info, form, workers=1)
    with pytest.raises(ContractError, match="'cuda', another device in each thread"):
        DeviceOrder(somewhere, is_beside=True)
    for device, target_device in (("cuda", "cuda:0"), ("cuda:1", "cuda")):
        for transport, options in ((ShmTransport, ShmOptions()), (NcclTransport, NcclOptions())):
            endpoint = transport.listen(options)
            control = MemoryControl(endpoint, device=device, target_device=target_device)
            with pytest.raises(ConnectError, match="name its number"):
                transport.connect(options, endpoint.offer(), control)
            endpoint.close()
    hello = {**this_host(), "backend": "nccl", "target_device": "cuda", "digest": DIGESTS[0], "gpu": "another"}
    for endpoint in (ShmTransport.listen(ShmOptions()), NcclTransport.listen(NcclOptions())):
        with pytest.raises(ConnectError, match="number"):
            endpoint.accept(hello, reached_at="127.0.0.1")
        endpoint.close()


# F17: staged memory is pinned, and waited for, on the device that it goes to.


def test_f17_staged_tensors_are_waited_for_on_their_own_device(machine: Machine) -> None:
    class Assembler:
        def put(self, name: str, rows: torch.Tensor) -> None:
            assert rows.is_pinned()
            batch[name] = rows.to("cuda:3", non_blocking=True)

        def finish(self) -> None:
            return None

    batch: dict[str, torch.Tensor] = {}
    stagings: list[torch.Tensor] = []

    def work() -> None:
        device = torch.device("cuda:3")
        sink = StagedSink(Assembler(), device, PinnedPool(device).allocate)  # type: ignore[arg-type]
        store = sink.allocate("rows", (64,), torch.float32)
        store.out.fill_(1)
        stagings.append(store.out)
        sink.finish()
        # From now on the next answer may be read into it.
        store.out.fill_(2)

    with machine.in_process("trainer"):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        torch.cuda.set_device(3)
        assert batch["rows"].tolist() == [1.0] * 64
    assert {device for process, device in machine.contexts if process == "trainer"} == {3}


# What is open. An order is given where only some show it.


@IN_ONE_ORDER
@pytest.mark.xfail(strict=True, raises=Stuck, reason="F5: a client makes batches on the trainer's default stream")
@pytest.mark.parametrize("encoding", ["probs", "hidden"])
def test_f5_a_batch_is_made_beside_the_trainers_work(machine: Machine, encoding: str) -> None:
    rows = rows_of_a_trainer()
    with served(machine) as url, machine.in_process("trainer"), _client(url, "wire", encoding) as client:
        backward = machine.hold(machine.default_queue(1), "the trainer's backward")
        try:
            client.generate_batch_async(**rows).result(60)
        finally:
            machine.open(backward)


@IN_ONE_ORDER
@pytest.mark.xfail(strict=True, reason="F5: a client makes batches on the trainer's default stream")
@pytest.mark.parametrize("encoding", ["probs", "hidden"])
def test_f5_a_worker_waits_once_for_its_device(machine: Machine, encoding: str) -> None:
    rows = rows_of_a_trainer()
    with served(machine) as url, machine.in_process("trainer"), _client(url, "wire", encoding) as client:
        client.generate_batch_async(**rows).result(60)
        machine.syncs.clear()
        client.generate_batch_async(**rows).result(60)
        waits = [sync for sync in machine.syncs if sync.thread.startswith("eagle-target-client")]
        assert len(waits) <= 1, "\n".join(f"{sync.kind} {sync.site}" for sync in waits)


@contextmanager
def _client(url: str, transport: str, encoding: Any) -> Iterator[RemoteEagle3TargetModel]:
    with RemoteEagle3TargetModel.from_urls([url], device="cuda:1", encoding=encoding, transport=transport) as client:
        client.set_vocab_mapping(mapping_of_50())
        yield client


@IN_PLAIN_ORDERS
@pytest.mark.xfail(strict=True, raises=Stuck, reason="F6: shm sends an event that is recorded behind the next forward")
def test_f6_an_answer_in_shared_memory_does_not_wait_for_the_next_forward(machine: Machine, peers: None) -> None:
    pair = shm_channel()
    side, tensors = torch.cuda.Stream("cuda:0"), pair.server.new_tensors()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(side):
        tensors.put("rows", torch.ones(64, device="cuda:0"))
    side.synchronize()
    forward = machine.hold(machine.default_queue(0), "the next forward")
    received = PackedTensors()
    stuck = ""
    try:
        reply = pair.server.send("t", tensors, {})
        with machine.in_process("trainer"):
            pair.client.receive(MemoryBody.of(reply), received)
    except Stuck as error:
        stuck = str(error)
    finally:
        machine.open(forward)
        received.clear()
        pair.close()
    if stuck:
        # Without the frames of the first one, which would keep what is mapped until there is no CUDA to unmap it.
        raise Stuck(stuck)


@IN_ONE_ORDER
@pytest.mark.xfail(strict=True, reason="F7: nccl puts its kernels on the default streams of both ends")
@pytest.mark.parametrize("end", ["server", "trainer"])
def test_f7_a_transfer_does_not_wait_for_other_work_of_an_end(machine: Machine, peers: None, end: str) -> None:
    with machine.in_process("server"):
        endpoint = NcclTransport.listen(NcclOptions())
    control = _ServerProcess(endpoint, machine, device="cuda:1", target_device="cuda:0")
    with machine.in_process("trainer"):
        client = NcclTransport.connect(NcclOptions(), endpoint.offer(), control)
    server = control.accepted[0]
    gate: Gate | None = None
    try:
        with machine.in_process("server"):
            tensors = server.new_tensors()
            tensors.put("rows", torch.ones(64, device="cuda:0"))
            torch.cuda.current_stream("cuda:0").synchronize()
            reply = server.send("t", tensors, {})
        device = 0 if end == "server" else 1
        with machine.in_process(end):
            gate = machine.hold(machine.default_queue(device), "the next forward")
        with machine.in_process("trainer"):
            client.receive(MemoryBody.of(reply), PackedTensors())
    finally:
        if gate is not None:
            machine.open(gate)
        client.close()
        endpoint.close()


class _ServerProcess(MemoryControl):
    """The server's end of a channel, which plays the server's process."""

    def __init__(self, endpoint: ServerEndpoint, machine: Machine, *, device: str, target_device: str) -> None:
        super().__init__(endpoint, device=device, target_device=target_device)
        self._machine = machine

    def open_channel(self, hello: Mapping[str, Any]) -> Mapping[str, Any]:
        with self._machine.in_process("server"):
            return super().open_channel(hello)

    def tell(self, message: Mapping[str, Any], *, timeout: float | None = None) -> Mapping[str, Any]:
        with self._machine.in_process("server"):
            return super().tell(message, timeout=timeout)


@pytest.mark.xfail(strict=True, reason="F32: a finished batch carries no event")
def test_f32_a_trainer_on_a_stream_of_its_own_reads_a_finished_batch() -> None:
    rows = rows_of_a_trainer()
    with fake_cuda(0) as world, served(world.machine) as url, world.machine.in_process("trainer"):
        with _client(url, "wire", "hidden") as client:
            batch = client.generate_batch_async(**rows).result(60)
            with torch.cuda.stream(torch.cuda.Stream("cuda:1")):  # type: ignore[no-untyped-call]
                read = {name: tensor.cpu() for name, tensor in batch.tensors().items()}
        assert_same_tensors(read, expected_batch(rows, "hidden"))
