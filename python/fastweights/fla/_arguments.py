"""What the functions share: their keywords, types, layouts of the state, gates and strengths."""

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from ..errors import ShapeError

# Keywords that older versions of fla knew.
_REMOVED = {"head_first": "inputs are [B, T, H, ...]"}


def keywords(
    function: Callable[..., Any], given: dict[str, Any], **defaults: Any
) -> dict[str, Any]:
    """`defaults` with what the caller gave in ``**kwargs``; a keyword not among them is refused.

    Raises:
        TypeError: naming the keyword and those that `function` knows.
    """
    unknown = next((name for name in given if name not in defaults), None)
    if unknown is not None:
        named = (name for name in inspect.signature(function).parameters if name != "kwargs")
        known = ", ".join([*named, *defaults])
        hint = f" ({_REMOVED[unknown]})" if unknown in _REMOVED else ""
        raise TypeError(f"{function.__name__}: unknown keyword {unknown!r}{hint}; known: {known}")
    return defaults | given


def state_layout(function: str, state_v_first: bool, transpose_state_layout: bool | None) -> bool:
    """``state_v_first``, which may come by its former name."""
    if transpose_state_layout is None:
        return state_v_first
    if state_v_first:
        raise ValueError(
            f"{function}: transpose_state_layout is the former name of state_v_first: give one"
        )
    warnings.warn(
        f"{function}: transpose_state_layout is deprecated, its name is now state_v_first",
        DeprecationWarning,
        stacklevel=3,
    )
    return transpose_state_layout


def refuse_context(function: str, cp_context: object) -> None:
    if cp_context is not None:
        raise NotImplementedError(
            f"{function}: cp_context must be None, got {type(cp_context).__name__}: a sequence is "
            "not split over devices here"
        )


def of_one_type(*tensors: Tensor) -> list[Tensor]:
    """The tensors in the smallest floating-point type that holds the values of each."""
    common = tensors[0].dtype
    for tensor in tensors[1:]:
        if tensor.is_floating_point():
            common = torch.promote_types(common, tensor.dtype)
    return [x.to(common) if x.is_floating_point() else x for x in tensors]


def gate_for(q: Tensor, gate: Tensor) -> Tensor:
    """A gate or strength in a type that the operator takes beside `q`: q's or fp32."""
    if gate.dtype in (q.dtype, torch.float32) or not gate.is_floating_point():
        return gate
    return gate.to(torch.promote_types(q.dtype, torch.float32))


def strength(
    function: str, q: Tensor, beta: Tensor, use_sigmoid: bool, allow_neg_eigval: bool
) -> Tensor:
    """β as the operator takes it: as given, or σ(beta), or 2·σ(beta)."""
    if allow_neg_eigval and not use_sigmoid:
        raise ValueError(
            f"{function}: allow_neg_eigval needs use_beta_sigmoid_in_kernel=True, got False"
        )
    if use_sigmoid:
        beta = torch.sigmoid(_wide(beta)) * (2.0 if allow_neg_eigval else 1.0)
    return gate_for(q, beta)


def log_decay(
    function: str,
    g: Tensor,
    A_log: Tensor | None,  # noqa: N803
    dt_bias: Tensor | None,
    lower_bound: float | None = None,
) -> Tensor:
    """The log-decay that fla forms in its kernel, in fp32 or wider.

    ``−exp(A_log) · softplus(g + dt_bias)``, or with a lower bound, where A_log may be missing,
    ``lower_bound · σ(exp(A_log) · (g + dt_bias))``.

    Args:
        function: that errors name.
        g: [B, T, HV] or [B, T, HV, K], before the activation.
        A_log: HV elements.
        dt_bias: as many elements as g has for a token.
        lower_bound: what the log-decay never falls below; < 0.
    """
    x = _wide(g)
    if dt_bias is not None:
        _check_elements(function, "dt_bias", dt_bias, x.shape[2:])
        x = x + dt_bias.reshape(x.shape[2:]).to(x.dtype)
    rate = None
    if A_log is not None:
        _check_elements(function, "A_log", A_log, x.shape[2:3])
        rate = A_log.reshape(-1, *[1] * (x.dim() - 3)).to(x.dtype).exp()
    if lower_bound is None:
        if rate is None:
            raise ValueError(f"{function}: use_gate_in_kernel needs A_log, got None")
        return -rate * softplus(x)
    if lower_bound >= 0:
        raise ValueError(f"{function}: lower_bound must be below 0, got {lower_bound}")
    return lower_bound * torch.sigmoid(x if rate is None else rate * x)


def initial(state: Tensor | None, q: Tensor) -> Tensor | None:
    """A state [N, HV, K, V] in the type that the operator takes beside `q`: fp32 or wider."""
    if state is None or not state.is_floating_point():
        return state
    return state.to(torch.promote_types(q.dtype, torch.float32))


def k_first(
    function: str, state: Tensor | None, q: Tensor, v: Tensor, state_v_first: bool
) -> Tensor | None:
    """A state as the caller lays it out as [N, HV, K, V]."""
    if state is None or not state_v_first:
        return state
    sizes = [v.shape[-1], q.shape[-1]]
    if list(state.shape[-2:]) != sizes:
        raise ShapeError(
            f"{function}: initial_state must be [N, HV, V, K] with [V, K] = {sizes}, got "
            f"{list(state.shape)}"
        )
    return state.mT


def final(state: Tensor | None, state_v_first: bool) -> Tensor | None:
    """The operator's state in the layout that was asked for."""
    return state.mT.contiguous() if state_v_first and state is not None else state


def borders(cu_seqlens: Tensor | None) -> Tensor | None:
    return None if cu_seqlens is None else cu_seqlens.to(torch.int64)


def backwards(q: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """For each token the one as far from the end of its sequence as it is from the beginning."""
    tokens = torch.arange(q.shape[1], device=q.device)
    if cu_seqlens is None:
        return tokens.flip(0)
    lengths = cu_seqlens.diff()
    if int(lengths.sum()) != tokens.numel() or bool((lengths < 0).any()):
        return tokens  # the operator refuses such borders
    first = torch.repeat_interleave(cu_seqlens[:-1], lengths)
    after = torch.repeat_interleave(cu_seqlens[1:], lengths)
    return first + after - 1 - tokens


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _check_elements(function: str, name: str, tensor: Tensor, shape: torch.Size) -> None:
    if tensor.numel() != shape.numel():
        letters = {1: "HV", 2: "HV * K"}[len(shape)]
        raise ShapeError(
            f"{function}: {name} must have {letters} = {shape.numel()} elements, got "
            f"{list(tensor.shape)}"
        )
