"""Pieces of a quantized matrix that a checkpoint keeps as arrays."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from .error import ElastiqError


@dataclass(frozen=True)
class Kept:
    """An array as it is stored. plane: the file it travels in, from 1. levels: the only widths at which it is read;
    empty: all from `plane` on."""

    array: Tensor
    plane: int = 1
    levels: tuple[int, ...] = ()


class Part(ABC):
    """A piece of a matrix that is stored and read back by its class: `class Sparse(SideTerm, kind="sparse")`.

    Whoever writes, counts or runs matrices knows arrays and facts only, so a new kind touches none of them.
    """

    kind: ClassVar[str]
    registry: ClassVar[dict[str, type[Part]]] = {}

    def __init_subclass__(cls, *, kind: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if kind is not None:
            if kind in Part.registry:
                raise ElastiqError(f"part: the kind {kind!r} is taken by {Part.registry[kind].__name__}")
            cls.kind = kind
            Part.registry[kind] = cls

    @abstractmethod
    def kept(self) -> dict[str, Kept]:
        """Everything stored, by short name (letters, digits and _)."""

    def facts(self) -> dict[str, Any]:
        """JSON-ready: what else `restore` must know."""
        return {}

    @classmethod
    @abstractmethod
    def restore(cls, arrays: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Self:
        """The part again, from the arrays of the planes present (not copied). What does not fit together may raise
        anything but must not be followed blindly: arrays and facts come from outside."""

    def to(self, device: torch.device | str) -> Self:
        """The part with its arrays on `device`."""
        return self.restore({name: kept.array.to(device) for name, kept in self.kept().items()}, self.facts())

    def num_bits(self, level: int) -> int:
        """Stored bits that a reader of `level` needs."""
        kept = self.kept().values()
        return sum(8 * k.array.nbytes for k in kept if is_read(k.plane, k.levels, level))


def is_read(plane: int, levels: tuple[int, ...], width: int) -> bool:
    """Whether a reader of `width` needs an array kept for these."""
    return plane <= width if not levels else width in levels
