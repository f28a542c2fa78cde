"""How a script ends: bad input gives one line and status 2; anything else is a bug and keeps its traceback."""

import argparse
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn


class InputError(Exception):
    """Bad input, as one line for the user: what was wrong, the value, what to do."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are InputErrors, and that takes flags by their full names only."""

    def __init__(self, description: str):
        super().__init__(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )

    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def end(message: object, status: int = 2) -> NoReturn:
    """Ends the script with one line on stderr."""
    line = " ".join(str(message).split())
    with suppress(OSError, ValueError):  # a stream that is closed
        print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr, flush=True)
    sys.exit(status)


@contextmanager
def one_line_errors(if_too_large: str = "give fewer images") -> Iterator[None]:
    """Around a script's main part: what goes wrong with its input, files, memory or keyboard becomes one line."""
    prepare_streams()
    try:
        yield
        sys.stdout.flush()
    except InputError as error:
        end(error)
    except OSError as error:
        if error.filename is None and error.errno is None:
            raise  # not about a file
        if error.filename is None:  # the output's reader is gone, or its disk is full: what is left goes nowhere
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        end(f"{error.filename or 'standard output'}: {error.strerror or error}; free or correct it, or give another")
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        end(f"out of memory; {if_too_large} ({str(error)[:100] or type(error).__name__})")
    except KeyboardInterrupt:
        end("stopped", status=130)


def is_out_of_memory(error: Exception) -> bool:
    words = ("out of memory", "allocate memory", "enough memory", "size calculation overflowed", "ALLOC_FAILED")
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


def prepare_streams() -> None:
    """Gives a script streams that take every letter: a console without γ shows a question mark."""
    sys.stdout = sys.stdout or open(os.devnull, "w")  # pythonw on Windows has none
    sys.stderr = sys.stderr or open(os.devnull, "w")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a notebook's is something else
            stream.reconfigure(errors="replace")
