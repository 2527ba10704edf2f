"""Many sessions on one model, called from any threads."""

import os
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

from . import _C, nn
from .end_to_end import EndToEndOptions
from .exact_store import ExactStoreOptions
from .protection import Protection
from .session import (
    Progress,
    Session,
    Text,
    _checked_seed,
    _native,
    _session_options,
    _to_bytes,
    _to_text,
    _write_options,
)
from .write_policy import AS_TRAINED, WritePolicy

Result = TypeVar("Result")


class SessionPoolReport(NamedTuple):
    """What a pool holds and did."""

    resident: int  # sessions in memory
    on_disk: int  # sessions in the pool's folder
    resident_bytes: int  # of those in memory, each as of the end of its last call
    batches: int  # decoding steps
    tokens_written: int  # by all of them
    pieces_read: int
    saves: int  # sessions that went to disk
    loads: int  # and that came back

    @property
    def mean_batch(self) -> float:
        """Sessions per decoding step; 0 before the first."""
        return self.tokens_written / self.batches if self.batches else 0.0


class SessionPool:
    """Many sessions on one model, called from any threads (docs/session_pool.md).

    Sessions that write at the same time are decoded together, in one pass over the weights for all;
    pieces of reads come in between, so that neither starves the other. A session that is not used
    may be on disk, and comes back with its next call. It is, bit for bit, a lone `Session` that was
    driven by the same calls, whoever else is in the pool.

    Calls on one session are served in the order in which they came, calls on different ones at the
    same time. Callbacks run on the thread of the call that they belong to, and must not call the
    pool: that is an Error. Ctrl-C ends a read or a write of the main thread at the next boundary.

    Every call raises Error if there is no session of that name. A call whose session is not in
    memory, or is new, may need room: it raises FileError if another session cannot be saved or its
    own not be loaded, and Error where there is no folder. Nothing is lost then.
    """

    def __init__(
        self,
        model: "nn.LanguageModel | _C.LanguageModel",
        *,
        memory_bytes: int = 1 << 30,
        folder: str | os.PathLike[str] = "",
        piece: int = 1024,
        seed: int = 0,
        journal_bytes: int = 64 << 20,
        store: bool | ExactStoreOptions = False,
        policy: WritePolicy = AS_TRAINED,
        end_to_end: bool | EndToEndOptions = False,
        protection: Protection | None = None,
        most_per_batch: int = 64,
    ) -> None:
        """A pool without sessions.

        Args:
            model: its weights are shared; they must not change while the pool lives.
            memory_bytes: bytes that sessions may hold in memory; when there would be more, those
                without a call go to disk, the one that was used longest ago first.
            folder: where they go: the pool makes a folder of its own in it, which only the owner
                can read, and removes it at its end. Made if it is missing. Empty: none go to disk.
            piece: of the sessions that `create` makes, see `Session`; so are the next two.
            seed: see `Session`.
            journal_bytes: see `Session`; counted in `memory_bytes` as far as it is used.
            store: see `Session`; counted in `memory_bytes` too.
            policy: see `Session`.
            end_to_end: see `Session`.
            protection: see `Session`.
            most_per_batch: sessions whose next tokens are decoded together.

        Raises:
            Error: the model is not fit for sessions, or an option is out of range.
            FileError: the folder cannot be made.
        """
        self._model = _native(model)
        self._pool = _C.SessionPool(
            self._model,
            memory_bytes,
            folder,
            _session_options(piece, seed, journal_bytes, store, policy, end_to_end, protection),
            most_per_batch,
        )

    def create(self, name: str, seed: int | None = None) -> None:
        """Makes a session that has seen nothing, with a seed of its own or the pool's.

        Raises:
            Error: the name is taken, or has not 1 to 80 bytes.
        """
        self._pool.create(name, None if seed is None else _checked_seed(seed))

    def add(self, name: str, session: Session) -> None:
        """Takes in a copy of a session.

        Raises:
            Error: the name is taken, or the session runs on another model: it must have been made
                with `pool.model`.
        """
        self._pool.add(name, session._session)

    def load(self, name: str, path: str | os.PathLike[str]) -> None:
        """Takes in the session of a state file; raises what `Session.load` raises."""
        self._pool.load(name, path)

    def close(self, name: str) -> None:
        """Drops a session, after the calls on it that came before."""
        self._pool.close(name)

    def ids(self) -> list[str]:
        """The names of all sessions, in order."""
        return self._pool.ids()

    def __contains__(self, name: str) -> bool:
        return self._pool.contains(name)

    def read(self, name: str, text: Text, progress: Progress | None = None) -> None:
        """`Session.read`."""
        self._pool.read(name, _to_bytes(text), progress)

    def write(
        self,
        name: str,
        *,
        max_tokens: int = 256,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop: Text | Sequence[Text] = (),
        on_token: Callable[[str], bool | None] | None = None,
        ahead: int = 0,
    ) -> str:
        """`Session.write`, with the same options but for `guess`."""
        with _write_options(
            max_tokens, temperature, top_k, top_p, seed, stop, on_token, ahead
        ) as options:
            written = self._pool.write(name, options)
        return _to_text(written)

    def save(self, name: str, path: str | os.PathLike[str]) -> None:
        """`Session.save`."""
        self._pool.save(name, path)

    def use(self, name: str, work: Callable[[Session], Result]) -> Result:
        """Runs `work(session)` and returns what it returns: everything else that a session does.

        The session is lent: once `work` is over its use is an Error. A `fork()` of it is
        independent of the pool.
        """
        result: Result = self._pool.use(name, lambda native: work(Session._of(native)))
        return result

    def report(self) -> SessionPoolReport:
        """What the pool holds and did."""
        return SessionPoolReport(**self._pool.report())

    @property
    def model(self) -> _C.LanguageModel:
        """The model that all sessions run on, for `Session(pool.model)` and `Session.load`."""
        return self._model


__all__ = ["SessionPool", "SessionPoolReport"]
