"""Do the weights of an exported EAGLE drafter arrive in vLLM's own classes?

    python -m benchmarks.export.vllm_conformity --venv /tmp/vllm-venv [--report benchmarks/results/export/<date>-vllm-conformity.md]

Makes a tiny target and drafters of random weights, exports them in every layout that vLLM reads, makes an environment of its own with vLLM
(2.6 GB; the CUDA wheel runs its loaders on a CPU), lets vLLM resolve each folder's config, build its drafter class and load the weights,
and compares every tensor. The environment is made once and kept; a second run takes about three minutes.

What this does not show: decoding in vLLM. The attention kernels of the wheel need a GPU; `vllm_decoding.py` decodes with a build for CPUs.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shlex
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

VLLM = "0.32.0"
FIRST = ["torch==2.13.0", "transformers==5.20.2", "safetensors", "numpy"]
# What vLLM imports on the way to its loaders. All that it declares would be several times as much, most of it for GPUs.
NEEDED = [
    *(
        "psutil",
        "cachetools",
        "blake3",
        "py-cpuinfo",
        "msgspec",
        "cloudpickle",
        "pyzmq",
        "einops",
        "requests",
        "pydantic",
        "orjson",
    ),
    *(
        "pillow",
        "aiohttp",
        "prometheus_client",
        "sentencepiece",
        "protobuf",
        "gguf",
        "compressed-tensors==0.17.0",
        "depyf==0.20.0",
    ),
    *(
        "python-json-logger",
        "partial-json-parser",
        "jsonschema",
        "cbor2",
        "ijson",
        "setproctitle",
        "pybase64",
        "openai",
        "fastapi",
    ),
    *(
        "lark==1.2.2",
        "watchfiles",
        "tiktoken",
        "numba==0.65.0",
        "diskcache",
        "outlines_core==0.2.14",
        "oss-harmony>=0.0.11",
    ),
    *(
        "mcp>=2.2,<3",
        "anthropic",
        "mistral_common>=1.11.6",
        "llguidance>=1.7,<1.8",
        "prometheus-fastapi-instrumentator>=8",
    ),
    *("model-hosting-container-standards", "ninja", "opencv-python-headless", "uvloop", "uvicorn"),
]
WITHOUT_DEPENDENCIES = [[f"vllm=={VLLM}"], ["xgrammar==0.2.8", "apache-tvm-ffi==0.1.11"]]
RESULT = "RESULT "

# name, layout, family, draft vocabulary, layers (None: the default), method
CASES = (
    ("EAGLE-1", "eagle", "eagle", False, None, "eagle"),
    ("EAGLE-1, trained with a draft vocabulary", "eagle", "eagle", True, None, "eagle"),
    ("EAGLE-3, whole vocabulary", "eagle3", "eagle3", False, None, "eagle3"),
    ("EAGLE-3, draft vocabulary", "eagle3", "eagle3", True, None, "eagle3"),
    ("EAGLE-3, other layers", "eagle3", "eagle3", True, (0, 2, 5), "eagle3"),
    ("EAGLE-3, two layers", "eagle3", "eagle3", True, (1, 6), "eagle3"),
    ("EAGLE-3, speculators' layout", "speculators", "eagle3", True, None, "eagle3"),
    ("EAGLE-3, speculators' layout, other layers", "speculators", "eagle3", False, (0, 2, 5), "eagle3"),
)
CONTROL = "control: EAGLE-1 without fc.weight"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path, help="where vLLM's environment is or is to be made")
    parser.add_argument("--report", type=Path, help="Markdown to write; without it the table is printed only")
    parser.add_argument("--inside", nargs=3, metavar=("TARGET", "FOLDER", "METHOD"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        print(RESULT + json.dumps(inside(*options.inside)))
        return
    if options.venv is None:
        parser.error("--venv is required")
    python = environment(options.venv)
    with tempfile.TemporaryDirectory() as work:
        folders = export_all(Path(work))
        results = {name: ask(python, Path(work) / "target", folder, method) for name, folder, method in folders}
    text = report(python, results)
    print(text)
    if options.report:
        options.report.write_text(text, encoding="utf-8")
    if not all(verdict(name, result) for name, result in results.items()):
        sys.exit("some weights did not arrive as they were meant to")


def environment(folder: Path) -> Path:
    """The Python of an environment with vLLM, made if it is not there."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    if subprocess.run([python, "-c", "import vllm"], capture_output=True).returncode != 0:
        for packages, flags in [
            (FIRST, []),
            (NEEDED, []),
            *((package, ["--no-deps"]) for package in WITHOUT_DEPENDENCIES),
        ]:
            subprocess.run([python, "-m", "pip", "install", "--quiet", *flags, *packages], check=True)
    return python


