"""The proof at loading: that a model, run through explicit masks, positions and caches, gives its own numbers.

Owns two proofs. The loaded weights are proven on a few tokens. Some faults show only with length: windows, contexts that factors of
rotary positions change at, chunks, selections of keys. These are proven on a tiny random model of the same class, with layers of the same
kinds and short lengths. Its texts grow past all of them: prompts in chunks, two rows of unequal length, and trees with branches. The
reference is the model's own generation step by step. Knows no family by name.

Shape legend: B batch rows, N tree nodes, T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache

from draftsmith.models.files.finite import refuse_non_finite
from draftsmith.models.files.pretrained import RAISED_BY_CONFIGS
from draftsmith.models.slots.row_caches import RowCaches
from draftsmith.models.slots.slot_cache import SlotCache
from draftsmith.models.tree.tree import DraftTree, tree_from_paths
from draftsmith.models.trunk.attention import NAME
from draftsmith.models.trunk.forwards import read_again, read_prompts, read_tree, within_factors
from draftsmith.models.trunk.known_models import keeps_state, text_base
from draftsmith.models.trunk.recurrent import RecurrentTrunk, read_chain
from draftsmith.models.trunk.shrink import shrunk
from draftsmith.models.trunk.trunk import PRE_NORM, MaskStyle, Trunk, mask_styles

PROMPTS, NEW_TOKENS, CHUNK = (5, 19), 16, 4
"""Tokens of the two prompts, of what follows each, and of a chunk of a prompt: one text grows past every length, one begins past some."""
_PARENTS = (-1, 0, 0, 2, 2, 1)
_TRUE_PATH = (0, 2, 4)
"""The tree of a cycle: the text continues along the second child of the root, and its second child."""
# Two draws of the weights, since rounding may tip a router of experts in one.
_SEEDS = (0, 1)
_RECURRENT_STYLES = [MaskStyle((), None), MaskStyle((), None, in_steps=True)]
_proven: dict[tuple[type, str | None, str], MaskStyle | str] = {}


def prove(model: PreTrainedModel, name: str, logits: Callable[[Tensor], Tensor]) -> Trunk:
    """Prove a model's decoder.

    Args:
        model: whole, with weights.
        name: for messages.
        logits: normed states [..., D] -> logits [..., V].

    Returns:
        The decoder, with the way in which it takes masks.

    Raises:
        ValueError: through masks and caches the model does not give its own numbers.
    """
    config = model.config.get_text_config()
    if getattr(config, "_attn_implementation", None) == "sdpa":
        # Our own attention where a family runs it and stays exact, else the one that it was loaded with.
        config._attn_implementation = NAME
        try:
            return _proven_trunk(model, name, logits)
        except ValueError:
            config._attn_implementation = "sdpa"
    return _proven_trunk(model, name, logits)


def _proven_trunk(model: PreTrainedModel, name: str, logits: Callable[[Tensor], Tensor]) -> Trunk:
    """See :func:`prove`: with the attention that the config names."""
    base, config = cast(PreTrainedModel, text_base(model)), model.config.get_text_config()
    style = _style_by_length(base, config)
    if isinstance(style, str):
        raise _refused(model, name, style)
    trunk = _trunk(base, config, style, name)
    with torch.inference_mode():
        expected = model(input_ids=_few_ids(model), use_cache=False).logits
        refuse_non_finite(expected, name)
    if not same_logits(few_logits(trunk, model, logits), expected):
        raise _refused(model, name, "on six tokens, some of them drafted, its logits are others")
    return trunk


@torch.inference_mode()
def few_logits(trunk: Trunk, model: PreTrainedModel, logits: Callable[[Tensor], Tensor]) -> Tensor:
    """Logits of six tokens, of which four are read as a tree, or as chains where the decoder keeps a recurrent state.

    Args:
        trunk: the model's decoder.
        model: whole, with weights.
        logits: normed states [..., D] -> logits [..., V].

    Returns:
        [1, 6, V].
    """
    read = _few_in_chains if trunk.keeps_state else _few_in_a_tree
    return logits(read(trunk, _few_ids(model)))


def same_logits(got: Tensor, expected: Tensor) -> bool:
    """Whether logits of the same tokens agree as far as their dtype allows."""
    return _close(got.float(), expected.float(), 1e-3 if got.dtype == torch.float32 else 5e-2)


def _few_ids(model: PreTrainedModel) -> Tensor:
    embedding = next(model.get_input_embeddings().parameters())
    return torch.arange(6, device=embedding.device)[None] % model.config.get_text_config().vocab_size


def _refused(model: PreTrainedModel, name: str, finding: str) -> ValueError:
    if keeps_state(model):
        how, why = (
            "keeps a recurrent state, and with drafts in its own cache it",
            "the cache may not hold all that it keeps",
        )
    else:
        how, why = "run through explicit masks it", "it may build its attention in a way that masks cannot express"
    return ValueError(
        f"{name}: {type(model).__name__} is not supported: {how} does not give its own numbers ({finding}); {why}. Please report the "
        "model's name"
    )


def _trunk(base: PreTrainedModel, config: PreTrainedConfig, style: MaskStyle, name: str) -> Trunk:
    return (RecurrentTrunk if keeps_state(base) else Trunk)(base, config, style, name)


def _close(got: Tensor, expected: Tensor, share: float) -> bool:
    tolerance = share * float(expected.abs().max().clamp(min=1.0))
    return got.shape == expected.shape and torch.allclose(got, expected, rtol=0.0, atol=tolerance)


def _few_in_a_tree(trunk: Trunk, ids: Tensor) -> Tensor:
    """Normed states [1, T, D] of a prefill of two tokens and a packed tree of two branches, of which the second is the text."""
    cache, total = DynamicCache(), ids.shape[1]
    positions = torch.arange(total, device=ids.device)[None]
    causal = torch.ones(total, total, dtype=torch.bool, device=ids.device).tril()[None, None]
    first = trunk.forward(
        ids[:, :2],
        cache=cache,
        positions=positions[:, :2],
        mask=causal[:, :, :2, :2],
        key_positions=positions[:, :2],
    )
    decoy = ids[:, 3:4]
    tree = torch.cat([decoy, ids[:, 2:]], dim=1)
    tree_positions = torch.cat([positions[:, 2:3], positions[:, 2:]], dim=1)
    tree_mask = torch.zeros(1, 1, total - 1, total + 1, dtype=torch.bool, device=ids.device)
    tree_mask[..., :2] = True
    tree_mask[..., 0, 2] = True
    tree_mask[..., 1:, 3:] = causal[..., 2:, 2:]
    second = trunk.forward(
        tree,
        cache=cache,
        positions=tree_positions,
        mask=tree_mask,
        key_positions=torch.cat([positions[:, :2], tree_positions], 1),
    )
    return torch.cat([first.normed, second.normed[:, 1:]], dim=1)


def _few_in_chains(trunk: Trunk, ids: Tensor) -> Tensor:
    """Normed states [1, T, D] of a prefill of two tokens and two chains, of which the first is wrong behind its root."""
    cache = trunk.new_cache(ids.shape[1], 1, ids.device)
    assert isinstance(cache, RowCaches)
    prompt = read_prompts(trunk, cache, ids[:, :2], torch.tensor([2]), (PRE_NORM,))[PRE_NORM]
    wrong = read_chain(trunk, cache, tree_from_paths(ids[:, 2], ids[:, None, :2]), ())
    cache.keep(torch.cat([ids[:, 2:3], ids[:, :2]], dim=1), torch.tensor([1]))
    right = read_chain(trunk, cache, tree_from_paths(ids[:, 3], ids[:, None, 4:]), ())
    return torch.cat([trunk.final_norm(prompt), wrong.normed[:, :1], right.normed], dim=1)


def _style_by_length(base: PreTrainedModel, config: PreTrainedConfig) -> MaskStyle | str:
    """How the family takes masks so that a tiny model of it is exact past its lengths, or what was found; once for each config."""
    try:
        tiny = shrunk(config)
    except RAISED_BY_CONFIGS as error:
        return _not_run(error)
    tiny._attn_implementation = getattr(config, "_attn_implementation", None)
    key = (type(base), tiny._attn_implementation, json.dumps(tiny.to_dict(), sort_keys=True, default=str))
    if key not in _proven:
        with torch.device("cpu"):  # whatever the caller's default device is
            _proven[key] = _prove_lengths(type(base), tiny)
    style = _proven[key]
    # The tiny copy's window is short; the model's own is what its masks take.
    if isinstance(style, str) or keeps_state(base):
        return style
    return next(own for own in mask_styles(config) if own.kinds == style.kinds)


def _not_run(error: Exception) -> str:
    return f"a tiny copy of it cannot be made or run: {type(error).__name__}: {error}"


@torch.inference_mode()
def _prove_lengths(kind: type[PreTrainedModel], config: PreTrainedConfig) -> MaskStyle | str:
    finding = ""
    for seed in _SEEDS:
        try:
            base = _random(kind, config, seed)
            expected = [_own_steps(base, config, text, prompt) for text, prompt in _texts(config)]
        except RAISED_BY_CONFIGS as error:
            return _not_run(error)
        for style in _RECURRENT_STYLES if keeps_state(base) else mask_styles(config):
            try:
                got = _through_drafts(_trunk(base, config, style, "a tiny copy"), config)
            except RAISED_BY_CONFIGS as error:  # this family takes its masks in another way
                finding = finding or f"{type(error).__name__}: {error}"
                continue
            wrong = [row for row in range(len(got)) if not _close(got[row], expected[row], 1e-3)]
            if not wrong:
                return style
            finding = (
                f"past its lengths its states are others, first at token {_first(got, expected)} of a tiny copy's text"
            )
    return finding


def _first(got: list[Tensor], expected: list[Tensor]) -> int:
    """The first place of any row that differs."""
    apart = [
        (states - own).abs().amax(-1) > 1e-3 * own.abs().max().clamp(min=1.0)
        for states, own in zip(got, expected, strict=True)
    ]
    return min(int(differs.nonzero()[0]) for differs in apart if differs.any())


def _random(kind: type[PreTrainedModel], config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    """A tiny model whose weights are so large that its states depend on all that it sees."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        base = kind(config)
        for name, parameter in base.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.25)
            elif "bias" in name or "sink" in name:
                parameter.normal_(0.0, 0.3)
    return base.float().eval()


