"""ReDrafter on disk: Apple's layout both ways.

Ours and Apple's (github.com/apple/ml-recurrent-drafter) have the same tensor names. Ours adds to the config the bond to one target and
may add a draft vocabulary (tensor ``d2t``); Apple's has neither. Knows nothing of cards and commands.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from draftsmith.export.layouts.layout import Layout, LayoutReader
from draftsmith.export.layouts.readback import refuse_difference, tensors_of
from draftsmith.models.drafters.drafter_reader import assemble, module_table
from draftsmith.models.families.redrafter import ReDrafter, ReDrafterConfig
from draftsmith.models.files.checkpoint_files import CONFIG, as_text, read_fields, read_tensors, write_files
from draftsmith.models.files.field_rules import check_fields
from draftsmith.models.target.ends import TargetEnds

APPLE_KEYS = ("vocab_size", "hidden_size", "exit_dim", "num_draft_layers", "num_lookback_tokens", "rnn")


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
    module_table(ReDrafter, config).check(tensors, "the drafter in memory")
    write_files(folder, as_text(fields), tensors)
    refuse_difference(drafter, read_apple(read_fields(folder), read_tensors(folder), ends, str(folder)), folder)
    return ()


def read_apple(
    fields: Mapping[str, Any], tensors: Mapping[str, Tensor], ends: TargetEnds | None, where: str
) -> ReDrafter:
    """A drafter from Apple's layout; it knows no target yet beyond its sizes. `num_lookback_tokens` says nothing of the head itself.

    Raises:
        ValueError: keys of the config are missing or break their rules, or the tensors are not those of a ReDrafter.
    """
    missing = [key for key in APPLE_KEYS if key not in fields and key != "num_lookback_tokens"]
    if missing:
        raise ValueError(f"{where}: {CONFIG} lacks {', '.join(missing)}, which Apple's layout has; add them by hand")
    check_fields(
        fields,
        {key: ReDrafterConfig.rules[key] for key in APPLE_KEYS if key != "num_lookback_tokens"},
        where,
        "correct it",
    )
    config = ReDrafterConfig(
        exit_dim=int(fields["exit_dim"]),
        num_draft_layers=int(fields["num_draft_layers"]),
        rnn=bool(fields["rnn"]),
        hidden_size=int(fields["hidden_size"]),
        vocab_size=int(fields["vocab_size"]),
    )
    module_table(ReDrafter, config, where).check(tensors, where)
    return assemble(ReDrafter, config, tensors)


def holds(fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bool:
    """Whether a folder is in Apple's layout: it has the same model type as ours, and names no target."""
    return fields.get("model_type") == ReDrafterConfig.model_type and "target_fingerprint" not in fields


LAYOUTS = (
    Layout(
        "apple",
        write_apple,
        "the layout of Apple's ml-recurrent-drafter: `config.json` with its keys only, `model.safetensors` with its tensor names. The "
        "target is named in `provenance.json`",
        LayoutReader("Apple's", holds, read_apple, understood=APPLE_KEYS),
    ),
)
