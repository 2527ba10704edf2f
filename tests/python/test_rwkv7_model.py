"""The baseline model benchmarks/baselines/rwkv7.py against the package rwkv, logits and states."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from comparison import assert_near
from torch import Tensor
from witnesses import source

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from baselines.rwkv7 import RWKV7, RWKV7Config, RWKV7State, load_rwkv7, save_rwkv7

CONFIG = RWKV7Config(
    vocabulary_size=61,
    width=48,
    layers=3,
    head_size=16,
    feed_forward_width=80,
    decay_rank=7,
    rate_rank=6,
    value_rank=5,
    gate_rank=9,
)
TOKENS = 21

# The package sets global switches of PyTorch, so it runs in a process of its own.
WITNESS = """
import sys

import torch
from rwkv.model import RWKV

folder, tokens = sys.argv[1], [int(token) for token in sys.argv[2:]]
torch.set_num_threads(1)
with torch.inference_mode():
    model = RWKV(model=folder + "/model", strategy="cpu fp32")
    logits, state = model.forward(tokens, None, full_output=True)
    steps, step_state = [], None
    for token in tokens:
        step, step_state = model.forward(token, step_state)
        steps.append(step)
result = {"logits": logits, "steps": torch.stack(steps)}
result |= {f"state.{i}": tensor for i, tensor in enumerate(state)}
result |= {f"step_state.{i}": tensor for i, tensor in enumerate(step_state)}
torch.save({name: tensor.clone() for name, tensor in result.items()}, folder + "/result.pth")
"""


def random_model() -> RWKV7:
    """Every weight is moved from its initial value, so that no term vanishes."""
    model = RWKV7(CONFIG).requires_grad_(False)
    generator = torch.Generator().manual_seed(3)
    for name, weight in model.named_parameters():
        columns = weight.shape[-1] if weight.dim() == 2 else 16
        weight += torch.randn(weight.shape, generator=generator) / columns**0.5
        if name == "emb.weight":
            weight *= 4
    return model.eval()


@pytest.fixture(scope="module")
def model() -> RWKV7:
    return random_model()


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.randint(CONFIG.vocabulary_size, (1, TOKENS), generator=generator)


@pytest.fixture(scope="module")
def witness(model: RWKV7, tokens: Tensor, tmp_path_factory: pytest.TempPathFactory) -> object:
    """Logits and states of the package, in one go and token by token."""
    folder = tmp_path_factory.mktemp("rwkv7")
    torch.save(model.state_dict(), folder / "model.pth")
    path = source("rwkv/model.py").parents[1]
    environment = os.environ | {"RWKV_V7_ON": "1", "RWKV_CUDA_ON": "0", "PYTHONPATH": str(path)}
    environment.pop("RWKV_DE_VERSION", None)
    arguments = [str(folder), *map(str, tokens[0].tolist())]
    run = subprocess.run(
        [sys.executable, "-c", WITNESS, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return torch.load(folder / "result.pth", weights_only=True)


def states_of(state: RWKV7State) -> list[Tensor]:
    """In the package's order and layout: for each layer shift, matrix [H, V, K], shift."""
    out = []
    for layer in range(CONFIG.layers):
        out += [
            state.time_shift[0, layer],
            state.matrix[0, layer].mT,
            state.channel_shift[0, layer],
        ]
    return out


def check(logits: Tensor, state: RWKV7State, expected: Tensor, states: list[Tensor]) -> None:
    assert logits.shape[1:] == expected.shape
    assert_near("logits", logits[0], expected, 1e-5)
    for index, (one, other) in enumerate(zip(states_of(state), states, strict=True)):
        assert_near(f"state {index}", one, other, 1e-5)


@torch.no_grad()
def test_one_go(model: RWKV7, tokens: Tensor, witness: dict[str, Tensor]) -> None:
    logits, state = model(tokens)
    states = [witness[f"state.{i}"] for i in range(3 * CONFIG.layers)]
    check(logits, state, witness["logits"], states)


@torch.no_grad()
@pytest.mark.parametrize("piece", [1, 8])
def test_pieces_with_the_state_carried(
    model: RWKV7, tokens: Tensor, witness: dict[str, Tensor], piece: int
) -> None:
    state, rows = None, []
    for part in tokens.split(piece, 1):
        logits, state = model(part, state)
        rows.append(logits)
    states = [witness[f"step_state.{i}"] for i in range(3 * CONFIG.layers)]
    assert state is not None
    check(torch.cat(rows, 1), state, witness["steps"], states)


@torch.no_grad()
def test_rows_are_independent_and_reset(model: RWKV7, tokens: Tensor) -> None:
    other = tokens.flip(1)
    _, state = model(torch.cat([tokens, other]))
    state = state.reset_rows(torch.tensor([True, False]))
    logits, _ = model(torch.cat([tokens, tokens]), state)
    fresh, _ = model(tokens)
    later, _ = model(torch.cat([other, tokens], 1))
    assert_near("reset", logits[:1], fresh, 1e-6)
    assert_near("carried", logits[1:], later[:, TOKENS:], 1e-5)


def test_every_weight_has_a_gradient(tokens: Tensor) -> None:
    model = random_model().requires_grad_()
    state = model.initial_state(1).map(lambda x: x.requires_grad_())
    model(tokens, state).logits.square().mean().backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None, name
        assert weight.grad.any(), name
    assert all(tensor.grad is not None and tensor.grad.any() for tensor in state)


def test_file(model: RWKV7, tokens: Tensor, tmp_path: Path) -> None:
    save_rwkv7(tmp_path / "small.safetensors", model, torch.float32)
    loaded = load_rwkv7(tmp_path / "small.safetensors")
    assert loaded.config == CONFIG
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
