"""Calibration: windows of tokens, and their way through a model one block at a time."""

from .objective import BlockObjective, by_parameter, parameter
from .stream import BlockStream
from .text import Calibration, calibration_ids, file_names, tuning_ids

__all__ = [
    "BlockObjective",
    "BlockStream",
    "Calibration",
    "by_parameter",
    "calibration_ids",
    "file_names",
    "parameter",
    "tuning_ids",
]
