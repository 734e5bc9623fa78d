"""Texts as windows of tokens: those that a run learns from, and those that a model is judged on."""

from .calibration import Calibration, calibration_ids, file_names, tuning_ids
from .evaluation import read_text, windows

__all__ = [
    "Calibration",
    "calibration_ids",
    "file_names",
    "read_text",
    "tuning_ids",
    "windows",
]
