"""Bytes and JSON that were right once: flipped, cut, repeated, swapped, and with numbers nobody expects."""

from __future__ import annotations

import contextlib
import copy
import re
import time
from typing import TYPE_CHECKING, Any

from hypothesis import strategies as st

from eagle_target.errors import EagleTargetError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

# Far above what any parser takes for a few kilobytes, however busy the machine.
LONGEST_SECONDS = 20.0
WORDS = [
    b"-1", b"0", b"1.5", b"1e400", b"99999999999999999999999999", b"4611686018427387904", b"9223372036854775807",
    b"null", b"true", b'""', b"[]", b"{}", b"NaN", b"-Infinity", b"\\ud800", b"[" * 2000,
]  # fmt: skip
INTEGERS = [0, 1, 2, 255, 1 << 20, (1 << 31) - 1, 1 << 40, (1 << 63) - 1, (1 << 64) - 1]
EDITS = ("flip", "cut", "drop", "insert", "repeat", "number", "integer", "swap")


def json_values() -> st.SearchStrategy[Any]:
    """Any JSON, with the numbers and names that parsers look for."""
    leaves = (
        st.none()
        | st.booleans()
        | st.integers(-2, 5)
        | st.sampled_from([1 << 31, 1 << 62, 1 << 63, -(1 << 63), 1 << 200, 1e308, -0.0, 0.5])
        | st.text(max_size=12)
        | st.sampled_from(["cuda:0", "cpu", "::1", "127.0.0.1", "0.0.0.0", "tcp", "F32", "00" * 16])
    )
    return st.recursive(
        leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    )


@st.composite
def mutated_json(draw: st.DrawFn, valid: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with a few of its values replaced or left out, at any depth."""
    changed = copy.deepcopy(dict(valid))
    for _ in range(draw(st.integers(0, 3))):
        place: Any = changed
        while place:
            keys = sorted(place) if isinstance(place, dict) else range(len(place))
            key = draw(st.sampled_from(list(keys)))
            inner = place[key]
            if isinstance(inner, dict | list) and inner and draw(st.booleans()):
                place = inner
                continue
            if draw(st.integers(0, 3)):
                place[key] = draw(json_values())
            else:
                del place[key]
            break
    return changed | draw(st.just({}) | st.dictionaries(st.text(max_size=8), json_values(), max_size=1))


@st.composite
def mutated(draw: st.DrawFn, *valid: bytes) -> bytes:
    """One of these with a few edits, or now and then bytes from nothing."""
    if not draw(st.integers(0, 15)):
        return draw(st.binary(max_size=300))
    data = bytearray(draw(st.sampled_from(valid)))
    for _ in range(draw(st.integers(0, 4))):
        _edit(draw, data)
    return bytes(data)


def _edit(draw: st.DrawFn, data: bytearray) -> None:
    kind = draw(st.sampled_from(EDITS))
    # Headers are where parsers go wrong: half of the edits are in the first bytes.
    first = draw(st.integers(0, max(min(len(data), 200), 0)) | st.integers(0, len(data)))
    last = min(first + draw(st.integers(0, 40)), len(data))
    if kind == "flip" and first < len(data):
        data[first] ^= 1 << draw(st.integers(0, 7))
    elif kind == "cut":
        del data[first:]
    elif kind == "drop":
        del data[first:last]
    elif kind == "insert":
        data[first:first] = draw(st.binary(max_size=20) | st.sampled_from(WORDS))
    elif kind == "repeat":
        data[first:first] = data[first:last] * draw(st.integers(1, 50))
    elif kind == "integer":
        data[first : first + 8] = draw(st.sampled_from(INTEGERS)).to_bytes(8, "little")
    elif kind == "swap":
        data[first:last] = data[first:last][::-1]
    elif kind == "number":
        found = re.search(rb"\d+", data[first:])
        if found:
            data[first + found.start() : first + found.end()] = draw(st.sampled_from(WORDS))


def value_or_typed_error(parse: Callable[[], object]) -> None:
    """Either it is read, or refused by an error of ours, soon."""
    started = time.monotonic()
    with contextlib.suppress(EagleTargetError):
        parse()
    assert time.monotonic() - started < LONGEST_SECONDS
