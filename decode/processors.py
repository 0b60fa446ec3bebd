"""What a model's maker forbids or demands in replies: Transformers' own logits processors, run on each node's own text.

Owns the processors of constraints and flags in Transformers' order, and the texts of a tree's nodes. Knows nothing of where settings
come from (:mod:`draftsmith.decode.model_settings`). A processor may read all of a text, so each node is processed alone, on the host's
copy of its tokens. That is exact for every tree, and slower than :func:`draftsmith.decode.sampling.process`, which takes all nodes at once.

Shape legend: B batch rows, N tree nodes, T prompt tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor
from transformers import WatermarkingConfig
from transformers.generation import (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    ExponentialDecayLengthPenalty,
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    LogitsProcessor,
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
    WatermarkLogitsProcessor,
)

from draftsmith.decode.constraints import Constraints
from draftsmith.decode.sampling import GenerationSettings
from draftsmith.models.tree.tree import DraftTree

# What Transformers makes of a config's constraints; `remove_invalid_values` and `renormalize_logits` among them.
OF_CONSTRAINTS = (
    SequenceBiasLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    EncoderNoRepeatNGramLogitsProcessor,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    InfNanRemoveLogitsProcessor,
    ExponentialDecayLengthPenalty,
    SuppressTokensLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    TopHLogitsWarper,
    TypicalLogitsWarper,
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    WatermarkLogitsProcessor,
    LogitNormalization,
)


@dataclass(frozen=True)
class RequestText:
    """One request's text and its processors.

    Attributes:
        prompt: token ids.
        emitted: those emitted so far; the engine's own list, which grows.
        processors: of this request.
    """

    prompt: Sequence[int]
    processors: LogitsProcessorList
    emitted: list[int] = field(default_factory=list)

    def process(self, path: Sequence[int], logits_V: Tensor) -> Tensor:
        """float32 [V]: the logits of what follows the text and some more tokens."""
        ids_1T = torch.tensor([[*self.prompt, *self.emitted, *path]], device=logits_V.device)
        return self.processors(cast(torch.LongTensor, ids_1T), logits_V[None])[0]


def process_texts(logits_BNV: Tensor, tree: DraftTree, texts: Sequence[RequestText]) -> Tensor:
    """Logits after all of a request's processors, float32 [B, N, V]; those of padding nodes stay as they are.

    Args:
        logits_BNV: float.
        tree: its root is the last token of each text.
        texts: of each row.
    """
    processed_BNV = logits_BNV.float().clone()
    tokens, parents, valid = tree.tokens_BN.tolist(), tree.parents_BN.tolist(), tree.valid_BN.tolist()
    for row, text in enumerate(texts):
        for node in range(tree.num_nodes):
            if valid[row][node]:
                path = _path(tokens[row], parents[row], node)
                processed_BNV[row, node] = text.process(path, logits_BNV[row, node].float())
    return processed_BNV


def _path(tokens: Sequence[int], parents: Sequence[int], node: int) -> list[int]:
    """Tokens from below the root down to a node; none for the root itself."""
    path = []
    while node > 0:
        path.append(tokens[node])
        node = parents[node]
    return path[::-1]


def processors_of(
    settings: GenerationSettings, prompt: Sequence[int], budget: int, vocab_size: int, device: torch.device
) -> LogitsProcessorList:
    """The processors of a request in Transformers' order, those of flags (penalty, temperature, top-k ...) among them.

    Args:
        settings: with constraints.
        prompt: token ids; some settings count or read them.
        budget: tokens that the reply may have.
        vocab_size: V.
        device: of the logits.

    Raises:
        ValueError: Transformers' own, for a value that a processor does not take.
    """
    constraints = settings.constraints or Constraints()
    shaping = [
        *_of_text(settings, constraints, prompt, device),
        *_of_length(settings, constraints, prompt, budget, device),
    ]
    if constraints.suppress_tokens:
        shaping.append(SuppressTokensLogitsProcessor(constraints.suppress_tokens, device=str(device)))
    if constraints.begin_suppress_tokens:
        begin = len(prompt) + (len(prompt) == 1 and constraints.forced_bos_token_id is not None)
        shaping.append(
            SuppressTokensAtBeginLogitsProcessor(constraints.begin_suppress_tokens, begin, device=str(device))
        )
    if settings.temperature > 0.0:
        shaping += _of_sampling(settings, constraints, device)
    if constraints.watermarking_config:
        watermark = WatermarkingConfig(**dict(constraints.watermarking_config))
        shaping.append(watermark.construct_processor(vocab_size, device))
    return LogitsProcessorList(shaping)


def _of_text(
    settings: GenerationSettings, constraints: Constraints, prompt: Sequence[int], device: torch.device
) -> list[LogitsProcessor]:
    """Those that look at which tokens a text holds."""
    prompt_1T = cast(torch.LongTensor, torch.tensor([list(prompt)], device=device))
    processors: list[LogitsProcessor] = []
    if constraints.sequence_bias:
        processors.append(SequenceBiasLogitsProcessor([[list(ids), bias] for ids, bias in constraints.sequence_bias]))
    if constraints.encoder_repetition_penalty != 1.0:
        processors.append(EncoderRepetitionPenaltyLogitsProcessor(constraints.encoder_repetition_penalty, prompt_1T))
    if settings.repetition_penalty != 1.0:
        processors.append(RepetitionPenaltyLogitsProcessor(settings.repetition_penalty))
    if constraints.no_repeat_ngram_size:
        processors.append(NoRepeatNGramLogitsProcessor(constraints.no_repeat_ngram_size))
    if constraints.encoder_no_repeat_ngram_size:
        processors.append(EncoderNoRepeatNGramLogitsProcessor(constraints.encoder_no_repeat_ngram_size, prompt_1T))
    if constraints.bad_words_ids:
        words = [list(ids) for ids in constraints.bad_words_ids]
        processors.append(NoBadWordsLogitsProcessor(words, list(settings.eos_token_ids) or None))
    return processors


def _of_length(
    settings: GenerationSettings, constraints: Constraints, prompt: Sequence[int], budget: int, device: torch.device
) -> list[LogitsProcessor]:
    """Those that look at a text's length; without end tokens there is no end to hold back or to hasten."""
    ends, length, where = list(settings.eos_token_ids), len(prompt), str(device)
    processors: list[LogitsProcessor] = []
    if ends and constraints.min_length:
        processors.append(MinLengthLogitsProcessor(constraints.min_length, ends, device=where))
    if ends and constraints.min_new_tokens:
        processors.append(MinNewTokensLengthLogitsProcessor(length, constraints.min_new_tokens, ends, device=where))
    if constraints.forced_bos_token_id is not None:
        processors.append(ForcedBOSTokenLogitsProcessor(constraints.forced_bos_token_id))
    if constraints.forced_eos_token_id:
        processors.append(
            ForcedEOSTokenLogitsProcessor(length + budget, list(constraints.forced_eos_token_id), device=where)
        )
    if constraints.remove_invalid_values:
        processors.append(InfNanRemoveLogitsProcessor())
    if ends and constraints.exponential_decay_length_penalty is not None:
        processors.append(ExponentialDecayLengthPenalty(constraints.exponential_decay_length_penalty, ends, length))
    return processors


def _of_sampling(settings: GenerationSettings, constraints: Constraints, device: torch.device) -> list[LogitsProcessor]:
    """Those that matter only where a token is drawn."""
    processors: list[LogitsProcessor] = [TemperatureLogitsWarper(settings.temperature)]
    if constraints.top_h is not None:
        processors.append(TopHLogitsWarper(constraints.top_h))
    if settings.top_k:
        processors.append(TopKLogitsWarper(settings.top_k))
    if settings.top_p < 1.0:
        processors.append(TopPLogitsWarper(settings.top_p))
    if settings.min_p:
        processors.append(MinPLogitsWarper(settings.min_p))
    if constraints.typical_p < 1.0:
        processors.append(TypicalLogitsWarper(constraints.typical_p))
    if constraints.epsilon_cutoff:
        processors.append(EpsilonLogitsWarper(constraints.epsilon_cutoff))
    if constraints.eta_cutoff:
        processors.append(EtaLogitsWarper(constraints.eta_cutoff, device=str(device)))
    return processors
