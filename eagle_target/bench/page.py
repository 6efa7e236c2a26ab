"""One HTML page with the plots in it: nothing is loaded from anywhere."""

from __future__ import annotations

from typing import TYPE_CHECKING

from eagle_target.bench.report import describe_machine, memory_sources, shown
from eagle_target.client.timings import STAGES
from eagle_target.server.status.environment import environment

if TYPE_CHECKING:
    from collections.abc import Sequence

    from eagle_target.bench.measuring import Cell
    from eagle_target.verify.workload import Workload


def render_page(cells: Sequence[Cell], workload: Workload, *, advice: Sequence[str] = ()) -> str:
    """The page."""
    measured = [cell for cell in cells if cell.problem is None]
    return (
        environment()
        .get_template("bench/bench.html")
        .render(
            title=f"eagle-target bench: batches of {workload.batch} x {workload.seq}",
            machine=describe_machine(),
            workload=workload,
            cells=shown(cells),
            measured=measured,
            totals=[sum(cell.stage_ms().values()) for cell in measured],
            stages=STAGES,
            memory_sources=memory_sources(measured),
            advice=advice,
        )
    )
