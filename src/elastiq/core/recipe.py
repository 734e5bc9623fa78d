"""What is done to a model, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .error import ElastiqError
from .step import Format, Solver, Tuner, step_from_dict

_CHOICES = {"inputs": ("full", "quantized"), "token_weights": ("output", "uniform")}


@dataclass(frozen=True)
class Recipe:
    """The filled slots.

    embeddings: quantize the embedding table and the output head too (they stay in 16 bits otherwise).
    inputs: what a block is calibrated on, `full` (the 16-bit model's activations) or `quantized` (those that the
        already quantized blocks before it produce, at the top level).
    token_weights: how much each calibration token counts for a matrix, `output` (by how far its block's output moves
        when the matrix's output does at that token) or `uniform`.
    tuner: what the finished codes and scales become, judged by the whole model's answers; None leaves them.
    """

    format: Format
    solver: Solver
    embeddings: bool = False
    inputs: str = "full"
    token_weights: str = "output"
    tuner: Tuner | None = None

    def __post_init__(self) -> None:
        for field, known in _CHOICES.items():
            if getattr(self, field) not in known:
                raise ElastiqError(f"recipe: {field}={getattr(self, field)!r} is not one of {', '.join(known)}")

    @property
    def levels(self) -> tuple[int, ...]:
        return self.format.levels

    @property
    def needs(self) -> frozenset[str]:
        return self.format.needs | self.solver.needs

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; an empty slot is left out."""
        tuner = {} if self.tuner is None else {"tuner": self.tuner.to_dict()}
        return {
            "format": self.format.to_dict(),
            "solver": self.solver.to_dict(),
            "embeddings": self.embeddings,
            "inputs": self.inputs,
            "token_weights": self.token_weights,
            **tuner,
        }

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Recipe:
        """Raises ElastiqError for an unknown slot, step or parameter."""
        data = dict(data)
        steps = {slot: step_from_dict(slot, data.pop(slot, {})) for slot in ("format", "solver")}
        steps |= {slot: step_from_dict(slot, data.pop(slot)) for slot in ("tuner",) if slot in data}
        unknown = sorted(set(data) - {"embeddings", *_CHOICES})
        if unknown:
            raise ElastiqError(f"recipe: unknown slot {', '.join(unknown)}")
        return Recipe(**steps, **data)  # type: ignore[arg-type]
