"""Takes back, one by one, what keeps the CUDA paths right, and sees that the tests on the fake notice each.

    python -m tests.cuda_sim.mutants [NAME ...]

To add one, add an entry to `MUTANTS`: its name, the file, the text that does it, the text without, and the tests that
must fail then, as pytest takes them. The working tree is left alone: what is changed is a copy. A text that the file
does not have exactly once is an error, and so are tests that fail before anything is taken back. Prints a table, and as
the last line `RESULT` and a JSON object with the keys `mutants` and `caught`; ends with 1 unless they are equal.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
FINDINGS = "tests/cuda_sim/test_findings.py"
WORKERS = 2
FAILED = 1
# The plain orders and a few that are drawn.
SEEDS = 6


class Mutant(NamedTuple):
    """One change. tests: names of tests, without the file where it is `FINDINGS`."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


MUTANTS = (
    Mutant(
        "F1: flushed tensors are let go of at once",
        "eagle_target/server/engine/pipeline.py",
        "            read = self.sink.flush()\n        del read\n",
        "            self.sink.flush()\n",
        ("test_f1_what_a_supervising_runner_puts_is_kept_until_it_is_copied",),
    ),
    Mutant(
        "F1: what fails is not waited for",
        "eagle_target/server/engine/pipeline.py",
        "                self.settle()\n                raise\n",
        "                raise\n",
        ("test_f1_what_fails_is_over_when_its_memory_goes_back",),
    ),
    Mutant(
        "F1: shm lets go of what it copies",
        "transports/shm/eagle_target_shm/memory.py",
        "loan.keep.append([tensors[name] for name in missing])",
        "pass",
        ("test_f1_what_shm_lends_by_a_copy_is_kept_until_the_client_is_done",),
    ),
    Mutant(
        "F1: shm gives room back before it is copied",
        "transports/shm/eagle_target_shm/memory.py",
        "torch.cuda.current_stream(device).record_event().synchronize()",
        "pass",
        ("test_f1_room_that_an_answer_steps_out_of_is_given_to_others_when_it_is_copied",),
    ),
    Mutant(
        "F1: shm does not wait for the last user's writes",
        "transports/shm/eagle_target_shm/cuda.py",
        "            # What was queued for its last user may still be written.\n            stream.synchronize()\n",
        "            del stream\n",
        ("test_f1_memory_of_a_channel_that_ended_is_not_written_for_it_any_more",),
    ),
    Mutant(
        "F3: vllm's worker waits for the device",
        "adapters/vllm/eagle_target_vllm/worker.py",
        "torch.cuda.current_stream(self._device).record_event().synchronize()",
        "torch.cuda.synchronize(self._device)",
        ("test_f3_a_vllm_worker_waits_for_its_own_stream",),
    ),
    Mutant(
        "F3: a parcel waits for the device",
        "transports/nccl/eagle_target_nccl/outbox.py",
        "            self._ready = [torch.cuda.current_stream(device).record_event() for device in devices]\n",
        "            for device in devices:\n                torch.cuda.synchronize(device)\n",
        ("test_f3_a_parcel_waits_for_the_streams_that_make_it",),
    ),
    Mutant(
        "F3: a parcel waits for nothing",
        "transports/nccl/eagle_target_nccl/outbox.py",
        "            self._ready = [torch.cuda.current_stream(device).record_event() for device in devices]\n",
        "            del devices\n",
        ("test_f3_a_parcel_waits_for_the_streams_that_make_it",),
    ),
    Mutant(
        "F3: shm's probe waits for the device",
        "transports/shm/eagle_target_shm/cuda.py",
        "        torch.cuda.current_stream(self.device).synchronize()\n",
        "        torch.cuda.synchronize(self.device)\n",
        ("test_f3_a_channel_of_shared_device_memory_never_waits_for_the_device",),
    ),
    Mutant(
        "F3: shm's client waits for the device",
        "transports/shm/eagle_target_shm/client.py",
        "            settle(loan.streams | current_streams(self._devices))\n",
        "            for device in self._devices:\n                torch.cuda.synchronize(device)\n",
        ("test_f3_a_channel_of_shared_device_memory_never_waits_for_the_device",),
    ),
    Mutant(
        "F3: shm's client waits for nothing",
        "transports/shm/eagle_target_shm/client.py",
        "            settle(loan.streams | current_streams(self._devices))\n",
        "            pass\n",
        ("test_f3_memory_of_another_process_goes_back_when_it_is_read",),
    ),
    Mutant(
        "F3: shm frees a channel's memory beside others' sends",
        "transports/shm/eagle_target_shm/cuda.py",
        "        if self._closed:\n            for each",
        "        if True:\n            for each",
        ("test_f3_a_channel_of_shared_device_memory_never_waits_for_the_device",),
    ),
    Mutant(
        "F4: a client's device has no number",
        "eagle_target/client/remote.py",
        "device = resolve_device(config.device)",
        "device = torch.device(config.device)",
        ("test_f4_all_threads_of_a_client_use_the_device_that_was_current_when_it_was_made",),
    ),
    Mutant(
        "F4: a co-located target's device has no number",
        "eagle_target/colocated.py",
        "resolve_device(runner.info.device if device is None else device)",
        "torch.device(runner.info.device if device is None else device)",
        ("test_f4_all_threads_of_a_colocated_target_use_the_device_that_was_current_when_it_was_made",),
    ),
    Mutant(
        "F4: a backend takes a device without a number",
        "eagle_target/backend.py",
        "if not is_numbered(form.device):",
        "if False:",
        ("test_f4_below_the_entrances_a_device_without_a_number_is_refused",),
    ),
    Mutant(
        "F4: a backend's threads begin on device 0",
        "eagle_target/backend.py",
        "                    initializer=use_device,\n                    initargs=(self.form.device,),\n",
        "",
        ("test_f4_threads_of_a_backend_have_its_device_as_their_current_one",),
    ),
    Mutant(
        "F4: the server takes a device without a number",
        "eagle_target/server/engine/pipeline.py",
        "if not is_numbered(device):",
        "if False:",
        ("test_f4_below_the_entrances_a_device_without_a_number_is_refused",),
    ),
    Mutant(
        "F4: the engine's thread stays on device 0",
        "eagle_target/server/engine/engine.py",
        "            use_device(device)\n",
        "",
        ("test_f4_threads_of_a_server_are_on_its_targets_device",),
    ),
    Mutant(
        "F4: the projection's thread stays on device 0",
        "eagle_target/server/engine/pipeline.py",
        "        use_device(self._device)\n",
        "",
        ("test_f4_threads_of_a_server_are_on_its_targets_device",),
    ),
    Mutant(
        "F4: shm's client takes a device without a number",
        "transports/shm/eagle_target_shm/client.py",
        "if not (is_numbered(reader) and is_numbered(target)):",
        "if False:",
        ("test_f4_below_the_entrances_a_device_without_a_number_is_refused",),
    ),
    Mutant(
        "F4: shm's server takes a device without a number",
        "transports/shm/eagle_target_shm/server.py",
        "if device.index is None or device.index >= torch.cuda.device_count():",
        "if (device.index or 0) >= torch.cuda.device_count():",
        ("test_f4_below_the_entrances_a_device_without_a_number_is_refused",),
    ),
    Mutant(
        "F4: nccl's client takes a device without a number",
        "transports/nccl/eagle_target_nccl/client_channel.py",
        'if backend == "nccl" and not is_numbered(torch.device(device)):',
        "if False:",
        ("test_f4_below_the_entrances_a_device_without_a_number_is_refused",),
    ),
    Mutant(
        "F4: nccl's server takes a device without a number",
        "transports/nccl/eagle_target_nccl/endpoint.py",
        "if not is_numbered(torch.device(device)):",
        "if False:",
        ("test_f4_below_the_entrances_a_device_without_a_number_is_refused",),
    ),
    Mutant(
        "F4: nccl's thread stays on device 0",
        "transports/nccl/eagle_target_nccl/server_channel.py",
        "            use_device(self._device)\n",
        "",
        ("test_f4_the_thread_that_sends_over_nccl_is_on_the_targets_device",),
    ),
    Mutant(
        "F17: memory is pinned by device 0",
        "eagle_target/memory.py",
        "        with torch.cuda.device(device):\n            runtime = cuda.cudart()\n",
        "        with torch.cuda.device(0):\n            runtime = cuda.cudart()\n",
        ("test_f17_staged_tensors_are_waited_for_on_their_own_device",),
    ),
    Mutant(
        "F17: a staged copy is waited for on device 0",
        "eagle_target/compute/assembly.py",
        "torch.cuda.current_stream(self._device).synchronize()",
        "torch.cuda.current_stream().synchronize()",
        ("test_f17_staged_tensors_are_waited_for_on_their_own_device",),
    ),
    Mutant(
        "F8: a few tokens tell what a token takes",
        "adapters/hf/eagle_target_hf/memory.py",
        "SIZEABLE_TOKENS = 1024",
        "SIZEABLE_TOKENS = 1",
        ("adapters/hf/tests/test_memory.py::test_forwards_of_a_few_tokens_alone_tell_nothing_of_a_token",),
    ),
    Mutant(
        "F8: what is between tells of the fixed part",
        "adapters/hf/eagle_target_hf/memory.py",
        "is_telling = 0 < tokens <= FIXED_TOKENS or tokens >= SIZEABLE_TOKENS",
        "is_telling = 0 < tokens",
        ("adapters/hf/tests/test_memory.py::test_what_is_between_tells_nothing_of_the_fixed_part",),
    ),
    Mutant(
        "F8: a forward beside a head counts like one alone",
        "adapters/hf/eagle_target_hf/memory.py",
        "        self._is_alone = False",
        "        self._is_alone = True",
        ("adapters/hf/tests/test_memory.py::test_a_forward_of_a_few_tokens_beside_a_head_does_not_decide",),
    ),
    Mutant(
        "F8: what was taken once is never forgotten",
        "adapters/hf/eagle_target_hf/memory.py",
        "self._alone: deque[_Taken] = deque(maxlen=KEPT_FORWARDS)",
        "self._alone: deque[_Taken] = deque()",
        ("adapters/hf/tests/test_memory.py::test_a_forward_that_took_more_is_forgotten_after_a_while",),
    ),
    Mutant(
        "F8: the fixed part counts as tokens'",
        "adapters/hf/eagle_target_hf/memory.py",
        "fixed = min(self._tiny, default=0)",
        "fixed = 0",
        ("adapters/hf/tests/test_memory.py::test_the_fixed_part_is_no_token_s",),
    ),
    Mutant(
        "F8: the head is not noted",
        "adapters/hf/eagle_target_hf/runner.py",
        "        self._memory.note_head()\n",
        "",
        ("adapters/hf/tests/test_memory.py::test_a_runner_s_forward_and_head_are_noted",),
    ),
    Mutant(
        "F18: answers are in torch's pinned memory",
        "eagle_target/server/engine/answer.py",
        "return self._pool.allocate(shape, dtype)",
        "return torch.empty(tuple(shape), dtype=dtype, pin_memory=self.pinned)",
        ("tests/server/engine/test_pinned_answers.py::test_answers_lie_in_pinned_memory_that_is_given_back",),
    ),
    Mutant(
        "F18: a client's staging is pageable",
        "eagle_target/client/remote.py",
        'PinnedPool(form.device) if form.device.type == "cuda" else BufferPool()',
        "BufferPool()",
        ("tests/client/test_staging.py::test_a_client_of_a_device_gives_pinned_memory_back",),
    ),
    Mutant(
        "F18: staged memory goes back before it is copied",
        "eagle_target/compute/assembly.py",
        "            for name, rows in self._staged.items():\n                self._assembler.put(name, rows)\n",
        "            while self._staged:\n                self._assembler.put(*self._staged.popitem())\n",
        ("tests/client/test_staging.py::test_memory_is_there_until_the_device_has_copied_it",),
    ),
    Mutant(
        "F18: pinned memory comes in powers of two",
        "eagle_target/memory.py",
        "-(-size // ROUNDING_BYTES) * ROUNDING_BYTES)",
        "1 << (size - 1).bit_length())",
        ("tests/memory/test_pinned.py::test_memory_is_not_rounded_to_powers_of_two",),
    ),
    Mutant(
        "F18: memory in use is given back",
        "eagle_target/memory.py",
        "if slab.is_free and slab.free_since <= oldest])",
        "if slab.free_since <= oldest])",
        ("tests/memory/test_pinned.py::test_trimming_gives_back_what_nothing_is_in",),
    ),
    Mutant(
        "F18: a failed supervision leaves copies under way",
        "eagle_target/server/engine/pipeline.py",
        "            self._order.settle()\n",
        "",
        ("tests/server/engine/test_pinned_answers.py::test_a_runner_that_fails_half_way_leaves_no_copy_under_way",),
    ),
    Mutant(
        "F24: CUDA's last error is left",
        "eagle_target/memory.py",
        "            _clear_last_error()\n",
        "",
        ("tests/memory/test_pinned.py::test_a_failure_leaves_no_error_for_the_next_kernel",),
    ),
)


