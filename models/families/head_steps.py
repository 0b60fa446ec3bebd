"""What is between the target's state and the output head of draft heads, step by step.

- ``medusa``: h + SiLU(A_k h + a_k), once or several times (Medusa, arXiv:2401.10774). No step reads a drafted token.
- ``blockwise``: h + V_k ReLU(W_k h + w_k) + v_k, one hidden layer a step (blockwise parallel decoding, arXiv:1811.03115). As above.
- ``hydra``: each step reads the state and the embeddings of all tokens before it (Hydra, arXiv:2402.05109).
- ``mlp``: a recurrent state that each token changes (the MLP speculator, arXiv:2404.19124), with embeddings of its own.

The first three begin as the identity, so that a step begins as whatever head follows it.

Owns their weights and one step of each, in training as in decoding. Knows nothing of heads, trees or losses.

Shape legend: D hidden, E outputs, I inner, S state, K draft steps, V target vocabulary; any leading dimensions.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Network = Literal["medusa", "blockwise", "hydra", "mlp"]
READ_BY: dict[str, tuple[Network, ...]] = {
    "num_blocks": ("medusa", "hydra"),
    "inner_size": ("blockwise", "mlp"),
    "tied": ("mlp",),
    "scale_input": ("mlp",),
}
"""Settings that only some networks have."""


class ResidualBlock(nn.Module):
    """x + SiLU(A x + a); the identity when its weights are zero."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        """[..., E] -> [..., E]."""
        return x + F.silu(self.linear(x))


class DraftSteps(nn.Module, ABC):
    """All steps of a draft.

    Attributes:
        reads_tokens: whether a step depends on the tokens before it; otherwise all steps can be computed at once.
    """

    reads_tokens: ClassVar[bool] = False

    def begin(self, context: Tensor) -> Tensor:
        """The state before the first step: [..., S], from the target's normed state [..., D]."""
        return context

    def read(self, tokens: Tensor, embedded: Tensor, state: Tensor, step: int) -> Tensor:
        """Take in the token before a step.

        Args:
            tokens: int64 [...], target ids: the root, or what was drafted.
            embedded: [..., D], the target's embeddings of them.
            state: [..., S].
            step: counted from 0.

        Returns:
            The new state, [..., S].
        """
        return state

    @abstractmethod
    def outputs(self, state: Tensor, step: int) -> Tensor:
        """What a step gives to its head.

        Args:
            state: [..., S], after :meth:`read`.
            step: counted from 0.

        Returns:
            [..., E].
        """

    def read_once(self) -> tuple[Tensor, ...]:
        """Weights that one step alone has, so that a draft reads them once; none where all steps are computed at once."""
        return ()

    @abstractmethod
    def reset(self) -> None:
        """Give every weight the value that training begins with."""


class MedusaSteps(DraftSteps):
    """Residual blocks for each step.

    Args:
        size: D.
        num_steps: K.
        num_blocks: blocks a step.
    """

    def __init__(self, size: int, num_steps: int, num_blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(*(ResidualBlock(size) for _ in range(num_blocks))) for _ in range(num_steps)
        )

    def outputs(self, state: Tensor, step: int) -> Tensor:
        """See :meth:`DraftSteps.outputs`."""
        return self.blocks[step](state)

    def reset(self) -> None:
        """See :meth:`DraftSteps.reset`: zeros, the biases too."""
        for parameter in self.parameters():
            nn.init.zeros_(parameter)


class BlockwiseSteps(DraftSteps):
    """One hidden layer for each step, beside a residual connection.

    Args:
        size: D.
        num_steps: K.
        inner_size: I.
    """

    def __init__(self, size: int, num_steps: int, inner_size: int) -> None:
        super().__init__()
        self.hidden = nn.ModuleList(nn.Linear(size, inner_size) for _ in range(num_steps))
        self.output = nn.ModuleList(nn.Linear(inner_size, size) for _ in range(num_steps))

    def outputs(self, state: Tensor, step: int) -> Tensor:
        """See :meth:`DraftSteps.outputs`."""
        return state + self.output[step](F.relu(self.hidden[step](state)))

    def reset(self) -> None:
        """See :meth:`DraftSteps.reset`: the residual alone."""
        for parameter in self.output.parameters():
            nn.init.zeros_(parameter)


