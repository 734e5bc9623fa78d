"""A step is one part of a recipe: parameters in the constructor, one verb from values to values."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

import numpy as np
from pydantic import TypeAdapter, ValidationError

from .error import ElastiqError
from .plain import plain_number
from .powers import LEAST

if TYPE_CHECKING:
    from torch import Tensor

    from .edit import Edits, ResidualStream
    from .fold import Fold
    from .grid import CodeGrid
    from .stats import Stats
    from .term import QuantizedWeight, SideTerm, Term


class Step(ABC):
    """Base of every part. A frozen dataclass that names itself registers itself: `class GPTQ(Solver, name="gptq")`.

    `needs` lists the statistics (by the names of `Statistic`) the step asks calibration for; nothing else is collected.
    `resources`: what it takes besides these, such as gradients. `bits`: smallest and largest width it is for. Papers
    are named in the docstring, "GPTQ, 2210.17323" with the number at arXiv; `elastiq cite` finds them there.
    """

    slot: ClassVar[str]
    name: ClassVar[str]
    needs: ClassVar[frozenset[str]] = frozenset()
    resources: ClassVar[tuple[str, ...]] = ()
    bits: ClassVar[tuple[int, int]] = (1, 8)
    registry: ClassVar[dict[str, dict[str, type[Step]]]] = {}

    def __init_subclass__(cls, *, slot: str | None = None, name: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if slot is not None:
            cls.slot = slot
            Step.registry[slot] = {}
        if name is not None:
            if name in Step.registry[cls.slot]:
                taken = Step.registry[cls.slot][name].__name__
                raise ElastiqError(f"{cls.slot}: the name {name!r} is taken by {taken}")
            cls.name = name
            Step.registry[cls.slot][name] = cls

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready parameters with the registered name first."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}  # type: ignore[arg-type]
        return {"name": self.name, **{k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}}

    def plain(self) -> Self:
        """The same step with numbers of other libraries among its parameters as Python's own. Raises ElastiqError for
        a truth value where a number belongs."""
        changed = {
            field.name: _plain(getattr(self, field.name), str(field.type), f"{self.name}: {field.name}")
            for field in dataclasses.fields(self)  # type: ignore[arg-type]
        }
        return dataclasses.replace(self, **changed)  # type: ignore[type-var]

    def require_at_least(self, **least: float) -> None:
        """Raises ElastiqError for a parameter that is below its least value, or no number."""
        for parameter, value in least.items():
            if not getattr(self, parameter) >= value:
                raise ElastiqError(f"{self.name}: {parameter}={getattr(self, parameter)} must be at least {value}")


def _plain(value: Any, type: str, name: str) -> Any:
    """A parameter, declared as `type`, with Python's own numbers. A fraction that is whole stays a fraction where one
    belongs: 1.0 and 1 are one value and two spellings in the recipe's file."""
    if isinstance(value, tuple | list):
        return tuple(_plain(part, type, name) for part in value)
    if type.startswith("bool"):
        return bool(value) if isinstance(value, np.bool_) else value
    number = plain_number(value, name)
    return float(number) if "float" in type and isinstance(number, int) and not isinstance(value, int) else number


