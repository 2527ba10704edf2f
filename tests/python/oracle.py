"""The rules as they are defined: one token after the other, in fp64, gradients by autograd."""

import itertools

import torch
from torch import Tensor


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    g: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    use_qk_l2norm: bool = False,
) -> tuple[Tensor, Tensor]:
    """``S ← exp(g) S``, ``S ← S + β k (v − Sᵀk)ᵀ``, ``o = scale · Sᵀq``; returns o and the last S.

    Shapes as in `fastweights.ops`; without `g` nothing decays.
    """
    q, k, v, beta = q.double(), k.double(), v.double(), beta.double()
    if use_qk_l2norm:
        q, k = l2_normalised(q), l2_normalised(k)
    groups = v.shape[2] // q.shape[2]
    q, k = q.repeat_interleave(groups, dim=2), k.repeat_interleave(groups, dim=2)
    q = q * (q.shape[-1] ** -0.5 if scale is None else scale)
    decay = torch.ones_like(beta) if g is None else g.double().exp()
    batch = q.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    shape = (batch, v.shape[2], k.shape[3], v.shape[3])
    if initial_state is None:
        state = torch.zeros(shape, dtype=torch.float64)
    else:
        state = initial_state.double()
    if cu_seqlens is None:
        return _run(q, k, v, beta, decay, state)
    outputs, states = [v[:, :0]], [state[:0]]
    for n, (begin, end) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
        part = slice(begin, end)
        o, last = _run(
            q[:, part], k[:, part], v[:, part], beta[:, part], decay[:, part], state[n : n + 1]
        )
        outputs.append(o)
        states.append(last)
    return torch.cat(outputs, 1), torch.cat(states)


def l2_normalised(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def _run(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    outputs = [v[:, :0]]
    for t in range(q.shape[1]):
        state = state * decay[:, t, :, None, None]
        key = k[:, t, :, None, :]
        error = v[:, t, :, None, :] - key @ state
        state = state + (beta[:, t, :, None, None] * key.mT) @ error
        outputs.append((q[:, t, :, None, :] @ state).transpose(1, 2))
    return torch.cat(outputs, 1), state
