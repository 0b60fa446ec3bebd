"""What training a drafter costs, on paper: floating-point operations, bytes and hours from the shapes alone.

Owns: the counts of matrix products of a target's forward and of a drafter's training step, bytes of a cache, and what hours follow on
given hardware. Does not know: how fast anything really is; `benchmarks/train/speed.py` compares these counts with what a real step does.

A product of [n, k] with [k, m] counts 2 n k m. Normalisations, activations and softmax are left out: they are bound by memory, not by
arithmetic, and are part of what utilisation means.

Letters: D hidden, I intermediate, Q = heads x head size, G = key/value heads x head size, V vocabulary, Vd draft vocabulary, E exit
dimension, K draft steps, T tokens, A anchors (about one a labelled token).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from transformers import PreTrainedConfig

Family = Literal["redrafter", "eagle", "eagle3"]
_SCALE_BYTES = 4
_TEXT_BYTES = 5  # token id (int32) and loss mask


@dataclass(frozen=True)
class TargetShape:
    """The sizes of a Llama-like target that decide what it costs."""

    name: str
    hidden_size: int
    num_layers: int
    intermediate_size: int
    query_size: int
    key_value_size: int
    vocab_size: int

    @classmethod
    def from_config(cls, config: PreTrainedConfig, name: str = "") -> TargetShape:
        """The shape of a Hugging Face config with Llama's field names."""
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        groups = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        return cls(
            name=name or config.model_type,
            hidden_size=config.hidden_size,
            num_layers=config.num_hidden_layers,
            intermediate_size=config.intermediate_size,
            query_size=head * config.num_attention_heads,
            key_value_size=head * groups,
            vocab_size=config.vocab_size,
        )

    @property
    def layer_parameters(self) -> int:
        """Weights of one decoder block's matrices."""
        attention = 2 * self.hidden_size * (self.query_size + self.key_value_size)
        return attention + 3 * self.hidden_size * self.intermediate_size

    @property
    def block_parameters(self) -> int:
        """Weights of all decoder blocks' matrices: what a forward without the head reads."""
        return self.num_layers * self.layer_parameters

    def forward_flops(self, length: float) -> float:
        """Operations a token of a causal forward without the head; over texts of `length` tokens each sees half of its text on average."""
        return 2.0 * self.block_parameters + self.num_layers * 4.0 * self.query_size * length / 2.0

    @property
    def head_flops(self) -> float:
        """Operations of the output head at one position."""
        return 2.0 * self.hidden_size * self.vocab_size


LLAMA_3_8B = TargetShape("Llama-3-8B", 4096, 32, 14336, 4096, 1024, 128256)
LLAMA_3_70B = TargetShape("Llama-3-70B", 8192, 80, 28672, 8192, 1024, 128256)


@dataclass(frozen=True)
class DrafterPlan:
    """A drafter and how it is trained.

    Attributes:
        family: which.
        num_steps: K.
        draft_vocab_size: Vd; None is the target's.
        exit_dim: E of a ReDrafter; None is the target's hidden size.
        num_draft_layers: residual blocks of a ReDrafter.
        fused_layers: target layers that an EAGLE-3 reads.
        reads_target_distribution: distillation `path`, which applies the target's head at every predicted position.

    Raises:
        ValueError: a family whose products nobody has counted here.
    """

    family: Family
    num_steps: int
    draft_vocab_size: int | None = None
    exit_dim: int | None = None
    num_draft_layers: int = 2
    fused_layers: int = 3
    reads_target_distribution: bool = True

    def __post_init__(self) -> None:
        if self.family not in get_args(Family):
            raise ValueError(
                f"family is {self.family!r}; the products of {', '.join(get_args(Family))} are counted here, so add those of others to "
                "benchmarks/train/cost.py"
            )

    def num_cached_layers(self) -> int:
        """Layers that a cache must hold: EAGLE-3's fused ones, and the last where the target's distribution is read."""
        if self.family != "eagle3":
            return 1
        return self.fused_layers + int(self.reads_target_distribution)

    def parameters(self, target: TargetShape) -> int:
        """Trained weights in matrices."""
        D, Vd = target.hidden_size, self.draft_vocab_size or target.vocab_size
        if self.family == "redrafter":
            E = self.exit_dim or D
            projection = 0 if E == 2 * D else 2 * D * E
            return 2 * D * D + projection + self.num_draft_layers * E * E + E * Vd
        if self.family == "eagle":
            return 2 * D * D + target.layer_parameters
        wide = D * (target.query_size + 2 * target.key_value_size)  # embedding and state side by side enter attention
        return self.fused_layers * D * D + target.layer_parameters + wide + D * Vd

    def step_flops(self, target: TargetShape, length: float, labelled_share: float = 1.0) -> float:
        """Operations of training, forward and backward, for one token of text (prompt tokens included).

        A product whose weight and input are both trained through costs three times its forward; one whose input is frozen (states and
        embeddings of the target) twice; a frozen head whose input is trained twice.

        Args:
            target: the target's shape.
            length: tokens of a text.
            labelled_share: anchors a token of text.
        """
        if self.family == "redrafter":
            return labelled_share * (self._redrafter(target) + self._teacher(target))
        return self._eagle(target, length, labelled_share) + labelled_share * self._teacher(target)

    def _redrafter(self, target: TargetShape) -> float:
        D, E, Vd = target.hidden_size, self.exit_dim or target.hidden_size, self.draft_vocab_size or target.vocab_size
        K, projected = self.num_steps, int(target.hidden_size * 2 != E)
        context = 2 * 2.0 * D * E * projected
        recurrence = (
            K * 2 * 2.0 * D * D + (3 * K - 1) * 2.0 * D * D
        )  # of the embedding; of the state, which is frozen at first
        exits = K * 3 * (2.0 * D * E * projected + self.num_draft_layers * 2.0 * E * E)
        return context + recurrence + exits + K * 3 * 2.0 * E * Vd

    def _eagle(self, target: TargetShape, length: float, share: float) -> float:
        D, Q, G, K = target.hidden_size, target.query_size, target.key_value_size, self.num_steps
        Vd = self.draft_vocab_size or target.vocab_size
        wide = self.family == "eagle3"
        inputs = 2 * D if wide else D
        join = 2.0 * (self.fused_layers * D if wide else 2 * D) * D
        keys_values = 2.0 * inputs * 2 * G
        of_anchor = 2.0 * inputs * Q + 2.0 * Q * D + 6.0 * D * target.intermediate_size
        attention = 4.0 * Q * length / 2.0
        head = (3 if wide else 2) * 2.0 * D * Vd
        at_text = 2 * join + 3 * keys_values
        further = 3 * keys_values + (0 if wide else 3 * join)
        return at_text + share * (K * (3 * of_anchor + head + 3.5 * attention) + (K - 1) * further)

    def _teacher(self, target: TargetShape) -> float:
        return target.head_flops if self.reads_target_distribution else 0.0


