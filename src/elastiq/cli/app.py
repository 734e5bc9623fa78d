"""The application: its errors, its log, its version."""

from __future__ import annotations

import logging
import sys
from io import TextIOWrapper
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.text import Text
from transformers.utils import logging as transformers_logging
from typer.core import TyperGroup

from .. import __version__
from ..core import ElastiqError
from .tables import out, printable

log = logging.getLogger("elastiq")
err = Console(stderr=True, soft_wrap=True, highlight=False, markup=False, emoji=False)

_INTERRUPTED = 130
_KEPT = {
    "pull": "; files that are whole are kept, the same command goes on",
    "quantize": "; finished blocks are kept, the same command resumes",
    "sensitivity": "; what was measured is kept, the same command resumes",
}


class Commands(TyperGroup):
    """Turns the errors a user can mend into one line and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            fail(f"interrupted{_KEPT.get(ctx.invoked_subcommand, '')}")
            raise typer.Exit(_INTERRUPTED) from None
        except (ElastiqError, OSError) as error:
            if isinstance(error, BrokenPipeError):
                raise
            fail(str(error))
            raise typer.Exit(1) from None
        except torch.OutOfMemoryError:
            fail("the device has not enough memory; use --device cpu, fewer samples or a smaller window")
            raise typer.Exit(1) from None


app = typer.Typer(
    cls=Commands,
    help="Quantize a language model once into one nested checkpoint, run it at any precision from 1 to 8 bits.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


def main() -> None:
    """Entry point of the `elastiq` command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="backslashreplace")  # for terminals that are not UTF-8, and texts that are not
    app()


def _show_version(wanted: bool) -> None:
    if wanted:
        out.print(f"elastiq {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    log.handlers = [RichHandler(console=err, show_time=False, show_path=False, markup=False)]
    log.propagate = False
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def fail(message: str) -> None:
    err.print(Text(f"elastiq: error: {' '.join(printable(message).split())}", style="red"))