def step_from_dict(slot: str, data: dict[str, Any]) -> Step:
    """The step that `to_dict` described. Raises ElastiqError for an unknown name or parameter, or a value of another
    type."""
    data = dict(data)
    name = data.pop("name", None)
    known = Step.registry.get(slot, {})
    if name not in known:
        raise ElastiqError(f"{slot}: unknown name {name!r}; known: {', '.join(sorted(known))}")
    cls = known[name]
    parameters = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(data) - parameters)
    if unknown:
        known_ones = ", ".join(sorted(parameters))
        raise ElastiqError(f"{slot} {name}: unknown parameter {', '.join(unknown)}; known: {known_ones}")
    try:
        return TypeAdapter(cls).validate_python(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ElastiqError(f"{slot} {name}: {where}={first['input']!r:.60}: {first['msg']}") from None


class Format(Step, slot="format"):
    """Which numbers a code may stand for."""

    levels: tuple[int, ...]

    @property
    def least(self) -> float:
        """The smallest of the largest weights of rows for which its stored scales are precise."""
        return LEAST

    @abstractmethod
    def fit(self, weight: Tensor, stats: Stats) -> CodeGrid:
        """The grid for `weight` [out, in], or [levels, out, in] where every level has a weight of its own."""

    @abstractmethod
    def overhead(self, in_features: int) -> int:
        """Stored bits per output row and level beside the codes: scales and zero points."""


@dataclasses.dataclass(frozen=True)
class Seen:
    """What a batch of windows showed of one matrix.

    x: its input [windows, tokens, in], or [rows, in] for an expert. gradient: [..., out], what came back to its output
    from the block's output times a random direction; None where nothing did, or nobody asked. attention:
    probabilities [windows, heads, queries, keys] of the block, added over its attention modules; None unless asked for.
    """

    x: Tensor
    gradient: Tensor | None = None
    attention: Tensor | None = None


class TokenWeights(Step, slot="token-weights"):
    """How much each calibration token counts in the statistics of a matrix.

    gradients, attention: whether `weigh` looks at `Seen.gradient` and at `Seen.attention`, which cost a backward pass,
    and attention that writes its probabilities down.
    """

    gradients: ClassVar[bool] = False
    attention: ClassVar[bool] = False

    @abstractmethod
    def weigh(self, seen: Seen) -> Tensor | None:
        """Weights [windows, tokens] (of an expert, [rows]), none negative; None counts every token once."""


class Rewrite(Step, slot="rewrite"):
    """A change of parameters, made while they are read, after which the model computes the same."""

    @abstractmethod
    def plan(self, stream: ResidualStream) -> Edits:
        """What becomes of which parameter, by name. Names that the model does not have are left out by who applies
        them."""


class Transform(Step, slot="transform"):
    """A map of a matrix's input that changes no output of the model, and after which codes do better."""

    @abstractmethod
    def plan(self, consumers: Sequence[Tensor], stats: Stats, format: Format) -> Fold:
        """The map for the matrices [out, in] that read one input."""


class Split(Step, slot="split"):
    """Which values are kept apart, in more bits than the codes have."""

    @abstractmethod
    def split(self, weight: Tensor, format: Format, stats: Stats) -> tuple[Tensor, tuple[SideTerm, ...]]:
        """What the codes shall stand for [out, in], and the terms that stand for the rest of `weight`."""


class Compensator(Step, slot="compensator"):
    """What is added to make up for what the codes lose. shifts: to the output, whatever the input is."""

    shifts: ClassVar[bool] = False

    @abstractmethod
    def fit(self, residual: Tensor, stats: Stats, level: int) -> tuple[SideTerm, ...]:
        """Terms for `residual` [out, in], the weight less what is read at `level`; they are read at that level."""


class Solver(Step, slot="solver"):
    """Which code every weight gets.

    by_rows: rows of a matrix are solved apart, so that their order and company change nothing. serves_top_alone: the
    codes are the best for the widest level, and narrower ones read what they find. minimises: the measure in which the
    result is no worse than rounding to nearest. terms_by_level: a level reads more terms, and no wider codes.
    """

    by_rows: ClassVar[bool] = True
    serves_top_alone: ClassVar[bool] = True
    minimises: ClassVar[str] = "the output's error"
    terms_by_level: ClassVar[bool] = False

    @abstractmethod
    def solve(self, weight: Tensor, format: Format, stats: Stats) -> tuple[Term, ...]:
        """The terms whose sum stands for `weight` [out, in]."""


class Objective(Protocol):
    """How far a model, or a block of one, is from the full one, on windows of text to which the answers are kept."""

    def __len__(self) -> int:
        """Number of windows."""

    def loss(
        self, weight: Callable[[str], Tensor], windows: Sequence[int], second: tuple[Tensor, ...] | None = None
    ) -> Tensor:
        """Mean loss, differentiable, over these windows when matrix `name` is `weight(name)` [out, in].

        second: answers of something else to the same windows; the loss is then the mean of the distances to both. Each
        matrix is asked for once, and once more in the backward pass where that spares memory.
        """

    def answers(self, weight: Callable[[str], Tensor], windows: Sequence[int]) -> tuple[Tensor, ...]:
        """What is answered to these windows with such matrices, without gradients."""

    def original(self, name: str) -> Tensor | None:
        """What matrix `name` stands for [out, in], None where that is no longer at hand."""


class Journal(Protocol):
    """Keeps the state of long work, so that a killed run goes on from what was saved last."""

    def load(self) -> dict[str, Tensor]:
        """What was saved last; empty if nothing was."""

    def save(self, state: Mapping[str, Tensor]) -> None:
        """Make the state durable in the place of what was saved before."""


@dataclasses.dataclass(frozen=True)
class Tuned:
    """What a tuner made of some matrices: by site name, the loss of each level before and after on windows it did not
    train on (relative to before, the mean after is not above 1: a change that does not help is given up)."""

    weights: Mapping[str, QuantizedWeight]
    before: Mapping[int, float]
    after: Mapping[int, float]


class Tuner(Step, slot="tuner"):
    """What solved codes and scales become when a block, or the whole model, is judged and not one matrix.

    joint: all levels are tuned together, and codes may change; otherwise one level is, and its codes stay.
    batch: windows of one loss.
    """

    joint: ClassVar[bool] = False
    batch: int

    @property
    @abstractmethod
    def windows(self) -> int:
        """Windows of text it makes use of."""

    def groups(self, levels: Sequence[int]) -> list[tuple[int, ...]]:
        """The levels it tunes, those that it tunes together side by side."""
        return [tuple(levels)] if self.joint else [(level,) for level in levels]

    @abstractmethod
    def calls(self, windows: int, levels: Sequence[int]) -> int:
        """How often `tune` asks for a loss at `levels`, given so many windows."""

    @abstractmethod
    def tune(
        self, objective: Objective, weights: Mapping[str, QuantizedWeight], levels: Sequence[int], journal: Journal
    ) -> Tuned:
        """Matrices that read better at `levels` (ascending), and the same as before at every other level with scales of
        its own: one level, or all of them if the tuner is `joint`. The first term of each is `Codes`, and alone may
        change.

        Stopped at any moment and called again with the same arguments, it gives the same result.
        """
