"""`eagle-target verify`: whether a server gives what another target gives."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from eagle_target.cli.settings import access_flags
from eagle_target.errors import ConfigError

if TYPE_CHECKING:
    from eagle_target.auth import AccessFiles
    from eagle_target.backend import Eagle3TargetBackend
    from eagle_target.contract.model_info import ModelInfo
    from eagle_target.contract.vocab_mapping import VocabMapping

TOLERANCES = {
    "hidden": "Relative Frobenius norm a layer's hidden states may differ by",
    "kl": "Mean KL of the draft's distribution, nats",
    "argmax": "Share of the predictions whose argmax may differ, true ties left out",
    "mask": "Share of the positions whose mask may differ, true ties left out",
    "tie": "Nats between two logits of the reference that are as good as equal",
}
DEFAULT_TEXTS = {
    "hidden": "1e-4 for float32, 1e-2 float16, 5e-2 bfloat16",
    "kl": "1e-6, 1e-4, 5e-3",
    "argmax": "0.001, 0.01, 0.05",
    "mask": "0.001, 0.01, 0.05",
    "tie": "1e-4, 0.02, 0.13",
}


def _tolerance_flags(command: Any) -> Any:
    for name, text in reversed(TOLERANCES.items()):
        command = click.option(
            f"--{name}-tolerance", f"{name}_tolerance", type=float, help=f"{text}. [default: {DEFAULT_TEXTS[name]}]"
        )(command)
    return command


@click.command()
@click.argument("url")
@click.option(
    "--reference", default="hf", show_default=True, help="URL of another server, or an engine for this process."
)
@click.option("--model", help="Path or hub id that the engine loads; default the one the server names.")
@click.option("-o", "engine_option", multiple=True, metavar="KEY=VALUE", help="Option of the engine; repeatable.")
@click.option(
    "--tokens",
    type=click.Path(path_type=Path),
    help='JSON lines with "input_ids", a sequence each; default random ones.',
)
@click.option("--sequences", type=int, default=8, show_default=True, help="Random sequences.")
@click.option("--seq", type=int, default=256, show_default=True, help="Tokens of the longest random sequence.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the random tokens.")
@click.option("--vocab-mapping", type=click.Path(path_type=Path), help="Mapping file; default random ids.")
@click.option("--draft-vocab", type=int, help="How many random ids. [default: 32000, or all if fewer]")
@click.option("--transport", default="auto", show_default=True)
@access_flags
@click.option("--worst", type=int, default=8, show_default=True, help="Positions to show.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="File that gets every figure.")
@_tolerance_flags
def verify(
    url: str,
    reference: str,
    model: str | None,
    engine_option: tuple[str, ...],
    tokens: Path | None,
    sequences: int,
    seq: int,
    seed: int,
    vocab_mapping: Path | None,
    draft_vocab: int | None,
    transport: str,
    worst: int,
    json_path: Path | None,
    token_file: Path | None,
    ca_file: Path | None,
    client_cert: Path | None,
    client_key: Path | None,
    **given: float | None,
) -> None:
    """Compare a server's supervision with that of another server, or of an engine in this process.

    Both supervise the same tokens. The status is 1 where a figure is past its tolerance. The default of a tolerance
    is that of the coarser of the two dtypes.
    """
    from eagle_target.cli.supervise import read_rows
    from eagle_target.verify.parity import default_tolerances
    from eagle_target.verify.verification import compare_targets, facts_lines, random_rows, verdict_table, worst_table

    changes = {name.removesuffix("_tolerance"): value for name, value in given.items()}
    rows = None if tokens is None else read_rows(tokens)[:2]
    access: AccessFiles = {
        "token_file": token_file,
        "ca_file": ca_file,
        "client_cert": client_cert,
        "client_key": client_key,
    }
    with _connect(url, transport, access) as target:
        facts = target.model_info()
        with _open_reference(reference, model, engine_option, transport, facts, access) as other:
            other_facts = other.model_info()
            tolerances = default_tolerances(facts["dtype"], other_facts["dtype"]).changed(changes)
            vocab_size = int(facts["vocab_size"])
            compared = compare_targets(
                target,
                other,
                random_rows(vocab_size, sequences, seq, seed) if rows is None else rows,
                _mapping(vocab_mapping, vocab_size, draft_vocab),
                tie=tolerances.tie,
                worst=worst,
            )
    _print([f"{_name(facts)} against {_name(other_facts)}"])
    _print([verdict_table(compared, tolerances), *facts_lines(compared)])
    if compared.worst:
        _print([worst_table(compared)])
    result = {"target": facts, "reference": other_facts, **compared.to_json(tolerances)}
    if json_path is not None:
        try:
            json_path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"cannot write {json_path}: {error}") from error
    if not result["within"]:
        click.echo("past the tolerances", err=True)
        sys.exit(1)


def _connect(url: str, transport: str, access: AccessFiles) -> Eagle3TargetBackend:
    from eagle_target.client.remote import RemoteEagle3TargetModel

    return RemoteEagle3TargetModel.from_urls([url], encoding="probs", rows="all", transport=transport, **access)


def _open_reference(
    reference: str,
    model: str | None,
    options: tuple[str, ...],
    transport: str,
    facts: ModelInfo,
    access: AccessFiles,
) -> Eagle3TargetBackend:
    """Another server, or an engine in this process with the server's layers, dtype and, if none is named, model."""
    from eagle_target.plugins.options import parse_assignments
    from eagle_target.plugins.registry import load_plugins
    from eagle_target.targets import load_target

    if "://" in reference:
        if model is not None or options:
            raise ConfigError("--model and -o are for a reference in this process, not for a server")
        return _connect(reference, transport, access)
    given = parse_assignments(options, "-o")
    if "dtype" in load_plugins().adapters.get(reference).options_model.model_fields:
        given = {"dtype": facts["dtype"], **given}
    return load_target(
        reference,
        model or str(facts["model"]),
        aux_layer_ids=facts["aux_layer_ids"],
        engine_options=given,
        encoding="probs",
        rows="all",
        device="cpu",
    )


def _mapping(path: Path | None, vocab_size: int, draft_vocab: int | None) -> VocabMapping:
    from eagle_target.contract.vocab_mapping import VocabMapping
    from eagle_target.verify.workload import random_mapping

    if path is None:
        return random_mapping(vocab_size, draft_vocab)
    return VocabMapping.from_file(path, vocab_size=vocab_size)


def _name(facts: ModelInfo) -> str:
    return f"{facts['engine']} {facts['engine_version']}, {facts['dtype']}"


def _print(parts: list[Any]) -> None:
    from eagle_target.bench.report import console

    for part in parts:
        console().print(part)
