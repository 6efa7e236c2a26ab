"""Files that a user names, damaged: settings, tokens, mappings, training data. And rows that a trainer gets wrong."""

from __future__ import annotations

import gzip
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from eagle_target.auth import read_tokens
from eagle_target.compute.layout import read_trainer_rows
from eagle_target.config import ClientConfig, ServerConfig, load_config, read_environment
from eagle_target.contract.vocab_mapping import VocabMapping
from eagle_target.plugins.options import parse_assignments, parse_value
from eagle_target.vocab.record_files import RecordFiles
from tests.fuzz.budget import tries
from tests.fuzz.mutations import json_values, mutated, value_or_typed_error
from tests.server.cases import VOCAB_SIZE, mapping_of

SETTINGS = b"""model: x
port: 8001
aux_layer_ids: [1, 3, 4]
engine_options: {dtype: bfloat16, nested: {a: 1}}
transports: wire,shm
transport_options:
  shm: {max_bytes: 1000}
log_level: info
"""
LINES = b'{"input_ids": [1, 2, 3], "loss_mask": [0, 1, 1]}\n{"text": "to be"}\n\n'
LENGTHS = st.lists(st.lists(st.integers(-1, 8), max_size=3), max_size=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def written(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def mapping_file(suffix: str) -> bytes:
    path = Path(f"mapping{suffix}")
    if suffix == ".safetensors":
        from safetensors.torch import save

        mapping = mapping_of()
        return bytes(save({"d2t": mapping.d2t, "t2d": mapping.t2d, "other": torch.ones(3)}))
    buffer = io.BytesIO()
    mapping = mapping_of()
    content = {"selected_token_ids": mapping.selected_token_ids, "selected_token_mask": mapping.selected_token_mask}
    torch.save(content, buffer, _use_new_zipfile_serialization=path.suffix == ".pt")
    return buffer.getvalue()


def parquet_file() -> bytes:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    buffer = io.BytesIO()
    parquet.write_table(pyarrow.table({"input_ids": [[1, 2], [3]], "text": ["a", None]}), buffer)
    return buffer.getvalue()


@tries(3)
@given(mutated(mapping_file(".safetensors")), st.sampled_from([None, VOCAB_SIZE, 5]))
def test_a_mapping_as_safetensors(folder: Path, data: bytes, vocab_size: int | None) -> None:
    path = written(folder, "mapping.safetensors", data)
    value_or_typed_error(lambda: VocabMapping.from_file(path, vocab_size=vocab_size))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@tries(3)
@given(mutated(mapping_file(".pt"), mapping_file(".bin")), st.sampled_from([".pt", ".bin", ".pth"]))
def test_a_mapping_as_a_checkpoint(folder: Path, data: bytes, suffix: str) -> None:
    path = written(folder, f"mapping{suffix}", data)
    value_or_typed_error(lambda: VocabMapping.from_file(path))


@tries(2)
@given(st.lists(st.sampled_from([-5, -1, 0, 1, 7, 10, 11, 1 << 40, -(1 << 63)]), max_size=5), st.integers(-1, 12))
def test_a_mapping_of_offsets_nobody_expects(folder: Path, offsets: list[int], size: int) -> None:
    path = folder / "offsets.pt"
    torch.save({"d2t": torch.tensor(offsets, dtype=torch.int64), "t2d": torch.ones(max(size, 0))}, path)
    value_or_typed_error(lambda: VocabMapping.from_file(path, vocab_size=size))


def test_a_mapping_as_it_was_saved(folder: Path) -> None:
    mapping_of().save(folder / "saved.safetensors")
    assert VocabMapping.from_file(folder / "saved.safetensors") == mapping_of()


@tries(3)
@given(mutated(LINES, gzip.compress(LINES), b'{"a": ' + b"[" * 3000), st.sampled_from([".jsonl", ".json.gz"]))
def test_training_data_in_lines(folder: Path, data: bytes, suffix: str) -> None:
    path = written(folder, f"data{suffix}", data)
    value_or_typed_error(lambda: [record.location for record in RecordFiles(path, [["input_ids"]])])


@tries(4)
@given(mutated(parquet_file()))
def test_training_data_in_columns(folder: Path, data: bytes) -> None:
    path = written(folder, "data.parquet", data)
    value_or_typed_error(lambda: [record.fields for record in RecordFiles(path, [["input_ids"], ["text"]])])


@tries(3)
@given(mutated(SETTINGS), st.sampled_from([ServerConfig, ClientConfig]))
@example(b"a: &a [*a]\nmodel: *a", ServerConfig)
@example(b"model: 2026-02-30", ServerConfig)
@example(b"[" * 5000, ServerConfig)
@example(b"aux_layer_ids: a,b,c\nmodel: x", ServerConfig)
@example(b"model: x\nport: " + b"9" * 5000, ServerConfig)
def test_settings(folder: Path, data: bytes, model: Any) -> None:
    path = written(folder, "settings.yaml", data)
    value_or_typed_error(lambda: load_config(model, path=path, environment={}, overrides={}))


@tries(4)
@given(
    st.dictionaries(
        st.sampled_from([*ServerConfig.model_fields, *ClientConfig.model_fields, "engine_options__a__b", "nothing"]),
        st.text(max_size=20) | st.sampled_from(["1,2", "a,b,c", "{", "[[[[", "1e999", "NaN", '{"a": {"b": 1}}']),
        max_size=3,
    ),
    st.sampled_from([ServerConfig, ClientConfig]),
)
@example({"port": "9" * 5000}, ServerConfig)
@example({"engine_options": "[" * 100_000}, ServerConfig)
def test_settings_in_the_environment(variables: dict[str, str], model: Any) -> None:
    environment = {f"EAGLE_TARGET_{name.upper()}": text for name, text in variables.items()}
    value_or_typed_error(lambda: load_config(model, path=None, environment=environment, overrides={"model": "x"}))
    value_or_typed_error(lambda: read_environment(model, environment))


@tries(4)
@given(st.lists(st.text(max_size=20) | st.sampled_from(["a=1", "a=", "=", "a=[", "a=1e400"]), max_size=3))
@example(["a=" + "9" * 5000])
def test_options(assignments: list[str]) -> None:
    value_or_typed_error(lambda: parse_assignments(assignments, "-o"))
    for text in assignments:
        parse_value(text)


@tries(4)
@given(mutated(b"# ours\n" + b"t" * 32 + b"\n\n" + b"u" * 40 + b"\n"))
def test_a_token_file(folder: Path, data: bytes) -> None:
    path = written(folder, "tokens", data)
    value_or_typed_error(lambda: read_tokens(path))


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    dtype = draw(st.sampled_from(["int64", "int32", "bool", "float32", "uint8"]))
    shape = draw(arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5))
    values = {"bool": st.booleans(), "float32": st.sampled_from([0.0, 1.0, 0.5, float("nan"), float("inf")])}
    default = st.sampled_from([0, 1, 2, 5, 210, 211]) | st.integers(0, 255)
    return torch.from_numpy(draw(arrays.arrays(dtype, shape, elements=values.get(dtype, default), fill=None)))


@tries(3)
@given(tensors(), tensors(), tensors(), st.none() | tensors(), st.none() | tensors() | LENGTHS, st.none() | tensors())
def test_rows_of_a_trainer(ids: Any, attention: Any, loss: Any, positions: Any, lengths: Any, remaining: Any) -> None:
    packing = {"position_ids": positions, "seq_lens": lengths, "doc_remaining": remaining}
    value_or_typed_error(lambda: read_trainer_rows(ids, attention, loss, vocab_size=VOCAB_SIZE, **packing))


@tries(3)
@given(
    st.integers(1, 3),
    st.integers(1, 5),
    st.data(),
)
def test_rows_of_a_trainer_of_the_right_shape(batch: int, seq: int, data: st.DataObject) -> None:
    def draw(values: list[int]) -> torch.Tensor:
        return torch.tensor([[data.draw(st.sampled_from(values)) for _ in range(seq)] for _ in range(batch)])

    ids, attention, loss = draw([0, 1, 210, 211, -1]), draw([0, 1, 1, 1]), draw([0, 1])
    lengths = data.draw(st.none() | LENGTHS)

    def read() -> None:
        rows = read_trainer_rows(ids, attention, loss, vocab_size=VOCAB_SIZE, seq_lens=lengths)
        assert sum(rows.layout.seq_lens) <= batch * seq

    value_or_typed_error(read)


@tries(2)
@given(json_values())
def test_what_validates_a_whole_file_of_settings(values: Any) -> None:
    overrides = {"model": "x", "engine_options": values, "transport_options": values, "port": values}
    value_or_typed_error(lambda: load_config(ServerConfig, path=None, environment={}, overrides=overrides))
