"""ReDrafter on disk: the table of its tensors, and Apple's layout both ways.

Ours and Apple's (github.com/apple/ml-recurrent-drafter) have the same tensor names. Ours adds to the config the bond to one target and
may add a draft vocabulary (tensor ``d2t``); Apple's has neither. Knows nothing of cards and commands.

Shape legend: D hidden, E exit dimension, V vocabulary, Vd draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from draftsmith.export.folder import CONFIG, as_text, read_fields, read_tensors, write_files
from draftsmith.export.readback import assemble, refuse_difference, tensors_of
from draftsmith.export.tables import Table, TensorSpec
from draftsmith.models.ends import TargetEnds
from draftsmith.models.redrafter import ReDrafter, ReDrafterConfig

WHAT = "ReDrafter"
APPLE_KEYS = ("vocab_size", "hidden_size", "exit_dim", "num_draft_layers", "num_lookback_tokens", "rnn")


def own_table(config: ReDrafterConfig) -> Table:
    """Every tensor of a ReDrafter checkpoint, ours or Apple's."""
    D, E, N = config.hidden_size, config.exit_dim, config.num_draft_layers
    truncated = config.draft_vocab_size is not None and config.draft_vocab_size < config.vocab_size
    head_size = int(config.draft_vocab_size or 0) if truncated else config.vocab_size
    specs = {f"lm_head.{N}.weight": TensorSpec((head_size, E))}
    for block in range(N):
        specs[f"lm_head.{block}.linear.weight"] = TensorSpec((E, E))
        specs[f"lm_head.{block}.linear.bias"] = TensorSpec((E,))
    if E != 2 * D:
        specs |= {"input_proj.weight": TensorSpec((E, 2 * D)), "input_proj.bias": TensorSpec((E,))}
    if config.rnn:
        specs |= {
            "rnn_u.weight": TensorSpec((D, D)),
            "rnn_u.bias": TensorSpec((D,)),
            "rnn_w.weight": TensorSpec((D, D)),
        }
    if truncated:
        specs["d2t"] = TensorSpec((head_size,), "int64")
    return Table(WHAT, config.vocab_size, specs)


def write_apple(drafter: ReDrafter, folder: Path, ends: TargetEnds | None = None) -> tuple[str, ...]:
    """Write Apple's layout into an existing folder, read it back and compare.

    Returns:
        what a user must know of the result: nothing.

    Raises:
        ValueError: the drafter has a draft vocabulary. Apple's head scores the whole vocabulary without a bias, so there is no row that
            would keep a token out: zero rows would score 0, not minus infinity.
    """
    config = drafter.config
    if drafter.d2t is not None:
        raise ValueError(
            f"this drafter has a draft vocabulary of {config.draft_vocab_size} of {config.vocab_size} tokens, which "
            "Apple's layout cannot express; export it with --layout draftsmith, or train it with draft_vocab_size null"
        )
    fields = {key: getattr(config, key) for key in APPLE_KEYS if key != "num_lookback_tokens"}
    fields |= {"model_type": config.model_type, "num_lookback_tokens": 1}
    tensors = tensors_of(drafter)
    own_table(config).check(tensors, "the drafter in memory")
    write_files(folder, as_text(fields), tensors)
    refuse_difference(drafter, read_apple(read_fields(folder), read_tensors(folder), ends, str(folder)), folder)
    return ()


def read_apple(
    fields: Mapping[str, Any], tensors: Mapping[str, Tensor], ends: TargetEnds | None, where: str
) -> ReDrafter:
    """A drafter from Apple's layout; it knows no target yet beyond its sizes. `num_lookback_tokens` says nothing of the head itself.

    Raises:
        ValueError: keys of the config are missing, or the tensors are not the table's.
    """
    missing = [key for key in APPLE_KEYS if key not in fields and key != "num_lookback_tokens"]
    if missing:
        raise ValueError(f"{where}: {CONFIG} lacks {', '.join(missing)}, which Apple's layout has; add them by hand")
    config = ReDrafterConfig(
        exit_dim=int(fields["exit_dim"]),
        num_draft_layers=int(fields["num_draft_layers"]),
        rnn=bool(fields["rnn"]),
        hidden_size=int(fields["hidden_size"]),
        vocab_size=int(fields["vocab_size"]),
    )
    own_table(config).check(tensors, where)
    return assemble(ReDrafter, config, tensors)
