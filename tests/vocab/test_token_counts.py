"""Tokens are counted right whatever carries them, and a bad record is named by file, line and reason."""

from __future__ import annotations

import json
import sys
from collections import Counter
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from eagle_target.errors import ConfigError
from eagle_target.vocab.token_counts import count_tokens

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from tokenizers import Tokenizer

    Write = Callable[..., Path]

VOCAB = 320
SHAREGPT = [{"from": "human", "value": "Count the tokens."}, {"from": "gpt", "value": "Two times faster."}]
CHAT = [{"role": "user", "content": "Count the tokens."}, {"role": "assistant", "content": "Two times faster."}]
RENDERED = "<s><|user|>Count the tokens.<|assistant|>Two times faster.</s>"


def expected(ids: Iterable[int], vocab_size: int = VOCAB) -> list[int]:
    counter = Counter(ids)
    return [counter[i] for i in range(vocab_size)]


def test_ids_are_counted(write_jsonl: Write) -> None:
    path = write_jsonl([{"input_ids": [1, 2, 2], "other": "x"}, {"input_ids": []}, "", {"input_ids": [9, 2]}])
    counts = count_tokens(path, vocab_size=10)
    assert counts.dtype == torch.int64
    assert counts.tolist() == expected([1, 2, 2, 9, 2], 10)


def test_only_supervised_counts_what_the_mask_has(write_jsonl: Write) -> None:
    path = write_jsonl(
        [
            {"input_ids": [1, 2, 3], "loss_mask": [0, 1, 1]},
            {"input_ids": [4, 3], "loss_mask": [False, True]},
        ]
    )
    assert count_tokens(path, vocab_size=5, only_supervised=True).tolist() == expected([2, 3, 3], 5)
    assert int(count_tokens(path, vocab_size=5).sum()) == 5


def test_text_is_counted_the_same_with_a_folder_and_a_file(
    write_jsonl: Write, bpe: Tokenizer, tokenizer_file: Path, tokenizer_folder: Path
) -> None:
    texts = ["The draft proposes.", "the tokens ☃"]
    path = write_jsonl([{"text": text} for text in texts])
    want = expected(i for text in texts for i in bpe.encode(text).ids)
    assert count_tokens(path, tokenizer=tokenizer_folder).tolist() == want
    assert count_tokens([path], tokenizer=str(tokenizer_file), vocab_size=VOCAB).tolist() == want


@pytest.mark.parametrize("record", [{"messages": CHAT}, {"conversations": SHAREGPT}, {"conversations": CHAT}])
def test_chats_go_through_the_chat_template(
    write_jsonl: Write, bpe: Tokenizer, tokenizer_folder: Path, record: dict[str, Any]
) -> None:
    want = expected(bpe.encode(RENDERED, add_special_tokens=False).ids)
    assert count_tokens(write_jsonl([record]), tokenizer=tokenizer_folder).tolist() == want


def test_only_supervised_counts_the_assistants_tokens_of_a_chat(
    write_jsonl: Write, bpe: Tokenizer, tokenizer_folder: Path
) -> None:
    counts = count_tokens(write_jsonl([{"messages": CHAT}]), tokenizer=tokenizer_folder, only_supervised=True)
    assert counts.tolist() == expected(bpe.encode("Two times faster.</s>", add_special_tokens=False).ids)


def test_a_template_that_marks_nothing_cannot_count_only_supervised(
    write_jsonl: Write, folder_with_template: Callable[[str | None], Path]
) -> None:
    folder = folder_with_template("{% for m in messages %}{{ m.content }}{% endfor %}")
    with pytest.raises(ConfigError, match=r"data\.jsonl:1: .*does not mark the assistant's tokens"):
        count_tokens(write_jsonl([{"messages": CHAT}]), tokenizer=folder, only_supervised=True)


def test_mixed_records_and_a_named_field(write_jsonl: Write, bpe: Tokenizer, tokenizer_folder: Path) -> None:
    path = write_jsonl([{"body": "Count"}, {"body": [5, 6]}, {"body": CHAT}])
    ids = [*bpe.encode("Count").ids, 5, 6, *bpe.encode(RENDERED, add_special_tokens=False).ids]
    assert count_tokens(path, field="body", tokenizer=tokenizer_folder).tolist() == expected(ids)


def test_gzip_folders_and_globs_read_each_file_once(write_jsonl: Write, tmp_path: Path) -> None:
    write_jsonl([{"input_ids": [1]}], "data/a.jsonl")
    write_jsonl([{"input_ids": [2]}], "data/deep/b.jsonl.gz")
    write_jsonl(["not read"], "data/.cache/c.jsonl")
    write_jsonl([{"input_ids": [3]}], "more/d.json")
    paths: list[str | Path] = [tmp_path / "data", tmp_path / "data" / "*.jsonl", str(tmp_path / "m*" / "*.json")]
    assert count_tokens(paths, vocab_size=5).tolist() == [0, 1, 1, 1, 0]


