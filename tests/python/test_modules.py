"""The layers: C++ and Python twins, streaming, hooks, replaced children, ablation, training."""

import math
from typing import Any

import pytest
import torch
from comparison import assert_near
from small_models import VARIANTS, random_tokens, small_config, small_model
from torch import Tensor, nn

import fastweights
from fastweights.nn import FastWeightMemory, LanguageModel, LanguageModelState


def logits_of(model: LanguageModel, tokens: Tensor, **options: Any) -> Tensor:
    logits: Tensor | None = model(tokens, **options).logits
    assert logits is not None
    return logits


@pytest.mark.parametrize("variant", VARIANTS)
def test_cpp_and_python_are_twins(variant: str) -> None:
    model = small_model(variant)
    native = model.native()
    parameters = dict(model.named_parameters())
    assert set(native.tensors()) == set(parameters)
    for name, tensor in native.tensors().items():
        assert tensor.data_ptr() == parameters[name].data_ptr(), name
    assert native.parameter_count() == model.parameter_count()
    assert native.state_bytes(3) == model.state_bytes(3)

    tokens = random_tokens(2, 30)
    with torch.no_grad():
        logits, state = model(tokens)
        native_logits, native_state = native.forward(tokens)
        assert_near("logits", native_logits, logits, 1e-6)
        assert list(native_state) == list(state.tensors())
        for name, tensor in state.tensors().items():
            assert_near(name, native_state[name], tensor, 1e-6)
        again, _ = native.forward(tokens, state.tensors(), last_logits_only=True)
        assert_near("logits", again, model(tokens, state, last_logits_only=True).logits, 1e-6)


@pytest.mark.parametrize("variant", ["both", "delta_rule"])
def test_write_strengths(variant: str) -> None:
    model = small_model(variant).double()
    tokens = random_tokens(2, 30)
    state = model(tokens).state
    plain = logits_of(model, tokens, state=state)
    strength = torch.ones(2, 30)
    assert torch.equal(logits_of(model, tokens, state=state, write_strength=strength), plain)
    strength[0] = 0
    strength[1, 10:] = 1.5
    output = model(tokens, state, write_strength=strength)
    assert_near("logits", output.logits[1, :10], plain[1, :10], 1e-12)
    assert not torch.equal(output.logits[1], plain[1])
    for before, after in zip(state.blocks, output.state.blocks, strict=True):
        assert torch.equal(before.memory.state[0], after.memory.state[0])
        assert not torch.equal(before.memory.state[1], after.memory.state[1])
    strength.requires_grad_()
    logits_of(model, tokens, state=state, write_strength=strength).square().sum().backward()
    assert strength.grad is not None
    assert (strength.grad.count_nonzero(1) > 20).all()
    with pytest.raises(fastweights.ShapeError, match=r"write_strength must be float32 \[B, T\] = "):
        model(tokens, state, write_strength=torch.ones(2, 29))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("pieces", [[1] * 25, [7, 0, 18], [24, 1]], ids=str)
@pytest.mark.parametrize("in_place", [False, True])
def test_pieces_give_the_same_as_one_call(variant: str, pieces: list[int], in_place: bool) -> None:
    model = small_model(variant).double()
    tokens = random_tokens(2, 25)
    with torch.no_grad():
        expected, last = model(tokens)
        state = model.initial_state(2)
        outputs = []
        for piece in tokens.split(pieces, 1):
            logits, state = model(piece, state, in_place=in_place)
            outputs.append(logits)
    assert_near("logits", torch.cat(outputs, 1), expected, 1e-12)
    for name, tensor in last.tensors().items():
        assert_near(name, state.tensors()[name], tensor, 1e-12)


def test_pieces_in_single_precision() -> None:
    model = small_model()
    tokens = random_tokens(1, 60)
    with torch.no_grad():
        expected, _ = model(tokens)
        first, state = model(tokens[:, :23])
        second, _ = model(tokens[:, 23:], state)
    assert_near("logits", torch.cat([first, second], 1), expected, 1e-5)


def test_the_state_does_not_grow_and_is_not_changed() -> None:
    model = small_model()
    with torch.no_grad():
        _, state = model(random_tokens(2, 3))
        before = state.clone()
        _, longer = model(random_tokens(2, 200), state)
    assert longer.nbytes == state.nbytes == model.state_bytes(2)
    for name, tensor in state.tensors().items():
        assert torch.equal(tensor, before.tensors()[name]), name


