"""`read`, `write`, `score`, `chat` and `merge`: what a session does."""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..errors import Error
from ..session import Session
from ._options import Commands, add_command, open_model, open_state, positive, read_bytes


def add_commands(commands: Commands) -> None:
    """Adds the five."""
    _add_read(commands)
    _add_write(commands)
    _add_score(commands)
    _add_chat(commands)
    _add_merge(commands)


def _add_read(commands: Commands) -> None:
    command = add_command(
        commands, "read", _read, "Read texts and learn from them. Saves the session after each."
    )
    command.add_argument(
        "texts", nargs="+", type=Path, metavar="TEXT", help="file, or - for standard input"
    )
    _add_state(command, required=True)
    command.add_argument(
        "--skip", type=int, default=0, metavar="BYTES", help="leave out the start of the first text"
    )
    command.add_argument(
        "--score", action="store_true", help="print the bits per byte of each text as it was read"
    )


def _add_write(commands: Commands) -> None:
    command = add_command(
        commands, "write", _write, "Write on from here. The session learns what it writes."
    )
    _add_state(command)
    command.add_argument("--prompt", metavar="TEXT", help="text to read first")
    _add_sampling(command, max_tokens=400)
    command.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="stop behind it; repeatable",
    )


def _add_score(commands: Commands) -> None:
    command = add_command(
        commands,
        "score",
        _score,
        "Print the bits per byte of texts, each from here. The session itself stays as it is.",
    )
    command.add_argument(
        "texts", nargs="+", type=Path, metavar="TEXT", help="file, or - for standard input"
    )
    command.add_argument("--state", type=Path, metavar="FILE", help="state file to start from")


def _add_chat(commands: Commands) -> None:
    command = add_command(
        commands, "chat", _chat, "Read a line, write an answer, and so on. Learns from both."
    )
    _add_state(command)
    _add_sampling(command, max_tokens=200)
    command.add_argument(
        "--stop",
        action="append",
        metavar="TEXT",
        help="an answer ends behind it; repeatable (default: an empty line)",
    )


def _add_merge(commands: Commands) -> None:
    command = add_command(
        commands,
        "merge",
        _merge,
        "Let the first session go on with what the second read and wrote since the two were one.",
    )
    command.add_argument("first", type=Path, metavar="FIRST", help="state file")
    command.add_argument("second", type=Path, metavar="SECOND", help="state file")
    command.add_argument("output", type=Path, metavar="OUTPUT", help="state file to write")


def _merge(arguments: argparse.Namespace) -> int:
    model = open_model(arguments)
    session = open_state(arguments.first, model)
    other = open_state(arguments.second, model)
    before = session.position
    with bar(arguments.second.name, other.position) as show:
        session.merge(other, show)
    session.save(arguments.output)
    print(f"{arguments.output}: {before} bytes and {session.position - before} of the second")
    return 0


def _add_state(command: argparse.ArgumentParser, required: bool = False) -> None:
    command.add_argument(
        "--state",
        type=Path,
        required=required,
        metavar="FILE",
        help="state file: taken up if it is there, and saved at the end",
    )
    command.add_argument("--no-save", action="store_true", help="leave the state file as it is")
    command.add_argument(
        "--store", action="store_true", help="give a new session an exact store, which recalls"
    )
    command.add_argument(
        "--end-to-end",
        action="store_true",
        help="have a new session take gradient steps as it reads",
    )


def _add_sampling(command: argparse.ArgumentParser, max_tokens: int) -> None:
    command.add_argument(
        "--bytes",
        type=positive,
        default=max_tokens,
        metavar="N",
        help="to write at most (%(default)s)",
    )
    command.add_argument(
        "--temperature", type=float, default=0.8, help="0: the most probable byte (%(default)s)"
    )
    command.add_argument("--top-k", type=int, default=0, metavar="N", help="of the best N; 0: all")
    command.add_argument(
        "--top-p", type=float, default=1.0, metavar="SHARE", help="of the best of this probability"
    )
    command.add_argument("--seed", type=int, help="restarts the generator")
    command.add_argument(
        "--ahead",
        type=int,
        default=0,
        metavar="N",
        help="guess N bytes ahead: the same text, sooner where it repeats itself (%(default)s)",
    )


