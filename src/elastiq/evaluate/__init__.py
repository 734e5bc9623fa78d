"""What a checkpoint, or a model before it, is worth."""

from ..checkpoint.sizes import checkpoint_files, full_bytes, level_sizes, megabytes
from ..text.evaluation import windows
from .card import made_by, write_card
from .evaluation import check_windows, evaluate, load_full
from .kinds import kind, short_kinds
from .record import read_evaluations, read_tasks, row_key, row_name, row_order, write_json
from .table import doubts, level_error, mean_error
from .tasks import evaluate_tasks

__all__ = [
    "check_windows",
    "checkpoint_files",
    "doubts",
    "evaluate",
    "evaluate_tasks",
    "full_bytes",
    "kind",
    "level_error",
    "level_sizes",
    "load_full",
    "made_by",
    "mean_error",
    "megabytes",
    "read_evaluations",
    "read_tasks",
    "row_key",
    "row_name",
    "row_order",
    "short_kinds",
    "windows",
    "write_card",
    "write_json",
]
