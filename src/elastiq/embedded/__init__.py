"""A small language model that travels inside the package, so that every example and every test runs offline.

See README.md beside this file for its data, licence, shape and measured perplexity; `scripts/train_embedded.py`
makes all of it.
"""

from pathlib import Path

_HERE = Path(__file__).parent


def model_dir() -> Path:
    """Directory of the model and its tokenizer, as `from_pretrained` reads it."""
    return _HERE / "model"


def calibration_text() -> str:
    """Part of the training text, for collecting statistics."""
    return (_HERE / "calibration.txt").read_text(encoding="utf-8")


def heldout_text() -> str:
    """Text of documents that never entered training, for measuring perplexity."""
    return (_HERE / "heldout.txt").read_text(encoding="utf-8")
