"""Training that gets a signal to stop, or loses a node, in processes of its own; the two nodes are network namespaces of this machine."""

import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
import torch
from training import MakeCache, tiny_config

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = ROOT / "train.py"
LENGTHS = [9] * 20
TOKENS = "--data.init_args.tokens_per_batch=20"

# Validation that cannot end by itself: `told` sleeps, where a signal is heard, everybody else waits in a call that hears nothing.
STUCK = """
import ctypes, sys, time
from pathlib import Path
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from draftsmith.train.batches.data_module import CacheDataModule
from draftsmith.train import Preemption, ResumeValidation
from training import make_module, make_trainer

target, cache, folder, devices = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])

class Stuck(pl.Callback):
    def on_validation_epoch_end(self, trainer, module):
        (folder / f"stuck-{trainer.global_rank}").touch()
        if trainer.global_rank == 1:
            time.sleep(600)
        elif trainer.world_size > 1:
            torch.distributed.barrier()
        else:
            lock, library = ctypes.create_string_buffer(128), ctypes.CDLL(None)
            library.pthread_mutex_lock(lock)
            library.pthread_mutex_lock(lock)

keeper = ModelCheckpoint(folder / "checkpoints", save_last=True, save_top_k=0)
trainer = make_trainer(
    folder, devices=devices, strategy="ddp" if devices > 1 else "auto", enable_checkpointing=True,
    callbacks=[Stuck(), keeper, ResumeValidation(), Preemption(leave_after=1.0)],
)
trainer.fit(make_module(target), CacheDataModule(cache, val_fraction=0.2, tokens_per_batch=20))
"""


@contextmanager
def started(command: list[str], log: Path, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a group of its own; whatever happens, the group is gone in the end."""
    paths = f"{ROOT / 'tests' / 'helpers'}:{os.environ.get('PYTHONPATH', '')}"
    variables = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | environment
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=variables, start_new_session=True
        )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(60)


def wait_until(there: Callable[[], bool], process: subprocess.Popen[bytes], log: Path, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not there():
        assert process.poll() is None, log.read_text(errors="replace")[-4000:]
        assert time.monotonic() < deadline, log.read_text(errors="replace")[-4000:]
        time.sleep(0.02)


def expect(code: int, process: subprocess.Popen[bytes], log: Path, seconds: float = 240) -> None:
    assert process.wait(seconds) == code, log.read_text(errors="replace")[-4000:]


def fit(config: Path, *arguments: str) -> list[str]:
    return [sys.executable, str(SCRIPT), "fit", f"--config={config}", TOKENS, *arguments]


def children(pid: int) -> list[int]:
    """Processes that a process started to train beside it; a loader's workers are not among them."""
    mine = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in mine if b"train.py" in Path(f"/proc/{child}/cmdline").read_bytes()]