def export_all(work: Path) -> list[tuple[str, Path, str]]:
    """A tiny target under ``work / "target"`` and every case's folder: name, folder, vLLM's method."""
    # Imported here: the other half of this script runs where draftsmith is not installed.
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    from draftsmith.export.layouts.layouts import write
    from draftsmith.models import Eagle, Eagle3, TargetEnds

    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 8, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    rope = {"rope_type": "linear", "rope_theta": 50000.0, "factor": 2.0}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads, rope_parameters=rope)).save_pretrained(work / "target")
    ends = TargetEnds.load(str(work / "target"))
    made = []
    for number, (name, layout, family, truncated, blocks, method) in enumerate(CASES):
        ids = torch.randperm(256)[:96].sort().values if truncated else None
        if family == "eagle":
            drafter: Any = Eagle.for_target(ends, draft_token_ids=ids)
        else:
            layers = None if blocks is None else [f"layer.{block}.output" for block in blocks]
            drafter = Eagle3.for_target(ends, draft_token_ids=ids, layers=layers)
        with torch.no_grad():
            for parameter in drafter.parameters():
                parameter.normal_()
        folder = work / f"case{number}"
        folder.mkdir()
        write(drafter, folder, layout, ends)
        made.append((name, folder, method))
    control = work / "control"
    control.mkdir()
    tensors = load_file(made[0][1] / "model.safetensors")
    expected = tensors.pop("fc.weight")
    save_file(tensors, control / "model.safetensors")
    save_file({"fc.weight": expected}, beside(control))
    (control / "config.json").write_bytes((made[0][1] / "config.json").read_bytes())
    return [*made, (CONTROL, control, "eagle")]


def beside(folder: Path) -> Path:
    """Where the control's missing tensor lies: not inside, where vLLM would load it, since it takes every safetensors file."""
    return folder.with_name(f"{folder.name}.safetensors")


