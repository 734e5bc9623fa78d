"""The picture of a frontier."""

from __future__ import annotations

from pathlib import Path

from ..allocate import Frontier
from .charts import Line, save_line_chart


def save_frontier(curve: Frontier, file: Path) -> None:
    """Damage against counted bits per weight, with the uniform widths as points; the suffix names the kind of file.

    The damage is the KL divergence where uniform maps were measured, else the sensitivity's own loss.
    """
    key = "kl" if all(step.kl is not None for step in curve.steps) else "loss"
    drawn = [step for step in curve.steps if getattr(step, key) > 0]
    best = Line(
        f"mixed, predicted by {curve.sensitivity}",
        [step.bits_per_weight for step in drawn],
        [getattr(step, key) for step in drawn],
        colour=1,
        faint=True,
    )
    rows = {level: row for level, row in curve.uniform.items() if row[key] is not None and row[key] > 0}
    flat = Line(
        "uniform",
        [row["bits_per_weight"] for row in rows.values()],
        [row[key] for row in rows.values()],
        [str(level) for level in rows],
    )
    label = "KL divergence, nats per token" if key == "kl" else "loss"
    save_line_chart(file, [flat, best], "bits per weight", label, (), log_y=True)
