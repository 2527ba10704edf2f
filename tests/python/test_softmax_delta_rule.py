"""The rule at the head, against its definition in fp64, which PyTorch differentiates."""

from functools import partial
from typing import Any

import pytest
import torch
from comparison import GATE_GRADIENT_TOLERANCE, GRADIENT_TOLERANCE, OUTPUT_TOLERANCE, assert_near
from torch import Tensor

import fastweights
from fastweights.ops import softmax_delta_rule, softmax_delta_rule_recurrent_

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def by_definition(
    h: Tensor,
    logits: Tensor,
    target: Tensor,
    eta: Tensor,
    g: Tensor | None,
    state: Tensor,
    pending: bool = False,
) -> tuple[Tensor, Tensor]:
    keys = h * torch.rsqrt(h.square().sum(-1, keepdim=True) + 1e-6)
    rows = []
    for t in range(h.shape[1]):
        row = logits[:, t]
        if t > 0 or not pending:
            row = row + torch.einsum("bd,bdn->bn", keys[:, t], state)
        rows.append(row)
        known = (target[:, t] >= 0).to(h.dtype)[:, None]
        wanted = torch.nn.functional.one_hot(target[:, t].clamp(min=0), row.shape[-1])
        error = known * eta[:, t, None] * (wanted - row.softmax(-1))
        decay = 1.0 if g is None else torch.where(known > 0, g[:, t, None].exp(), 1.0)[..., None]
        state = decay * state + keys[:, t, :, None] * error[:, None, :]
    return torch.stack(rows, 1) if rows else logits, state


class Case:
    """Random arguments of one call, in the types of a call with h of type `dtype`."""

    def __init__(
        self,
        tokens: int,
        dtype: torch.dtype = torch.float64,
        batch: int = 2,
        width: int = 12,
        vocabulary: int = 20,
    ) -> None:
        self.wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.h = torch.randn(batch, tokens, width, dtype=dtype)
        self.logits = torch.randn(batch, tokens, vocabulary, dtype=self.wide)
        self.target = torch.randint(-1, vocabulary, (batch, tokens))
        self.eta = torch.rand(batch, tokens, dtype=self.wide)
        self.g = -0.2 * torch.rand(batch, tokens, dtype=self.wide)
        self.state = torch.randn(batch, width, vocabulary, dtype=self.wide)

    def tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in ("h", "logits", "eta", "g", "state")}

    def call(self, **changes: Any) -> tuple[Tensor, Tensor]:
        x = self.tensors() | changes
        y, state = softmax_delta_rule(
            x["h"], x["logits"], self.target, x["eta"], x["g"], x["state"], True,
            x.get("pending", False),
        )  # fmt: skip
        assert state is not None
        return y, state

    def expected(self, **changes: Any) -> tuple[Tensor, Tensor]:
        x = {name: tensor.double() for name, tensor in self.tensors().items()} | changes
        return by_definition(
            x["h"], x["logits"], self.target, x["eta"], x["g"], x["state"], x.get("pending", False)
        )


