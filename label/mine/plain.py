"""The plain twin of mining: the reference procedure line by line, one question at a time, nothing kept from one answer to the next.

Owns what the fast way must agree with, and what it is measured against. The target continues by Transformers' own `generate`, with its
own cache, made anew for each answer. The draft reads the whole text each time. It knows neither :mod:`draftsmith.label.mine.kept_rows` nor
the known answers of :mod:`draftsmith.label.mine.known_answers`.
"""

from __future__ import annotations

import torch
from transformers import GenerationConfig

from draftsmith.label.mine.question_mining import MiningCost, MiningQuestion, MiningResult, Rules, Swap
from draftsmith.label.token_labels import CORRECT, WRONG
from draftsmith.models.target.target import Target


@torch.inference_mode()
def mine_plain(target: Target, draft: Target, question: MiningQuestion, rules: Rules) -> MiningResult:
    """Mines one question (arXiv:2504.20039, section 3). It ignores `stop_on_rejoin` and counts no cost.

    Args:
        target: greedy.
        draft: whose tokens are tried.
        question: with its prompt in token ids.
        rules: of the mining.
    """
    prompt, eos, parse = question.prompt_ids, rules.eos_token_ids, question.parse or rules.parse
    reply = question.reply_ids
    if reply is None:
        reply = greedy(target, prompt, rules, rules.max_new_tokens)
    for place, token in enumerate(reply):
        if token in eos:
            reply = reply[: place + 1]
            break
    first_reply, answer = reply, parse(reply)
    if answer is None:
        reason = "the target's reply has no answer that can be read"
        return MiningResult(question.id, prompt, reply, reply, None, (), MiningCost(), reason)
    if rules.against == "reference" and answer != question.reference:
        reason = "the target's answer is not the reference's"
        return MiningResult(question.id, prompt, reply, reply, None, (), MiningCost(), reason)
    limit = max(rules.max_new_tokens, len(reply))
    if rules.max_length is not None:
        limit = min(limit, int(rules.max_length * len(reply)))
    swaps: list[Swap] = []
    left = 0
    while True:
        logits_1TV = draft.model(input_ids=torch.tensor([prompt + reply], device=draft.device)).logits
        drafted = logits_1TV[0, len(prompt) - 1 : -1, : target.ends.vocab_size].argmax(-1).tolist()
        places = [place for place in range(left, min(len(reply), limit)) if drafted[place] != reply[place]]
        if not places:
            break
        place = places[0]
        alternative = [*reply[:place], drafted[place]]
        if drafted[place] not in eos:
            alternative += greedy(target, prompt + alternative, rules, max(1, limit - len(alternative)))
        kept = parse(alternative) == answer
        swaps.append(Swap(place, reply[place], drafted[place], CORRECT if kept else WRONG))
        if kept:
            reply = alternative
        if drafted[place] in eos:
            break
        left = place + 1
    return MiningResult(question.id, prompt, first_reply, reply, answer, tuple(swaps), MiningCost())


@torch.inference_mode()
def greedy(target: Target, text: list[int], rules: Rules, most: int) -> list[int]:
    """The target's most likely continuation, its end token included.

    Args:
        target: the model.
        text: token ids.
        rules: end tokens and context.
        most: at most this many tokens.
    """
    room = most if rules.context is None else min(most, rules.context - len(text))
    if room < 1:
        return []
    settings = GenerationConfig(
        do_sample=False, max_new_tokens=room, eos_token_id=list(rules.eos_token_ids) or None, pad_token_id=0
    )
    ids_1T = torch.tensor([text], device=target.device)
    output_1T = target.model.generate(ids_1T, attention_mask=torch.ones_like(ids_1T), generation_config=settings)
    return [int(token) for token in output_1T[0, len(text) :].tolist()]
