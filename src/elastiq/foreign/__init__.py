"""Other people's formats: a checkpoint at one width written in them, and models read from them."""

from .exporting import TARGETS, ExportSummary, export
from .importing import import_model, ordinary

__all__ = ["TARGETS", "ExportSummary", "export", "import_model", "ordinary"]
