"""How a script ends: bad input gives one line and status 2; anything else is a bug and keeps its traceback."""

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


class InputError(Exception):
    """Bad input, as one line for the user: what was wrong, the value, what to do."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are InputErrors, and that shows a script's docstring as it is."""

    def __init__(self, description: str):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str):
        raise InputError(message)


class Console:
    """A stream that drops what can't be written: a closed terminal must not end a run, nor cost a checkpoint."""

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")  # a closed one is None
        if hasattr(stream, "reconfigure"):  # a notebook's stream has no such method
            stream.reconfigure(errors="replace")  # a letter that the console doesn't have becomes a question mark

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> None:
        with suppress(OSError, ValueError):  # ValueError: the stream is closed
            self.stream.write(text)
            self.stream.flush()

    def flush(self) -> None:
        """There is nothing left to flush after `write`."""


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Around a script's `main`: what is wrong with its input or its files becomes one line on stderr and status 2."""
    sys.stdout, sys.stderr = Console(sys.stdout), Console(sys.stderr)
    try:
        yield
    except (InputError, OSError) as error:
        print(f"{Path(sys.argv[0]).name}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
