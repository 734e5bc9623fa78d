"""One HTML page about a checkpoint."""

from .page import write_picture, write_report

__all__ = ["write_picture", "write_report"]
