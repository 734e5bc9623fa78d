"""The command line."""

from . import quantize, run, allocate, files, methods  # noqa: I001  (the order of the commands in the help)
from .app import app, main
from .progress import Bars

__all__ = ["Bars", "allocate", "app", "files", "main", "methods", "quantize", "run"]
