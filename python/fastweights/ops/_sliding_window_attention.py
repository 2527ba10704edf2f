from torch import Tensor

from ._dispatch import operator

_sliding_window_attention = operator("sliding_window_attention")


def sliding_window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sink_key: Tensor,
    sink_value: Tensor,
    cache_key: Tensor | None,
    cache_value: Tensor | None,
    position: Tensor,
    *,
    heads: int,
    window: int,
    rope_base: float = 10000.0,
    in_place: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Causal attention over a sliding window with learned sinks and partial rotary embedding.

    The first half of each head is rotated by the absolute position (arXiv:2104.09864), the sinks'
    keys live in the other (arXiv:2309.17453). Cost and memory are linear in T.

    Args:
        query: [B, T, heads·D], projected; D a multiple of 4.
        key: [B, T, heads·D].
        value: [B, T, heads·D].
        sink_key: [heads, S, D/2].
        sink_value: [heads, S, D].
        cache_key: ring [B, window, heads, D] of rotated keys: token i stands in slot i % window.
            Empty unless given.
        cache_value: the values, likewise.
        position: int64 [B], tokens seen so far; a row at 0 does not see what its ring holds.
        heads: number of heads.
        window: a token sees itself and the window − 1 tokens before it.
        rope_base: base of the rotary frequencies.
        in_place: inference only: the caches are overwritten.

    Returns:
        o [B, T, heads·D], and both caches after the last token.
    """
    o, next_key, next_value = _sliding_window_attention(
        query,
        key,
        value,
        sink_key,
        sink_value,
        cache_key,
        cache_value,
        position,
        heads,
        window,
        rope_base,
        in_place,
    )
    return o, next_key, next_value
