"""A running model that learns from what it reads and from what it writes."""

import codecs
import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, overload

from torch import Tensor

from . import _C, nn
from .end_to_end import EndToEndOptions
from .errors import Error
from .exact_store import ExactStoreOptions
from .protection import Protection
from .write_policy import AS_TRAINED, SurpriseGate, WritePolicy

Text = str | bytes | bytearray | memoryview
Progress = Callable[[int, int], bool | None]


class LogCall(NamedTuple):
    """One call of a session: a text that it read or has written."""

    kind: str  # "read" or "written"
    text: bytes


class Mark(NamedTuple):
    """A place in what a session read and wrote; see `Session.mark`."""

    id: int  # like no other mark's, of any session and process, but for copies of one session


class Strength(NamedTuple):
    """Bytes [start, end) of a session that are learned with a strength other than 1."""

    start: int
    end: int
    strength: float


class SessionReport(NamedTuple):
    """What a session did and holds."""

    read: int  # bytes read since the session began
    written: int  # bytes written
    committed: int  # of both, those that commit() took out of the log
    checkpoints: int  # places that going back can start from
    checkpoint_bytes: int  # of their tensors; copies of a session share them
    log_bytes: int  # of tokens, calls and strengths; copies share them too
    marks: int  # that are valid
    limited_writes: int  # β that feedback would have raised beyond 2, in the session's present text
    capped_norms: int  # matrices that the write policy's caps scaled down, in the present text
    refused_writes: int  # writes that a protection refused, in the present text
    store_tokens: int  # that the exact store was given; 0 without one
    store_bytes: int  # of what it keeps, whether copies share it or not


class ConsolidationTrial(NamedTuple):
    """One way of consolidating, and what it cost.

    Shares are those of what the session learned that the new model starts from.
    """

    memory_share: float
    head_share: float
    protection: float  # how strongly what the guarded text is read with is left as it was
    trial_bits: float  # bits per byte of the trial text
    guarded_bits: float  # of the guarded text; 0 if there is none
    feed_forward_share: float = 0.0


class Consolidation(NamedTuple):
    """A model that knows what a session learned, and the figures that speak for it."""

    model: nn.LanguageModel
    before: ConsolidationTrial  # the session's own model
    chosen: ConsolidationTrial
    trials: list[ConsolidationTrial]  # all that were tried