@contextmanager
def saved_session(arguments: argparse.Namespace) -> Iterator[Session]:
    """A session that is saved where that was asked for, after Ctrl-C too."""
    model = open_model(arguments)
    path = arguments.state
    if path and path.exists():
        session = open_state(path, model)
        if arguments.store and session.store is None:
            raise Error(f"{path} is the state of a session without an exact store")
        if arguments.end_to_end and session.end_to_end is None:
            raise Error(f"{path} is the state of a session that takes no gradient steps")
    else:
        session = Session(model, store=arguments.store, end_to_end=arguments.end_to_end)
    try:
        yield session
    except KeyboardInterrupt:
        if path and not arguments.no_save:
            session.save(path)
            print(f"saved at position {session.position}", file=sys.stderr)
        raise
    if path and not arguments.no_save:
        session.save(path)


@contextmanager
def bar(name: str, size: int) -> Iterator[Callable[[int, int], None]]:
    """A bar on the terminal, to be told what is done."""
    with tqdm(total=size, desc=name, unit="B", unit_scale=True, leave=False, disable=None) as line:

        def show(done: int, _: int) -> None:
            line.update(done - line.n)

        yield show


def _read(arguments: argparse.Namespace) -> int:
    with saved_session(arguments) as session:
        for index, path in enumerate(arguments.texts):
            text = _behind(arguments.skip, path) if index == 0 else read_bytes(path)
            _read_text(session, path, text, arguments.score)
            is_last = index + 1 == len(arguments.texts)  # saved when the session ends
            if not arguments.no_save and not is_last:
                session.save(arguments.state)
    return 0


def _behind(skip: int, path: Path) -> bytes:
    text = read_bytes(path)
    if not 0 <= skip < len(text):
        raise Error(f"--skip must be in [0, {len(text)}), got {skip}")
    return text[skip:]


def _read_text(session: Session, path: Path, text: bytes, score: bool) -> None:
    start, begin = time.monotonic(), session.position
    bits = ""
    try:
        with bar(path.name, len(text)) as show:
            if score:
                costs = session.read_and_score(text, show)
                bits = f", {costs.double().mean().item():.4f} bits per byte"
            else:
                session.read(text, show)
    except KeyboardInterrupt:
        print(f"{path}: stopped after {session.position - begin} of {len(text)} bytes")
        raise
    speed = len(text) / max(time.monotonic() - start, 1e-9)
    print(f"{path}: {len(text)} bytes{bits}, {speed:.0f} bytes/s")


def _sampling(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "max_tokens": arguments.bytes,
        "temperature": arguments.temperature,
        "top_k": arguments.top_k,
        "top_p": arguments.top_p,
        "ahead": arguments.ahead,
    }


def print_now(text: str) -> None:
    """Prints bytes as they are, whatever the terminal's encoding."""
    sys.stdout.buffer.write(text.encode("utf-8", "surrogateescape"))
    sys.stdout.buffer.flush()


def _write(arguments: argparse.Namespace) -> int:
    with saved_session(arguments) as session:
        if arguments.prompt:
            session.read(arguments.prompt)
            print_now(arguments.prompt)
        session.write(
            **_sampling(arguments), seed=arguments.seed, stop=arguments.stop, on_token=print_now
        )
        print_now("\n")
    return 0


def _score(arguments: argparse.Namespace) -> int:
    model = open_model(arguments)
    session = open_state(arguments.state, model) if arguments.state else Session(model)
    for path in arguments.texts:
        text = read_bytes(path)
        with bar(path.name, len(text)) as show:
            bits = session.score(text, show)
        print(f"{path}: {len(text)} bytes, {bits:.4f} bits per byte")
    return 0


def _chat(arguments: argparse.Namespace) -> int:
    stops = arguments.stop or ["\n\n"]
    seed = arguments.seed
    with saved_session(arguments) as session:
        for line in _lines():
            session.read(line + b"\n")
            answer = session.write(
                **_sampling(arguments), seed=seed, stop=stops, on_token=print_now
            )
            seed = None  # it goes on where it stands
            print_now("" if answer.endswith("\n") else "\n")
    return 0


def _lines() -> Iterator[bytes]:
    if not sys.stdin.isatty():
        for line in sys.stdin.buffer:
            yield line.removesuffix(b"\n")
        return
    print("A line is read, then answered. Ctrl-D ends.", file=sys.stderr)
    while True:
        try:
            yield input("> ").encode("utf-8", "surrogateescape")
        except EOFError:
            print(file=sys.stderr)
            return
