"""Which numbers codes may stand for."""

from .integer import Integer

__all__ = ["Integer"]
