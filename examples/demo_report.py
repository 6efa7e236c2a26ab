"""What the demo shows at its end: a table and a picture."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.ticker import PercentFormatter
from train_draft import comparison_table

if TYPE_CHECKING:
    from pathlib import Path

    from rich.table import Table
    from train_draft import Result

INK, MUTED, GRID = "#1f2933", "#6b7785", "#e4e8ec"
ACCENT, FAINT = "#1d5fbf", "#b9d0f0"
DASHES = (0, (4, 3))
# Depth 1 is the darkest: it counts most.
DEPTHS = ("#123f82", "#2f6fcb", "#6a9ee3", "#9fc0ee", "#c3d8f5")


def figures_table(result: Result) -> Table:
    """Untrained beside trained, and what the way over the wire cost."""
    table = comparison_table(result)
    table.add_section()
    table.add_row("training loss, first and last", f"{result.losses[0]:.3f}", "", f"{result.losses[-1]:.3f}")
    table.add_row("tokens/s", "", "", f"{result.tokens_per_second:,.0f}")
    if result.bytes_per_token is not None:
        table.add_row("bytes/token on the wire", "", "", f"{result.bytes_per_token:,.0f}")
    return table


def draw_curves(result: Result, path: Path) -> None:
    """Draw loss, agreement at each depth and accept length over the steps, into a PNG."""
    style = {
        "font.size": 10,
        "axes.edgecolor": MUTED,
        "axes.labelcolor": MUTED,
        "axes.titlecolor": INK,
        "axes.titlesize": 11.5,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.axisbelow": True,
        "grid.color": GRID,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "text.color": INK,
    }
    with mpl.rc_context(style):
        figure, axes = plt.subplots(1, 3, figsize=(13.5, 4.4), layout="constrained")
        _draw_loss(axes[0], result)
        _draw_agreement(axes[1], result)
        _draw_accept_length(axes[2], result)
        for axis in axes:
            axis.set_xlabel("training step")
            axis.set_xlim(0, len(result.losses))
            axis.tick_params(length=0)
        figure.suptitle(
            f"An EAGLE-3 draft learns its target over the wire, {result.tokens_per_second:,.0f} tokens/s",
            x=0.01, y=1.06, ha="left", fontsize=13.5, fontweight="bold",
        )  # fmt: skip
        figure.savefig(path, dpi=150, bbox_inches="tight", pad_inches=0.2)
        plt.close(figure)


def _draw_loss(axis: Any, result: Result) -> None:
    axis.set_title("Loss (cross-entropy, nats)")
    steps = range(1, len(result.losses) + 1)
    axis.plot(steps, result.losses, color=FAINT, linewidth=1, label="each step")
    axis.plot(steps, _smooth(result.losses), color=ACCENT, linewidth=2, label="smoothed")
    held_out = [(one.step, one.loss) for one in result.evaluations]
    axis.plot(*zip(*held_out, strict=True), "o", color=INK, markersize=5, label="held-out text", clip_on=False)
    axis.axhline(result.entropy, color=MUTED, linewidth=1.2, linestyle=DASHES, label="target's own entropy")
    axis.set_ylim(result.entropy - 0.3, max(result.losses) * 1.03)
    axis.legend(frameon=False, labelcolor=INK, loc="upper right")


def _draw_agreement(axis: Any, result: Result) -> None:
    axis.set_title("Top-1 agreement with the target, held-out text")
    steps = [one.step for one in result.evaluations]
    curves = list(zip(*(one.agreement for one in result.evaluations), strict=True))
    for depth, curve in enumerate(curves):
        color = DEPTHS[min(depth, len(DEPTHS) - 1)]
        label = f"depth {depth + 1}: {curve[-1]:.0%}"
        axis.plot(steps, curve, "o-", color=color, linewidth=2, markersize=4, label=label, clip_on=False)
    baseline = result.context_free.agreement[0]
    _draw_baseline(axis, steps[-1], baseline, f"reads nothing {baseline:.0%}")
    axis.set_ylim(0, max(baseline, *(max(curve) for curve in curves)) * 1.12)
    axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axis.legend(frameon=False, labelcolor=INK, loc="center right")


def _draw_accept_length(axis: Any, result: Result) -> None:
    depths = len(result.evaluations[0].agreement)
    axis.set_title(f"Simulated accept length, of {depths + 1} at most")
    steps = [one.step for one in result.evaluations]
    lengths = [one.accept_length for one in result.evaluations]
    axis.plot(steps, lengths, "o-", color=ACCENT, linewidth=2, markersize=5, clip_on=False)
    axis.fill_between(steps, 1.0, lengths, color=FAINT, alpha=0.35, linewidth=0)
    baseline = result.context_free.accept_length
    _draw_baseline(axis, steps[-1], baseline, f"reads nothing {baseline:.2f}")
    axis.annotate(f"untrained {lengths[0]:.2f}", (steps[0], lengths[0]), (8, -14), textcoords="offset points")
    axis.annotate(
        f"trained {lengths[-1]:.2f}", (steps[-1], lengths[-1]), (0, 10),
        textcoords="offset points", ha="right", fontweight="bold",
    )  # fmt: skip
    axis.set_ylim(0.8, max(lengths) * 1.15)
    axis.set_ylabel("tokens a round")


def _draw_baseline(axis: Any, right: int, height: float, label: str) -> None:
    axis.axhline(height, color=MUTED, linewidth=1.2, linestyle=DASHES)
    axis.annotate(label, (right, height), (0, 5), textcoords="offset points", ha="right", color=MUTED)


def _smooth(values: list[float], reach: int = 6) -> list[float]:
    """Mean over each value's neighbours, on both sides alike."""
    windows = (values[max(0, index - reach) : index + reach + 1] for index in range(len(values)))
    return [sum(window) / len(window) for window in windows]
