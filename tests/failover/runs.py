"""A trainer's run over several servers, every batch of which is compared with the target's own."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from eagle_target.client.remote import RemoteEagle3TargetModel
from tests.client.batches import assert_same_batch, expected_batch, rows_of
from tests.server.cases import mapping_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SOON_SECONDS = 30.0


@contextlib.contextmanager
def client(*urls: str, **options: Any) -> Iterator[RemoteEagle3TargetModel]:
    usual = {"transport": "wire", "encoding": "probs", "timeout": SOON_SECONDS, "ready_timeout": SOON_SECONDS}
    with RemoteEagle3TargetModel.from_urls(urls, **{**usual, **options}) as target:
        target.set_vocab_mapping(mapping_of())
        yield target


def run(
    target: RemoteEagle3TargetModel, batches: int, at: dict[int, Callable[[], object]] | None = None, depth: int = 4
) -> None:
    """Take so many batches in order; `at` a number something happens, with batches on their way."""
    items = [rows_of(seed) for seed in range(batches)]
    number = -1
    for number, batch in enumerate(target.prefetch(items, depth=depth)):
        assert_same_batch(batch, expected_batch(items[number]))
        (at or {}).get(number, lambda: None)()
    assert number == batches - 1


def server_of(target: RemoteEagle3TargetModel, url: str) -> dict[str, Any]:
    """What `model_info` tells of one server."""
    (found,) = (each for each in target.model_info()["servers"] if each["url"] == url)
    return dict(found)


def is_used(target: RemoteEagle3TargetModel, url: str) -> bool:
    """Whether a server is well after a few more batches."""
    run(target, 4)
    return bool(server_of(target, url)["healthy"])
