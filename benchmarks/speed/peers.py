"""The rules as others compute them on a CPU; each as a call on `Inputs`."""

from __future__ import annotations

import ast
import importlib.util
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """Batch rows, tokens, heads, and the size of a key and of a value."""

    batch: int
    tokens: int
    heads: int
    size: int

    def __str__(self) -> str:
        return f"B{self.batch} T{self.tokens} H{self.heads} K=V={self.size}"

    @property
    def forward_flop(self) -> int:
        """6·K·V per token and head: two reads of the state and one write."""
        return 6 * self.size**2 * self.batch * self.tokens * self.heads


@dataclass(frozen=True)
class Inputs:
    """Tensors that fit every rule; keys have length 1."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    channel_g: Tensor
    beta: Tensor
    a: Tensor
    b: Tensor
    mu: Tensor
    eta: Tensor

    @classmethod
    def random(cls, shape: Shape, dtype: torch.dtype = torch.float32) -> Inputs:
        generator = torch.Generator().manual_seed(0)
        rows = (shape.batch, shape.tokens, shape.heads)

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator)

        def uniform() -> Tensor:
            return torch.rand(*rows, generator=generator)

        k = torch.nn.functional.normalize(normal(*rows, shape.size), dim=-1)
        beta = uniform()
        inputs = (
            normal(*rows, shape.size),
            k,
            normal(*rows, shape.size),
            -0.1 * normal(*rows).abs(),
            -0.1 * normal(*rows, shape.size).abs(),
            beta,
            -k,
            k * beta[..., None],
            0.9 * uniform(),
            uniform(),
        )
        return cls(*(x.to(dtype) for x in inputs))

    def to(self, dtype: torch.dtype) -> Inputs:
        return Inputs(*(x.to(dtype) for x in vars(self).values()))

    def requiring_gradients(self) -> Inputs:
        return Inputs(*(x.detach().requires_grad_() for x in vars(self).values()))


Rule = Callable[[Inputs], Tensor]
PeerFactory = Callable[[Shape, int], Rule]


def transformers_rule(shape: Shape, threads: int) -> Rule:
    """The chunkwise PyTorch path of transformers, the one its models take on a CPU."""
    del shape, threads
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    def call(x: Inputs) -> Tensor:
        o: Tensor = torch_chunk_gated_delta_rule(x.q, x.k, x.v, g=x.g, beta=x.beta)[0]
        return o

    return call


def onnxruntime_rule(shape: Shape, threads: int) -> Rule:
    """The LinearAttention operator of onnxruntime (a C++ kernel), in a model of that one node."""
    import onnxruntime
    from onnx import TensorProto, helper

    b, t, h, k = shape.batch, shape.tokens, shape.heads, shape.size
    sizes = {
        "query": [b, t, h * k],
        "key": [b, t, h * k],
        "value": [b, t, h * k],
        "past_state": [b, h, k, k],
        "decay": [b, t, h],
        "beta": [b, t, h],
    }
    results = {"output": [b, t, h * k], "present_state": [b, h, k, k]}

    def declare(tensors: dict[str, list[int]]) -> list[Any]:
        return [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, size)
            for name, size in tensors.items()
        ]

    node = helper.make_node(
        "LinearAttention",
        list(sizes),
        list(results),
        domain="com.microsoft",
        q_num_heads=h,
        kv_num_heads=h,
        update_rule="gated_delta",
        scale=k**-0.5,
    )
    model = helper.make_model(
        helper.make_graph([node], "rule", declare(sizes), declare(results)),
        opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)],
        ir_version=10,
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Its threads would go on spinning after a call, on the cores of whoever is timed next.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    state = torch.zeros(b, h, k, k).numpy()

    def call(x: Inputs) -> Tensor:
        rows = {"query": x.q, "key": x.k, "value": x.v}
        feed = {name: tensor.reshape(b, t, h * k).numpy() for name, tensor in rows.items()}
        feed |= {"past_state": state, "decay": x.g.numpy(), "beta": x.beta.numpy()}
        return torch.from_numpy(session.run(None, feed)[0]).reshape(b, t, h, k)

    return call


def rwkv_rule(shape: Shape, threads: int) -> Rule:
    """The loop over tokens of the package rwkv, all that it has for a sequence on a CPU.

    Scripted as it is there, and taken out of the function that surrounds it, so that the layer's
    projections are not timed.
    """
    del threads
    if shape.batch != 1:
        raise ValueError(f"rwkv reads one sequence, got B = {shape.batch}")
    loop = torch.jit.CompilationUnit(_rwkv_loop()).loop
    t, h, n = shape.tokens, shape.heads, shape.size

    def call(x: Inputs) -> Tensor:
        rate = x.beta[..., None].expand_as(x.k)
        tensors = (x.q, x.channel_g.exp(), x.k, x.v, -x.a, rate)
        rows = [tensor.reshape(t, h * n) for tensor in tensors]
        state = torch.zeros(h, n, n)
        o: Tensor = loop(h, n, t, state, *rows, x=rows[0], xx=torch.empty(t, h * n))
        return o.view(1, t, h, n)

    return call


def _rwkv_loop() -> str:
    """A function around the loop in the installed package's time mixing."""
    spec = importlib.util.find_spec("rwkv")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("rwkv is not installed: run with --install-peers")
    tree = ast.parse(Path(spec.origin).with_name("model.py").read_text(encoding="utf-8"))
    (loop,) = (
        statement
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.name == "RWKV_x070_TMix_seq"
        for statement in node.body
        if isinstance(statement, ast.For)
    )
    head = "def loop(H: int, N: int, T: int, state, r, w, k, v, kk, a, x, xx):"
    return "\n".join([head, textwrap.indent(ast.unparse(loop), "    "), "    return xx", ""])


# Rule: its peers on a CPU by the name of their package. Rules that are not here have none beside
# loops in Python.
PEERS: dict[str, dict[str, PeerFactory]] = {
    "gated_delta_rule": {"transformers": transformers_rule, "onnxruntime": onnxruntime_rule},
    "rwkv7": {"rwkv": rwkv_rule},
}
TRAINABLE = ("transformers",)  # peers with a backward

PACKAGES = {
    "transformers": ["transformers>=4.57"],
    "onnxruntime": ["onnxruntime>=1.32", "onnx"],
    "rwkv": ["rwkv>=0.8.30"],
}
