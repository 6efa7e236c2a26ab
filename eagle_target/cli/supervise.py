"""`eagle-target supervise`: one batch from the shell, for people who debug."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import click

from eagle_target.cli.settings import access_flags
from eagle_target.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from eagle_target.auth import AccessFiles


@click.command()
@click.option("--url", "urls", multiple=True, required=True, help="Server to ask; repeatable.")
@click.option(
    "--input",
    "source",
    type=click.Path(path_type=Path),
    required=True,
    help='JSON lines with "input_ids" and, if not every token bears loss, "loss_mask". A line is a row.',
)
@click.option(
    "--output", type=click.Path(path_type=Path), required=True, help="safetensors file to write the batch to."
)
@click.option("--vocab-mapping", type=click.Path(path_type=Path), help="Mapping file; default every target id.")
@click.option("--encoding", type=click.Choice(["probs", "hidden", "logits"]), default="probs", show_default=True)
@click.option("--rows", type=click.Choice(["supervised", "all"]), default="supervised", show_default=True)
@click.option("--transport", default="auto", show_default=True)
@access_flags
@click.option("--timeout", type=float, default=120.0, show_default=True, help="Seconds one attempt may take.")
def supervise(
    urls: tuple[str, ...],
    source: Path,
    output: Path,
    vocab_mapping: Path | None,
    encoding: Any,
    rows: Any,
    transport: str,
    timeout: float,
    **access: Unpack[AccessFiles],
) -> None:
    """Ask for the supervision of one batch and write it to a file."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    from eagle_target.client.remote import RemoteEagle3TargetModel
    from eagle_target.contract.vocab_mapping import VocabMapping

    input_ids, attention_mask, loss_mask = read_rows(source)
    with RemoteEagle3TargetModel.from_urls(
        urls,
        encoding=encoding,
        rows=rows,
        transport=transport,
        timeout=timeout,
        ready_timeout=timeout,
        **access,
    ) as target:
        info = target.model_info()
        mapping = (
            VocabMapping.identity(int(info["vocab_size"]))
            if vocab_mapping is None
            else VocabMapping.from_file(vocab_mapping)
        )
        target.set_vocab_mapping(mapping)
        batch = target.generate_batch(input_ids, attention_mask, loss_mask)
        tensors = batch.tensors()
    metadata = {"fingerprint": str(info["fingerprint"]), "vocab_mapping": mapping.sha256}
    try:
        save_file(tensors, output, metadata=metadata)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"cannot write {output}: {error}") from error
    for name, tensor in tensors.items():
        click.echo(f"{name:20} {str(tensor.dtype).removeprefix('torch.'):9} {list(tensor.shape)}")
    click.echo(f"written to {output}")


def read_rows(source: Path) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Read JSON lines into right-padded `[batch, seq]` input_ids, attention_mask and loss_mask.

    Raises:
        ConfigError: the file cannot be read, or a line is wrong, with its number.
    """
    import torch

    try:
        lines = [line for line in source.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {source}: {error}") from error
    rows = [_read_row(source, number, line) for number, line in enumerate(lines, start=1)]
    if not rows:
        raise ConfigError(f"{source} has no rows: one JSON object a line is expected")
    width = max(len(ids) for ids, _ in rows)
    filled = torch.zeros(3, len(rows), width, dtype=torch.int64)
    for row, (ids, mask) in enumerate(rows):
        filled[0, row, : len(ids)] = torch.tensor(ids)
        filled[1, row, : len(ids)] = 1
        filled[2, row, : len(ids)] = torch.tensor(mask)
    input_ids, attention_mask, loss_mask = filled
    return input_ids, attention_mask, loss_mask


def _read_row(source: Path, number: int, line: str) -> tuple[list[int], list[int]]:
    try:
        record = json.loads(line)
        ids = [int(token) for token in record["input_ids"]]
        mask = [int(bool(flag)) for flag in record.get("loss_mask", [1] * len(ids))]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f'{source}:{number}: expected {{"input_ids": [...]}}: {type(error).__name__}: {error}'
        ) from error
    if any(not 0 <= token < 1 << 63 for token in ids):
        raise ConfigError(f"{source}:{number}: input_ids must be token ids, got {min(ids)} to {max(ids)}")
    if not ids or len(ids) != len(mask):
        raise ConfigError(f"{source}:{number}: {len(ids)} input_ids and {len(mask)} of loss_mask: equal and not empty")
    return ids, mask