def test_rows_are_independent_and_can_be_reset() -> None:
    model = small_model()
    tokens = random_tokens(3, 12)
    with torch.no_grad():
        _, state = model(random_tokens(3, 20))
        reset = state.reset_rows(torch.tensor([False, True, False]))
        logits = logits_of(model, tokens, state=reset)
        fresh = logits_of(model, tokens)
        carried = logits_of(model, tokens, state=state)
    assert reset.position.tolist() == [20, 0, 20]
    assert_near("reset row", logits[1], fresh[1], 1e-6)
    assert_near("other rows", logits[::2], carried[::2], 1e-6)
    with pytest.raises(fastweights.ShapeError, match=r"mask must be bool \[B\] = \[3\]"):
        state.reset_rows(torch.tensor([True]))


def test_gradients_flow_through_the_state_unless_detached() -> None:
    model = small_model()
    first, second = random_tokens(1, 10), random_tokens(1, 10)

    def gradient(detach: bool) -> Tensor:
        memory = model.blocks[0].memory
        assert isinstance(memory, FastWeightMemory)
        model.zero_grad()
        _, state = model(first)
        logits_of(model, second, state=state.detach() if detach else state).sum().backward()
        assert memory.value.weight.grad is not None
        return memory.value.weight.grad.clone()

    assert not torch.allclose(gradient(True), gradient(False))


def test_logits_options() -> None:
    model = small_model()
    tokens = random_tokens(2, 9)
    with torch.no_grad():
        every, state = model(tokens)
        last, _ = model(tokens, last_logits_only=True)
        none, same = model(tokens, logits=False)
        empty, _ = model(tokens[:, :0], last_logits_only=True)
    assert_near("logits", last, every[:, -1:], 1e-6)
    assert none is None
    assert torch.equal(same.blocks[1].memory.state, state.blocks[1].memory.state)
    assert empty.shape == (2, 0, 50)


@pytest.mark.parametrize("branch", ["attention", "memory"])
def test_a_branch_can_be_switched_off(branch: str) -> None:
    model = small_model()
    tokens = random_tokens(1, 9)
    with torch.no_grad():
        both = logits_of(model, tokens)
        getattr(model, f"enable_{branch}")(False)
        ablated, state = model(tokens)
        native, _ = model.native().forward(tokens)
        getattr(model, f"enable_{branch}")(True)
        again = logits_of(model, tokens)
    assert not torch.allclose(ablated, both)
    assert_near("native", native, ablated, 1e-6)
    assert torch.equal(again, both)
    assert not any(x.any() for n, x in state.tensors().items() if f".{branch}." in n)


def test_memory_dropout_drops_whole_rows_in_training_only() -> None:
    model = small_model(memory_dropout=0.5)
    tokens = random_tokens(1, 9).expand(40, -1)
    with torch.no_grad():
        kept = logits_of(model, tokens[:1])
        model.enable_memory(False)
        dropped = logits_of(model, tokens[:1])
        model.enable_memory(True)
        evaluated = logits_of(model, tokens)
        trained = logits_of(model.train(), tokens)
    assert_near("evaluation", evaluated, kept.expand(40, -1, -1), 1e-6)
    is_kept = torch.isclose(trained, kept, atol=1e-5).flatten(1).all(1)
    is_dropped = torch.isclose(trained, dropped, atol=1e-5).flatten(1).all(1)
    assert (is_kept ^ is_dropped).all()
    assert 5 < is_kept.sum() < 35


def test_dropout_is_drawn_in_training_only() -> None:
    model, tokens = small_model(dropout=0.3), random_tokens(2, 20)
    with torch.no_grad():
        evaluated = logits_of(model, tokens)
        native, _ = model.native().forward(tokens)
        model.train()
        torch.manual_seed(1)
        one = logits_of(model, tokens)
        other = logits_of(model, tokens)
        torch.manual_seed(1)
        assert torch.equal(logits_of(model, tokens), one)
    assert_near("native", native, evaluated, 1e-6)
    assert not torch.allclose(one, other)
    assert not torch.allclose(one, evaluated)


def test_dropout_keeps_the_mean_of_what_it_drops() -> None:
    model, tokens = small_model(dropout=0.3, layers=1), torch.zeros(1, 20000, dtype=torch.int64)
    seen: list[Tensor] = []
    model.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model.train()(tokens)
    assert abs((seen[0] == 0).float().mean().item() - 0.3) < 0.01
    assert_near("mean", seen[0].mean((0, 1)), model.embedding.weight[0], 0.02)


