"""One HTML page with the plots in it: nothing is loaded from anywhere."""

from __future__ import annotations

import html
import io
from typing import TYPE_CHECKING, Any

from eagle_target.bench.report import describe_machine, memory_sources, shown
from eagle_target.client.timings import STAGES
from eagle_target.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from eagle_target.bench.measuring import Cell
    from eagle_target.verify.workload import Workload

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 68rem; padding: 0 1rem; color: #1b1f24 }
h1 { font-size: 1.5rem; margin-bottom: .2rem } h2 { font-size: 1.1rem; margin-top: 2rem }
p.facts { color: #57606a; margin-top: 0 } svg { max-width: 100%; height: auto }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .6rem; border-bottom: 1px solid #d0d7de; text-align: right; white-space: nowrap }
th { color: #57606a; font-weight: 600 } td.name, th.name { text-align: left }
td.problem { text-align: left; white-space: normal; color: #9a3412 }
"""
COLORS = {
    "queue": "#c9ced6",
    "forward": "#2f6fb0",
    "projection": "#7fb2e0",
    "transfer": "#d98032",
    "assembly": "#f0c48f",
}
BAR_INCHES = 0.34
WIDTH_INCHES = 10.5


def render_page(cells: Sequence[Cell], workload: Workload, *, advice: Sequence[str] = ()) -> str:
    """The page.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    measured = [cell for cell in cells if cell.problem is None]
    title = f"eagle-target bench: batches of {workload.batch} x {workload.seq}"
    facts = (
        f"{workload.real_tokens:,} real tokens a batch, {workload.supervised_tokens:,} supervised; {describe_machine()}"
    )
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>",
        f"<h1>{html.escape(title)}</h1><p class='facts'>{html.escape(facts)}</p>",
    ]
    if measured:
        parts += ["<h2>Real tokens a second, median; the line goes from least to most</h2>", _rates_svg(measured)]
        parts += ["<h2>Where a request's time goes, milliseconds</h2>", _stages_svg(measured)]
    parts += ["<h2>Figures</h2>", _table(cells)]
    parts += [f"<p class='facts'>{html.escape(line)}</p>" for line in memory_sources(measured)]
    if advice:
        parts.append("<h2>Advice</h2><pre>" + html.escape("\n".join(advice)) + "</pre>")
    parts.append("</body></html>\n")
    return "\n".join(parts)


def _rates_svg(cells: Sequence[Cell]) -> str:
    figure, axes = _figure(len(cells))
    rates = [cell.rate for cell in cells]
    below = [cell.rate - min(cell.rates) for cell in cells]
    above = [max(cell.rates) - cell.rate for cell in cells]
    axes.barh(range(len(cells)), rates, xerr=[below, above], color="#2f6fb0", ecolor="#1b1f24", capsize=3, height=0.6)
    for place, cell in enumerate(cells):
        axes.annotate(
            f"{cell.rate:,.0f}",
            (max(cell.rates), place),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            size=9,
        )
    axes.set_xlim(0, 1.15 * max(max(cell.rates) for cell in cells))
    return _svg(figure, axes, cells)


def _stages_svg(cells: Sequence[Cell]) -> str:
    figure, axes = _figure(len(cells), extra=0.5)
    left = [0.0] * len(cells)
    for stage in STAGES:
        widths = [cell.stage_ms().get(stage, 0.0) for cell in cells]
        axes.barh(range(len(cells)), widths, left=left, color=COLORS[stage], label=stage, height=0.6)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.legend(ncols=len(STAGES), loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    return _svg(figure, axes, cells)


def _figure(bars: int, extra: float = 0.0) -> tuple[Any, Any]:
    try:
        from matplotlib import rcParams
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("plots need matplotlib: pip install 'eagle-target[bench]'") from error
    # With a salt of its own and without a date the same figures give the same page.
    rcParams["svg.hashsalt"] = "eagle-target"
    figure = Figure(figsize=(WIDTH_INCHES, 0.9 + extra + BAR_INCHES * bars), layout="constrained")
    return figure, figure.add_subplot()


def _svg(figure: Any, axes: Any, cells: Sequence[Cell]) -> str:
    axes.set_yticks(range(len(cells)), [_label(cell) for cell in cells])
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", color="#d0d7de", linewidth=0.6)
    axes.set_axisbelow(True)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _label(cell: Cell) -> str:
    return f"{cell.endpoint.name}  {cell.used_transport}  {cell.encoding}  {cell.clients} x depth {cell.depth}"


def _table(cells: Sequence[Cell]) -> str:
    names = ("target", "transport", "encoding")
    columns = ("clients", "depth", "tokens/s", "least", "most", "bytes/token", "server MB", "client MB")
    head = "".join(f"<th class='name'>{name}</th>" for name in names)
    head += "".join(f"<th>{name}</th>" for name in columns)
    return "\n".join([f"<table><tr>{head}</tr>", *(_row(cell) for cell in shown(cells)), "</table>"])


def _row(cell: Cell) -> str:
    named = (cell.endpoint.name, cell.used_transport or cell.transport, cell.encoding)
    text = "".join(f"<td class='name'>{html.escape(name)}</td>" for name in named)
    if cell.problem is not None:
        return f"<tr>{text}<td class='problem' colspan='8'>not measured: {html.escape(cell.problem)}</td></tr>"
    text += f"<td>{cell.clients}</td><td>{cell.depth}</td>"
    figures = (
        cell.rate,
        min(cell.rates),
        max(cell.rates),
        cell.bytes_per_token,
        cell.server_peak_mb,
        cell.client_peak_mb,
    )
    text += "".join("<td></td>" if value is None else f"<td>{value:,.0f}</td>" for value in figures)
    return f"<tr>{text}</tr>"
