"""How often each target token occurs in training data, to choose a draft vocabulary from.

vocab = the target's vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from eagle_target.errors import ConfigError
from eagle_target.vocab.record_files import Record, RecordFiles, missing_field
from eagle_target.vocab.text_tokenizer import TextTokenizer, load_tokenizer

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Ids = NDArray[np.int64]

Progress = Callable[[int, int, int], None]

FIELDS = ("input_ids", "messages", "conversations", "text")
LOSS_MASK = "loss_mask"
_BATCH_BYTES = 4 << 20
_BATCH_RECORDS = 4096


def count_tokens(
    paths: str | Path | Iterable[str | Path],
    *,
    field: str | None = None,
    tokenizer: str | Path | TextTokenizer | None = None,
    vocab_size: int | None = None,
    only_supervised: bool = False,
    progress: Progress | None = None,
) -> torch.Tensor:
    """Count the tokens of JSON-lines and parquet files; int64 `[vocab]`.

    A record carries token ids (and `loss_mask`, as long), a text, or a chat as a list of messages with `role` and
    `content` or `from` and `value`. The files are streamed.

    Args:
        paths: files, folders and glob patterns.
        field: where a record has its ids, text or chat; by default the first it has of `FIELDS`.
        tokenizer: for texts and chats: a folder (chats need its chat template), a name on the Hub, a tokenizer.json.
        vocab_size: size of the target's vocabulary; by default that of the config.json beside the tokenizer.
        only_supervised: count only what `loss_mask` has, or what the chat template marks as the assistant's.
        progress: called with bytes read, bytes in all, tokens counted.

    Raises:
        ConfigError: files, tokenizer or vocabulary size missing; a bad record, with its file, line and reason.
    """
    if isinstance(tokenizer, str | Path):
        tokenizer = load_tokenizer(tokenizer)
    vocab_size = target_vocab_size(tokenizer, vocab_size)
    files = RecordFiles(paths, [(name, LOSS_MASK) for name in _wanted(field)])
    reader = _RecordIds(field, tokenizer, only_supervised=only_supervised)
    counts, tokens = np.zeros(vocab_size, np.int64), 0
    for batch in _batches(files):
        arrays = reader.ids(batch)
        flat = np.concatenate(arrays)
        if len(flat) and not 0 <= flat.min() <= flat.max() < vocab_size:
            _refuse_out_of_range(batch, arrays, vocab_size)
        counts += np.bincount(flat, minlength=vocab_size)
        tokens += len(flat)
        if progress:
            progress(files.bytes_done, files.total_bytes, tokens)
    return torch.from_numpy(counts)


def target_vocab_size(tokenizer: TextTokenizer | None, vocab_size: int | None) -> int:
    """The size given, else the one in the config.json beside the tokenizer.

    Raises:
        ConfigError: neither.
    """
    size = vocab_size if vocab_size is not None or tokenizer is None else tokenizer.vocab_size
    if size is None:
        raise ConfigError(
            "the size of the target's vocabulary is not known: pass vocab_size (--vocab-size; the target's config.json "
            "has it), or a tokenizer in the target's folder"
        )
    if size < 1:
        raise ConfigError(f"vocab_size must be at least 1, got {size}")
    return size


class _RecordIds:
    """Records to token ids, texts and chats a batch at a time."""

    def __init__(self, field: str | None, tokenizer: TextTokenizer | None, *, only_supervised: bool) -> None:
        self._fields = _wanted(field)
        self._tokenizer = tokenizer
        self._only_supervised = only_supervised

    def ids(self, records: Sequence[Record]) -> list[Ids]:
        """Ids of each record, int64 `[tokens]`."""
        arrays: dict[int, Ids] = {}
        texts: dict[int, str] = {}
        chats: dict[int, str] = {}
        for index, record in enumerate(records):
            value = self._value(record)
            with _located(record):
                if isinstance(value, str):
                    texts[index] = self._text(value)
                elif not _is_chat(value):
                    arrays[index] = self._given(record, value)
                elif self._only_supervised:
                    arrays[index] = self._needed("a chat").supervised_chat_ids(value)
                else:
                    chats[index] = self._needed("a chat").render(value)
        if self._tokenizer:
            # A chat template has written its special tokens itself.
            for strings, special in ((texts, True), (chats, False)):
                encoded = self._tokenizer.encode(list(strings.values()), add_special_tokens=special)
                arrays.update(zip(strings, encoded, strict=True))
        return [arrays[index] for index in range(len(records))]

    def _value(self, record: Record) -> Any:
        for name in self._fields:
            if (value := record.fields.get(name)) is not None:
                return value
        empty = [name for name in self._fields if name in record.fields]
        if empty:
            raise ConfigError(f"{record.location}: {empty[0]!r} is null: remove the record")
        raise ConfigError(missing_field(record.location, self._fields, record.fields))

    def _text(self, text: str) -> str:
        self._needed("a text")
        if self._only_supervised:
            raise ValueError("a text has no loss mask: give input_ids with loss_mask, or a chat, or count every token")
        return text

    def _needed(self, what: str) -> TextTokenizer:
        if self._tokenizer is None:
            raise ValueError(f"this is {what}, not token ids: pass the target's tokenizer (--tokenizer)")
        return self._tokenizer

    def _given(self, record: Record, value: Any) -> Ids:
        ids = _vector(value, "token ids", "iu")
        if not self._only_supervised:
            return ids
        if record.fields.get(LOSS_MASK) is None:
            raise ValueError(f"only supervised tokens count, and it has no {LOSS_MASK}: add it, or count every token")
        mask = _vector(record.fields[LOSS_MASK], LOSS_MASK, "iub")
        if len(mask) != len(ids):
            raise ValueError(f"{LOSS_MASK} has {len(mask)} entries, the token ids {len(ids)}: make them as long")
        return ids[mask.astype(np.bool_)]


def _wanted(field: str | None) -> tuple[str, ...]:
    return FIELDS if field is None else (field,)


def _is_chat(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _vector(value: Any, what: str, kinds: str) -> Ids:
    is_list = isinstance(value, list | np.ndarray)
    try:
        vector = np.asarray(value)
    except ValueError:  # lists of different lengths inside
        is_list = False
    if is_list and not len(vector):
        return np.zeros(0, np.int64)
    if not is_list or vector.ndim != 1 or vector.dtype.kind not in kinds:
        raise ValueError(f"{what} must be a flat list of integers, got {str(value)[:60]}")
    return vector.astype(np.int64, copy=False)


@contextmanager
def _located(record: Record) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ConfigError(f"{record.location}: {error}") from error


def _batches(records: Iterable[Record]) -> Iterator[list[Record]]:
    batch, size = [], 0
    for record in records:
        batch.append(record)
        size += record.size
        if size >= _BATCH_BYTES or len(batch) >= _BATCH_RECORDS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _refuse_out_of_range(batch: Sequence[Record], arrays: Sequence[Ids], vocab_size: int) -> None:
    for record, ids in zip(batch, arrays, strict=True):
        wrong = ids[(ids < 0) | (ids >= vocab_size)]
        if len(wrong):
            raise ConfigError(
                f"{record.location}: token id {wrong[0]}, but the target's ids are 0 to {vocab_size - 1}: pass the "
                "target's vocabulary size, and the tokenizer the data was made for"
            )
