"""Do the classes of the speculators package load our exported folders, and compute our logits?

    python -m benchmarks.export.speculators_conformity [--report benchmarks/results/export/<date>-speculators-conformity.md]

Needs the speculators package (0.9.0) beside draftsmith: `pip install speculators==0.9.0`, in an environment of its own, since it asks for
older versions of other packages. The script makes a tiny random target and a drafter of each kind with random weights everywhere. It
exports each with `--layout speculators` and loads the folder with the package's own loader. Then it compares every tensor bit for bit, and
the logits of the package's training forward with ours at every slot or depth of every anchor, on a CPU in float32.

The mask token is left out: we never draft it, and the package scores it like any other.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

os.environ.setdefault(
    "TORCHDYNAMO_DISABLE", "1"
)  # before torch is imported: the package compiles its forwards otherwise

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from draftsmith import provenance
from draftsmith.evaluate.doctor.serving import trained_logits
from draftsmith.export.layouts.layouts import write
from draftsmith.models.drafters.drafter import Drafter
from draftsmith.models.drafters.rollout import PackedBatch
from draftsmith.models.families.block import BlockDrafter
from draftsmith.models.families.eagle3 import Eagle3
from draftsmith.models.target.target import PRE_NORM, Target

VOCAB, LENGTH, STEPS, MASK = 64, 24, 4, 63
OF_THE_TARGET = {"verifier_lm_head.weight", "verifier_norm.weight", "embed_tokens.weight", "lm_head.weight"}
LAYERS = ["layer.1.output", "layer.3.output", "layer.5.output"]
BLOCKS: dict[str, dict[str, Any]] = {
    "dflash": {},
    "dflash, 12 tokens": {"draft_token_ids": torch.arange(3, 63, 5)},
    "dflash, windows of 6": {"sliding_window": 6, "sliding_layers": [0, 1], "window_from_root": True},
    "dflash, causal windows of 6": {
        "sliding_window": 6,
        "sliding_layers": [0, 1],
        "sliding_causal": True,
        "window_from_root": True,
    },
    "dflash2": {"convolution": True, "correction": "selector", "correction_rank": 5, "candidates": 6},
    "dspark, vanilla": {"correction": "vanilla", "correction_rank": 5, "sample_from_anchor": True},
    "dspark, gated": {"correction": "gated", "correction_rank": 5, "sample_from_anchor": True},
    "dspark, rnn, confidence": {
        "correction": "recurrent",
        "correction_rank": 5,
        "sample_from_anchor": True,
        "confidence": True,
    },
}


@dataclass(frozen=True)
class Compared:
    """One kind of drafter in both.

    Attributes:
        kind: which.
        loaded_as: the package's class.
        tensors: how many tensors of the folder arrived bit for bit, and of how many.
        rows: how many rows of logits were compared.
        largest: the largest absolute difference of two logits.
        scale: the largest absolute logit.
    """

    kind: str
    loaded_as: str
    tensors: tuple[int, int]
    rows: int
    largest: float
    scale: float

    @property
    def agrees(self) -> bool:
        """Whether every tensor arrived, and the logits are the same up to rounding."""
        return self.tensors[0] == self.tensors[1] and self.rows > 0 and self.largest <= 1e-3 * max(1.0, self.scale)


def saved_target(folder: Path) -> Target:
    """A random Llama of eight small layers."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return Target.load(str(folder))


def drafters(target: Target) -> dict[str, Drafter]:
    """A drafter of each kind, with random weights everywhere."""
    blocks = {
        kind: BlockDrafter.for_target(
            target.ends, layers=LAYERS, num_draft_layers=2, num_draft_steps=STEPS, mask_token_id=MASK, **chosen
        )
        for kind, chosen in BLOCKS.items()
    }
    parallel = Eagle3.for_target(target.ends, layers=LAYERS, num_draft_steps=STEPS, mask_token_id=MASK)
    made: dict[str, Drafter] = {**blocks, "peagle": parallel}
    generator = torch.Generator().manual_seed(1)
    for drafter in made.values():
        with torch.no_grad():
            for parameter in drafter.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        drafter.eval()
    return made


def text_of(target: Target) -> PackedBatch:
    """One random text, with the layers that all drafters read."""
    ids = torch.randint(3, VOCAB - 1, (LENGTH,), generator=torch.Generator().manual_seed(0))
    names = (*LAYERS, PRE_NORM)
    with torch.no_grad():
        states = target.prefix(ids[None], layers=names)
    return PackedBatch(
        input_ids=ids,
        loss_mask=torch.arange(LENGTH) >= 2,
        document_ids=torch.zeros(LENGTH, dtype=torch.int64),
        positions=torch.arange(LENGTH),
        hidden={name: states.feature(name)[0].clone() for name in names},
    )


def caught(model: Any, given: dict[str, Any]) -> dict[str, Any]:
    """What the package's forward hands to its own loss, by the names of that function's arguments."""
    core = importlib.import_module(type(model).__module__)
    seen: dict[str, Any] = {}
    own = core.compute_metrics
    names = own.__code__.co_varnames[: own.__code__.co_argcount + own.__code__.co_kwonlyargcount]

    def note(*arguments: Any, **named: Any) -> tuple[Tensor, dict[str, Any]]:
        seen.update(zip(names, arguments, strict=False))
        seen.update(named)
        return torch.zeros(()), {}

    core.compute_metrics = note
    try:
        with torch.no_grad():
            model(**given)
    finally:
        core.compute_metrics = own
    return seen


