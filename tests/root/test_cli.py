"""The command `draftsmith` as a stranger meets it."""

import dataclasses
import errno
import inspect
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path

import docstring_parser
import pytest

import draftsmith
from draftsmith import cli
from draftsmith.arguments import field_help, flat_parameters, gather_lists, list_options, parser_for, whole_options
from draftsmith.decode.decode_command import EndingOptions
from draftsmith.models.target.options import TargetOptions
from draftsmith.outline import outline

PARSED = [name for name, command in cli.COMMANDS.items() if not command.reads_arguments]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., None]], None]:
    """Puts a function in the place of `draftsmith export`."""

    def replace(function: Callable[..., None]) -> None:
        module = types.ModuleType("draftsmith_fake_command")
        module.run = function  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setitem(cli.COMMANDS, ("export",), cli.Command(module.__name__, "run", "Fake."))

    return replace


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    for name, command in cli.COMMANDS.items():
        assert " ".join(name) in text
        assert command.summary in text


def test_help_of_a_group_lists_that_group_only(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data"]) == 0
    text = capsys.readouterr().out
    assert "data extract" in text
    assert "evaluate" not in text


def test_the_overview_loads_neither_torch_nor_jsonargparse_and_is_quick() -> None:
    script = (
        "import sys; from draftsmith.cli import main\n"
        "code = main(['--help'])\n"
        "sys.exit(code or any(name in sys.modules for name in ('torch', 'transformers', 'jsonargparse')))"
    )
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - start < 5  # a tenth of a second on an idle machine


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"draftsmith {draftsmith.__version__}\n"


@pytest.mark.parametrize(
    ("words", "hint"),
    [(["evalute"], "evaluate"), (["data", "extrct"], "data extract"), (["extract"], "data extract"), (["dat"], "data")],
)
def test_an_unknown_command_is_answered_with_the_nearest(
    capsys: pytest.CaptureFixture[str], words: list[str], hint: str
) -> None:
    assert cli.main(words) == 2
    assert hint in capsys.readouterr().err.partition("Did you mean ")[2].splitlines()[0]


def test_a_users_mistake_is_one_message_without_a_traceback(
    install: Callable[[Callable[..., None]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(width: int) -> None:
        raise ValueError(f"width {width} is below 1; give 1 or more")

    install(refuse)
    assert cli.main(["export", "--width", "0"]) == 1
    assert capsys.readouterr().err == "draftsmith export: error: width 0 is below 1; give 1 or more\n"


def test_a_full_disk_is_told_in_one_line(
    install: Callable[[Callable[..., None]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    def fill() -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "cache/shard-00000.safetensors")

    install(fill)
    assert cli.main(["export"]) == 1
    assert "No space left on device: 'cache/shard-00000.safetensors'" in capsys.readouterr().err


def test_a_fault_of_ours_keeps_its_traceback(install: Callable[[Callable[..., None]], None]) -> None:
    def break_down() -> None:
        raise RuntimeError("ours")

    install(break_down)
    with pytest.raises(RuntimeError, match="ours"):
        cli.main(["export"])


def test_an_interrupt_ends_with_the_shells_code(install: Callable[[Callable[..., None]], None]) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    install(interrupt)
    assert cli.main(["export"]) == 130


def test_arguments_of_train_are_handed_on_as_they_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    got: list[list[str]] = []
    module = types.ModuleType("draftsmith_fake_train")
    module.main = got.append  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(cli.COMMANDS, ("train",), cli.Command(module.__name__, "main", "Fake.", True))
    (tmp_path / "x.yaml").write_text("trainer: {max_epochs: 1}")
    words = ["fit", "--config", str(tmp_path / "x.yaml"), "--config=trainer: {devices: 1}"]
    assert cli.main(["train", *words]) == 0
    assert got == [words]


@pytest.mark.parametrize("content", [None, "a: [", "- a"])
def test_a_config_of_train_that_is_no_file_of_options_is_told_before_lightning_is_imported(
    content: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(cli.COMMANDS, ("train",), cli.Command("draftsmith_no_such_module", "main", "Fake.", True))
    file = tmp_path / "x.yaml"
    if content is not None:
        file.write_text(content)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", "fit", f"--config={file}"])
    assert stopped.value.code == 2
    told = capsys.readouterr().err
    assert f"draftsmith train: error: --config {file}" in told
    assert "draftsmith train --help" in told


@pytest.mark.parametrize("name", cli.COMMANDS, ids=" ".join)
def test_every_command_can_be_imported(name: tuple[str, ...]) -> None:
    assert callable(cli.COMMANDS[name].load())


@pytest.mark.parametrize("name", PARSED, ids=" ".join)
def test_every_option_is_explained_in_the_docstring_of_its_function(name: tuple[str, ...]) -> None:
    function = cli.COMMANDS[name].load()
    described = docstring_parser.parse(inspect.getdoc(function) or "")
    explained = {parameter.arg_name for parameter in described.params if parameter.description}
    for kind in flat_parameters(function).values():
        assert [name for name, text in field_help(kind).items() if not text] == []
    assert explained >= set(inspect.signature(function).parameters)
    assert described.short_description
    assert "usage: draftsmith" in parser_for(function, " ".join(["draftsmith", *name])).format_help()


@pytest.mark.parametrize("name", PARSED, ids=" ".join)
def test_the_outline_of_a_command_has_the_options_of_the_command(name: tuple[str, ...]) -> None:
    command = cli.COMMANDS[name]
    read, real = outline(command.module, command.function), command.load()
    assert parser_for(read, "x").format_help().split() == parser_for(real, "x").format_help().split()
    assert (list_options(read), whole_options(read)) == (list_options(real), whole_options(real))


def test_help_and_mistakes_of_every_command_import_no_torch_and_make_no_folder(tmp_path: Path) -> None:
    mistakes = [[*name, "--help"] for name in cli.COMMANDS]
    mistakes += [["train", "fit", "--help"], ["train", "ftt"], ["train", "fit", "--config", "none.yaml"]]
    mistakes += [["evaluate", "--no-such-option", "1"], ["data", "extract", "--layers"], ["tune", "--widths", "1,a"]]
    script = (
        "import contextlib, io, sys\nfrom draftsmith.cli import main\ncodes = []\n"
        f"for words in {mistakes!r}:\n"
        "    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):\n"
        "        try: codes.append(main(words))\n"
        "        except SystemExit as stopped: codes.append(stopped.code)\n"
        "print(codes, [name for name in ('torch', 'transformers', 'numpy', 'pytorch_lightning') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    expected = [0 if words[-1] == "--help" else 2 for words in mistakes]
    assert (done.stdout.strip(), done.stderr) == (f"{expected} []", "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", PARSED, ids=" ".join)
def test_every_list_option_takes_every_form_of_a_list(name: tuple[str, ...]) -> None:
    function = cli.COMMANDS[name].load()
    parser = parser_for(function, "x")
    kinds = {action.dest: action for action in parser._actions}
    for option, text in list_options(function).items():
        values, whole = (["1x4", "2x4"] if text else ["1", "2"]), option in whole_options(function)
        forms = [[f"--{option}", *values], [f"--{option}", values[0], f"--{option}={values[1]}"]]
        forms += [
            [f"--{option}", str(values).replace("'", '"')],
            *([] if whole else [[f"--{option}", ",".join(values)]]),
        ]
        read = [gather_lists(words, {option: text}, {option} if whole else ()) for words in forms]
        assert all(words == read[0] for words in read)
        if option in kinds:  # fields of an optional dataclass have no line of their own in the help
            assert f"--{option} A B" in kinds[option].help


def test_a_reader_that_leaves_early_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "loud.py").write_text("def run() -> None:\n    for i in range(100000):\n        print(i, flush=True)\n")
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); from draftsmith import cli\n"
        "cli.COMMANDS[('export',)] = cli.Command('loud', 'run', '')\n"
        "sys.exit(cli.main(['export']))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (0, b"")


def test_no_command_has_an_option_of_its_own_that_a_shared_group_has() -> None:
    """What means the same everywhere has its names and help written once."""
    groups = (TargetOptions, EndingOptions)
    shared = {field.name for group in groups for field in dataclasses.fields(group)}
    for name, command in cli.COMMANDS.items():
        if not command.reads_arguments:
            function = command.outline()
            own = set(inspect.signature(function).parameters) - set(flat_parameters(function))
            assert own & shared == set(), " ".join(name)