@pytest.mark.parametrize("ids_type", [pa.int32(), pa.int64()])
def test_parquet_ids_with_masks(tmp_path: Path, ids_type: pa.DataType) -> None:
    ids = [[i % 7, 8, 8] for i in range(1000)]
    rows = {"input_ids": ids, "loss_mask": [[True, False, True]] * 1000}
    schema = pa.schema([("input_ids", pa.list_(ids_type)), ("loss_mask", pa.list_(pa.bool_()))])
    pq.write_table(pa.table(rows, schema=schema), tmp_path / "d.parquet", row_group_size=300)
    supervised = [i for row in ids for i in (row[0], row[2])]
    counts = count_tokens(tmp_path / "d.parquet", vocab_size=9, only_supervised=True)
    assert counts.tolist() == expected(supervised, 9)
    assert int(count_tokens(tmp_path / "d.parquet", vocab_size=9).sum()) == 3000


def test_parquet_chats_and_texts(tmp_path: Path, bpe: Tokenizer, tokenizer_folder: Path) -> None:
    optional = [{**message, "name": None} for message in CHAT]
    pq.write_table(pa.table({"messages": [optional], "other": [1]}), tmp_path / "chat.parquet")
    pq.write_table(pa.table({"text": ["Count the tokens."]}), tmp_path / "text.parquet")
    ids = [*bpe.encode(RENDERED, add_special_tokens=False).ids, *bpe.encode("Count the tokens.").ids]
    assert count_tokens(tmp_path, tokenizer=tokenizer_folder).tolist() == expected(ids)


def test_data_of_many_batches_is_counted_in_full(write_jsonl: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eagle_target.vocab.token_counts._BATCH_RECORDS", 7)
    path = write_jsonl({"input_ids": [i % 10] * (i % 3)} for i in range(500))
    want = expected((i % 10 for i in range(500) for _ in range(i % 3)), 10)
    assert count_tokens(path, vocab_size=10).tolist() == want


@pytest.mark.parametrize("name", ["data.jsonl", "data.jsonl.gz"])
def test_progress_rises_to_the_whole(write_jsonl: Write, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr("eagle_target.vocab.token_counts._BATCH_RECORDS", 10)
    path = write_jsonl([{"input_ids": [1, 2]}] * 35, name)
    seen: list[tuple[int, int, int]] = []
    count_tokens(path, vocab_size=3, progress=lambda *state: seen.append(state))
    assert [tokens for _, _, tokens in seen] == [20, 40, 60, 70]
    assert [done for done, _, _ in seen] == sorted(done for done, _, _ in seen)
    assert seen[-1][:2] == (path.stat().st_size, path.stat().st_size)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"input_ids": [1, 2}', "not JSON"),
        ("[1, 2]", "a list, not an object"),
        ('"abc"', "a str, not an object"),
        ("[", "not JSON.*a JSON array is not read"),
        ("[" * 100_000, "not JSON"),
        ('{"input_ids": [1, 10]}', "token id 10, but the target's ids are 0 to 9"),
        ('{"input_ids": [-1]}', "token id -1"),
        ('{"input_ids": [1.5]}', "token ids must be a flat list of integers"),
        ('{"input_ids": [[1, 2]]}', "flat list"),
        ('{"input_ids": [[1], [1, 2]]}', "flat list"),
        ('{"input_ids": ["1"]}', "flat list"),
        (f'{{"input_ids": [{10**30}]}}', "flat list"),
        ('{"input_ids": 4}', "flat list"),
        ('{"input_ids": null}', "'input_ids' is null"),
        ('{"ids": [1], "meta": 0}', "no field 'input_ids' or 'messages' .*; it has ids, meta"),
        ('{"text": "hello"}', "this is a text, not token ids: pass the target's tokenizer"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "this is a chat, not token ids"),
    ],
)
def test_a_bad_record_is_named(write_jsonl: Write, line: str, reason: str) -> None:
    path = write_jsonl([{"input_ids": [1]}, line])
    with pytest.raises(ConfigError, match=f"{path}:2: .*{reason}"):
        count_tokens(path, vocab_size=10)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"input_ids": [1, 2]}, "it has no loss_mask"),
        ({"input_ids": [1, 2], "loss_mask": [1]}, "loss_mask has 1 entries, the token ids 2"),
        ({"input_ids": [1, 2], "loss_mask": [[1, 1]]}, "loss_mask must be a flat list"),
        ({"text": "x"}, "a text has no loss mask"),
    ],
)
def test_a_record_that_cannot_say_what_is_supervised_is_named(
    write_jsonl: Write, tokenizer_file: Path, record: dict[str, Any], reason: str
) -> None:
    path = write_jsonl([record])
    with pytest.raises(ConfigError, match=f"{path}:1: .*{reason}"):
        count_tokens(path, vocab_size=VOCAB, tokenizer=tokenizer_file, only_supervised=True)


@pytest.mark.parametrize(
    ("chat", "reason"),
    [
        ([{"role": "oracle", "content": "x"}], "unknown role oracle"),
        ([{"speaker": "x", "line": "y"}], "a message has speaker, line: it needs role and content"),
        ([{"role": "user", "content": None}], "the chat template of .* refuses it"),
        ([{"role": "user", "content": "x"}, "y"], "a message has 'y'"),
    ],
)
def test_a_chat_that_the_template_refuses_is_named(
    write_jsonl: Write, tokenizer_folder: Path, chat: list[Any], reason: str
) -> None:
    path = write_jsonl([{"messages": CHAT}, {"messages": chat}])
    with pytest.raises(ConfigError, match=f"{path}:2: .*{reason}"):
        count_tokens(path, tokenizer=tokenizer_folder)