@pytest.mark.usefixtures("poisoned_buffers")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "pending"), [(0, False), (1, True), (16, False), (70, True)])
@pytest.mark.parametrize(("width", "vocabulary"), [(12, 20), (60, 257)])
def test_outputs_and_gradients(
    dtype: torch.dtype, tokens: int, pending: bool, width: int, vocabulary: int
) -> None:
    case = Case(tokens, dtype, width=width, vocabulary=vocabulary)
    given = {name: x.clone().requires_grad_() for name, x in case.tensors().items()}
    exact = {name: x.double().requires_grad_() for name, x in case.tensors().items()}
    y, state = case.call(**given, pending=pending)
    wanted, wanted_state = case.expected(**exact, pending=pending)
    assert y.dtype == state.dtype == case.wide
    # h is exact in fp64, and all else is fp32 or better.
    assert_near("logits", y, wanted, OUTPUT_TOLERANCE[case.wide])
    assert_near("state", state, wanted_state, OUTPUT_TOLERANCE[case.wide])
    outer, outer_state = torch.randn_like(y), torch.randn_like(state)
    (y * outer).sum().add((state * outer_state).sum()).backward()
    (wanted * outer).sum().add((wanted_state * outer_state).sum()).backward()
    for name, tensor in given.items():
        assert tensor.grad is not None
        assert tensor.grad.dtype == tensor.dtype
        tolerances = GATE_GRADIENT_TOLERANCE if name in {"eta", "g"} else GRADIENT_TOLERANCE
        expected = exact[name].grad
        assert_near(
            f"d_{name}",
            tensor.grad,
            torch.zeros_like(tensor.grad) if expected is None else expected,
            tolerances[tensor.dtype],
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_everything_in_16_bits(dtype: torch.dtype) -> None:
    case = Case(40, dtype)
    narrow = {name: x.to(dtype) for name, x in case.tensors().items() if name != "state"}
    y, state = case.call(**narrow)
    wanted, wanted_state = case.expected(**{name: x.double() for name, x in narrow.items()})
    assert y.dtype == dtype
    assert_near("logits", y, wanted, OUTPUT_TOLERANCE[dtype])
    # The state is made from logits before they are rounded.
    assert_near("state", state, wanted_state, OUTPUT_TOLERANCE[torch.float32])


@pytest.mark.parametrize("pieces", [[1] * 50, [16, 34], [7, 0, 42, 1], [50]], ids=str)
def test_pieces(pieces: list[int]) -> None:
    case = Case(50)
    case.target.clamp_(min=0)
    whole, final = case.call()
    rows, state, begin = [], case.state, 0
    hidden, before = case.h[:, :0], case.logits[:, :0]
    past = 0  # the pending token, once there is one
    for count in pieces:
        part = slice(begin, begin + count)
        targets = slice(begin - past, begin + count)
        target = case.target[:, targets].clone()
        if count:
            target[:, -1] = -1
        y, new = softmax_delta_rule(
            torch.cat([hidden, case.h[:, part]], 1),
            torch.cat([before, case.logits[:, part]], 1),
            target if count else torch.full_like(target, -1),
            case.eta[:, targets],
            case.g[:, targets],
            state,
            output_final_state=True,
            pending=past > 0,
        )
        assert new is not None
        state = new
        rows.append(y[:, past:])
        begin += count
        if count:
            hidden, before, past = case.h[:, begin - 1 : begin], y[:, -1:], 1
    assert_near("logits", torch.cat(rows, 1), whole, 1e-13)
    _, last = softmax_delta_rule(
        hidden, before, case.target[:, -1:], case.eta[:, -1:], case.g[:, -1:], state, True, True
    )
    assert last is not None
    assert_near("state", last, final, 1e-13)


def test_recurrent_form_writes_in_place() -> None:
    case = Case(5, torch.float32)
    y, state = case.call()
    given = case.state.clone()
    version = given._version
    again = softmax_delta_rule_recurrent_(case.h, case.logits, case.target, case.eta, case.g, given)
    assert torch.equal(again, y)
    assert torch.equal(given, state)
    assert given._version > version
    strided = case.state.transpose(1, 2).contiguous().transpose(1, 2)
    softmax_delta_rule_recurrent_(case.h, case.logits, case.target, case.eta, case.g, strided)
    assert torch.equal(strided, state)
    case.h.requires_grad_()
    y = softmax_delta_rule_recurrent_(case.h, case.logits, case.target, case.eta, case.g, given)
    with pytest.raises(RuntimeError, match="not implemented"):
        y.sum().backward()


def test_numbers_for_tensors_and_defaults() -> None:
    case = Case(20)
    y, state = softmax_delta_rule(case.h, case.logits, case.target, 0.3, -0.01)
    assert state is None
    full = torch.full_like(case.eta, 0.3), torch.full_like(case.g, -0.01)
    expected, _ = by_definition(
        case.h, case.logits, case.target, *full, torch.zeros_like(case.state)
    )
    assert_near("logits", y, expected, 1e-12)


def test_it_learns_what_follows_what() -> None:
    h = torch.randn(3, 64)
    text = torch.arange(300) % 3
    logits = torch.zeros(1, 299, 10)
    y, _ = softmax_delta_rule(h[text[None, :-1]], logits, text[None, 1:], 0.5)
    assert y[0, -3:].softmax(-1).gather(1, text[None, -3:].T).min() > 0.9


def test_threads_change_nothing() -> None:
    case = Case(100, torch.float32, batch=1, width=128, vocabulary=1100)
    given = {name: x.requires_grad_() for name, x in case.tensors().items()}

    def run(threads: int) -> tuple[Tensor, ...]:
        torch.set_num_threads(threads)
        y, state = case.call(**given)
        return (y, state, *torch.autograd.grad(y.sum() + state.sum(), list(given.values())))

    for one, two in zip(run(1), run(2), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("pending", [False, True])
@pytest.mark.parametrize("gate", [False, True])
def test_gradcheck(pending: bool, gate: bool) -> None:
    case = Case(19, width=5, vocabulary=6)

    def function(
        h: Tensor, logits: Tensor, eta: Tensor, state: Tensor, g: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        y, final = softmax_delta_rule(h, logits, case.target, eta, g, state, True, pending)
        assert final is not None
        return y, final

    tensors = [case.h, case.logits, case.eta, case.state, *([case.g] if gate else [])]
    assert torch.autograd.gradcheck(function, [x.requires_grad_() for x in tensors])


def test_opcheck() -> None:
    case = Case(5, torch.float32)
    registered, opcheck = torch.ops.fastweights, torch.library.opcheck
    for x in case.tensors().values():
        x.requires_grad_()
    everything = (case.h, case.logits, case.target, case.eta, case.g, case.state, True, True)
    opcheck(registered.softmax_delta_rule.default, everything)
    opcheck(registered.softmax_delta_rule.default, everything[:4])
    for x in case.tensors().values():
        x.requires_grad_(False)
    opcheck(registered.softmax_delta_rule_recurrent_.default, everything[:6])


def test_compile_in_one_graph() -> None:
    torch.compiler.reset()
    case = Case(20, torch.float32)
    given = {name: x.requires_grad_() for name, x in case.tensors().items()}
    expected = case.call(**given)
    gradients = torch.autograd.grad(expected[0].square().sum(), list(given.values()))
    compiled = torch.compile(
        partial(softmax_delta_rule, output_final_state=True), fullgraph=True, backend="aot_eager"
    )
    y, state = compiled(case.h, case.logits, case.target, case.eta, case.g, case.state)
    assert_near("logits", y, expected[0], 1e-6)
    assert_near("state", state, expected[1], 1e-6)
    again = torch.autograd.grad(y.square().sum(), list(given.values()))
    for mine, theirs in zip(again, gradients, strict=True):
        assert_near("gradient", mine, theirs, 1e-6)


def test_vmap_and_functional_gradients() -> None:
    case = Case(6)
    mapped = torch.func.vmap(
        lambda h: softmax_delta_rule(h, case.logits, case.target, case.eta, case.g, case.state)[0]
    )
    rows = torch.stack([case.h, 2 * case.h.flip(1)])
    for h, y in zip(rows, mapped(rows), strict=True):
        assert_near("logits", y, case.call(h=h)[0], 1e-12)

    def loss(h: Tensor) -> Tensor:
        return case.call(h=h)[0].square().sum()

    given = torch.func.grad(loss)(case.h)
    loss(case.h.requires_grad_()).backward()
    assert case.h.grad is not None
    assert_near("d_h", given, case.h.grad, 1e-12)


def test_what_there_is_no_derivative_for() -> None:
    case = Case(3)
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(lambda h: case.call(h=h)[0], (case.h,), (case.h,))
    y, _ = case.call(h=case.h.requires_grad_())
    (gradient,) = torch.autograd.grad(y.square().sum(), case.h, create_graph=True)
    with pytest.raises(RuntimeError, match="not implemented"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"h": torch.zeros(2, 3)}, r"h must be \[B, T, D\], got \[2, 3\]"),
        ({"h": torch.zeros(2, 3, 4, dtype=torch.int64)}, "h must be .*Float.* got Long"),
        ({"logits": torch.zeros(2, 4, 5)}, r"logits must be \[B, T, N\] = \[2, 3, 5\], got \[2, 4"),
        ({"logits": torch.zeros(2, 3, 0)}, "logits must be .* N of at least 1"),
        ({"logits": torch.zeros(2, 3, 5).double()}, "logits must be Float, got Double"),
        ({"target": torch.zeros(2, 3)}, "target must be Long, got Float"),
        ({"target": torch.zeros(3, 2).long()}, r"target must be \[B, T\] = \[2, 3\], got \[3, 2\]"),
        (
            {"target": torch.tensor([[0, 1, 2], [3, 5, 0]])},
            r"target must be below N = 5, got 5 at \[1, 1\]",
        ),
        ({"eta": torch.zeros(2, 3, 1)}, r"eta must be \[B, T\] = \[2, 3\], got \[2, 3, 1\]"),
        ({"g": torch.zeros(2, 3).half()}, "g must be Float, got Half"),
        ({"state": torch.zeros(2, 5, 4)}, r"initial_state must be \[B, D, N\] = \[2, 4, 5\]"),
        ({"state": torch.zeros(2, 4, 5).double()}, "initial_state must be Float, got Double"),
    ],
)
def test_errors(changes: dict[str, Tensor], message: str) -> None:
    x = {
        "h": torch.zeros(2, 3, 4),
        "logits": torch.zeros(2, 3, 5),
        "target": torch.zeros(2, 3, dtype=torch.int64),
        "eta": torch.zeros(2, 3),
        "g": torch.zeros(2, 3),
        "state": torch.zeros(2, 4, 5),
    } | changes
    with pytest.raises(fastweights.ShapeError, match="softmax_delta_rule: " + message):
        softmax_delta_rule(x["h"], x["logits"], x["target"], x["eta"], x["g"], x["state"])
