"""`eagle-target vocab`: choose a draft vocabulary from training data, and look at one."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from eagle_target.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import torch

    from eagle_target.contract.vocab_mapping import VocabMapping
    from eagle_target.vocab.text_tokenizer import TextTokenizer

_SHOWN_IDS = 8


@click.group()
def vocab() -> None:
    """Make and look at vocabulary mappings: which target tokens the draft can emit."""


@vocab.command()
@click.option(
    "--input",
    "inputs",
    multiple=True,
    required=True,
    metavar="PATH",
    help="A .jsonl, .json, .jsonl.gz or .parquet file, a folder or a glob pattern; repeatable.",
)
@click.option("--field", help="Where a record has its ids, text or chat; default input_ids, messages, ... or text.")
@click.option("--tokenizer", metavar="PATH", help="The target's folder, its name on the Hub, or a tokenizer.json.")
@click.option("--vocab-size", type=click.IntRange(1), help="The target's vocabulary; default from its config.json.")
@click.option("--size", type=click.IntRange(1), required=True, help="How many tokens the draft gets.")
@click.option(
    "--special",
    multiple=True,
    metavar="ID|auto|none",
    help="A token id that is always in, repeatable; auto is the tokenizer's special tokens, and the default.",
)
@click.option("--ascending", is_flag=True, help="Order by target id (SpecForge, EAGLE), not by frequency.")
@click.option("--only-supervised", is_flag=True, help="Count only tokens that bear loss.")
@click.option("--output", type=click.Path(path_type=Path), required=True, help="A .safetensors or .pt file.")
def build(
    *,
    inputs: Sequence[str],
    field: str | None,
    tokenizer: str | None,
    vocab_size: int | None,
    size: int,
    special: Sequence[str],
    ascending: bool,
    only_supervised: bool,
    output: Path,
) -> None:
    """Count the tokens of training data and keep the most frequent ones."""
    import torch

    from eagle_target.contract.vocab_mapping import VocabMapping
    from eagle_target.vocab.mapping_files import check_output_path
    from eagle_target.vocab.text_tokenizer import load_tokenizer  # a fast start
    from eagle_target.vocab.token_counts import count_tokens, target_vocab_size

    check_output_path(output)
    source = load_tokenizer(tokenizer) if tokenizer else None
    special_ids = _special_ids(special, source)
    vocab_size = target_vocab_size(source, vocab_size)
    # Refuses sizes and special ids that do not fit before the data is read.
    VocabMapping.from_counts(torch.zeros(vocab_size), size, special_ids=special_ids)
    with _progress_bar() as progress:
        counts = count_tokens(
            inputs,
            field=field,
            tokenizer=source,
            vocab_size=vocab_size,
            only_supervised=only_supervised,
            progress=progress,
        )
    if not counts.any():
        raise ConfigError(f"{', '.join(inputs)}: no tokens to count: is the data empty, or nothing of it supervised?")
    mapping = VocabMapping.from_counts(counts, size, special_ids=special_ids, ascending=ascending)
    mapping.save(output)
    _print_counts(counts, mapping, special_ids)
    _line("sha256", mapping.sha256)
    _line("written to", str(output))


@vocab.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--vocab-size", type=click.IntRange(1), help="The target's vocabulary, for a file that has only ids.")
def show(file: Path, vocab_size: int | None) -> None:
    """Describe the mapping in FILE, which may be a draft checkpoint."""
    from eagle_target.contract.vocab_mapping import VocabMapping  # a fast start

    mapping = VocabMapping.from_file(file, vocab_size)
    ids = mapping.selected_token_ids
    more = ", ..." if len(ids) > _SHOWN_IDS else ""
    _line("draft vocabulary", f"{mapping.draft_vocab_size} of {mapping.vocab_size}")
    _line("sha256", mapping.sha256)
    _line("ascending", _yes(bool((ids[1:] > ids[:-1]).all())))
    _line("identity", _yes(mapping.is_identity))
    _line("first ids", ", ".join(map(str, ids[:_SHOWN_IDS].tolist())) + more)


def _special_ids(given: Sequence[str], tokenizer: TextTokenizer | None) -> list[int]:
    ids: set[int] = set()
    for item in given or ("auto" if tokenizer else "none",):
        if item == "auto":
            if tokenizer is None:
                raise ConfigError("--special auto takes the tokenizer's special tokens: pass --tokenizer")
            ids.update(tokenizer.special_ids)
        elif item.isdecimal():
            ids.add(int(item))
        elif item != "none" or len(given) > 1:
            raise ConfigError(f"--special {item}: give a token id, or auto, or none by itself")
    return sorted(ids)


def _print_counts(counts: torch.Tensor, mapping: VocabMapping, special_ids: Sequence[int]) -> None:
    seen = int((counts > 0).sum())
    _line("tokens", f"{int(counts.sum()):,}, {seen:,} different ones of {len(counts):,}")
    _line("special ids", f"{len(special_ids)}, always in")
    size = mapping.draft_vocab_size
    for other in sorted({size // 2, size, min(2 * size, len(counts))}):
        if other >= max(len(special_ids), 1):
            chosen = mapping if other == size else mapping.from_counts(counts, other, special_ids=special_ids)
            _line(
                "coverage", f"{chosen.coverage(counts):.2%} with {other} ids" + (" (written)" if other == size else "")
            )
    unseen = int((counts[mapping.selected_token_ids] == 0).sum())
    if unseen:
        _line("note", f"{unseen} of the {size} ids never occur in this data: a smaller --size covers as much")


@contextmanager
def _progress_bar() -> Iterator[Callable[[int, int, int], None]]:
    from rich.console import Console  # a fast start
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (BarColumn(), DownloadColumn(), TextColumn("{task.fields[tokens]:,} tokens"), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("counting", total=None, tokens=0)
        yield lambda done, total, tokens: bar.update(task, completed=done, total=total, tokens=tokens)


def _line(name: str, value: str) -> None:
    click.echo(f"{name:<18}{value}")


def _yes(answer: bool) -> str:
    return "yes" if answer else "no"
