"""An exact memory of a text: what the model read, found again by its words and by its thoughts."""

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from . import _C


class ExactStoreOptions(NamedTuple):
    """What an exact store keeps and how it speaks."""

    text_bytes: int = 32 << 20  # most bytes of text and its index, some 8 per token; 0: no match
    neighbour_bytes: int = (
        4 << 20
    )  # most bytes of keys, 65 per token of a small vocabulary; 0: none
    shortest: int = 6  # tokens that must agree before a place counts as a match
    longest: int = 64  # agreement is measured up to so many tokens
    candidates: int = 16  # matches that vote, the most recent ones
    neighbours: int = 128  # neighbours that vote
    temperature: float = 0.033  # a neighbour counts exp(cosine / temperature) · age^−recency,
    recency: float = 0.5  # where it came `age` entries ago; 0: all ages are alike
    rate: float = 0.02  # least step by which the weights of the mixture move
    seed: int = 0  # of the random projection of hidden states to keys


class ExactStore:
    """Remembers a text token by token, exactly, and predicts from it. It needs no training.

    For the next token three experts speak: the model, the nearest neighbours of its final hidden
    state among all earlier ones (each with the token that came then), and the longest match of the
    text's end in the text. Their predictions are mixed with weights that are learned as the text is
    read, apart for each bucket of match length, similarity, and what the model thinks of the match.

    The store is a function of what was read: the same bits token by token or in batches, for any
    number of threads. `copy.copy(store)` is independent and shares what neither has changed. Text
    and hidden states have a budget of bytes each, in which the oldest goes first.
    """

    def __init__(
        self,
        hidden_size: int,
        vocabulary_size: int,
        *,
        text_bytes: int = 32 << 20,
        neighbour_bytes: int = 4 << 20,
        shortest: int = 6,
        longest: int = 64,
        candidates: int = 16,
        neighbours: int = 128,
        temperature: float = 0.033,
        recency: float = 0.5,
        rate: float = 0.02,
        seed: int = 0,
    ) -> None:
        """An empty store.

        Args:
            hidden_size: of the model's final hidden states.
            vocabulary_size: number of tokens.
            text_bytes: most bytes of text and its index, some 8 per token; 0: no longest match.
            neighbour_bytes: most bytes of keys, 65 per token of a small vocabulary; 0: none.
            shortest: tokens that must agree before a place counts as a match.
            longest: agreement is measured up to so many tokens.
            candidates: matches that vote, the most recent ones.
            neighbours: neighbours that vote.
            temperature: a neighbour that came `age` entries ago counts
                exp(cosine / temperature) · age^−recency.
            recency: see there; what was said lately is more likely to be said again. 0: all ages
                are alike.
            rate: least step by which the weights of the mixture move.
            seed: of the random projection of hidden states to keys.

        Raises:
            Error: a value is out of range.
        """
        self._store = _C.ExactStore(
            hidden_size,
            vocabulary_size,
            ExactStoreOptions(
                text_bytes,
                neighbour_bytes,
                shortest,
                longest,
                candidates,
                neighbours,
                temperature,
                recency,
                rate,
                seed,
            ),
        )

    def read(
        self, tokens: Tensor, hidden: Tensor, logits: Tensor, strengths: Tensor | None = None
    ) -> Tensor:
        """Reads tokens, and returns log p of every token at each place, before it was learned.

        Args:
            tokens: int64 [T].
            hidden: fp32 [T, hidden_size], the hidden state that predicted each token. Where there
                is none, as at the start of a text, zeros.
            logits: fp32 [T, vocabulary_size], the model's logits for each token.
            strengths: fp32 [T], at least 0; a token of strength 0 passes, but is neither found
                later nor learned from.

        Returns:
            fp32 [T, vocabulary_size].

        Raises:
            ShapeError: a tensor has a wrong shape or type.
            Error: a token or strength is out of range.
        """
        return self._store.read(tokens, hidden, logits, strengths)

    def predict(self, hidden: Tensor, logits: Tensor) -> Tensor:
        """Log p of every token for the next one: fp32 [vocabulary_size].

        Args:
            hidden: fp32 [hidden_size], the model's final hidden state at this place.
            logits: fp32 [vocabulary_size], its logits.

        Raises:
            ShapeError: a tensor has a wrong shape or type.
        """
        return self._store.predict(hidden, logits)

    def __len__(self) -> int:
        """Tokens read."""
        return self._store.size()

    @property
    def nbytes(self) -> int:
        """Bytes of text, index, keys and weights; those shared with copies included."""
        return self._store.bytes()

    def checkpoint(self) -> _C.ExactStoreCheckpoint:
        """A place for `rollback` to go back to: some kilobytes."""
        return self._store.checkpoint()

    def rollback(self, checkpoint: _C.ExactStoreCheckpoint) -> None:
        """Goes back, bit for bit, to a checkpoint of this store or of one it is a copy of.

        Raises:
            Error: what there was then has been dropped since; a copy would have kept it.
        """
        self._store.rollback(checkpoint)

    def tensors(self) -> dict[str, Tensor]:
        """Name → tensor, copies of all that the store is."""
        return self._store.tensors()

    @classmethod
    def from_tensors(
        cls, hidden_size: int, vocabulary_size: int, tensors: Mapping[str, Tensor]
    ) -> "ExactStore":
        """A store that goes on exactly like the one whose tensors these are.

        Raises:
            StateMismatch: they are of other sizes.
            FileError: they are none of a store's.
        """
        return cls._of(_C.ExactStore.from_tensors(hidden_size, vocabulary_size, dict(tensors)))

    def __copy__(self) -> "ExactStore":
        return self._of(self._store.copy())

    def __deepcopy__(self, memo: dict[int, object]) -> "ExactStore":
        return self._of(self._store.copy())

    @classmethod
    def _of(cls, native: _C.ExactStore) -> "ExactStore":
        store = cls.__new__(cls)
        store._store = native
        return store


__all__ = ["ExactStore", "ExactStoreOptions"]