def _texts(config: PreTrainedConfig) -> list[tuple[Tensor, int]]:
    """int64 [T] and how many of them are the prompt, of each row."""
    generator = torch.Generator().manual_seed(0)
    size = min(config.vocab_size, 64)
    return [(torch.randint(1, size, (prompt + NEW_TOKENS,), generator=generator), prompt) for prompt in PROMPTS]


def _own_steps(base: PreTrainedModel, config: PreTrainedConfig, text: Tensor, prompt: int) -> Tensor:
    """Normed states [T, D] as transformers' generation has them: the prompt at once, then token by token."""
    base = copy.deepcopy(base)  # rotary factors may depend on what a model has read before
    rereads_past = Trunk(base, config, mask_styles(config)[0], "").rereads_past
    states: list[Tensor] = []
    cached, cache = 0, DynamicCache(config=config)
    for end in range(prompt, len(text) + 1):
        if end - 1 == rereads_past:
            cached, cache = 0, DynamicCache(config=config)
        normed = base(input_ids=text[None, cached:end], past_key_values=cache, use_cache=True).last_hidden_state[0]
        states.append(normed[-1:] if states else normed)
        cached = end
    return torch.cat(states)


def _through_drafts(trunk: Trunk, config: PreTrainedConfig) -> list[Tensor]:
    """The same states [T, D] of each row, as one ragged batch: prompts in chunks, then drafts."""
    texts = _texts(config)
    host_lengths = [prompt for _, prompt in texts]
    lengths = torch.tensor(host_lengths)
    tokens = torch.nn.utils.rnn.pad_sequence([text[:prompt] for text, prompt in texts], batch_first=True)
    cache = trunk.new_cache(max(PROMPTS) + NEW_TOKENS + len(_PARENTS), len(texts), lengths.device)
    states = read_prompts(trunk, cache, tokens, lengths, (PRE_NORM,), CHUNK)[PRE_NORM]
    prompts = [trunk.final_norm(states[row, :prompt]) for row, prompt in enumerate(host_lengths)]
    whole = [text for text, _ in texts]
    if isinstance(cache, RowCaches):
        replies = _through_chains(trunk, cache, whole, host_lengths)
    else:
        replies = _through_trees(trunk, cache, whole, host_lengths)
    return [torch.cat([prompt, *parts]) for prompt, parts in zip(prompts, replies, strict=True)]