def cache_bytes(target: TargetShape, num_layers: int, item_bytes: int, scaled: bool = False) -> int:
    """Bytes a token in a hidden-state cache; `scaled` adds a float32 scale a token and layer (8-bit floats)."""
    return num_layers * (target.hidden_size * item_bytes + (_SCALE_BYTES if scaled else 0)) + _TEXT_BYTES


def file_a_sample_bytes(target: TargetShape, num_layers: int) -> int:
    """Bytes a token where each sample is one saved file with bf16 states and int64 ids and mask, its overhead left out."""
    return num_layers * target.hidden_size * 2 + 16


@dataclass(frozen=True)
class Cluster:
    """What computes and stores: devices, operations a second of each at its peak, the share of the peak that is reached, and bytes a second
    of the disk that all of them share."""

    devices: int
    peak_flops: float
    utilisation: float
    disk_rate: float

    def compute_hours(self, flops: float) -> float:
        """Hours that so many operations take."""
        return flops / (self.devices * self.peak_flops * self.utilisation) / 3600.0

    def disk_hours(self, num_bytes: float) -> float:
        """Hours that reading or writing so many bytes takes."""
        return num_bytes / self.disk_rate / 3600.0


@dataclass(frozen=True)
class Bill:
    """A training run on paper.

    Attributes:
        extract_hours: of filling the cache; computing and writing go side by side, the slower one counts.
        train_hours: of all epochs; computing and reading likewise.
        disk_bound: whether the disk is the slower one in training.
        disk_bytes: of the cache.
    """

    extract_hours: float
    train_hours: float
    disk_bound: bool
    disk_bytes: float

    @property
    def hours(self) -> float:
        """Both together."""
        return self.extract_hours + self.train_hours


def bill(
    target: TargetShape,
    plan: DrafterPlan,
    cluster: Cluster,
    *,
    tokens: float,
    epochs: float,
    length: float,
    labelled_share: float = 1.0,
    online: bool = False,
    item_bytes: int = 2,
) -> Bill:
    """What training costs.

    Args:
        target: the target's shape.
        plan: the drafter.
        cluster: what it runs on.
        tokens: of text, prompts included.
        epochs: passes over it.
        length: tokens of a text.
        labelled_share: of the tokens.
        online: the target runs in every epoch and nothing is stored; else it runs once.
        item_bytes: 2 stores bf16 states, 1 stores 8-bit floats with a scale.
    """
    forward = tokens * target.forward_flops(length)
    steps = epochs * tokens * plan.step_flops(target, length, labelled_share)
    if online:
        return Bill(0.0, cluster.compute_hours(epochs * forward + steps), False, 0.0)
    stored = tokens * cache_bytes(target, plan.num_cached_layers(), item_bytes, scaled=item_bytes == 1)
    computing, reading = cluster.compute_hours(steps), cluster.disk_hours(epochs * stored)
    extracting = max(cluster.compute_hours(forward), cluster.disk_hours(stored))
    return Bill(extracting, max(computing, reading), reading > computing, stored)
