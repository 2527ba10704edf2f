"""How a session decides how strongly each token is learned (docs/write_policies.md)."""

from typing import NamedTuple


class SurpriseGate(NamedTuple):
    """A strength by surprise: what the model, without an exact store, gave the token for a cost.

    Up to `low` bits a token is learned with `least`, from `high` bits on with `most`, between them
    in proportion.
    """

    low: float = 0.0
    high: float = 4.0
    least: float = 0.0
    most: float = 1.0


class WritePolicy(NamedTuple):
    """What is done to a session's writes beyond what the model was trained to do.

    By default nothing. The parts work together. A policy is fixed for the life of a session and is
    applied on top of the strengths of its log, so that edits stay exact.
    """

    # Times the strength of every token, see Session.feedback; 0: a frozen session, whose text
    # passes the attention window and leaves no write.
    strength: float = 1.0
    # A further factor, by surprise. A read then runs the model twice over each piece: what a token
    # costs is measured with all tokens before it learned as they would be without the gate.
    surprise: SurpriseGate | None = None
    # Largest Frobenius norm of each head's matrix in the blocks; 0: no limit. A matrix that is
    # larger after a piece, or after a written token, is scaled down; the report counts it.
    memory_norm_cap: float = 0.0
    head_norm_cap: float = 0.0  # the same of the matrix at the head
    # Recursive least squares in the blocks: above 0, each head's matrix is, after every token, the
    # exact ridge solution over all that was learned, weighted by beta, around the matrix that the
    # session began with. Nothing decays: a decay would shrink the solution. It runs in fp64 and
    # module by module; 0: the model's own rule.
    ridge: float = 0.0


AS_TRAINED = WritePolicy()
FROZEN = WritePolicy(strength=0.0)  # reads and writes, and learns nothing

__all__ = ["AS_TRAINED", "FROZEN", "SurpriseGate", "WritePolicy"]