def content(folder: Path) -> dict[str, torch.Tensor]:
    """Weights of the last checkpoint of a run, and its step."""
    checkpoint = torch.load(folder / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    return {"step": torch.tensor(checkpoint["global_step"])} | checkpoint["state_dict"]


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def new_run(folder: Path, target: Path, cache: Path) -> tuple[Path, Path]:
    folder.mkdir()
    return tiny_config(folder, target, cache), folder / "log"


TWO = ("--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.max_epochs=3")
SHARDED = (*TWO, "--trainer.strategy={class_path: draftsmith.train.FullyShard}")


@pytest.fixture(scope="module")
def two_undisturbed(target_dir: Path, make_cache: MakeCache, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    """A cache, and the end of a run of two processes on it."""
    cache, folder = make_cache(LENGTHS), tmp_path_factory.mktemp("two") / "whole"
    config, log = new_run(folder, target_dir, cache)
    with started(fit(config, *TWO), log) as process:
        expect(0, process, log)
    return cache, content(folder)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("two", [TWO, SHARDED], ids=["ddp", "fsdp2"])
def test_when_one_of_two_processes_is_told_both_stop_at_the_same_step_and_resume_to_the_same_weights(
    target_dir: Path, two_undisturbed: tuple, tmp_path: Path, two: tuple[str, ...]
) -> None:
    """Shards are written, and not read again here: `test_engines.py` resumes them, to the same bits."""
    cache, expected = two_undisturbed
    config, log = new_run(tmp_path / "told", target_dir, cache)
    with started(fit(config, *two), log) as process:
        wait_until((tmp_path / "told" / "run" / "checkpoints" / "last.ckpt").exists, process, log)
        [other] = children(process.pid)
        os.kill(other, signal.SIGTERM)
        expect(0, process, log)
    stopped = content(tmp_path / "told")["step"]
    assert 0 < stopped < expected["step"]
    if two is SHARDED:
        return
    with started(fit(config, *two, "--ckpt_path=last"), log) as process:
        expect(0, process, log)
    assert_same(content(tmp_path / "told"), expected)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("devices", [1, 2])
def test_a_run_told_in_validation_ends_although_a_process_waits_where_it_hears_nothing(
    target_dir: Path, make_cache: MakeCache, tmp_path: Path, devices: int
) -> None:
    script, log = tmp_path / "train.py", tmp_path / "log"
    script.write_text(STUCK)
    command = [sys.executable, str(script), str(target_dir), str(make_cache(LENGTHS)), str(tmp_path), str(devices)]
    with started(command, log) as process:
        wait_until(lambda: len(list(tmp_path.glob("stuck-*"))) == devices, process, log)
        others = children(process.pid)
        # Long enough for them to be inside what they wait in.
        time.sleep(2.0)
        process.send_signal(signal.SIGTERM)
        expect(0, process, log, seconds=120)
        assert len(others) == devices - 1
        deadline = time.monotonic() + 120
        while any(Path(f"/proc/{other}").exists() for other in others) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not any(Path(f"/proc/{other}").exists() for other in others)
    checkpoint = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["validation_due"]


def no_namespaces() -> str:
    """Why there can be none here; empty where there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "network namespaces need `ip` (iproute2)"
    name = f"ds{uuid.uuid4().hex[:8]}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, timeout=60)
    subprocess.run(["ip", "netns", "delete", name], capture_output=True, timeout=60)
    return f"`ip netns add` fails: {made.stderr.strip()}" if made.returncode else ""


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=60)


@contextmanager
def two_nodes() -> Iterator[list[str]]:
    """Two network namespaces that see nothing but each other, as 10.77.0.1 and 10.77.0.2."""
    mark = uuid.uuid4().hex[:8]
    names = [f"ds{mark}{side}" for side in "ab"]
    try:
        for name in names:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("link", "add", "veth0", "netns", names[0], "type", "veth", "peer", "name", "veth0", "netns", names[1])
        for number, name in enumerate(names, 1):
            ip("-n", name, "address", "add", f"10.77.0.{number}/24", "dev", "veth0")
            ip("-n", name, "link", "set", "veth0", "up")
        yield names
    finally:
        for name in names:
            kill_all(name)
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, timeout=60)


def node(name: str, number: int, job: str, config: Path) -> list[str]:
    """The agent of one node, as on a cluster; the folder of the run is shared."""
    agent = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--max-restarts=0"]
    meeting = ["--rdzv-backend=c10d", "--rdzv-endpoint=10.77.0.1:29400", f"--rdzv-id={job}"]
    own = [f"--local-addr=10.77.0.{number}", f"--rdzv-conf=is_host={int(number == 1)},timeout=240,read_timeout=20"]
    train = [str(SCRIPT), "fit", f"--config={config}", TOKENS, *TWO, "--trainer.num_nodes=2", "--trainer.devices=1"]
    return ["ip", "netns", "exec", name, *agent, *meeting, *own, *train, "--ckpt_path=last"]


def kill_all(name: str) -> int:
    """Every process of a namespace, as a power cut does; gives how many there were."""
    pids = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, timeout=60).stdout.split()
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
    return len(pids)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_lost_node_comes_back_and_training_ends_with_the_weights_of_an_undisturbed_run(
    target_dir: Path, two_undisturbed: tuple, tmp_path: Path
) -> None:
    if reason := no_namespaces():
        pytest.skip(reason)
    cache, expected = two_undisturbed
    config, log = new_run(tmp_path / "run", target_dir, cache)
    job, checkpoint = uuid.uuid4().hex, tmp_path / "run" / "run" / "checkpoints" / "last.ckpt"
    environment = {"GLOO_SOCKET_IFNAME": "veth0"}
    with two_nodes() as names, ExitStack() as stack:

        def start(name: str) -> subprocess.Popen[bytes]:
            command = node(name, names.index(name) + 1, job, config)
            return stack.enter_context(started(command, log.with_name(name), **environment))

        agents = {name: start(name) for name in names}
        wait_until(checkpoint.exists, agents[names[0]], log.with_name(names[0]))
        assert kill_all(names[1]) >= 2, "the agent and its worker"
        stopped = content(tmp_path / "run")["step"]
        assert 0 < stopped < expected["step"]
        # As a scheduler does: an agent that ends with an error, whether its own node was lost or the other, is started again.
        deadline, restarts = time.monotonic() + 600, 0
        while any(agent.poll() != 0 for agent in agents.values()):
            assert time.monotonic() < deadline, log.with_name(names[0]).read_text()[-4000:]
            for name, agent in agents.items():
                if agent.poll() not in (None, 0):
                    restarts += 1
                    assert restarts <= 8, log.with_name(name).read_text()[-4000:]
                    agents[name] = start(name)
            time.sleep(0.2)
    assert restarts >= 2
    assert "resumed from" in log.with_name(names[0]).read_text()
    assert_same(content(tmp_path / "run"), expected)
