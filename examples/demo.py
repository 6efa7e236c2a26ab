"""Everything at once, on any machine in a few minutes: train a target, serve it, train a draft against the server.

The target is a byte-level Llama; `eagle-target serve` runs it in another process; the draft learns from what comes
over the wire. Ends with a table and `.demo/curves.png`, and fails where the draft did not clearly learn.

    python examples/demo.py
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

# The target's server and the trainer share the cores. OpenMP's threads must not spin while they wait, and OpenMP reads
# this when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import byte_llama
import torch
from demo_report import draw_curves, figures_table
from rich.console import Console
from train_draft import Result, Settings, train_draft

from eagle_target import RemoteEagle3TargetModel
from eagle_target.errors import EagleTargetError

if TYPE_CHECKING:
    from collections.abc import Iterator

WORK = Path(__file__).resolve().parent.parent / ".demo"
TARGET = WORK / "target"

START_SECONDS = 120.0
STOP_SECONDS = 15.0
ACCEPT_LENGTH_GAIN = 0.5
AGREEMENT_GAIN = 0.1


class DemoError(Exception):
    """The demo could not run, or the draft did not learn."""


def ensure_target(corpus: byte_llama.Corpus, seconds: float, console: Console) -> None:
    """Train the target, unless an earlier run left one."""
    if (TARGET / "config.json").exists():
        console.print(f"1. target: reusing {relative(TARGET)} (--fresh trains a new one)", highlight=False)
        return
    console.print(f"1. target: a byte-level Llama on the standard library's sources, {seconds:.0f} s", highlight=False)
    with byte_llama.progress_bar(console) as progress:
        model = byte_llama.train(corpus, seconds, progress)
    byte_llama.save(model, TARGET)
    bits = byte_llama.evaluate(model, corpus.held_out)
    console.print(f"   {bits:.2f} bits per byte on held-out text (8 for a uniform guess)", highlight=False)


@contextlib.contextmanager
def serving(model: Path, threads: int) -> Iterator[str]:
    """Run `eagle-target serve` in another process; gives its URL, and stops it whatever happens."""
    port_file, log_file = WORK / "port", WORK / "server.log"
    port_file.unlink(missing_ok=True)
    command = [eagle_target_command(), "serve", "--engine", "hf", "--model", str(model)]
    command += ["--port", "0", "--port-file", str(port_file)]
    with log_file.open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": str(threads)})
        try:
            yield f"http://127.0.0.1:{wait_for_port(server, port_file, log_file)}"
        except EagleTargetError as error:
            raise DemoError(f"{error}\nthe server's log ends with:\n{tail(log_file)}") from error
        finally:
            server.terminate()
            try:
                server.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def wait_for_port(server: subprocess.Popen[bytes], port_file: Path, log_file: Path) -> int:
    """The port that the server took."""
    deadline = time.monotonic() + START_SECONDS
    while not port_file.exists():
        if server.poll() is not None:
            raise DemoError(f"the server ended with status {server.returncode}:\n{tail(log_file)}")
        if time.monotonic() > deadline:
            raise DemoError(f"the server has no port after {START_SECONDS:.0f} s:\n{tail(log_file)}")
        time.sleep(0.1)
    return int(port_file.read_text())


def run(seconds: float, settings: Settings, transport: str, console: Console) -> Result:
    """Target, server, draft."""
    corpus = byte_llama.load_corpus()
    ensure_target(corpus, seconds, console)
    # Two processes compute at the same time: half of the cores for each.
    threads = max(1, torch.get_num_threads() // 2)
    with serving(TARGET, threads) as url:
        console.print(f"2. server: eagle-target serve --engine hf, at {url}", highlight=False)
        with RemoteEagle3TargetModel.from_urls(
            [url], device="cpu", transport=transport, encoding="hidden", ready_timeout=START_SECONDS
        ) as target:
            taken = target.model_info()["servers"][0]["transport"]
            console.print(f"3. draft: {settings.steps} steps, supervision by transport {taken}", highlight=False)
            torch.set_num_threads(threads)
            with byte_llama.progress_bar(console) as progress:
                return train_draft(target, corpus, settings, progress)


def check(result: Result) -> None:
    """Refuse a run that shows nothing.

    Raises:
        DemoError: the loss did not fall, or the draft is hardly better than untrained, or than one that reads nothing.
    """
    before, after = result.evaluations[0], result.evaluations[-1]
    if not after.loss < before.loss:
        raise DemoError(
            f"the loss on held-out text did not fall: {before.loss:.3f} untrained, {after.loss:.3f} trained"
        )
    gain = after.accept_length - before.accept_length
    if gain < ACCEPT_LENGTH_GAIN:
        raise DemoError(f"the accept length rose by {gain:.2f} only, expected at least {ACCEPT_LENGTH_GAIN}")
    context_free = result.context_free
    if after.agreement[0] < context_free.agreement[0] + AGREEMENT_GAIN:
        raise DemoError(
            f"the draft agrees with the target in {after.agreement[0]:.0%} of the slots, and one that reads nothing in "
            f"{context_free.agreement[0]:.0%}: train the target for longer (--fresh --seconds 120)"
        )


def eagle_target_command() -> str:
    """Path of the `eagle-target` command that belongs to this Python."""
    command = shutil.which("eagle-target", path=str(Path(sys.executable).parent)) or shutil.which("eagle-target")
    if command is None:
        raise DemoError("the command eagle-target is not installed: pip install -e . -e adapters/hf")
    return command


def tail(path: Path, lines: int = 15) -> str:
    """The last lines of a log."""
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])


def relative(path: Path) -> str:
    """A path as short as it can be written here."""
    return os.path.relpath(path)


def stop_on_sigterm() -> None:
    """End by an exception, so that the server is stopped too."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))


def main() -> int:
    """Run the demo; 0 when the draft clearly learned."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fresh", action="store_true", help="train a new target even if there is one")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long to train the target")
    parser.add_argument("--steps", type=int, default=Settings().steps, help="how long to train the draft")
    parser.add_argument("--transport", default="wire", help="how the supervision travels; auto takes the best")
    arguments = parser.parse_args()
    stop_on_sigterm()
    console = Console()
    WORK.mkdir(exist_ok=True)
    if arguments.fresh:
        shutil.rmtree(TARGET, ignore_errors=True)
    started = time.monotonic()
    try:
        result = run(arguments.seconds, Settings(steps=arguments.steps), arguments.transport, console)
        result.write(WORK / "result.json")
        draw_curves(result, WORK / "curves.png")
        console.print(figures_table(result))
        console.print(f"curves: {relative(WORK / 'curves.png')}  figures: {relative(WORK / 'result.json')}")
        check(result)
    except (DemoError, EagleTargetError) as error:
        console.print(f"demo failed: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return 1
    console.print(f"[green]The draft learned its target over the wire[/], in {time.monotonic() - started:.0f} s.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
