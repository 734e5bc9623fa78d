"""What is done to a model, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .error import ElastiqError
from .step import Compensator, Format, Rewrite, Solver, Split, Step, TokenWeights, Transform, Tuner, step_from_dict

_LISTS = {"rewrites": "rewrite", "transforms": "transform", "splits": "split", "compensators": "compensator"}
"""Slots that any number of steps may fill, one after the other."""
_ONE = {"token_weights": "token-weights", "block_tuner": "tuner", "tuner": "tuner"}
"""Slots that one step fills, or none."""
_INPUTS = ("full", "quantized")
_FORMER_NAMES = {"output": "block-output"}
"""Names that steps had in recipes of earlier versions."""


@dataclass(frozen=True)
class Recipe:
    """The filled slots.

    embeddings: quantize the embedding table and the output head too (they stay in 16 bits otherwise).
    inputs: what a block is calibrated on, `full` (the 16-bit model's activations) or `quantized` (those that the
        already quantized blocks before it produce, at the top level).
    token_weights: how much each calibration token counts for a matrix; None counts every token once.
    rewrites: changes of the model as it is read.
    transforms, splits, compensators: steps in the order in which they are taken. A matrix that calibration did not
        reach goes without them.
    block_tuner: what the codes and scales of a block become once it is solved, judged by the block's output.
    tuner: what the finished codes and scales become, judged by the whole model's answers; None leaves them.
    """

    format: Format
    solver: Solver
    embeddings: bool = False
    inputs: str = "full"
    token_weights: TokenWeights | None = None
    tuner: Tuner | None = None
    block_tuner: Tuner | None = None
    transforms: tuple[Transform, ...] = ()
    splits: tuple[Split, ...] = ()
    compensators: tuple[Compensator, ...] = ()
    rewrites: tuple[Rewrite, ...] = ()

    def __post_init__(self) -> None:
        for slot in ("format", "solver", "block_tuner", "tuner"):
            if getattr(self, slot) is not None:
                object.__setattr__(self, slot, getattr(self, slot).plain())
        for slots in _LISTS:
            object.__setattr__(self, slots, tuple(step.plain() for step in getattr(self, slots)))
        if self.inputs not in _INPUTS:
            raise ElastiqError(f"recipe: inputs={self.inputs!r} is not one of {', '.join(_INPUTS)}")
        if self.token_weights is not None and not isinstance(self.token_weights, TokenWeights):
            raise ElastiqError(
                f"recipe: token_weights={self.token_weights!r} are no token weights; give a member of "
                "elastiq.token_weights, such as Uniform()"
            )
        if not isinstance(self.embeddings, bool):
            raise ElastiqError(f"recipe: embeddings={self.embeddings!r} must be true or false")
        shifting = [step.name for step in self.compensators if step.shifts]
        if shifting and (self.tuner or self.block_tuner):
            raise ElastiqError(f"recipe: a tuner sees no shift of an output; leave out the compensator {shifting[0]}")

    @property
    def levels(self) -> tuple[int, ...]:
        return self.format.levels

    @property
    def needs(self) -> frozenset[str]:
        steps = (self.format, self.solver, *self.transforms, *self.splits, *self.compensators)
        return frozenset().union(*(step.needs for step in steps))

    @property
    def steps(self) -> tuple[Step, ...]:
        """All of them, in the order in which they are taken."""
        filled = (
            *self.rewrites, self.token_weights, *self.transforms, *self.splits, self.format, self.solver,
            *self.compensators, self.block_tuner, self.tuner,
        )  # fmt: skip
        return tuple(step for step in filled if step is not None)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; an empty slot is left out."""
        single = {slot: getattr(self, slot) for slot in _ONE}
        lists = {name: [step.to_dict() for step in getattr(self, name)] for name in _LISTS if getattr(self, name)}
        return {
            "format": self.format.to_dict(),
            "solver": self.solver.to_dict(),
            "embeddings": self.embeddings,
            "inputs": self.inputs,
            **{slot: step.to_dict() for slot, step in single.items() if step is not None},
            **lists,
        }

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Recipe:
        """Raises ElastiqError for an unknown slot, step or parameter."""
        data = dict(data)
        steps: dict[str, Any] = {slot: step_from_dict(slot, data.pop(slot, {})) for slot in ("format", "solver")}
        weights = data.get("token_weights")
        if isinstance(weights, str):  # of a recipe written before token weights had parameters
            data["token_weights"] = {"name": _FORMER_NAMES.get(weights, weights)}
        steps |= {slot: step_from_dict(kind, data.pop(slot)) for slot, kind in _ONE.items() if slot in data}
        steps |= {name: tuple(step_from_dict(slot, row) for row in data.pop(name, ())) for name, slot in _LISTS.items()}
        unknown = sorted(set(data) - {"embeddings", "inputs"})
        if unknown:
            raise ElastiqError(f"recipe: unknown slot {', '.join(unknown)}")
        return Recipe(**steps, **data)