class Outcome(NamedTuple):
    """What became of one mutant."""

    mutant: Mutant
    is_caught: bool


def main(names: list[str]) -> int:
    """Run all mutants, or those named."""
    chosen = [mutant for mutant in MUTANTS if not names or mutant.name in names]
    unknown = {*names} - {mutant.name for mutant in MUTANTS}
    if unknown:
        raise SystemExit(f"no such mutant: {sorted(unknown)}")
    for mutant in chosen:
        _apply(mutant, (ROOT / mutant.file).read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        copies = [_copy(Path(folder) / str(number)) for number in range(WORKERS)]
        tests = tuple(dict.fromkeys(test for mutant in chosen for test in mutant.tests))
        before = _run(copies[0], tests)
        if before.returncode:
            raise SystemExit(f"these tests fail with nothing taken back:\n{before.stdout[-4000:]}")
        free = list(copies)
        with ThreadPoolExecutor(WORKERS) as workers:
            outcomes = list(workers.map(lambda mutant: _try(mutant, free), chosen))
    width = max(len(mutant.name) for mutant in chosen)
    for outcome in outcomes:
        print(f"{outcome.mutant.name:{width}}  {'caught' if outcome.is_caught else 'NOT CAUGHT'}")
    caught = sum(outcome.is_caught for outcome in outcomes)
    print("RESULT", json.dumps({"mutants": len(outcomes), "caught": caught}))
    return int(caught != len(outcomes))


def _apply(mutant: Mutant, text: str) -> str:
    if text.count(mutant.old) != 1:
        raise SystemExit(f"{mutant.name}: {mutant.file} has {mutant.old!r} {text.count(mutant.old)} times, not once")
    return text.replace(mutant.old, mutant.new)


def _copy(root: Path) -> Path:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, root / name)
    return root


def _try(mutant: Mutant, free: list[Path]) -> Outcome:
    root = free.pop()
    path = root / mutant.file
    text = path.read_text(encoding="utf-8")
    try:
        path.write_text(_apply(mutant, text), encoding="utf-8")
        return Outcome(mutant, _run(root, mutant.tests).returncode == FAILED)
    finally:
        path.write_text(text, encoding="utf-8")
        free.append(root)


def _run(root: Path, tests: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    packages = [root, *root.glob("transports/*"), *root.glob("adapters/*")]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    # Tests elsewhere know no seeds.
    seeds = ["--cuda-sim-seeds", str(SEEDS)] if any("::" not in test for test in tests) else []
    return subprocess.run(
        [*command, *seeds, *(test if "::" in test else f"{FINDINGS}::{test}" for test in tests)],
        cwd=root,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, packages)), "PYTHONDONTWRITEBYTECODE": "1"},
        check=False,
        capture_output=True,
        text=True,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
