"""How a script ends: bad input gives one line and status 2; anything else is a bug and keeps its traceback."""

import os
import sys
from argparse import SUPPRESS, ArgumentParser, RawDescriptionHelpFormatter
from contextlib import contextmanager, suppress


def argument_parser(docstring):
    """An ArgumentParser that shows a script's docstring as it is. Its errors are one line, without the usage."""
    return ArgumentParser(description=docstring, usage=SUPPRESS, formatter_class=RawDescriptionHelpFormatter)


class InputError(Exception):
    """Bad input, as one line for the user: what was wrong, the value, what to do."""


class Console:
    """A stream that drops what can't be written: a closed terminal must not end a run, nor cost a checkpoint."""

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")  # None: it was closed before Python started
        with suppress(AttributeError):  # None has no such method, nor has a notebook's stream
            stream.reconfigure(errors="replace")  # a letter that the console doesn't have becomes a question mark

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        with suppress(Exception):  # whatever it is
            self.stream.write(text)
            self.stream.flush()

    def flush(self):
        """There is nothing left to flush after `write`."""


@contextmanager
def one_line_errors():
    """Around a script's `main`: what is wrong with its input or its files becomes one line on stderr and status 2."""
    sys.stdout, sys.stderr = Console(sys.stdout), Console(sys.stderr)
    try:
        yield
    except (InputError, OSError) as error:
        print("error:", *str(error).split(), file=sys.stderr)
        raise SystemExit(2)
