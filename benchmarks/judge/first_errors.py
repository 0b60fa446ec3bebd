"""Who said the first wrong token of each wrong answer of the tuned judge: the target itself, or the draft by the rule.

    python -m benchmarks.judge.first_errors --work runs/judge

`make judge` runs this. Writes `first-errors.json` into the folder of the benchmark.
"""

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from benchmarks.judge.stages import DRAFT, TARGET, question_of
from benchmarks.judge.tuned import SHAPE, TUNED
from draftsmith.decode import Engine, Generation, GenerationSettings
from draftsmith.decode.verify.rule_text import parse_rule
from draftsmith.evaluate.samples import read_samples
from draftsmith.files import atomic_write, read_jsonl
from draftsmith.label.checkers.sums_answers import judge as check_sums
from draftsmith.label.checkers.sums_answers import problem_of
from draftsmith.models import Target, load_tokenizer
from draftsmith.models.drafters.draft_lm import load_draft_lm
from draftsmith.models.tree.shapes import parse_shape


def first_errors(work: Path) -> None:
    """Who said the first wrong token of each wrong answer: the target itself, or the draft by the rule.

    Without a rule, as in lossless decoding, it is always the target.
    """
    target, tokenizer, drafter = Target.load(TARGET), load_tokenizer(TARGET), load_draft_lm(DRAFT)
    rows = [row for _, row in read_jsonl(work / "test.jsonl")]
    samples = read_samples(work / "test.jsonl", tokenizer)
    settings = GenerationSettings(200, eos_token_ids=target.eos_token_ids)
    engine = Engine(target, drafter, parse_shape(SHAPE), rule=parse_rule(f"judge:{work / TUNED / 'judge'}")[1])
    prompts = [list(sample.prompt_ids) for sample in samples]
    room = max(map(len, prompts)) + 200
    replies = dict(engine.stream(list(enumerate(prompts)), settings, 64, room))
    counts = Counter(who_erred(row, replies[number], tokenizer) for number, row in enumerate(rows))
    atomic_write(work / "first-errors.json", json.dumps({"judge, tuned": counts}))


def who_erred(row: dict[str, Any], reply: Generation, tokenizer: PreTrainedTokenizerBase) -> str:
    """`nobody`, `rule`, `target`, or `unplaced` where no token is the first wrong one."""
    text = str(tokenizer.decode(reply.token_ids, skip_special_tokens=True))
    problem = problem_of(question_of(row))
    assert problem is not None
    span = check_sums(problem, text).error_span
    if span is None:
        return "nobody"
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    place = next((place for place, (start, end) in enumerate(offsets) if start <= span[0] < end), None)
    return "unplaced" if place is None else "rule" if place in reply.by_rule else "target"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/judge"))
    first_errors(parser.parse_args().work)
