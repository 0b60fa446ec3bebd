"""Causal LMs of transformers as tiny random targets: exact past their lengths, or refused; as docs/reference/targets.md says.

Shape legend: B batch rows.
"""

from __future__ import annotations

import copy
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from doubles import HistoryState, PlannedDrafter
from huggingface_hub.errors import StrictDataclassError
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from draftsmith.decode.engine import Engine
from draftsmith.decode.sampling import GenerationSettings
from draftsmith.models import Cycle, DraftLimits, DraftTree, Target, tree_from_paths
from draftsmith.models.trunk.shrink import shrunk

PAGE = Path(__file__).parents[3] / "docs" / "reference" / "targets.md"
NEW = 10
_HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16, "hidden_size": 128}
_CONVOLUTIONS = {"layer_types": ["conv", "conv", "full_attention"], "num_hidden_layers": 3}
# Where the config's own defaults make no model.
OPTIONS: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "deepseek_v2": {"topk_method": "greedy", "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "falcon_h1": {"mamba_d_ssm": None},
    "granitemoehybrid": {"layer_types": ["full_attention"] * 2, "num_hidden_layers": 2, "num_local_experts": 0},
    "hunyuan_v1_dense": _HEADS,
    "hunyuan_v1_moe": _HEADS | {"num_experts": 4, "moe_topk": 2},
    "lfm2": _CONVOLUTIONS,
    "lfm2_moe": _CONVOLUTIONS,
    "ministral": _HEADS,
    "nemotron": _HEADS,
    "phi3": {
        "original_max_position_embeddings": 16,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0] * 48,
            "long_factor": [4.0] * 48,
            "original_max_position_embeddings": 16,
        },
    },
}
# Their generation reads all again past the original context, as whole forwards do; some releases of transformers lose the text there.
REREADING = ("phi3", "phimoe")
# Encoders, encoder-decoders and others that are not decoders of text alone, and configs without a model by default.
_BUILD = (
    AssertionError,
    AttributeError,
    IndexError,
    KeyError,
    NotImplementedError,
    StrictDataclassError,
    TypeError,
    ValueError,
    RuntimeError,
)


class Foresight(PlannedDrafter):
    """Drafts what transformers generated, as the second of two beams, or as a chain for a recurrent state."""

    def __init__(self, target: Target, replies: dict[tuple[int, ...], list[int]]) -> None:
        super().__init__(target, "late")
        self.replies = replies

    def propose(self, state: HistoryState, cycle: Cycle, limits: DraftLimits) -> DraftTree:  # type: ignore[override]
        paths = []
        for text in state.texts:
            prompt = next(prompt for prompt in self.replies if tuple(text[: len(prompt)]) == prompt)
            right = ((list(prompt) + self.replies[prompt])[len(text) :] + [3] * limits.draft_length)[
                : limits.draft_length
            ]
            wrong = [(token + 1) % 60 for token in right]
            turn = len(text) % (limits.draft_length + 1)
            paths.append([right[:turn] + wrong[turn:]] if self.plan[0].keeps_state else [wrong, right])
        return tree_from_paths(torch.tensor([text[-1] for text in state.texts]), torch.tensor(paths))


def tiny_model(kind: str) -> transformers.PreTrainedModel:
    """A random model of a family, of few channels, a layer of each kind and short lengths."""
    config = shrunk(CONFIG_MAPPING[kind](**OPTIONS.get(kind, {})).get_text_config())
    torch.manual_seed(0)
    soft_capped = getattr(config, "attn_logit_softcapping", None)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager" if soft_capped else None)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.25)
            elif "bias" in name or "sink" in name:
                parameter.normal_(0.0, 0.3)
    return model.eval()


@torch.no_grad()
def own_reply(model: transformers.PreTrainedModel, prompt: list[int]) -> list[int]:
    if model.config.model_type in REREADING:
        text = list(prompt)
        for _ in range(NEW):
            text.append(int(model(input_ids=torch.tensor([text]), use_cache=False).logits[0, -1].argmax()))
        return text[len(prompt) :]
    ids = torch.tensor([prompt])
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": NEW, "eos_token_id": None, "pad_token_id": 0}
    reply = copy.deepcopy(model).generate(ids, attention_mask=torch.ones_like(ids), **settings)
    return reply[0, len(prompt) :].tolist()


def check_replies(target: Target, model: transformers.PreTrainedModel) -> None:
    """Plain and with drafts, in one ragged batch with prompts in chunks: what transformers generates for each prompt alone."""
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, 60, (length,), generator=generator).tolist() for length in (3, 11, 24)]
    expected = [own_reply(model, prompt) for prompt in prompts]
    settings = GenerationSettings(max_new_tokens=NEW)
    drafter = Foresight(target, dict(zip(map(tuple, prompts), expected, strict=True)))
    limits = DraftLimits(beam_width=1 if target.keeps_state else 2, draft_length=3)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*rows are read one by one")
        replies = Engine(target, drafter, limits, prefill_chunk=7).generate(prompts, settings)
    assert [reply.token_ids for reply in replies] == expected
    assert sum(replies[0].accepted) > 0, "nothing was accepted, so nothing was shown"
    assert [Engine(target).generate([prompt], settings)[0].token_ids for prompt in prompts[:1]] == expected[:1]


def outcome(kind: str) -> str:
    """``exact``, or why not."""
    try:
        model = tiny_model(kind)
    except _BUILD as error:
        return f"no model: {type(error).__name__}"
    try:
        target = Target.from_model(model, kind)
    except ValueError as error:
        return f"refused: {error}"
    check_replies(target, model)
    return "exact"


def on_the_page(mark: str) -> set[str]:
    """The families that the page names in the paragraph or row that begins with this mark."""
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith(mark)]
    assert lines, f"{PAGE.name} has no line that begins with {mark!r}"
    return {name for line in lines for name in re.findall(r"`([a-z0-9_-]+)`", line)}


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_causal_lms_of_transformers_are_exact_or_refused_as_the_page_says() -> None:
    exact, refused = on_the_page("| exact |"), on_the_page("| refused |")
    known = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    told = exact | refused | on_the_page("| not tried |")
    assert known <= told, f"{PAGE.name} does not tell of {sorted(known - told)}"
    assert not exact & refused
    found = {kind: outcome(kind) for kind in sorted((exact | refused) & known)}
    wrong = {kind: what for kind, what in found.items() if (what == "exact") != (kind in exact)}
    wrong |= {kind: what for kind, what in found.items() if kind in refused and not what.startswith("refused")}
    assert not wrong, f"{PAGE.name} says otherwise of these families"
