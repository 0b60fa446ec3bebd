"""What a comparison of ways of decoding needs: target, drafter, problems, and who judges the answers.

Owns how they are loaded and checked against each other. Knows no rule and no measure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from draftsmith import __version__
from draftsmith.data.formats import row_id
from draftsmith.data.progress import progress
from draftsmith.data.prompts import PROMPT_FILE, PromptSelection
from draftsmith.data.replies.reply_files import loaded_here
from draftsmith.decode.model_settings import for_target
from draftsmith.decode.sampling import DrawOptions, GenerationSettings, settings_of
from draftsmith.evaluate.lossy.lossy import IsRight
from draftsmith.evaluate.records import Sample
from draftsmith.evaluate.samples import readable_by, selected_samples
from draftsmith.files import read_jsonl, sha256_file
from draftsmith.json_rows import UnusableRow
from draftsmith.label.checkers.checkers import Checker
from draftsmith.label.commands.checked_answers import digest
from draftsmith.models.drafters.drafter import Drafter
from draftsmith.models.drafters.drafter_folder import drafter_fingerprint, drafter_folder, load_drafter
from draftsmith.models.drafters.other_layouts import TargetBond
from draftsmith.models.files.fingerprint import tokenizer_fingerprint
from draftsmith.models.target.options import TargetOptions
from draftsmith.models.target.prompt_template import TemplateChoice
from draftsmith.models.target.target import Target


@dataclass(frozen=True)
class Contest:
    """What every way of decoding answers the same problems with.

    Attributes:
        target: the frozen model.
        drafter: attached to it.
        tokenizer: the target's.
        samples: the problems, each with its prompt.
        settings: of the answers.
        is_right: whether a text answers a problem, by its number; None where nobody judges.
        inputs: what was read, for provenance.
        facts: everything that answers and verdicts depend on besides the way of decoding.
    """

    target: Target
    drafter: Drafter
    tokenizer: PreTrainedTokenizerBase
    samples: Sequence[Sample]
    settings: GenerationSettings
    is_right: IsRight | None
    inputs: Mapping[str, str]
    facts: Mapping[str, Any]

    def text_of(self, ids: Sequence[int]) -> str:
        """Token ids as text without special tokens.

        Args:
            ids: of a reply.
        """
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))


def prepare(
    target: str,
    drafter: str,
    prompts: Path,
    checker: Checker | None,
    draw: DrawOptions,
    selection: PromptSelection,
    where: TargetOptions,
    rendering: TemplateChoice,
) -> Contest:
    """Load target, drafter and problems.

    Args:
        target: directory or hub id of the target, or embedded:target.
        drafter: folder of a trained drafter, or a draft LM.
        prompts: JSONL file of problems, or a folder with one.
        checker: what judges answers; None for nobody.
        draw: length, seed and temperature of the answers.
        selection: which problems.
        where: where the target runs; resolved.
        rendering: the chat template.

    Raises:
        ValueError: a problem that the checker cannot judge, two problems of one id, or a drafter of another target or tokenizer.
    """
    folder = drafter_folder(drafter)
    tokenizer = where.tokenizer(target)
    samples = selected_samples(prompts, target, tokenizer, selection, rendering, where)
    file = prompts / PROMPT_FILE if prompts.is_dir() else prompts
    questions = None if checker is None else read_questions(file, samples, checker)
    model = where.load_to_decode(target)
    samples = readable_by(model, samples)
    draft = _drafter(folder, model, tokenizer_fingerprint(tokenizer), where.trust_remote_code)
    settings = for_target(settings_of(draw, eos_token_ids=model.eos_token_ids), model)
    is_right = None if checker is None or questions is None else judged_by(questions, samples, checker)
    inputs = {str(file): sha256_file(file), target: model.fingerprint}
    facts = {
        "draftsmith": __version__,
        "target_fingerprint": model.fingerprint,
        "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
        "drafter_fingerprint": drafter_fingerprint(folder),
        "dtype": where.dtype,
        **loaded_here(where),
        "settings": asdict(settings),
        "problems_sha256": digest([[each.id, each.prompt_ids, (questions or {}).get(each.id)] for each in samples]),
        "checker": None if checker is None else checker.code,
    }
    return Contest(model, draft, tokenizer, samples, settings, is_right, inputs, facts)


def judged_by(questions: Mapping[str, Mapping[str, Any]], samples: Sequence[Sample], checker: Checker) -> IsRight:
    """Tells whether a text answers the problem of a sample, by its number.

    Args:
        questions: the whole row of each problem, by its id.
        samples: the problems.
        checker: judges.
    """
    return lambda number, text: checker.check(questions[samples[number].id], text).verdict == "correct"


def read_questions(file: Path, samples: Sequence[Sample], judged: Checker) -> dict[str, Mapping[str, Any]]:
    """The whole row of each problem by its id. Each is checked now: a row that cannot judge an answer is an error before decoding.

    Args:
        file: of the problems.
        samples: those that are answered.
        judged: the checker.

    Raises:
        ValueError: two problems have one id, or one cannot judge an answer.
    """
    rows: dict[str, Mapping[str, Any]] = {}
    for line, row in read_jsonl(file, []):  # `read_samples` tells of those left out
        try:
            name = row_id(row, f"line-{line}")
        except UnusableRow:
            continue
        if name in rows:
            raise ValueError(
                f"{file}:{line}: id is {name!r}; another problem has it already; give each an id of its own"
            )
        rows[name] = row
    probed = samples if judged.probed else ()
    with progress("try the checker", len(probed), "problems", brief=True) as advance:
        for sample in probed:
            try:
                judged.check(rows[sample.id], "")
            except ValueError as error:
                raise ValueError(f"{file}: problem {sample.id}: {error}") from error
            advance(1)
    return rows


def _drafter(folder: Path, target: Target, tokenizer: str, trust_remote_code: bool) -> Drafter:
    dtype, bond = str(target.dtype).removeprefix("torch."), TargetBond(target.ends, tokenizer)
    drafter = load_drafter(folder, dtype, trust_remote_code, target=bond)
    drafter.attach(target.ends)
    drafter.check_tokenizer(tokenizer)
    return drafter.to_decode(target.device)