@pytest.mark.parametrize("branch", ["mix_attention", "mix_memory", "feed_forward.down.weight"])
def test_dropout_reaches_what_each_branch_adds(branch: str) -> None:
    torch.manual_seed(0)
    model = small_model(dropout=0.3)
    block, x, position = model.blocks[0], torch.randn(2, 300, model.config.width), torch.zeros(2)
    added = []
    with torch.no_grad():
        for other in ("mix_attention", "mix_memory", "feed_forward.down.weight"):
            if other != branch:
                block.get_parameter(other).zero_()
        for training in (True, False):
            y, _ = block.train(training)(x, block.initial_state(2), position.long())
            added.append(y - x)
    dropped, all_of_it = added
    gone = (dropped == 0) & (all_of_it != 0)
    assert abs(gone.sum() / (all_of_it != 0).sum() - 0.3) < 0.02
    assert_near("what is left", 0.7 * dropped, all_of_it.masked_fill(gone, 0.0), 1e-4)


def test_hooks_on_projections_are_called() -> None:
    model = small_model()
    seen = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda *_, name=name: seen.append(name))
    model(random_tokens(1, 3))
    assert sorted(seen) == sorted(n for n, m in model.named_modules() if isinstance(m, nn.Linear))


class LowRank(nn.Module):
    """A frozen Linear and a trained product of two thin matrices."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x) + self.up(self.down(x))
        return y


@pytest.mark.parametrize("branch", ["attention", "memory", "feed_forward"])
def test_projections_can_be_replaced(branch: str) -> None:
    model = small_model()
    tokens = random_tokens(1, 9)
    before = logits_of(model, tokens)
    layer = getattr(model.blocks[0], branch)
    name, base = next((n, m) for n, m in layer.named_children() if isinstance(m, nn.Linear))
    adapter = LowRank(base)
    setattr(layer, name, adapter)
    after = logits_of(model, tokens)
    after.square().sum().backward()
    assert not torch.allclose(before, after)
    assert adapter.up.weight.grad is not None
    assert adapter.up.weight.grad.any()
    assert base.weight.grad is None
    with pytest.raises(fastweights.Error, match=f"blocks.0.{branch}.{name} .* replaced"):
        model.native()


def test_the_cpp_model_refuses_a_model_with_hooks() -> None:
    model = small_model()
    model.blocks[1].register_forward_pre_hook(lambda *_: None)
    with pytest.raises(fastweights.Error, match=r"module blocks\.1 \(Block\)"):
        model.native()


@pytest.mark.parametrize("variant", VARIANTS)
def test_state_dict_round_trip(variant: str) -> None:
    model, other = small_model(variant), small_model(variant)
    tokens = random_tokens(1, 9)
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits_of(model, tokens), logits_of(other, tokens))


def test_state_round_trip_through_names() -> None:
    model = small_model()
    _, state = model(random_tokens(2, 5))
    tensors = state.tensors()
    assert list(tensors)[:4] == [
        "layers.0.memory.state",
        "layers.0.memory.conv",
        "layers.0.attention.key",
        "layers.0.attention.value",
    ]
    assert list(tensors)[-1] == "position"
    again = LanguageModelState.from_tensors(dict(reversed(tensors.items())))
    assert all(a is b for a, b in zip(tensors.values(), again.tensors().values(), strict=True))
    for broken, message in (
        (tensors | {"other": torch.zeros(1)}, 'unknown tensor "other"'),
        ({"layers.0.memory.state": torch.zeros(1)}, '"position" is missing'),
        (
            {"position": torch.zeros(1), "layers.0.memory.state": torch.zeros(1)},
            '"layers.0.memory.conv" is missing',
        ),
    ):
        with pytest.raises(fastweights.StateMismatch, match=message):
            LanguageModelState.from_tensors(broken)


def test_wrong_tokens_and_states() -> None:
    model = small_model()
    with pytest.raises(
        fastweights.ShapeError, match=r"tokens must be int64 \[B, T\], got .*float32"
    ):
        model(torch.zeros(1, 3))
    with pytest.raises(fastweights.ShapeError, match="tokens must be int64"):
        model(torch.zeros(3, dtype=torch.int64))
    tokens = random_tokens(1, 3)
    with pytest.raises(fastweights.StateMismatch, match=r"layers.0.memory.state must be \[1, 4"):
        model(tokens, model.initial_state(2))
    with pytest.raises(fastweights.StateMismatch, match="has 2 layers, the model 3"):
        small_model(layers=3)(tokens, model.initial_state(1))
    with pytest.raises(fastweights.StateMismatch, match=r"memory\.state must be .* got none"):
        model(tokens, small_model("attention_only").initial_state(1))
    with pytest.raises(fastweights.StateMismatch, match=r"memory\.state must be none"):
        small_model("attention_only")(tokens, model.initial_state(1))
    state = model.initial_state(1)
    with pytest.raises(fastweights.StateMismatch, match="position must be int64"):
        model(tokens, state._replace(position=state.position.float()))


def test_initial_half_lives_spread_over_heads_and_layers() -> None:
    config = small_config(layers=4, half_life_min=2.0, half_life_max=2048.0)
    lives = []
    for block in LanguageModel(config).blocks:
        memory = block.memory
        assert isinstance(memory, FastWeightMemory)
        assert memory.a_log is not None
        assert memory.dt_bias is not None
        g = -memory.a_log.double().exp() * nn.functional.softplus(memory.dt_bias.double())
        lives.append(-math.log(2.0) / g)
    spread = torch.stack(lives, 1).flatten().log2()
    assert torch.allclose(spread, torch.linspace(1.0, 11.0, 16).double(), atol=1e-3)


def test_initial_weights() -> None:
    model = LanguageModel(small_config(width=256, attention_heads=4, initializer_range=0.02))
    weights = dict(model.named_parameters())
    assert weights["blocks.0.memory.query.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    assert weights["embedding.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    residual = 0.02 / math.sqrt(2 * 2)
    for name in ("attention.output", "memory.output", "feed_forward.down"):
        std = weights[f"blocks.1.{name}.weight"].std().item()
        assert std == pytest.approx(residual, rel=0.05), name
    assert weights["blocks.0.memory.convolution_weight"].abs().max().item() <= 0.5


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_learns(variant: str) -> None:
    model = small_model(variant).train()
    tokens = random_tokens(2, 20)
    logits = logits_of(model, tokens[:, :-1])
    nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any() or not parameter.numel(), name


def test_training_learns_a_text_by_heart() -> None:
    model = small_model(layers=1).train()
    tokens = random_tokens(1, 33)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    for _ in range(40):
        logits = logits_of(model, tokens[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


@pytest.mark.parametrize(
    ("variant", "backend"),
    [("both", "inductor"), ("delta_rule", "aot_eager"), ("fast_head", "aot_eager")],
)
def test_compile_in_one_graph(variant: str, backend: str) -> None:
    torch.compiler.reset()
    model = small_model(variant, layers=1)
    tokens = random_tokens(2, 19)
    state = model(random_tokens(2, 5)).state.detach()
    expected = logits_of(model, tokens, state=state)
    expected.square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    logits, after = torch.compile(model, fullgraph=True, backend=backend)(tokens, state)
    logits.square().sum().backward()
    assert after.position.tolist() == [24, 24]
    assert_near("logits", logits, expected, 1e-5)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert_near(name, parameter.grad, gradients[name], 1e-4)


def test_functional_gradients() -> None:
    model = small_model()
    tokens = random_tokens(1, 9)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        logits: Tensor = torch.func.functional_call(model, parameters, (tokens,)).logits
        return logits.square().sum()

    given = torch.func.grad(loss)(parameters)
    logits_of(model, tokens).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert_near(name, given[name], parameter.grad, 1e-5)


def test_autocast() -> None:
    model = small_model().train()
    tokens = random_tokens(2, 19)
    expected = logits_of(model, tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, state = model(tokens)
    logits.square().sum().backward()
    assert logits.dtype == torch.float32
    assert state.blocks[0].memory.state.dtype == torch.float32
    assert_near("logits", logits, expected, 5e-2)


def test_half_precision_weights() -> None:
    model = small_model().bfloat16()
    tokens = random_tokens(2, 19)
    with torch.no_grad():
        logits, state = model(tokens)
        native, _ = model.native().forward(tokens)
    assert logits.dtype == torch.float32
    assert state.blocks[0].memory.state.dtype == torch.float32
    assert state.blocks[0].memory.conv.dtype == torch.bfloat16
    assert_near("native", native, logits, 1e-2)
