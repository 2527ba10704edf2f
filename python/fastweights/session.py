"""A running model that learns from what it reads and from what it writes."""

import codecs
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from . import _C, nn
from .errors import Error

Text = str | bytes | bytearray | memoryview
Progress = Callable[[int, int], bool | None]


class LogCall(NamedTuple):
    """One call of a session: a text that it read or has written."""

    kind: str  # "read" or "written"
    text: bytes


class Session:
    """A running model that learns from what it reads and from what it writes.

    A session owns fast weights, attention window and generator; the model is constant and may be
    shared by any number of sessions on any number of threads. A session is a log of what was read
    and written: everything else is a function of model and log, the same bits on one machine, build
    and number of threads. Memory is constant but for the log, one byte per byte.

    Texts are str (as UTF-8; surrogate escapes stand for single bytes) or bytes of any values. Long
    calls release the GIL. Where they take `progress`, it is called between pieces with the bytes
    done and in all, and returning False stops the call with `Cancelled`. Ctrl-C stops them too,
    with KeyboardInterrupt. In either case the session is valid and holds what was done so far. One
    session does one thing at a time: a call while another is under way is an Error.

    `copy.copy(session)` is an independent session at the same place.
    """

    def __init__(
        self, model: "nn.LanguageModel | _C.LanguageModel", *, piece: int = 1024, seed: int = 0
    ) -> None:
        """An empty session.

        Args:
            model: its weights are shared, not copied; they must not change while the session
                lives. Where many sessions begin, give them one `model.native()`: it saves the
                set-up of each.
            piece: bytes that a read processes at once, counted from the start of each call.
            seed: of the generator that `write` draws from until it is given another one.

        Raises:
            Error: the model's vocabulary is not that of bytes, a module was replaced or has hooks,
                or an option is out of range.
        """
        self._session = _C.Session(_native(model), piece, _checked_seed(seed))

    def read(self, text: Text, progress: Progress | None = None) -> None:
        """Reads a text of any length and learns from it."""
        self._session.read(_to_bytes(text), progress)

    def read_and_score(self, text: Text, progress: Progress | None = None) -> Tensor:
        """Reads, and returns the bits that each byte cost before it was learned: fp32 [bytes]."""
        return self._session.read_and_score(_to_bytes(text), progress)

    def score(self, text: Text, progress: Progress | None = None) -> float:
        """Bits per byte of a text from here on. A copy learns as it reads and is dropped.

        Raises:
            Error: the text is empty.
        """
        return self._session.score(_to_bytes(text), progress)

    def token_bits(self, text: Text, progress: Progress | None = None) -> Tensor:
        """The same for each byte: fp32 [bytes]."""
        return self._session.token_bits(_to_bytes(text), progress)

    def write(
        self,
        *,
        max_tokens: int = 256,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop: Text | Sequence[Text] = (),
        on_token: Callable[[str], bool | None] | None = None,
    ) -> str:
        """Writes on from here, learns what it writes, and returns it.

        Bytes that are no UTF-8 come as surrogate escapes:
        `text.encode("utf-8", "surrogateescape")` gives them back.

        Args:
            max_tokens: bytes to write at most.
            temperature: logits are divided by it; 0 takes the most probable token.
            top_k: only the `top_k` most probable tokens can be drawn; 0 means all.
            top_p: of these, only the most probable ones that hold this share of the probability.
            seed: restarts the generator; without it, it goes on where it stands.
            stop: writing stops as soon as the text ends with one of these; the text includes it.
            on_token: called with each piece of text once it has been learned and its characters are
                complete; returning False stops writing.

        Raises:
            Error: an option is out of range, or a stop string is empty.
        """
        stops = [stop] if isinstance(stop, str | bytes | bytearray | memoryview) else stop
        decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")

        def on_bytes(token: bytes) -> bool | None:
            text = decoder.decode(token)
            return on_token(text) if text and on_token else None

        written: bytes = self._session.write(
            max_tokens,
            temperature,
            top_k,
            top_p,
            None if seed is None else _checked_seed(seed),
            [_to_bytes(each) for each in stops],
            on_bytes if on_token else None,
        )
        rest = decoder.decode(b"", final=True)
        if rest and on_token:
            on_token(rest)
        return written.decode("utf-8", "surrogateescape")

    def logits(self) -> Tensor:
        """Logits of the next token, fp32 [vocabulary] on the CPU; all 0 in a fresh session."""
        return self._session.logits()

    def state(self) -> dict[str, Tensor]:
        """Name → tensor, copies of everything that decides the next token.

        They are `layers.N.memory.state`, `layers.N.memory.conv`, `layers.N.attention.key`,
        `layers.N.attention.value`, `position`, `logits`, and `generator` (the bits of its seed, and
        its draws).
        """
        return self._session.state()

    @property
    def position(self) -> int:
        """Bytes read and written so far."""
        return self._session.position()

    @property
    def fused(self) -> bool:
        """Whether `write` runs on the fused kernels rather than module by module.

        It does for a model on the CPU in fp32 or bf16.
        """
        return self._session.fused()

    def log(self) -> list[LogCall]:
        """What was read and written, call by call."""
        return [LogCall(kind, text) for kind, text in self._session.log()]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Saves the session in a file that only its owner can read, bound to the model.

        The file holds everything that was read.

        Raises:
            FileError: then whatever stood at `path` is untouched.
        """
        self._session.save(path)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], model: "nn.LanguageModel | _C.LanguageModel"
    ) -> "Session":
        """A session that goes on exactly like the one that was saved.

        Raises:
            FileError: the file is missing, cut short, altered, malformed or of a newer version.
            StateMismatch: it belongs to another model.
        """
        return cls._of(_C.Session.load(path, _native(model)))

    def __copy__(self) -> "Session":
        return self._of(self._session.copy())

    def __deepcopy__(self, memo: dict[int, object]) -> "Session":
        return self._of(self._session.copy())

    @classmethod
    def _of(cls, native: _C.Session) -> "Session":
        session = cls.__new__(cls)
        session._session = native
        return session


def _native(model: "nn.LanguageModel | _C.LanguageModel") -> _C.LanguageModel:
    return model.native() if isinstance(model, nn.LanguageModel) else model


def _to_bytes(text: Text) -> bytes:
    if isinstance(text, str):
        return text.encode("utf-8", "surrogateescape")
    return text if isinstance(text, bytes) else bytes(memoryview(text))


def _checked_seed(seed: int) -> int:
    if not 0 <= seed < 1 << 64:
        raise Error(f"session: seed must be in [0, 2^64), got {seed}")
    return seed


__all__ = ["LogCall", "Session"]
