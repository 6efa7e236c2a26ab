"""The status page's parts, each made of a `Report`."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

from eagle_target.server.recent import SAMPLE_SECONDS, SAMPLES, STAGES
from eagle_target.server.status.figures import NOTHING, show_bytes, show_count, show_duration, show_seconds
from eagle_target.server.status.markup import Markup, element, join
from eagle_target.server.status.plot import plot

if TYPE_CHECKING:
    from collections.abc import Sequence

    from eagle_target.server.status.report import Report

MAX_CLIENTS = 100
# What a server that has just started shows of its throughput.
FIRST_SAMPLES = 24
MOODS = {"ready": "good", "loading": "warn", "degraded": "bad", "draining": "warn", "failed": "bad", "closed": "bad"}
WHAT = {
    "read": "the request's body comes in",
    "queue": "waits for engine and room",
    "forward": "the target runs",
    "projection": "logits, argmax, draft columns",
    "send": "until the answer is sent",
}
BAR_WIDTH = 100
WINDOW = show_duration(SAMPLES * SAMPLE_SECONDS)
Cell = str | tuple[str, str]


def sections(report: Report) -> Markup:
    """All that stands in the page's `main`."""
    return join(
        _head(report),
        _tiles(report),
        _throughput(report),
        element("div", _target(report), _stages(report), class_="pair"),
        _clients(report),
        element("div", _transports(report), _problems(report), class_="pair"),
    )


