"""Training data on disk, one record at a time: JSON lines, plain or gzipped, and parquet."""

from __future__ import annotations

import gzip
import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eagle_target.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

JSON_SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz")
SUFFIXES = (*JSON_SUFFIXES, ".parquet")
MAX_LINE_BYTES = 256 << 20
_PARQUET_ROWS = 256


@dataclass(frozen=True, slots=True)
class Record:
    """One training example and where it stands.

    path, number: its file, and its line there (row, for parquet), from 1.
    fields: JSON values; a parquet column of integer lists gives numpy arrays.
    size: about how many bytes it has.
    """

    path: Path
    number: int
    fields: dict[str, Any]
    size: int

    @property
    def location(self) -> str:
        """`file:line`."""
        return f"{self.path}:{self.number}"


class RecordFiles:
    """The records of many files, in order, and how far reading them has come.

    Args:
        paths: files, folders (all their files, at any depth) and glob patterns; a file named twice is read once.
        columns: for parquet, groups of columns; a file's columns are read from the first group of which it has the
            first. Other columns are not read.

    Raises:
        ConfigError: a path with no files, or a file that is no such file.
    """

    def __init__(self, paths: str | Path | Iterable[str | Path], columns: Sequence[Sequence[str]]) -> None:
        self.files = find_files(paths)
        self.columns = columns
        self.total_bytes = sum(path.stat().st_size for path in self.files)
        self.bytes_done = 0

    def __iter__(self) -> Iterator[Record]:
        self.bytes_done = 0
        for path in self.files:
            before = self.bytes_done
            yield from self._parquet(path) if path.suffix == ".parquet" else self._json_lines(path)
            self.bytes_done = before + path.stat().st_size

    def _json_lines(self, path: Path) -> Iterator[Record]:
        before, number = self.bytes_done, 0
        try:
            with path.open("rb") as raw, gzip.open(raw) if path.suffix == ".gz" else raw as stream:
                while line := stream.readline(MAX_LINE_BYTES + 1):
                    number += 1
                    self.bytes_done = before + raw.tell()
                    if line.strip():
                        yield Record(path, number, _parse_line(line, path, number), len(line))
        except (OSError, EOFError, zlib.error) as error:
            raise ConfigError(f"{path}:{number + 1}: cannot be read: {error}") from error

    def _parquet(self, path: Path) -> Iterator[Record]:
        try:
            import pyarrow as pa  # optional
            import pyarrow.parquet as pq
        except ImportError as error:
            raise ConfigError(
                f'{path}: parquet files need pyarrow, which is not installed: pip install "eagle-target[vocab]"'
            ) from error
        before, number, size = self.bytes_done, 0, path.stat().st_size
        try:
            with pq.ParquetFile(path) as file:
                columns = self._present(path, file.schema_arrow.names)
                for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=columns):
                    for row in range(batch.num_rows):
                        number += 1
                        fields = {name: _value(batch.column(name)[row]) for name in columns}
                        yield Record(path, number, fields, batch.nbytes // batch.num_rows)
                    self.bytes_done = before + size * number // file.metadata.num_rows
        except (OSError, pa.ArrowException) as error:
            raise ConfigError(f"{path}:{number + 1}: cannot be read as parquet: {error}") from error

    def _present(self, path: Path, names: list[str]) -> list[str]:
        for group in self.columns:
            if group[0] in names:
                return [name for name in group if name in names]
        raise ConfigError(missing_field(str(path), [group[0] for group in self.columns], names))


def find_files(paths: str | Path | Iterable[str | Path]) -> list[Path]:
    """Files, folders and glob patterns as files, each once, in the order given and then by name.

    Raises:
        ConfigError: a path with no files, or a file of another kind.
    """
    given = [paths] if isinstance(paths, str | Path) else list(paths)
    found: dict[Path, Path] = {}
    for item in given:
        path = Path(item).expanduser()
        files = list(_expand(path))
        if not files:
            what = "has no files of these kinds" if path.is_dir() else "does not exist"
            raise ConfigError(f"{path} {what}: {', '.join(SUFFIXES)}")
        for file in files:
            if not file.name.endswith(SUFFIXES):
                raise ConfigError(f"{file} is not one of {', '.join(SUFFIXES)}: convert it")
            found.setdefault(file.resolve(), file)
    if not found:
        raise ConfigError(f"no data given: name files, folders or patterns of {', '.join(SUFFIXES)}")
    return list(found.values())


def missing_field(where: str, wanted: Sequence[str], present: Iterable[str]) -> str:
    """The message for a record or file that has none of the wanted fields."""
    one_of = " or ".join(repr(name) for name in wanted)
    return (
        f"{where}: no field {one_of}; it has {', '.join(map(str, present)) or 'none'}: name the field that has the data"
    )


def _expand(path: Path) -> Iterator[Path]:
    if path.is_dir():
        inside = (file for file in path.rglob("*") if file.name.endswith(SUFFIXES) and file.is_file())
        yield from sorted(file for file in inside if not _is_hidden(file.relative_to(path)))
    elif path.exists():
        yield path
    elif any(sign in str(path) for sign in "*?["):
        for match in sorted(Path(path.anchor).glob(str(path.relative_to(path.anchor)))):
            yield from _expand(match)


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _parse_line(line: bytes, path: Path, number: int) -> dict[str, Any]:
    if len(line) > MAX_LINE_BYTES:
        raise ConfigError(f"{path}:{number}: a line of more than {MAX_LINE_BYTES >> 20} MiB: put one record on a line")
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        hint = "; a JSON array is not read, put one record on a line" if line.lstrip()[:1] == b"[" else ""
        raise ConfigError(f"{path}:{number}: not JSON: {error}{hint}") from error
    if not isinstance(record, dict):
        raise ConfigError(f"{path}:{number}: a {type(record).__name__}, not an object: put one record on a line")
    return record


def _value(scalar: Any) -> Any:
    values = getattr(scalar, "values", None)
    if values is None or values.null_count or not str(values.type).startswith(("int", "uint", "bool")):
        return scalar.as_py()
    return values.to_numpy(zero_copy_only=False)
