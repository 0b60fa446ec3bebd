"""`draftsmith evaluate`: one target, its prompts, its drafters; a report of what they gain.

Owns the order of the work: load, refuse, race, report. Does not know the measures' definitions or the files' formats.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import nn

from draftsmith import provenance
from draftsmith.arguments import FLAT, WHOLE
from draftsmith.data.prompts import PROMPT_FILE
from draftsmith.decode import GenerationSettings
from draftsmith.decode.model_settings import for_target
from draftsmith.evaluate.chart import draw
from draftsmith.evaluate.drafters import Entry, parse_entries
from draftsmith.evaluate.measure import Candidate, Plan, measure
from draftsmith.evaluate.records import Row, Sample
from draftsmith.evaluate.report import REPORTS, main_table, write_report, write_scalars
from draftsmith.evaluate.resume import parts
from draftsmith.evaluate.samples import read_samples, readable_by
from draftsmith.evaluate.slow_drafters import slow_drafters
from draftsmith.files import atomic_directory, exclusive, sha256_file
from draftsmith.foreign import visible
from draftsmith.models.drafters.drafter_folder import load_drafter
from draftsmith.models.files.end_tokens import read_end_tokens
from draftsmith.models.files.fingerprint import checkpoint_fingerprint, module_fingerprint, tokenizer_fingerprint
from draftsmith.models.files.loading import load_tokenizer
from draftsmith.models.target.options import DEFAULTS, TargetOptions
from draftsmith.models.target.prompt_template import NO_OPTIONS, TemplateOptions
from draftsmith.models.target.target import Target
from draftsmith.ownership import check_replaceable, check_unclaimed

STAGE = "draftsmith evaluate"
TENSORBOARD = "tensorboard"
REPORT = "report.json"


def evaluate(
    target: str,
    prompts: Path,
    out: Path,
    drafters: Annotated[list[str] | None, WHOLE] = None,
    shapes: list[str] | None = None,
    temperatures: list[float] | None = None,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    max_new_tokens: int = 128,
    limit: int | None = None,
    split: str | None = None,
    template: str | None = None,
    batch_size: int = 1,
    repeats: int = 1,
    transformers_prompts: int = 40,
    prompt_lookup: int = 0,
    ledger_prompts: int = 8,
    dtype: str = "float32",
    where: Annotated[TargetOptions, FLAT] = DEFAULTS,
    rendering: Annotated[TemplateOptions, FLAT] = NO_OPTIONS,
) -> None:
    """Measure what drafters gain on a target, and whether its replies stay the same.

    Plain decoding and every drafter decode a prompt before the next prompt comes, so that all meet the same machine. Writes report.md,
    report.json, report.png and TensorBoard scalars. To resume a killed run, repeat the command.

    Args:
        target: Directory or hub id of the target, or embedded:target.
        prompts: JSONL file or folder of `draftsmith data prompts`, or JSONL rows with prompt_ids.
        out: Folder for the report.
        drafters: Folders of trained or exported drafters; NAME=PATH names one, PATH@1x4,10x4 gives it its own shapes.
        shapes: Shapes for the others: WIDTHxLENGTH beams with LENGTH drafted tokens, 10x6n60 a dynamic tree, tree:FILE.json
            or t3.2.1 a static one, s1.1.1 or k4.2.1 a sampled one; p0.1 prunes, e0.5 stops early. Default 1x4.
        temperatures: One row each; 0 is greedy. Default 0.
        top_k: Sample among the k most likely tokens only; 0 for all.
        top_p: Sample within this share of the probability.
        min_p: Leave out tokens below this share of the most likely one.
        repetition_penalty: Weaken tokens already seen; 1 for not.
        seed: Seed of the sampling noise, the same for plain decoding and drafters.
        max_new_tokens: Longest reply.
        limit: Only the first so many prompts.
        split: Only this split of the prompts.
        template: Chat template file where the tokenizer has none, or "none".
        batch_size: Prompts decoded together.
        repeats: Timed runs of every prompt; medians are taken.
        transformers_prompts: Prompts on which transformers.generate is timed beside the engine; 0 for none.
        prompt_lookup: Also time transformers' prompt lookup with so many drafted tokens; 0 for not.
        ledger_prompts: Prompts decoded once more with a clock on every stage; 0 for none.
        dtype: float32, bfloat16 or float16.
        where: The target's devices, revision, adapter and quantization; see `TargetOptions`.
        rendering: The chat template's name and variables; see `TemplateOptions`.
    """
    check_unclaimed(out, REPORTS)
    check_replaceable(out / TENSORBOARD, STAGE)
    plan = Plan(batch_size, repeats, transformers_prompts, prompt_lookup, ledger_prompts)
    settings = GenerationSettings(max_new_tokens, 0.0, top_k, top_p, min_p, repetition_penalty, seed)
    entries = parse_entries(drafters or [], ["1x4"] if shapes is None else shapes)
    tokenizer = load_tokenizer(target, where.revision, where.trust_remote_code)
    ends = read_end_tokens(target, where.revision, tokenizer, where.trust_remote_code)
    samples = read_samples(prompts, tokenizer, template, split, limit, ends, rendering)
    model = where.load(target, dtype)
    settings = for_target(settings, model)
    warmths = [replace(settings, temperature=one) for one in ([0.0] if temperatures is None else temperatures)]
    samples = readable_by(model, samples)
    candidates = load_candidates(entries, model, tokenizer_fingerprint(tokenizer), where.trust_remote_code)
    file = prompts / PROMPT_FILE if prompts.is_dir() else prompts
    inputs = {str(file): sha256_file(file), target: model.fingerprint}
    inputs |= {str(entry.path): checkpoint_fingerprint(entry.path) for entry in entries}
    config = asdict(settings) | asdict(plan) | {"temperatures": [one.temperature for one in warmths], "split": split}
    config |= {"drafters": [asdict(entry) for entry in entries], "dtype": dtype, "template": template} | asdict(where)
    config |= asdict(rendering)
    made_by = partial(provenance.record, provenance.command_line(), config, inputs)
    facts = identity(made_by(), samples, candidates)
    told = [one.temperature for one in warmths]
    measured = [facts | {"temperature": one, "repeated": told[:at].count(one)} for at, one in enumerate(told)]
    with exclusive(out), parts(out, measured) as unfinished:
        _tell_replaced(out)
        rows: list[Row] = []
        for one, part in zip(warmths, unfinished, strict=True):
            chosen = replace(one, eos_token_ids=model.eos_token_ids)
            rows += measure(model, samples, candidates, chosen, plan, part)
        _write(out, rows, made_by())
    print(main_table(rows))
    for line in slow_drafters(rows):
        print(visible(line))
    print(f"report: {out / 'report.md'}")


def load_candidates(
    entries: Sequence[Entry], target: Target, tokenizer: str, trust_remote_code: bool = False
) -> list[Candidate]:
    """Every drafter with every shape, on the target's device and attached to it.

    Raises ValueError for a drafter of another target or another tokenizer (by fingerprint), or one that does not load
    whole.
    """
    candidates = []
    for entry in entries:
        drafter = load_drafter(entry.path, str(target.dtype).removeprefix("torch."), trust_remote_code)
        drafter.attach(target.ends)
        drafter.check_tokenizer(tokenizer)
        fingerprint = module_fingerprint(drafter)
        nn.Module.to(drafter, target.device)
        candidates += [Candidate(entry.name, drafter, limits, fingerprint) for limits in entry.shapes]
    return candidates


def identity(record: Mapping[str, Any], samples: Sequence[Sample], candidates: Sequence[Candidate]) -> dict[str, Any]:
    """All that replies and times depend on but the temperature: two runs may share their measurements where this is equal.

    record: the run's provenance, of which the command's wording, the time and the other temperatures do not count.
    """
    facts = {name: value for name, value in record.items() if name not in ("command", "time", "config")}
    facts |= {name: value for name, value in record["config"].items() if name not in ("temperature", "temperatures")}
    drafters = [[one.label, one.fingerprint, one.drafter.config.to_json_string()] for one in candidates]
    prompts = [asdict(sample) for sample in samples]
    return facts | {"samples": prompts, "candidates": drafters, "threads": torch.get_num_threads()}


def _tell_replaced(out: Path) -> None:
    report = out / REPORT
    if not report.is_file():
        return
    try:
        rows = json.loads(report.read_bytes())["rows"]
        held = ", ".join(dict.fromkeys(f"T={row['temperature']:g}" for row in rows))
    except (ValueError, KeyError, TypeError):
        held = "unreadable"
    print(f"{report} of an earlier evaluation ({held}) will be replaced; to keep it, stop and give another --out")


def _write(out: Path, rows: Sequence[Row], made_by: dict) -> None:
    with atomic_directory(out / TENSORBOARD, STAGE) as folder:
        write_scalars(folder, rows)
        provenance.write(folder, made_by)
    provenance.write(out, made_by)
    write_report(out, made_by["command"], made_by["machine"], made_by["versions"], rows, draw(rows))
