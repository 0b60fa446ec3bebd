"""Every engine's fragment goes with every drafter's configuration."""

from pathlib import Path

import pytest
import yaml

from draftsmith import configs
from draftsmith.cli import main

FOLDER = Path(configs.__file__).parent
ENGINES = sorted((FOLDER / "engines").glob("*.yaml"))
DRAFTERS = [path for path in sorted(FOLDER.glob("*.yaml")) if "\nbase: " in path.read_text()]
CLASSES: dict[str, tuple[str, dict[str, object]]] = {
    "ddp": ("pytorch_lightning.strategies.DDPStrategy", {"gradient_as_bucket_view": True}),
    "fsdp2": ("draftsmith.train.FullyShard", {}),
    "zero2": ("draftsmith.train.Zero", {"stage": 2}),
    "zero3": ("draftsmith.train.Zero", {"stage": 3}),
}


def test_there_is_a_fragment_for_every_engine() -> None:
    assert [path.stem for path in ENGINES] == ["ddp", "fsdp2", "one", "zero2", "zero3"]
    assert len(DRAFTERS) >= 8


@pytest.mark.parametrize("drafter", DRAFTERS, ids=lambda path: path.stem)
@pytest.mark.parametrize("engine", ENGINES, ids=lambda path: path.stem)
def test_a_fragment_sets_the_engine_and_nothing_else(
    drafter: Path, engine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    resolved = []
    for fragments in ([], [f"--config={engine}"]):
        with pytest.raises(SystemExit) as stopped:
            main(["train", "fit", f"--config={drafter}", *fragments, "--print_config"])
        output = capsys.readouterr()
        assert stopped.value.code == 0, output.err
        resolved.append(yaml.safe_load(output.out))
    alone, together = resolved
    assert together["model"] == alone["model"]
    assert together["data"] == alone["data"]
    changed = {name for name, value in together["trainer"].items() if value != alone["trainer"][name]}
    assert changed <= {"accelerator", "devices", "num_nodes", "strategy", "precision"}
    strategy = together["trainer"]["strategy"]
    if engine.stem in CLASSES:
        name, chosen = CLASSES[engine.stem]
        assert strategy["class_path"] == name
        assert strategy["init_args"].items() >= chosen.items()
    else:
        assert strategy == "auto"