def _through_trees(trunk: Trunk, cache: SlotCache, texts: list[Tensor], host_lengths: list[int]) -> list[list[Tensor]]:
    """Behind the prompts, with branches; of each row the states in parts."""
    lengths = torch.tensor(host_lengths)
    states_of_rows: list[list[Tensor]] = [[] for _ in texts]
    while any(length < len(text) for length, text in zip(host_lengths, texts, strict=True)):
        tree = within_factors(trunk, _tree(texts, host_lengths), lengths)
        read_again(trunk, cache, [text.tolist() for text in texts], host_lengths, lengths.device, CHUNK)
        output = read_tree(trunk, cache, tree, tree.ancestors(), lengths, host_lengths)
        path = torch.tensor(_TRUE_PATH)
        kept = tree.valid_BN[:, path]
        for row, text in enumerate(texts):
            kept[row, len(text) - host_lengths[row] :] = False
            states_of_rows[row].append(output.normed[row, path[kept[row]]])
        cache.keep(path.expand(len(texts), -1))
        lengths = lengths + kept.sum(1)
        host_lengths = lengths.tolist()
    return states_of_rows


def _through_chains(trunk: Trunk, cache: RowCaches, texts: list[Tensor], host_lengths: list[int]) -> list[list[Tensor]]:
    """Behind the prompts, in chains of which none, some or all tokens are right; of each row the states in parts."""
    lengths = torch.tensor(host_lengths)
    states_of_rows: list[list[Tensor]] = [[] for _ in texts]
    cycle = 0
    while any(length < len(text) for length, text in zip(lengths.tolist(), texts, strict=True)):
        chains, counts = [], []
        for row, (text, length) in enumerate(zip(texts, lengths.tolist(), strict=True)):
            chain, right = torch.cat([text[length:], text[:4]])[:4], 1 + cycle % (3 + row)
            chain[right:] = (chain[right:] + 1) % int(text.max())
            chains.append(chain)
            counts.append(min(right, len(text) - length))
        tokens = torch.stack(chains)
        output = read_chain(trunk, cache, tree_from_paths(tokens[:, 0], tokens[:, None, 1:]), ())
        cache.keep(tokens, torch.tensor(counts))
        for row, count in enumerate(counts):
            states_of_rows[row].append(output.normed[row, :count])
        lengths = lengths + torch.tensor(counts)
        cycle += 1
    return states_of_rows


def _tree(texts: list[Tensor], lengths: list[int]) -> DraftTree:
    """Behind each row's cached tokens: its text along the true path, other tokens elsewhere."""
    parents = torch.tensor(_PARENTS)
    depths = torch.tensor([0, 1, 1, 2, 2, 2])
    rows = []
    for text, length in zip(texts, lengths, strict=True):
        rest = torch.cat([text[length:], text[:3]])[:3]
        row = (rest[depths] + 1) % int(text.max())
        row[torch.tensor(_TRUE_PATH)] = rest
        rows.append(row)
    tokens = torch.stack(rows)
    return DraftTree(
        tokens_BN=tokens,
        parents_BN=parents.expand_as(tokens),
        depths_BN=depths.expand_as(tokens),
        valid_BN=torch.ones_like(tokens, dtype=torch.bool),
        max_depth=2,
    )
