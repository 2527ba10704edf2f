from torch import nn


def make_projection(inputs: int, outputs: int, std: float) -> nn.Linear:
    """A Linear without a bias, weights normal(0, std)."""
    linear = nn.Linear(inputs, outputs, bias=False)
    nn.init.normal_(linear.weight, 0.0, std)
    return linear
