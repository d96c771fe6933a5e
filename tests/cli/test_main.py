"""The command line's shell, run as a user runs it: in a process of its own."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import typer

from checkpoint.errors import FormatError
from jaxserve.cli.main import SUMMARIES, app, is_user_error
from jaxserve.errors import ConfigError, InvalidRequest
from tests.engine.tiny_model import make_tiny_model

SCRIPT = Path(sys.executable).parent / "jaxserve"


def jaxserve(*args: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [SCRIPT, *args], cwd=cwd, capture_output=True, text=True, timeout=60, check=False
    )


def test_help_lists_every_command_and_no_help_loads_jax() -> None:
    program = (
        "import sys; sys.argv = ['jaxserve', '--help']\n"
        "from jaxserve.cli.main import SUMMARIES, main\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "loaded = {'jax', 'grpc', 'numpy', 'flax'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
        "import importlib\n"
        "for name in SUMMARIES: importlib.import_module(f'jaxserve.cli.{name}')\n"
        "assert 'jax' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in SUMMARIES)


def test_help_takes_less_than_a_second_of_the_processor() -> None:
    # Not of the clock: other programs may have the processor meanwhile.
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert jaxserve("--help").returncode == 0
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0


def test_version() -> None:
    from jaxserve import __version__

    assert jaxserve("--version").stdout == f"jaxserve {__version__}\n"


@pytest.mark.parametrize("name", SUMMARIES)
def test_every_command_loads_and_explains_itself(name: str) -> None:
    command = typer.main.get_command(app)
    with command.make_context("jaxserve", ["--help"], resilient_parsing=True) as context:
        _, subcommand, _ = command.resolve_command(context, [name])
        assert subcommand.help
        assert all(
            parameter.help
            for parameter in subcommand.params
            if parameter.name not in ("help", "install_completion", "show_completion")
        )


def test_unknown_command_names_the_nearest() -> None:
    done = jaxserve("serv")
    assert done.returncode == 2
    assert "serve" in done.stderr
    assert "Traceback" not in done.stderr


def test_user_mistake_is_one_line_and_exit_code_2() -> None:
    done = jaxserve("models", "remove", "no-such-model")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert "smollm2-135m-instruct" in done.stderr


def test_own_errors_are_told_from_defects() -> None:
    assert is_user_error(ConfigError("--dtype"))
    assert is_user_error(InvalidRequest("top_p", "too large"))
    assert is_user_error(FormatError("no GGUF file"))
    assert not is_user_error(ValueError("a defect"))
    assert not is_user_error(KeyError("a defect"))


def _as_raised(function: Callable[[], object]) -> OSError:
    with pytest.raises(OSError) as caught:  # noqa: PT011  which one is not the matter here
        function()
    return caught.value


def test_an_os_error_is_the_users_only_while_a_model_is_read(tmp_path: Path) -> None:
    from models.loading import open_model

    assert not is_user_error(_as_raised(lambda: (tmp_path / "none").open()))
    assert not is_user_error(_as_raised(lambda: os.kill(2**22 + 1, 0)))
    # Every read at the beginning of this file is an input/output error.
    (tmp_path / "config.json").symlink_to("/proc/self/mem")
    assert is_user_error(_as_raised(lambda: open_model(tmp_path)))
    assert is_user_error(_as_raised(lambda: open_model(tmp_path / "nothing.gguf")))


@pytest.mark.parametrize(
    "kind", ["dangling weights", "dangling config", "unreadable config", "weights are a directory"]
)
def test_a_model_that_cannot_be_read_is_one_line(tmp_path: Path, kind: str) -> None:
    model = make_tiny_model(tmp_path / "tiny")
    broken = model / ("config.json" if "config" in kind else "model.safetensors")
    broken.unlink()
    if "unreadable" in kind:
        broken.symlink_to("/proc/self/mem")
    elif "directory" in kind:
        broken.mkdir()
    else:
        broken.symlink_to(tmp_path / "gone")
    done = subprocess.run(
        [sys.executable, "-m", "jaxserve", "generate", "hi", "--model", model],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1, done.stderr
    assert "--model" in done.stderr or broken.name in done.stderr or "safetensors" in done.stderr


def test_completion_offers_commands_and_options() -> None:
    done = subprocess.run(
        [SCRIPT],
        env={
            "HOME": str(Path.home()),
            "_JAXSERVE_COMPLETE": "complete_bash",
            "COMP_WORDS": "jaxserve do",
            "COMP_CWORD": "1",
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout.split() == ["doctor"]
