"""The program `fastweights`: sessions from the command line.

`main` is the whole program and returns its exit code, so that it can be called from Python too.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from ..errors import Error
from . import _difference, _inspection, _sessions

DONE, TROUBLE, INTERRUPTED = 0, 2, 130

DESCRIPTION = """\
A model that goes on learning while it reads and writes, kept in a state file.

  fastweights read book.txt --state novel.fwstate     reads, learns, saves
  fastweights write --state novel.fwstate             writes on from there
  fastweights score other.txt --state novel.fwstate   bits per byte of a text from there
  fastweights inspect novel.fwstate                   what the state holds
"""
EPILOG = """\
Exit code: 0 done, 1 the two states of `diff` differ, 2 an error, 130 interrupted by Ctrl-C. Where a
session was to be saved, Ctrl-C saves what was done so far. A state file holds all that was read.
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        prog="fastweights",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = result.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _sessions.add_commands(commands)
    _inspection.add_commands(commands)
    _difference.add_commands(commands)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program.

    Args:
        argv: the arguments behind the program's name; those of the process unless given.

    Returns:
        The exit code.
    """
    arguments = parser().parse_args(argv)
    try:
        code: int = arguments.run(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        _complain("interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read the output has left; nothing more can be said there, not even at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return TROUBLE
    except (Error, OSError) as error:
        _complain(_message(error))
        return TROUBLE
    return code


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)


def _complain(message: str) -> None:
    print(f"fastweights: {message}", file=sys.stderr)


__all__ = ["main", "parser"]