class HydraSteps(DraftSteps):
    """Step k reads [h; e(x_{t+1}); ..; e(x_{t+1+k})]. Its first layer is narrow again behind a linear skip; blocks follow.

    Args:
        size: D.
        num_steps: K.
        num_blocks: layers a step, the first one included.
    """

    reads_tokens = True

    def __init__(self, size: int, num_steps: int, num_blocks: int) -> None:
        super().__init__()
        widths = [(step + 2) * size for step in range(num_steps)]
        self.skip = nn.ModuleList(nn.Linear(width, size) for width in widths)
        self.first = nn.ModuleList(nn.Linear(width, size) for width in widths)
        self.blocks = nn.ModuleList(
            nn.Sequential(*(ResidualBlock(size) for _ in range(num_blocks - 1))) for _ in range(num_steps)
        )

    def read(self, tokens: Tensor, embedded: Tensor, state: Tensor, step: int) -> Tensor:
        """See :meth:`DraftSteps.read`: the state grows by one embedding a step."""
        return torch.cat([state, embedded], dim=-1)

    def outputs(self, state: Tensor, step: int) -> Tensor:
        """See :meth:`DraftSteps.outputs`."""
        return self.blocks[step](self.skip[step](state) + F.silu(self.first[step](state)))

    def read_once(self) -> tuple[Tensor, ...]:
        """See :meth:`DraftSteps.read_once`: all of them."""
        return tuple(self.parameters())

    def reset(self) -> None:
        """See :meth:`DraftSteps.reset`: the skip hands the target's state on."""
        for parameter in self.parameters():
            nn.init.zeros_(parameter)
        for skip in self.skip:
            nn.init.eye_(skip.get_parameter("weight"))


class ShiftedNorm(nn.Module):
    """x / rms(x) * w + b: an RMS norm with a scale and a shift.

    Args:
        size: of the last dimension.
    """

    EPSILON: ClassVar[float] = 1e-6

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(size)), nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., I]."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.EPSILON) + self.bias


class MlpSteps(DraftSteps):
    """s' = GELU(norm_k(P_k s + c E_k[x])), the output of a step and the state of the next one.

    c = sqrt((1 - w^2) I / 2) / w with w = 2^(-1 / 2K) keeps a share of the state through all steps.

    Args:
        size: D.
        vocab_size: V.
        num_steps: K.
        inner_size: I.
        tied: embedding and norm serve all steps, and one projection all but the first.
        scale_input: the target's state is normed and divided by sqrt(2) first.
    """

    reads_tokens = True

    def __init__(
        self, size: int, vocab_size: int, num_steps: int, inner_size: int, tied: bool, scale_input: bool
    ) -> None:
        super().__init__()
        self.inner_size, self.tied, self.scale_input = inner_size, tied, scale_input
        num_own, num_further = (1, min(1, num_steps - 1)) if tied else (num_steps, num_steps - 1)
        self.emb = nn.ModuleList(nn.Embedding(vocab_size, inner_size) for _ in range(num_own))
        widths = [size, *[inner_size] * num_further]
        self.proj = nn.ModuleList(nn.Linear(width, inner_size, bias=False) for width in widths)
        self.ln = nn.ModuleList(ShiftedNorm(inner_size) for _ in range(num_own))
        share = 0.5 ** (0.5 / num_steps)
        self.token_scale = math.sqrt((1.0 - share**2) * inner_size / 2.0) / share

    def begin(self, context: Tensor) -> Tensor:
        """See :meth:`DraftSteps.begin`."""
        if not self.scale_input:
            return context
        return F.rms_norm(context, context.shape[-1:], eps=ShiftedNorm.EPSILON) / math.sqrt(2.0)

    def read(self, tokens: Tensor, embedded: Tensor, state: Tensor, step: int) -> Tensor:
        """See :meth:`DraftSteps.read`."""
        own = min(step, len(self.emb) - 1)
        mixed = self.proj[min(step, len(self.proj) - 1)](state) + self.token_scale * self.emb[own](tokens)
        return F.gelu(self.ln[own](mixed))

    def outputs(self, state: Tensor, step: int) -> Tensor:
        """See :meth:`DraftSteps.outputs`: the state itself."""
        return state

    def read_once(self) -> tuple[Tensor, ...]:
        """See :meth:`DraftSteps.read_once`: the first projection, and with it all but the embeddings where no step is tied."""
        if self.tied:
            return (self.proj.get_parameter("0.weight"),)
        return (*self.proj.parameters(), *self.ln.parameters())

    def reset(self) -> None:
        """See :meth:`DraftSteps.reset`: matrices from a normal distribution of deviation 1 / sqrt(I)."""
        for module in self.modules():
            if isinstance(module, nn.Embedding | nn.Linear):
                nn.init.normal_(module.weight, std=self.inner_size**-0.5)