def test_a_chat_needs_a_template(
    write_jsonl: Write, tokenizer_file: Path, folder_with_template: Callable[[str | None], Path]
) -> None:
    path = write_jsonl([{"messages": CHAT}])
    with pytest.raises(ConfigError, match=f"{path}:1: a chat needs a chat template.*name its folder"):
        count_tokens(path, tokenizer=tokenizer_file, vocab_size=VOCAB)
    with pytest.raises(ConfigError, match=f"{path}:1: .*chat.template"):
        count_tokens(path, tokenizer=folder_with_template(None))


def test_a_parquet_file_without_the_field_names_its_columns(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": [1], "b": ["x"]}), tmp_path / "d.parquet")
    with pytest.raises(ConfigError, match=r"d\.parquet: no field 'text'; it has a, b"):
        count_tokens(tmp_path / "d.parquet", field="text", vocab_size=5)


def test_a_parquet_row_out_of_range_is_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({"input_ids": [[1], [2], [77]]}), tmp_path / "d.parquet")
    with pytest.raises(ConfigError, match=r"d\.parquet:3: token id 77"):
        count_tokens(tmp_path / "d.parquet", vocab_size=5)


@pytest.mark.parametrize(("name", "reason"), [("d.parquet", "cannot be read as parquet"), ("d.jsonl.gz", "cannot be")])
def test_a_damaged_file_is_named(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / name).write_bytes(b"damaged")
    with pytest.raises(ConfigError, match=f"{name}:1: {reason}"):
        count_tokens(tmp_path / name, vocab_size=5)


def test_a_truncated_gzip_is_named(write_jsonl: Write) -> None:
    path = write_jsonl([{"input_ids": [1]}], "d.jsonl.gz")
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ConfigError, match=f"{path}:.*cannot be read"):
        count_tokens(path, vocab_size=5)


def test_an_endless_line_is_not_read_whole(write_jsonl: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eagle_target.vocab.record_files.MAX_LINE_BYTES", 1 << 20)
    with pytest.raises(ConfigError, match=r"data\.jsonl:1: a line of more than 1 MiB"):
        count_tokens(write_jsonl(["x" * (2 << 20)]), vocab_size=5)


def test_paths_without_data_are_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    for path, reason in [
        (tmp_path, "has no files"),
        (tmp_path / "none.jsonl", "does not exist"),
        (tmp_path / "*.jsonl", "does not exist"),
        (tmp_path / "notes.txt", "is not one of"),
    ]:
        with pytest.raises(ConfigError, match=reason):
            count_tokens(path, vocab_size=5)
    with pytest.raises(ConfigError, match="no data given"):
        count_tokens([], vocab_size=5)


def test_the_vocabulary_size_must_be_known(write_jsonl: Write, tokenizer_file: Path) -> None:
    path = write_jsonl([{"input_ids": [1]}])
    for tokenizer in (None, tokenizer_file):
        with pytest.raises(ConfigError, match="size of the target's vocabulary is not known: pass vocab_size"):
            count_tokens(path, tokenizer=tokenizer)
    with pytest.raises(ConfigError, match="at least 1, got 0"):
        count_tokens(path, vocab_size=0)


def test_the_vocabulary_size_is_the_text_configs(write_jsonl: Write, bpe: Tokenizer, tmp_path: Path) -> None:
    bpe.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"vocab_size": 512}}))
    path = write_jsonl([{"text": "Count"}])
    assert len(count_tokens(path, tokenizer=tmp_path / "tokenizer.json")) == 512


def test_tokenizers_that_cannot_be_loaded_are_named(write_jsonl: Write, tmp_path: Path) -> None:
    path = write_jsonl([{"text": "x"}])
    (tmp_path / "broken.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    for name in ("none.json", "broken.json", "empty"):
        with pytest.raises(ConfigError, match=f"tokenizer {tmp_path / name} "):
            count_tokens(path, tokenizer=tmp_path / name, vocab_size=5)


@pytest.mark.parametrize("library", ["pyarrow", "tokenizers", "transformers"])
def test_a_missing_library_says_what_to_install(
    tmp_path: Path, write_jsonl: Write, monkeypatch: pytest.MonkeyPatch, library: str
) -> None:
    pq.write_table(pa.table({"input_ids": [[1]]}), tmp_path / "d.parquet")
    monkeypatch.setitem(sys.modules, library, None)
    path = tmp_path / "d.parquet" if library == "pyarrow" else write_jsonl([{"text": "x"}])
    tokenizer = {"pyarrow": None, "tokenizers": "tokenizer.json", "transformers": "folder"}[library]
    with pytest.raises(ConfigError, match=rf'{library}.*pip install "eagle-target\[vocab\]"'):
        count_tokens(path, tokenizer=tokenizer, vocab_size=5)
