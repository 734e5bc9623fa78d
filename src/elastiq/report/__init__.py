"""One HTML page about a checkpoint, and pictures as files."""

from .frontier import save_frontier
from .page import write_picture, write_report

__all__ = ["save_frontier", "write_picture", "write_report"]
