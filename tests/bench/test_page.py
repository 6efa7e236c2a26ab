"""The page with the plots."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import TYPE_CHECKING

from eagle_target.bench.measuring import Cell, Endpoint
from eagle_target.bench.page import render_page
from eagle_target.client.timings import STAGES
from eagle_target.verify.workload import Workload

if TYPE_CHECKING:
    from collections.abc import Sequence

WORKLOAD = Workload(batch=2, seq=10)


class Loaded(HTMLParser):
    """Notes what a browser would load, and which tags are open."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "data")]


def make_cell(clients: int) -> Cell:
    cell = Cell(Endpoint("<hf>", "http://one"), "wire", "hidden", clients, 2, used_transport="wire")
    cell.rates = [1000.0, 1200.0, 900.0]
    cell.client_rates = [[1.0] * clients]
    cell.requests, cell.tokens, cell.nbytes = 10, 100, 1000
    cell.stages = dict.fromkeys(STAGES, 1.0)
    return cell


def test_the_page_has_plots_and_loads_nothing() -> None:
    unusable = Cell(Endpoint("hf", "http://one"), "nccl", "hidden", 1, 2, problem="no <GPU>")
    page = render_page([make_cell(1), make_cell(4), unusable], WORKLOAD, advice=["1 server"])
    found = Loaded()
    found.feed(page)

    assert found.tags.count("svg") == 2 * 2 + len(STAGES)
    assert page.count("<title>queue: ") == 2
    assert "script" not in found.tags
    assert found.addresses == ["data:,"]
    assert not re.search(r"url\(|@import", page)
    assert "no &lt;GPU&gt;" in page
    assert "&lt;hf&gt;" in page
    assert "1 server" in page


def test_a_page_without_measurements_still_says_why() -> None:
    page = render_page([Cell(Endpoint("hf", "u"), "shm", "hidden", 1, 2, problem="not offered")], WORKLOAD)

    assert "<svg" not in page
    assert "not measured: not offered" in page