def block_rows(model: Any, drafter: BlockDrafter, batch: PackedBatch) -> list[tuple[Tensor, Tensor]]:
    """Their logits and ours, [K, C] each, of every block that the package draws."""
    size, first = drafter.config.block_size, drafter.config.first_slot
    num_anchors = LENGTH - 2 - size  # every position that it may take
    seen = caught(
        model,
        {
            "hidden_states": torch.cat([batch.hidden[name] for name in LAYERS], dim=-1)[None],
            "input_ids": batch.input_ids[None],
            "loss_mask": batch.loss_mask[None].float(),
            "verifier_last_hidden_states": batch.hidden[PRE_NORM][None],
            "document_ids": batch.document_ids[None],
            "position_ids": batch.positions[None],
            "max_anchors": num_anchors,
        },
    )
    scores = seen.get("candidate_logits", seen.get("unary_logits", seen.get("logits")))
    ids = seen.get("training_candidate_ids")
    scores_ASC = scores[0].view(num_anchors, size, -1)
    roots = list(range(2, 2 + num_anchors))
    ours_AKV = trained_logits(drafter, batch, roots, STEPS)
    pairs = []
    for place in range(num_anchors):
        theirs, own = scores_ASC[place, first:], ours_AKV[place]
        if ids is not None:
            own = own.gather(-1, ids[0].view(num_anchors, size, -1)[place, first:])
        pairs.append((theirs, own))
    return pairs


def parallel_rows(model: Any, drafter: Eagle3, batch: PackedBatch) -> list[tuple[Tensor, Tensor]]:
    """Their logits and ours, [1, Vd] each, of every depth of every anchor that the package draws."""
    length = LENGTH - 1  # token t + 1 stands beside the state of token t
    torch.manual_seed(2)
    seen = caught(
        model,
        {
            "hidden_states": torch.cat([batch.hidden[name] for name in LAYERS], dim=-1)[None, :length],
            "input_ids": batch.input_ids[None, 1:],
            "document_ids": batch.document_ids[None, 1:],
            "loss_mask": batch.loss_mask[None, 1:].float(),
            "verifier_last_hidden_states": batch.hidden[PRE_NORM][None, :length],
            "num_depths": STEPS,
        },
    )
    places = zip(seen["anchor_pos"].tolist(), seen["depth"].tolist(), seen["logits"][0], strict=True)
    roots = list(range(2, LENGTH - STEPS))
    ours = dict(zip(roots, trained_logits(drafter, batch, roots, STEPS), strict=True))
    return [(theirs[None], ours[anchor + 1][depth][None]) for anchor, depth, theirs in places if anchor + 1 in ours]


def compare(kind: str, drafter: Drafter, target: Target, batch: PackedBatch, folder: Path) -> Compared:
    """Export one drafter, load it with the package, and compare.

    Raises:
        SystemExit: the package has weights that the folder lacks.
    """
    speculators = importlib.import_module("speculators")
    folder.mkdir()
    write(drafter, folder, "speculators", target.ends)
    config = speculators.SpeculatorModelConfig.from_pretrained(str(folder))
    config.transformer_layer_config._attn_implementation = "eager"
    model = speculators.SpeculatorModel.from_pretrained(str(folder), config=config).eval()
    theirs, ours = dict(model.state_dict()), load_file(folder / "model.safetensors")
    arrived = sum(name in theirs and torch.equal(theirs[name], tensor) for name, tensor in ours.items())
    if unknown := sorted(theirs.keys() - ours.keys() - OF_THE_TARGET - {"t2d", "d2t"}):
        raise SystemExit(f"{kind}: the package has {', '.join(unknown)}, which the folder lacks")
    rows: Callable[..., list[tuple[Tensor, Tensor]]] = parallel_rows if isinstance(drafter, Eagle3) else block_rows
    largest = scale = 0.0
    pairs = rows(model, drafter, batch)
    for their, own in pairs:
        drafted = own > -torch.inf  # the mask token, and a target that took the place of a candidate
        largest = max(largest, float((their - own)[drafted].abs().max()))
        scale = max(scale, float(own[drafted].abs().max()))
    num_rows = sum(len(own) for _, own in pairs)
    return Compared(kind, type(model).__name__, (arrived, len(ours)), num_rows, largest, scale)


def page(rows: list[Compared], version: str) -> str:
    """The table, as a page."""
    lines = [
        f"# The speculators package computes our folders ({date.today().isoformat()})",
        f"`{provenance.command_line()}`",
        f"speculators {version}, torch {torch.__version__}, on a CPU in float32. Random drafters, a random target. Each was exported with "
        "`--layout speculators`. *Rows*: slots or depths whose logits were compared.",
        "| kind | the package's class | tensors bit for bit | rows | largest difference | largest logit |\n"
        "|---|---|---|---|---|---|\n"
        + "\n".join(
            f"| {row.kind} | `{row.loaded_as}` | {row.tensors[0]} of {row.tensors[1]} | {row.rows} | {row.largest:.1e} | {row.scale:.1f} |"
            for row in rows
        ),
    ]
    return "\n\n".join(lines) + "\n"


def main() -> None:
    """Compare every kind, and print or write the table.

    Raises:
        SystemExit: the package is missing, or something differs.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path)
    options = parser.parse_args()
    try:
        importlib.import_module("speculators")
    except ImportError as error:
        sys.exit(f"skipped: the speculators package is not there ({error}); pip install speculators==0.9.0")
    with tempfile.TemporaryDirectory() as folder:
        target = saved_target(Path(folder) / "target")
        batch = text_of(target)
        rows = [
            compare(kind, drafter, target, batch, Path(folder) / f"{number}")
            for number, (kind, drafter) in enumerate(drafters(target).items())
        ]
    text = page(rows, importlib.metadata.version("speculators"))
    print(text)
    if options.report is not None:
        options.report.write_text(text, encoding="utf-8")
    if different := [row.kind for row in rows if not row.agrees]:
        sys.exit(f"{', '.join(different)}: not the same")


if __name__ == "__main__":
    main()
