"""The nested directory: ordinary safetensors files cut by bit plane."""

from .reader import CheckpointReader
from .slice import slice_checkpoint
from .writer import CheckpointWriter, is_finished, work_directory

__all__ = ["CheckpointReader", "CheckpointWriter", "is_finished", "slice_checkpoint", "work_directory"]