def _head(report: Report) -> Markup:
    moment = datetime.fromtimestamp(report.now, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    parts = [
        element("h1", report.model),
        element("span", report.state, class_=f"state {MOODS[report.state]}"),
        element("p", f"eagle-target {report.version}, as of {moment}", class_="note"),
    ]
    if report.failure is not None:
        parts.append(element("p", report.failure, class_="bad"))
    return element("header", *parts)


def _tiles(report: Report) -> Markup:
    tiles = [
        (show_duration(report.uptime), "up"),
        (show_count(report.rates.tokens), "tokens/s"),
        (f"{report.rates.requests:.1f}", "requests/s"),
        (f"{show_bytes(report.rates.sent_bytes)}/s", "sent"),
        (str(report.waiting), f"queued, of {report.max_queue}"),
        (show_bytes(report.outbox_bytes), f"outbox of {show_bytes(report.max_outbox_bytes)}"),
        (show_bytes(report.memory_bytes), "memory"),
        (str(len(report.clients)), "clients"),
    ]
    return element(
        "div",
        *(element("div", element("b", figure), element("span", what), class_="tile") for figure, what in tiles),
        class_="tiles",
    )


def _throughput(report: Report) -> Markup:
    samples = report.samples[-FIRST_SAMPLES:] if report.uptime < FIRST_SAMPLES * SAMPLE_SECONDS else report.samples
    marked = [sample.problems > 0 for sample in samples]
    tokens = [sample.tokens / SAMPLE_SECONDS for sample in samples]
    sent = [sample.sent_bytes / SAMPLE_SECONDS for sample in samples]
    return _section(
        f"Throughput of the last {show_duration(len(samples) * SAMPLE_SECONDS)}",
        element(
            "div",
            plot("Tokens a second", tokens, marked, seconds=SAMPLE_SECONDS, show=show_count),
            plot("Bytes sent a second", sent, marked, seconds=SAMPLE_SECONDS, show=show_bytes),
            class_="pair plots",
        ),
        element("p", "A red mark: a problem was answered.", class_="note") if any(marked) else Markup(),
    )


def _target(report: Report) -> Markup:
    facts = {"Since the start": f"{show_count(report.requests)} requests, {show_count(report.tokens)} tokens"}
    if report.cache_bytes is not None:
        facts["Cache"] = show_bytes(report.cache_bytes)
    if report.restarts:
        facts["Engine restarts"] = show_count(report.restarts)
    if report.served is not None:
        info = report.served.info
        facts = {
            "Engine": f"{info.engine} {info.engine_version}",
            "dtype, device": f"{info.dtype}, {info.device}",
            "Revision": info.revision or NOTHING,
            "Layers captured": f"{', '.join(map(str, report.served.aux_layer_ids))} of {info.num_layers}",
            "Sizes": f"hidden {info.hidden_size}, vocabulary {info.vocab_size}",
            "Encodings": ", ".join(report.encodings),
            "Fingerprint": report.served.fingerprint,
            **facts,
        }
    rows = (join(element("dt", name), element("dd", value)) for name, value in facts.items())
    return _section("Target", element("dl", *rows))


def _stages(report: Report) -> Markup:
    means = {name: spent.seconds / spent.requests for name, spent in report.stages.items()}
    longest = max(means.values(), default=0.0) or 1.0
    rows: list[Sequence[Cell]] = [
        (
            name,
            (WHAT[name], "wide note"),
            (show_seconds(means[name]), "n"),
            (show_seconds(report.stages[name].longest), "n"),
            _bar(means[name] / longest),
        )
        for name in STAGES
        if name in means
    ]
    heads: Sequence[Cell] = ("stage", ("", "wide"), ("mean", "n"), ("longest", "n"), "")
    return _section(f"Where requests' time went, last {WINDOW}", _table(heads, rows, "No requests yet."))


def _clients(report: Report) -> Markup:
    rows: list[Sequence[Cell]] = [
        (
            element("code", client.id),
            (client.address, "wide"),
            client.transport or NOTHING,
            (show_count(client.requests), "n"),
            (show_count(client.tokens), "n"),
            (show_duration(report.now - client.since), "n wide"),
            (f"{show_duration(report.now - client.last_seen)} ago", "n"),
        )
        for client in report.clients[:MAX_CLIENTS]
    ]
    heads: Sequence[Cell] = (
        "client", ("address", "wide"), "transport", ("requests", "n"), ("tokens", "n"), ("connected", "n wide"),
        ("heard of", "n"),
    )  # fmt: skip
    more = len(report.clients) - MAX_CLIENTS
    note = element("p", f"And {more} more.", class_="note") if more > 0 else Markup()
    return _section("Clients", _table(heads, rows, "No client is connected."), note)


def _transports(report: Report) -> Markup:
    rows: list[Sequence[Cell]] = [
        (
            transport.name,
            (str(transport.channels), "n"),
            (show_bytes(transport.sent_bytes), "n"),
            (show_count(transport.fallbacks), "n"),
        )
        for transport in report.transports
    ]
    heads: Sequence[Cell] = ("transport", ("open channels", "n"), ("sent", "n"), ("fallbacks", "n"))
    return _section("Transports", _table(heads, rows, "None is offered."))


def _problems(report: Report) -> Markup:
    rows: list[Sequence[Cell]] = [
        (
            element("code", problem.name),
            (str(problem.status), "n"),
            (show_count(problem.count), "n"),
            (f"{show_duration(report.now - problem.last_at)} ago", "n"),
        )
        for problem in report.problems
    ]
    heads: Sequence[Cell] = ("problem", ("status", "n"), ("answered", "n"), ("last", "n"))
    return _section("Errors since the start", _table(heads, rows, "None."))


def _section(title: str, *children: str) -> Markup:
    return element("section", element("h2", title), *children)


def _table(heads: Sequence[Cell], rows: Sequence[Sequence[Cell]], nothing: str) -> Markup:
    if not rows:
        return element("p", nothing, class_="note")
    return element(
        "table",
        element("thead", element("tr", *(_cell("th", head) for head in heads))),
        element("tbody", *(element("tr", *(_cell("td", cell) for cell in row)) for row in rows)),
    )


def _cell(name: str, cell: Cell) -> Markup:
    content, kind = cell if isinstance(cell, tuple) else (cell, None)
    return element(name, content, class_=kind)


def _bar(part: float) -> Markup:
    return element(
        "svg",
        element("rect", width=BAR_WIDTH, height=10, class_="track"),
        element("rect", width=f"{BAR_WIDTH * part:.1f}", height=10),
        viewBox=f"0 0 {BAR_WIDTH} 10",
        preserveAspectRatio="none",
        class_="bar",
        aria_hidden="true",
    )
