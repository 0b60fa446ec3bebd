"""`draftsmith evaluate`: one target, its prompts, its drafters; a report of what they gain.

Owns the order of the work: load, refuse, race, report. Does not know the measures' definitions or the files' formats.
"""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from torch import nn

from draftsmith import provenance
from draftsmith.data.prompts import PROMPT_FILE
from draftsmith.decode import GenerationSettings
from draftsmith.evaluate.chart import draw
from draftsmith.evaluate.drafters import Entry, load_drafter, parse_entries
from draftsmith.evaluate.measure import Candidate, Plan, measure
from draftsmith.evaluate.records import Row
from draftsmith.evaluate.report import main_table, write_report, write_scalars
from draftsmith.evaluate.samples import read_samples, within_context
from draftsmith.files import atomic_directory, exclusive, sha256_file
from draftsmith.models.fingerprint import module_fingerprint, tokenizer_fingerprint
from draftsmith.models.target import Target, load_tokenizer


def evaluate(
    target: str,
    prompts: Path,
    out: Path,
    drafters: list[str] | None = None,
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
    device: str = "cpu",
    device_map: str | None = None,
    revision: str | None = None,
    adapter: str | None = None,
    quantization: str | None = None,
) -> None:
    """Measure what drafters gain on a target, and whether its replies stay the same.

    Every prompt is decoded plainly and with every drafter, one after the other before the next prompt comes, so that
    all meet the same machine. Writes report.md, report.json, report.png and TensorBoard scalars.

    Args:
        target: Directory or hub id of the target, or embedded:target.
        prompts: JSONL file or folder of `draftsmith data prompts`, or JSONL rows with prompt_ids.
        out: Folder for the report.
        drafters: Folders of trained or exported drafters; NAME=PATH names one, PATH@1x4,10x4 gives it its own shapes.
        shapes: Beam shapes for the others, WIDTHxLENGTH with LENGTH drafted tokens; n16 adds a node budget. Default
            1x4.
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
        device: Where to run, such as cpu or cuda.
        device_map: Placement of a large target over several devices, such as auto.
        revision: Revision of a hub id.
        adapter: PEFT adapter to merge into the target.
        quantization: 8bit or 4bit weights for the target.
    """
    plan = Plan(batch_size, repeats, transformers_prompts, prompt_lookup, ledger_prompts)
    settings = GenerationSettings(max_new_tokens, 0.0, top_k, top_p, min_p, repetition_penalty, seed)
    warmths = [replace(settings, temperature=one) for one in ([0.0] if temperatures is None else temperatures)]
    entries = parse_entries(drafters or [], ["1x4"] if shapes is None else shapes)
    tokenizer = load_tokenizer(target, revision)
    samples = read_samples(prompts, tokenizer, template, split, limit)
    model = Target.load(target, dtype, device, device_map, revision, adapter, quantization)
    samples, left_out = within_context(samples, model.max_positions)
    if left_out:
        longest = f"context of {model.max_positions} tokens"
        print(f"left out: {len(left_out)} prompts that fill the {longest}, {left_out[0].id} first")
    candidates = load_candidates(entries, model, tokenizer_fingerprint(tokenizer))
    with exclusive(out):
        rows: list[Row] = []
        for one in warmths:
            rows += measure(model, samples, candidates, replace(one, eos_token_ids=end_tokens(model)), plan)
        file = prompts / PROMPT_FILE if prompts.is_dir() else prompts
        inputs = {str(file): sha256_file(file), target: model.fingerprint}
        inputs |= {str(entry.path): sha256_file(entry.path / "model.safetensors") for entry in entries}
        config = (
            asdict(settings) | asdict(plan) | {"temperatures": [one.temperature for one in warmths], "split": split}
        )
        config |= {
            "drafters": [asdict(entry) for entry in entries],
            "dtype": dtype,
            "device": device,
            "adapter": adapter,
        }
        _write(out, rows, provenance.record(provenance.command_line(), config, inputs))
    print(main_table(rows))
    print(f"report: {out / 'report.md'}")


def load_candidates(entries: Sequence[Entry], target: Target, tokenizer: str) -> list[Candidate]:
    """Every drafter with every shape, on the target's device and attached to it.

    Raises ValueError for a drafter of another target or another tokenizer (by fingerprint), or one that does not load
    whole.
    """
    candidates = []
    for entry in entries:
        drafter = load_drafter(entry.path)
        drafter.attach(target.ends)
        drafter.check_tokenizer(tokenizer)
        fingerprint = module_fingerprint(drafter)
        nn.Module.to(drafter, target.device)
        candidates += [Candidate(entry.name, drafter, limits, fingerprint) for limits in entry.shapes]
    return candidates


def end_tokens(target: Target) -> tuple[int, ...]:
    """The ids that end a reply: the model's own generation settings, else its config."""
    own = target.model.generation_config
    ids = own.eos_token_id if own is not None and own.eos_token_id is not None else target.config.eos_token_id
    return () if ids is None else (ids,) if isinstance(ids, int) else tuple(ids)


def _write(out: Path, rows: Sequence[Row], made_by: dict) -> None:
    with atomic_directory(out / "tensorboard") as folder:
        write_scalars(folder, rows)
    provenance.write(out, made_by)
    write_report(out, made_by["command"], made_by["machine"], made_by["versions"], rows, draw(rows))