def ask(python: Path, target: Path, folder: Path, method: str) -> dict[str, Any]:
    """One folder in a process of its own, since vLLM sets up its process groups once."""
    settings = {"VLLM_TARGET_DEVICE": "cpu", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    done = subprocess.run(
        [python, __file__, "--inside", target, folder, method],
        capture_output=True,
        text=True,
        env=os.environ | settings,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith(RESULT)]
    if not lines:
        return {"error": done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit {done.returncode}"}
    log = done.stderr + "".join(line for line in done.stdout.splitlines() if not line.startswith(RESULT))
    return json.loads(lines[0].removeprefix(RESULT)) | {"log_names_it": "fc.weight" in log}


def inside(target: str, folder: str, method: str) -> dict[str, Any]:
    """In vLLM's environment: build its drafter class from a folder and compare what arrived."""
    import torch
    from safetensors.torch import load_file

    torch.accelerator.empty_cache = lambda: None  # vLLM's CPU runner does the same; there is no accelerator
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model

    speculative = {"method": method, "model": folder, "num_speculative_tokens": 3}
    config = EngineArgs(
        model=target,
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=128,
        enforce_eager=True,
        speculative_config=speculative,
    ).create_engine_config()
    draft = config.speculative_config.draft_model_config
    with set_current_vllm_config(config), tempfile.TemporaryDirectory() as meeting:
        init_distributed_environment(1, 0, f"file://{meeting}/store", 0, "gloo")
        initialize_model_parallel(1, 1)
        model = get_model(vllm_config=config, model_config=draft)
        tensors = load_file(Path(folder) / "model.safetensors")
        left_out = beside(Path(folder))
        tensors |= load_file(left_out) if left_out.exists() else {}
        differences = compare(tensors, {name: value.detach() for name, value in model.named_parameters()})
        differences |= formulas(model, tensors, method)
    fields = draft.hf_config
    return differences | {
        "class": type(model).__name__,
        "config": type(fields).__name__,
        "layers": getattr(fields, "eagle_aux_hidden_state_layer_ids", None),
        "rope": {name: fields.rope_parameters[name] for name in sorted(fields.rope_parameters)},
    }


def compare(tensors: dict[str, Any], parameters: dict[str, Any]) -> dict[str, Any]:
    """Every tensor of the checkpoint against vLLM's parameter of it, which fuses projections and pads vocabularies."""
    import torch

    expected, dropped = {}, []
    for name, tensor in tensors.items():
        own = name.replace("midlayer.", "layers.0.")
        if name in ("fc.bias", "t2d"):
            dropped.append(name)
        elif name == "d2t":
            expected["draft_id_to_target_id"] = tensor
        elif own.endswith(("q_proj.weight", "gate_proj.weight")):
            fused, parts = ("qkv", "qkv") if "q_proj" in own else ("gate_up", ("gate", "up"))
            first = parts[0]
            whole = [tensors[name.replace(f"{first}_proj", f"{part}_proj")] for part in parts]
            expected["model." + own.replace(f"{first}_proj", f"{fused}_proj")] = torch.cat(whole)
        elif not own.endswith(("k_proj.weight", "v_proj.weight", "up_proj.weight")):
            expected[own if own.startswith("lm_head") else f"model.{own}"] = tensor
    missing = sorted(name for name in expected if name not in parameters)
    differing = [
        name
        for name, tensor in expected.items()
        if name in parameters and not torch.equal(parameters[name][: len(tensor)], tensor.to(parameters[name].dtype))
    ]
    return {
        "checkpoint_tensors": len(tensors),
        "dropped": sorted(dropped),
        "missing": missing,
        "differing": sorted(differing),
        "left_to_the_target": sorted(parameters.keys() - expected.keys()),
    }


def formulas(model: Any, tensors: dict[str, Any], method: str) -> dict[str, Any]:
    """What vLLM computes around the layer without attention: the fusion of the target's states, and draft logits as the target's."""
    import torch

    if method != "eagle3":
        return {}
    torch.manual_seed(1)
    known, state = torch.randn(5, tensors["fc.weight"].shape[1]), torch.randn(5, len(tensors["norm.weight"]))
    own = state @ tensors["lm_head.weight"].T
    wanted = own
    if "d2t" in tensors:
        wanted = torch.full((5, tensors["t2d"].shape[0]), -torch.inf)
        wanted[:, tensors["d2t"] + torch.arange(len(tensors["d2t"]))] = own
    return {
        "fusion_equal": bool(
            torch.allclose(model.combine_hidden_states(known), known @ tensors["fc.weight"].T, atol=1e-4)
        ),
        "logits_equal": bool(torch.allclose(model.compute_logits(state), wanted, atol=1e-4)),
    }


def verdict(name: str, result: dict[str, Any]) -> bool:
    """Whether a case came out as it should; the control is there to be noticed."""
    if "error" in result or result["missing"]:
        return False
    if name == CONTROL:
        return result["differing"] == ["model.fc.weight"]
    formulas_hold = result.get("fusion_equal", True) and result.get("logits_equal", True)
    return (
        not result["differing"] and formulas_hold and set(result["left_to_the_target"]) <= {"model.embed_tokens.weight"}
    )


def report(python: Path, results: dict[str, dict[str, Any]]) -> str:
    """The results as a page."""
    modules = "vllm, torch, transformers"
    script = f"import platform, {modules}; print(*(m.__version__ for m in ({modules})), platform.python_version())"
    asked = subprocess.run([python, "-c", script], capture_output=True, text=True, check=True)
    versions = asked.stdout.split()[-4:]
    date = datetime.date.today().isoformat()
    lines = [
        f"# vLLM reads our EAGLE folders ({date})",
        "",
        f"`{shlex.join(['python', *sys.argv])}`",
        "",
        f"vLLM {versions[0]}, torch {versions[1]}, Transformers {versions[2]}, Python {versions[3]}, on a CPU. Drafters of random",
        "weights for a random Llama of 8 layers (hidden size 64, vocabulary 256, linear rotary scaling). *Layers*: the ids that",
        "vLLM's config holds. *Equal*: every tensor of the folder is in the class that vLLM built from it, bit for bit. *Dropped*:",
        "read by other engines only. *From the target*: parameters that no tensor of the folder is for. *Formulas*: the fusion of",
        "the states, and draft logits placed at the target's token ids, against plain products of the folder's tensors.",
        "",
        "| folder | vLLM's class | layers | tensors | equal | dropped | from the target | formulas |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, result in results.items():
        if "error" in result:
            lines.append(f"| {name} | {result['error']} | | | no | | | |")
            continue
        differing = [*result["differing"], *result["missing"]]
        holds = [result[key] for key in ("fusion_equal", "logits_equal") if key in result]
        cells = [
            name,
            f"`{result['class']}`",
            "-" if "EAGLE-1" in name else ", ".join(map(str, result["layers"] or ["default"])),
            str(result["checkpoint_tensors"]),
            "all" if not differing else f"not {', '.join(differing)}",
            ", ".join(result["dropped"]) or "-",
            ", ".join(result["left_to_the_target"]) or "-",
            "-" if not holds else "hold" if all(holds) else "differ",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    warning = " and warns" if results[CONTROL].get("log_names_it") else ", and its log does not name the tensor"
    rope = next(result["rope"] for result in results.values() if "rope" in result)
    lines += [
        "",
        f"Rotary settings as vLLM resolved them: `{json.dumps(rope)}`.",
        "",
        f"The control is a folder whose `fc.weight` was taken out. vLLM loads it{warning}; this comparison notices.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
