"""`eagle-target bench`: what targets, transports and encodings do, what a trainer needs, bytes a token."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from eagle_target.cli.settings import ACCESS, access_flags
from eagle_target.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from eagle_target.auth import AccessFiles
    from eagle_target.bench.measuring import Cell
    from eagle_target.verify.workload import Workload


@click.command()
@click.option("--target", "targets", multiple=True, metavar="NAME=URL", help="Server to measure; repeatable.")
@click.option(
    "--launch",
    "launches",
    multiple=True,
    metavar="ENGINE=PYTHON",
    help="Start a server of this engine with the interpreter of its environment, and end it; repeatable.",
)
@click.option("--model", help="Path or hub id that started servers serve.")
@click.option(
    "--launch-option",
    "launch_options",
    multiple=True,
    metavar="ENGINE:KEY=VALUE",
    help="Option of a started server's adapter; repeatable.",
)
@click.option("--transport", "transports", default="auto", show_default=True, help="Names, comma-separated.")
@click.option("--encoding", "encodings", default="hidden", show_default=True, help="Encodings, comma-separated.")
@click.option("--batch", type=int, default=8, show_default=True, help="Rows of a batch.")
@click.option("--seq", type=int, default=512, show_default=True, help="Tokens of a row, pads included.")
@click.option("--clients", default="1", show_default=True, help="Client processes at a time, comma-separated.")
@click.option("--depth", "depths", default="2", show_default=True, help="Batches on their way, comma-separated.")
@click.option("--draft-vocab", type=int, help="Ids of the draft, random ones. [default: 32000, or all if fewer]")
@click.option("--loss-ratio", type=float, default=0.5, show_default=True, help="Share of real tokens that bear loss.")
@click.option("--pad-ratio", type=float, default=0.0, show_default=True, help="Share of tokens that are pads.")
@access_flags
@click.option("--rounds", type=int, default=3, show_default=True, help="Times each combination is measured.")
@click.option("--seconds", type=float, default=3.0, show_default=True, help="How long, each time.")
@click.option("--device", default="cpu", show_default=True, help="Where the clients' batches go.")
@click.option("--parity/--no-parity", default=True, show_default=True, help="Compare further targets with the first.")
@click.option("--advise", is_flag=True, help="Say how many servers and what prefetch depth a trainer needs.")
@click.option("--step-time", type=float, help="Seconds of a trainer's step, for --advise.")
@click.option("--bytes", "show_bytes", is_flag=True, help="Show bytes a token of known models and stop.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="File that gets every figure.")
@click.option("--html", "html_path", type=click.Path(path_type=Path), help="File that gets a page with plots.")
def bench(
    targets: tuple[str, ...],
    launches: tuple[str, ...],
    model: str | None,
    launch_options: tuple[str, ...],
    transports: str,
    encodings: str,
    clients: str,
    depths: str,
    rounds: int,
    seconds: float,
    device: str,
    parity: bool,
    advise: bool,
    step_time: float | None,
    show_bytes: bool,
    json_path: Path | None,
    html_path: Path | None,
    **work: Any,
) -> None:
    """Measure servers on the same requests: engines, transports and encodings, by themselves or against each other.

    Client processes of their own take batches as a trainer does. Every combination is measured in every round.
    """
    from eagle_target.bench.plan import Plan, run_plan
    from eagle_target.bench.report import advice_lines, rates_of, to_json
    from eagle_target.verify.workload import Workload

    # As text: client processes are told over a pipe.
    access = {name: str(path) for name in ACCESS if (path := work.pop(name)) is not None}
    workload = Workload(**work)
    if show_bytes:
        _show_bytes(workload, json_path)
        return
    if advise != (step_time is not None):
        raise ConfigError("--advise needs --step-time, the seconds of a trainer's step, and --step-time needs --advise")
    lonely = advise and "1" not in [depth.strip() for depth in depths.split(",")]
    plan = Plan(
        targets=_assignments(targets, "--target"),
        launches=_assignments(launches, "--launch"),
        model=model,
        launch_options=_options_by_engine(launch_options),
        transports=_names(transports),
        encodings=_encodings(encodings),
        clients=_with_one(_numbers(clients, "--clients"), advise),
        depths=_with_one(_numbers(depths, "--depth"), lonely),
        rounds=rounds,
        seconds=seconds,
        device=device,
        has_parity=parity,
        access=cast("AccessFiles", access),
    )
    signal.signal(signal.SIGTERM, _end)
    cells, compared = run_plan(plan, workload, lambda text: click.echo(text, err=True))
    advice = (
        []
        if step_time is None
        else [line for cell, rates in rates_of(cells, workload) for line in advice_lines(cell, rates, step_time)]
    )
    _show(cells, workload, advice, compared)
    if json_path is not None:
        result = to_json(cells, workload, step_time=step_time, parity=compared)
        _write(json_path, json.dumps(result, indent=1) + "\n")
    if html_path is not None:
        from eagle_target.bench.page import render_page

        _write(html_path, render_page(cells, workload, advice=advice))
    if all(cell.problem is not None for cell in cells):
        sys.exit(1)


def _show(cells: Sequence[Cell], workload: Workload, advice: Sequence[str], compared: Sequence[dict[str, Any]]) -> None:
    from eagle_target.bench.report import cells_table, console, memory_sources, problems

    out = console()
    out.print(cells_table(cells, workload))
    for line in (*problems(cells), *memory_sources(cells), *advice):
        out.print(line)
    for result in compared:
        pair = f"{result['target']} against {result['reference_target']}"
        if "error" in result:
            out.print(f"{pair}: not compared: {result['error']}")
            continue
        out.print(
            f"{pair}: {'within' if result['within'] else 'PAST'} the tolerances; hidden states differ by "
            f"{max(result['hidden_relative']):.2g}, mean KL {result['kl_mean']:.2g}, argmax at "
            f"{result['argmax_differs']} of {result['positions']} ({result['argmax_ties']} ties)"
        )


def _show_bytes(workload: Workload, json_path: Path | None) -> None:
    from dataclasses import asdict

    from eagle_target.bench.report import console, sizes_table
    from eagle_target.bench.sizes import known_sizes
    from eagle_target.verify.workload import DRAFT_VOCAB

    draft_vocab = DRAFT_VOCAB if workload.draft_vocab is None else workload.draft_vocab
    sizes = known_sizes(draft_vocab_size=draft_vocab, loss_ratio=workload.loss_ratio, pad_ratio=workload.pad_ratio)
    title = (
        f"Bytes a real token, draft vocabulary {draft_vocab:,}, {workload.loss_ratio:.0%} of the tokens supervised, "
        f"{workload.pad_ratio:.0%} pads"
    )
    console().print(sizes_table(sizes, title))
    if json_path is not None:
        _write(json_path, json.dumps([asdict(row) for row in sizes], indent=1) + "\n")


def _assignments(given: tuple[str, ...], flag: str) -> dict[str, str]:
    values: dict[str, str] = {}
    for assignment in given:
        name, equals, value = assignment.partition("=")
        if not (equals and name and value):
            raise ConfigError(f"{flag} {assignment!r} is not of the form NAME=VALUE")
        if name in values:
            raise ConfigError(f"{flag} has {name!r} twice: give each a name of its own")
        values[name] = value
    return values


def _options_by_engine(given: tuple[str, ...]) -> dict[str, list[str]]:
    options: dict[str, list[str]] = {}
    for assignment in given:
        engine, colon, option = assignment.partition(":")
        if not colon or "=" not in option:
            raise ConfigError(f"--launch-option {assignment!r} is not of the form ENGINE:KEY=VALUE")
        options.setdefault(engine, []).append(option)
    return options


def _names(text: str) -> list[str]:
    return list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def _encodings(text: str) -> list[str]:
    known = ("probs", "hidden", "logits")
    names = _names(text)
    wrong = [name for name in names if name not in known]
    if wrong or not names:
        raise ConfigError(f"--encoding takes {', '.join(known)}, got {text!r}")
    return names


def _numbers(text: str, flag: str) -> list[int]:
    try:
        return [int(part) for part in _names(text)]
    except ValueError as error:
        raise ConfigError(f"{flag} takes numbers, comma-separated, got {text!r}") from error


def _with_one(numbers: list[int], is_needed: bool) -> list[int]:
    return [1, *numbers] if is_needed and 1 not in numbers else numbers


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error}") from error
    click.echo(f"written to {path}")


def _end(*_: object) -> None:
    """SIGTERM unwinds like an error, so that what was started is ended."""
    sys.exit(128 + signal.SIGTERM)