class Session:
    """A running model that learns from what it reads and from what it writes.

    A session owns fast weights, attention window and generator; the model is constant and may be
    shared by any number of sessions on any number of threads. A session is a log of what was read
    and written, and of how strongly it was learned: everything else is a function of model and log,
    the same bits on one machine, build and number of threads. `rollback`, `feedback` and `revoke`
    edit the log and replay it from the nearest checkpoint; afterwards the session is, bit for bit,
    one that was driven that way from the start. Memory is constant but for the log, one byte per
    byte, and for the exact store.

    With `store` an exact store stands behind attention window and fast weights: it recalls what was
    read and written at any distance, its votes are mixed into every prediction, and it is part of
    all edits, copies, scores and files (docs/exact_store.md).

    Texts are str (as UTF-8; surrogate escapes stand for single bytes) or bytes of any values. Long
    calls release the GIL. Where they take `progress`, it is called between pieces with the bytes
    done and in all, and returning False stops the call with `Cancelled`. Ctrl-C stops them too,
    with KeyboardInterrupt. In either case the session is valid and holds what was done so far; an
    edit of the log that is stopped has not happened. One session does one thing at a time: a call
    while another is under way is an Error.

    Places in the text are marks or positions, which count bytes from the session's start.
    """

    def __init__(
        self,
        model: "nn.LanguageModel | _C.LanguageModel",
        *,
        piece: int = 1024,
        seed: int = 0,
        journal_bytes: int = 64 << 20,
        store: bool | ExactStoreOptions = False,
        policy: WritePolicy = AS_TRAINED,
        end_to_end: bool | EndToEndOptions = False,
        protection: Protection | None = None,
    ) -> None:
        """An empty session.

        Args:
            model: its weights are shared, not copied; they must not change while the session
                lives. Where many sessions begin, give them one `model.native()`: it saves the
                set-up of each.
            piece: bytes that a read processes at once, counted from the start of each call.
            seed: of the generator that `write` draws from until it is given another one.
            journal_bytes: bytes of tensors that may be kept to make going back cheap; with 0 an
                edit replays the whole log.
            store: whether there is an exact store, or its options.
            policy: what is done to its writes beyond what the model was trained to do.
            end_to_end: whether it takes gradient steps on the last block's feed-forward, in a ΔW of
                its own, or the options of these steps.
            protection: keys of the memories in the blocks that writes leave alone, see
                `protect_keys`. Such a session runs module by module.

        Raises:
            Error: the model's vocabulary is not that of bytes, a module was replaced or has hooks,
                or an option is out of range.
        """
        self._session = _C.Session(
            _native(model),
            _session_options(piece, seed, journal_bytes, store, policy, end_to_end, protection),
        )

    def read(self, text: Text, progress: Progress | None = None) -> None:
        """Reads a text of any length and learns from it.

        Raises:
            Error: the model's numbers are not finite any more after a piece; then that piece was
                not read.
        """
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
        ahead: int = 0,
        guess: Callable[[bytes, int], Text] | None = None,
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
            ahead: speculative decoding: at most so many bytes, in [0, 64], are guessed and read in
                one pass with the one before them. Those that turn out to be what is written are
                kept, the others leave no trace. Text and session are the same to the bit; only the
                time differs. Guesses are what followed the same words earlier in the session's
                text, so it pays where a text repeats itself. Without fused kernels, or under a
                write policy with a gate for surprise or caps, nothing is guessed.
            guess: guesses in place of that look-up, from a small model, say. Called with the bytes
                since it was last asked (at first, the byte that was written first) and how many
                bytes are wanted; returns what may follow.

        Raises:
            Error: an option is out of range, a stop string is empty, or there is a `guess` where
                `ahead` is 0.
        """
        with _write_options(
            max_tokens, temperature, top_k, top_p, seed, stop, on_token, ahead, guess
        ) as options:
            written = self._session.write(options)
        return _to_text(written)

    def mark(self) -> Mark:
        """Marks this place: a name for the present position, to come back to.

        It moves along when what comes before it is revoked. It is valid until `commit`, or a
        rollback to before it; then its use is an Error that says so, as is the use of another
        session's mark. Copies inherit marks; files keep them.
        """
        return Mark(self._session.mark())

    def marks(self) -> list[Mark]:
        """The valid marks, in order of their positions."""
        return [Mark(number) for number in self._session.marks()]

    def position_of(self, mark: Mark) -> int:
        """Where a mark stands: bytes before it.

        Raises:
            Error: it is not valid any more, or another session's.
        """
        return self._session.position_of(mark.id)

    def rollback(self, to: Mark | int, progress: Progress | None = None) -> None:
        """Goes back: afterwards the session is one that read and wrote nothing after `to`.

        That may lie inside a call, a piece or a write. Marks behind it are not valid any more.

        Raises:
            Error: the place is not in the log.
        """
        self._session.rollback(_point(to), progress)

    @overload
    def feedback(
        self, start: Mark | int, r: float, /, *, progress: Progress | None = None
    ) -> None: ...

    @overload
    def feedback(
        self, start: Mark | int, end: Mark | int, r: float, /, *, progress: Progress | None = None
    ) -> None: ...

    def feedback(
        self,
        start: Mark | int,
        end: "Mark | int | float",
        r: float | None = None,
        /,
        *,
        progress: Progress | None = None,
    ) -> None:
        """Sets how strongly a span was learned: `feedback(start, r)`, `feedback(start, end, r)`.

        Afterwards the session is one in which every β and η of these bytes was multiplied by r
        (limited to 2, the stable range; the report counts how often) and every g by min(r, 1). It
        sets, it does not compose: 1 gives the bits that there were. With 0 the text passed the
        attention window and left no write. Only under another strength than 1 is written text
        processed like read text, in pieces.

        Args:
            start: where the span begins.
            end: where it ends; without it, all that followed.
            r: the strength, in [0, 2].
            progress: see the class.

        Raises:
            Error: a place is not in the log, or the strength is out of range.
        """
        if r is None:
            if isinstance(end, Mark):
                raise Error("session: the strength of feedback must be a number, got a mark")
            self._session.feedback(_point(start), None, end, progress)
        else:
            if isinstance(end, float):
                raise Error(f"session: the end of feedback must be a mark or a position, got {end}")
            self._session.feedback(_point(start), _point(end), r, progress)

    def reward(
        self, r: float, *, half_life: float = 64.0, progress: Progress | None = None
    ) -> None:
        """Feedback that fades with distance: an eligibility trace times a reward.

        The last byte gets the strength 1 + r, one that lies `half_life` bytes further back 1 + r/2,
        and so on, in steps of 1/64; those that would get 1 keep the strength they have. Like
        `feedback` it sets.

        Raises:
            Error: r is not in [−1, 1], or the half-life is not above 0.
        """
        self._session.reward(r, half_life, progress)

    def correct(
        self, since: Mark | int, better: Text, r: float = 0.0, progress: Progress | None = None
    ) -> None:
        """Feedback with a correction, in one call: `better` is learned in the place of a text.

        What followed `since` gets the strength r, and `better` is read. What followed stays in the
        attention window, and `better` comes after it: feedback(since, r) and read(better), but if
        it fails neither has happened. To take the text out of the window too, roll back and read.

        Raises:
            Error: the place is not in the log, or the strength is out of range.
        """
        self._session.correct(_point(since), _to_bytes(better), r, progress)

    def revoke(self, start: Mark | int, end: Mark | int, progress: Progress | None = None) -> None:
        """Takes out a span: afterwards the session never read it, but did read what came after it.

        Calls keep their other boundaries. Later positions and marks move along; marks inside stand
        where the span began.

        Raises:
            Error: a place is not in the log, or the span ends before it begins.
        """
        self._session.revoke(_point(start), _point(end), progress)

    def merge(self, other: "Session", progress: Progress | None = None) -> None:
        """Goes on with what `other` read and wrote since the two were one.

        Afterwards the session is one that did so itself, after all that it did. Marks are the
        session's own.

        Raises:
            Error: the two run on different models, or one committed what the other did not.
        """
        self._session.merge(other._session, progress)

    def commit(self) -> None:
        """Makes what happened so far final.

        Tensors, position and generator stay, the log before this place is gone, and no mark is
        valid any more.
        """
        self._session.commit()

    def fork(self) -> "Session":
        """A copy that goes its own way; it costs what differs."""
        return self._of(self._session.copy())

    def strengths(self) -> list[Strength]:
        """The spans that feedback gave another strength than 1, in order."""
        return [Strength(*span) for span in self._session.strengths()]

    def report(self) -> SessionReport:
        """What the session did and holds."""
        return SessionReport(**self._session.report())

    def consolidate(
        self,
        trial: Text = b"",
        guarded: Text = b"",
        *,
        tolerance: float = 0.01,
        memory: bool = True,
        head: bool = True,
        feed_forward: bool = True,
        rank: int = 64,
        progress: Progress | None = None,
    ) -> Consolidation:
        """A new model whose memories start from what the session learned (docs/consolidation.md).

        The session and its model stay as they are; the new model shares the weights, which do not
        change (but for the two projections of a session that learned end to end, of which it has
        its own), and contains what the session read, as far as its matrices hold it. Several ways
        are tried; the best on the trial text that keeps within the tolerance on the guarded one is
        taken.

        Args:
            trial: text of the kind that the session learned, which it has not read: a session that
                starts from the new model must find it cheaper. Empty: the last tenth of what the
                session read and wrote, 16 KiB at most, which the model that is tried has then not
                learned.
            guarded: text of what the model knew before, if that is to be guarded.
            tolerance: bits per byte that the guarded text may cost more.
            memory: consolidate the matrices in the blocks.
            head: and the one at the head, where the model has one.
            feed_forward: and what the session learned end to end, as a change of the gate and the
                up projection of the last block's feed-forward.
            rank: of that change; 0: full.
            progress: called between trials with those done and in all.

        Raises:
            Error: there is no memory to consolidate, too little text for a trial, or, with the
                figures, nothing that was tried makes the trial text cheaper within the tolerance.
        """
        native, before, chosen, trials = self._session.consolidate(
            _to_bytes(trial),
            _to_bytes(guarded),
            tolerance,
            memory,
            head,
            feed_forward,
            rank,
            progress,
        )
        return Consolidation(
            nn.LanguageModel.from_native(native),
            ConsolidationTrial(*before),
            ConsolidationTrial(*chosen),
            [ConsolidationTrial(*each) for each in trials],
        )

    def rebase(
        self, model: "nn.LanguageModel | _C.LanguageModel", progress: Progress | None = None
    ) -> "Session":
        """A session on another model that has read and written the same: its log is replayed.

        Raises:
            Error: the log's beginning was committed.
        """
        return self._of(self._session.rebase(_native(model), progress))

    def replayed(
        self,
        model: "nn.LanguageModel | _C.LanguageModel",
        *,
        piece: int = 1024,
        journal_bytes: int = 64 << 20,
        store: bool | ExactStoreOptions = False,
        policy: WritePolicy = AS_TRAINED,
        end_to_end: bool | EndToEndOptions = False,
        protection: Protection | None = None,
        progress: Progress | None = None,
    ) -> "Session":
        """The session that has this one's log, on any model: all of it is replayed.

        Raises:
            Error: the log's beginning was committed.
        """
        return self._of(
            self._session.replayed(
                _native(model),
                _session_options(piece, 0, journal_bytes, store, policy, end_to_end, protection),
                progress,
            )
        )

    def logits(self) -> Tensor:
        """Logits of the next token, fp32 [vocabulary] on the CPU; all 0 in a fresh session.

        With an exact store: log p by model and store.
        """
        return self._session.logits()

    def state(self) -> dict[str, Tensor]:
        """Name → tensor, copies of everything that decides the next token.

        They are `layers.N.memory.state`, `layers.N.memory.conv`, `layers.N.attention.key`,
        `layers.N.attention.value`, `position`, `logits`, and `generator` (the bits of its seed, and
        its draws); with an exact store its tensors, and `store.hidden` and `store.logits`, what the
        model said at this place; where it learns end to end `end_to_end.delta`, and what the next
        step waits for.
        """
        return self._session.state()

    @property
    def position(self) -> int:
        """Bytes read and written so far, without those that were rolled back or revoked."""
        return self._session.position()

    @property
    def store(self) -> ExactStoreOptions | None:
        """The options of the exact store; None where there is none."""
        fields = self._session.store_options()
        return None if fields is None else ExactStoreOptions(*fields)

    @property
    def policy(self) -> WritePolicy:
        """What is done to its writes beyond what the model was trained to do."""
        strength, gate, memory_norm_cap, head_norm_cap, ridge = self._session.policy()
        surprise = None if gate is None else SurpriseGate(*gate)
        return WritePolicy(strength, surprise, memory_norm_cap, head_norm_cap, ridge)

    @property
    def end_to_end(self) -> EndToEndOptions | None:
        """The options of its gradient steps; None where it takes none."""
        fields = self._session.end_to_end_options()
        return None if fields is None else EndToEndOptions(*fields)

    @property
    def protection(self) -> Protection | None:
        """The keys that writes leave alone; None where there are none."""
        fields = self._session.protection()
        return None if fields is None else Protection(*fields)

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

        The file holds everything that was read, the marks and the checkpoints.

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
        return self.fork()

    def __deepcopy__(self, memo: dict[int, object]) -> "Session":
        return self.fork()

    @classmethod
    def _of(cls, native: _C.Session) -> "Session":
        session = cls.__new__(cls)
        session._session = native
        return session


def _native(model: "nn.LanguageModel | _C.LanguageModel") -> _C.LanguageModel:
    return model.native() if isinstance(model, nn.LanguageModel) else model


def _session_options(
    piece: int,
    seed: int,
    journal_bytes: int,
    store: bool | ExactStoreOptions,
    policy: WritePolicy,
    end_to_end: bool | EndToEndOptions,
    protection: Protection | None,
) -> "_C._SessionFields":
    return (
        piece,
        _checked_seed(seed),
        journal_bytes,
        (ExactStoreOptions() if store else None) if isinstance(store, bool) else store,
        policy,
        (EndToEndOptions() if end_to_end else None) if isinstance(end_to_end, bool) else end_to_end,
        protection,
    )


def _point(place: Mark | int) -> tuple[bool, int]:
    if isinstance(place, Mark):
        return True, place.id
    if place < 0:
        raise Error(f"session: a position must be at least 0, got {place}")
    return False, place


def _to_bytes(text: Text) -> bytes:
    if isinstance(text, str):
        return text.encode("utf-8", "surrogateescape")
    return text if isinstance(text, bytes) else bytes(memoryview(text))


def _to_text(text: bytes) -> str:
    return text.decode("utf-8", "surrogateescape")


@contextlib.contextmanager
def _write_options(
    max_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int | None,
    stop: Text | Sequence[Text],
    on_token: Callable[[str], bool | None] | None,
    ahead: int,
    guess: Callable[[bytes, int], Text] | None = None,
) -> "Iterator[_C._WriteFields]":
    """The options of a write; `on_token` gets what is left of its text when it has been written."""
    stream = _TokenStream(on_token) if on_token else None
    stops = [stop] if isinstance(stop, str | bytes | bytearray | memoryview) else stop
    yield (
        max_tokens,
        temperature,
        top_k,
        top_p,
        None if seed is None else _checked_seed(seed),
        [_to_bytes(each) for each in stops],
        stream,
        ahead,
        None if guess is None else lambda text, most: _to_bytes(guess(text, most)),
    )
    if stream:
        stream.finish()


class _TokenStream:
    """Hands on bytes that come one by one as text, each piece once its characters are complete."""

    def __init__(self, on_token: Callable[[str], bool | None]) -> None:
        self._on_token = on_token
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")

    def __call__(self, token: bytes) -> bool | None:
        text = self._decoder.decode(token)
        return self._on_token(text) if text else None

    def finish(self) -> None:
        rest = self._decoder.decode(b"", final=True)
        if rest:
            self._on_token(rest)


def _checked_seed(seed: int) -> int:
    if not 0 <= seed < 1 << 64:
        raise Error(f"session: seed must be in [0, 2^64), got {seed}")
    return seed


__all__ = ["LogCall", "Mark", "Session", "SessionReport", "Strength"]
