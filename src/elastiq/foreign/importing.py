"""Models of other tools as ordinary 16-bit directories, to evaluate them or to quantize them again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..checkpoint.files import read_json
from ..checkpoint.publish import scratch
from ..core import ElastiqError
from ..models import is_eight_bit
from .gguf.importing import import_gguf
from .packed import METHODS, import_packed

__all__ = ["import_model", "ordinary"]


def import_model(model: str | Path, output: str | Path) -> None:
    """Write a GGUF file, or a directory of GPTQ, AWQ, compressed-tensors or bitsandbytes, to `output` in 16 bits.

    Raises ElastiqError for anything else, and for files that are damaged; `output` appears whole or not at all.
    """
    model = Path(model)
    if not model.exists():
        raise ElastiqError(f"{model}: no such file or directory; give a GGUF file or a packed model directory")
    if model.is_file():
        import_gguf(model, output)
    else:
        import_packed(model, output)


@contextmanager
def ordinary(model: str | Path, output: Path) -> Iterator[str | Path]:
    """`model` itself, or where it is foreign its import beside `output`, for as long as the context lasts.

    Raises ElastiqError where another process is importing for the same output.
    """
    if not _is_foreign(Path(model)):
        yield model
        return
    with scratch(output, "imported") as room:
        imported = room.path / Path(model).stem
        import_model(model, imported)
        yield imported


def _is_foreign(model: Path) -> bool:
    if model.is_file():
        return model.suffix == ".gguf"
    if not (model / "config.json").is_file():
        return False
    config = read_json(model / "config.json")
    settings: Any = config.get("quantization_config") if isinstance(config, dict) else None
    known = isinstance(settings, dict) and settings.get("quant_method") in list(METHODS)
    return known and not is_eight_bit(settings)
