"""Texts: files as they are read, what a tokenizer makes of them, and windows to learn from and to be judged on."""

from .calibration import Calibration, calibration_ids, file_names, tuning_ids
from .evaluation import checkpoint_tokenizer, windows
from .files import read_records, read_text, require_characters
from .tokens import Windows, beginning, begins, check_ids, ending, tokenize

__all__ = [
    "Calibration",
    "Windows",
    "beginning",
    "begins",
    "calibration_ids",
    "check_ids",
    "checkpoint_tokenizer",
    "ending",
    "file_names",
    "read_records",
    "read_text",
    "require_characters",
    "tokenize",
    "tuning_ids",
    "windows",
]
