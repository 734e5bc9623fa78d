"""Maps that are measured before they are taken."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..allocate import Allocation, Budget, Table, allocate
from ..core import Damage, ElastiqError, LevelMap
from .bench import Bench

_TRIES = 6
"""Bounds on the predicted damage that are tried until the measured one is within the limit."""


@dataclass(frozen=True)
class Verdict:
    """An allocation, and what was measured. uniform: damage of the widest uniform map within the budget."""

    allocation: Allocation
    measured: Damage
    uniform: Damage | None

    def to_dict(self) -> dict[str, Any]:
        uniform = None if self.uniform is None else {"kl": self.uniform.kl, "nll": self.uniform.nll}
        measured = {"kl": self.measured.kl, "nll": self.measured.nll, "uniform": uniform}
        return {**self.allocation.to_dict(), "measured": measured}


def allocate_measured(bench: Bench, budget: Budget, *, max_kl: float | None = None, **options: Any) -> Verdict:
    """`allocate` with the result measured end to end on the bench's text.

    Without `max_kl` the widest uniform map within the budget is measured too, and taken if it is better. With it, the
    bound on the predicted damage is tightened until the measured one is at most `max_kl`. options: of `allocate`.
    Raises ElastiqError if no map within the budget is good enough.
    """
    if max_kl is not None:
        return _within(bench, budget, max_kl, options)
    found = allocate(bench.reader, budget, measure=bench.damage, **options)
    measured = bench.damage(found.level_map.widths)
    if found.uniform is None:
        return Verdict(found, measured, None)
    flat = dict.fromkeys(bench.nested, int(found.uniform["bits"]))
    uniform = bench.damage(flat)
    if uniform.kl < measured.kl:
        note = (
            f"measured, the uniform map at {found.uniform['bits']} bits is better (KL divergence {uniform.kl:.4g}, "
            f"not {measured.kl:.4g}), and is taken"
        )
        return Verdict(_replaced(found, bench, flat, note, options), uniform, uniform)
    note = f"measured, uniform {found.uniform['bits']} bits is worse ({uniform.kl:.4g}, not {measured.kl:.4g})"
    return Verdict(replace(found, notes=(*found.notes, note)), measured, uniform)


def _within(bench: Bench, budget: Budget, max_kl: float, options: dict[str, Any]) -> Verdict:
    bound, best = max_kl, None
    for _ in range(_TRIES):
        found = allocate(bench.reader, budget, max_kl=bound, measure=bench.damage, **options)
        measured = bench.damage(found.level_map.widths)
        if measured.kl <= max_kl:
            best = Verdict(found, measured, None)
            break
        bound *= 0.95 * max_kl / measured.kl
    if best is None:
        raise ElastiqError(
            f"max damage: kl={max_kl:g} was not reached; the last map measured {measured.kl:.3g} at "
            f"{found.sizes['bits_per_weight']:.2f} bits per weight; allow more, or measure a sensitivity on this text"
        )
    return best


def _replaced(
    found: Allocation, bench: Bench, widths: Mapping[str, int], note: str, options: Mapping[str, Any]
) -> Allocation:
    """The allocation with a uniform map in its place."""
    table = options.get("table") or Table.of(bench.reader, bool(options.get("untie")))
    sizes = table.sizes(bench.reader, table.choices(widths))
    assert found.uniform is not None
    facts = {**found.level_map.facts, **sizes, "loss": found.uniform["loss"], "kl": found.uniform["kl"]}
    return replace(
        found,
        level_map=LevelMap(widths, {**facts, "notes": [*found.notes, note]}),
        sizes=sizes,
        loss=found.uniform["loss"],
        kl=found.uniform["kl"],
        notes=(*found.notes, note),
    )
