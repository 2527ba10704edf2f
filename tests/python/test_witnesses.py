"""Independent implementations of the gated delta rule: those in transformers."""

import pytest
from cases import Case, make_inputs
from comparison import assert_near
from rules import call, options_of

qwen = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")

CASES = [
    Case(tokens=tokens, sizes=sizes, heads=(2, 2), use_qk_l2norm=l2norm, initial_state=initial)
    for tokens in (1, 63, 130)
    for sizes in ((64, 64), (60, 100))
    for l2norm, initial in ((True, True), (False, False))
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(
    "witness", ["torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"]
)
def test_transformers_agrees(witness: str, case: Case) -> None:
    inputs = make_inputs(case)
    o, state = call(inputs, output_final_state=True, **options_of(case))
    expected, expected_state = getattr(qwen, witness)(
        inputs.q,
        inputs.k,
        inputs.v,
        g=inputs.g,
        beta=inputs.beta,
        initial_state=inputs.initial_state,
        output_final_state=True,
        use_qk_l2norm_in_kernel=case.use_qk_l2norm,
    )
    assert state is not None
    assert o.shape == expected.shape
    assert_near("o", o, expected, 1e-5)
    assert_near("final_state", state, expected_state, 1e-5)


def test_transformers_agrees_on_gradients() -> None:
    inputs = make_inputs(Case(tokens=70, sizes=(32, 32), heads=(2, 2), initial_state=False))
    mine, theirs = inputs.with_gradients(), inputs.with_gradients()
    call(mine)[0].square().sum().backward()
    o, _ = qwen.torch_chunk_gated_delta_rule(
        theirs.q, theirs.k, theirs.v, g=theirs.g, beta=theirs.beta
    )
    o.square().sum().backward()
    for name, x in mine.tensors().items():
        expected = theirs.tensors()[name].grad
        assert x.grad is not None
        assert expected is not None
        assert_near(f"d{name}", x.grad, expected, 1e-4)
