"""Calibration: windows of tokens, and their way through a model one block at a time."""

from .stream import BlockStream
from .text import Calibration, calibration_ids, mixed_ids

__all__ = ["BlockStream", "Calibration", "calibration_ids", "mixed_ids"]
