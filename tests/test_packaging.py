"""What is installed and shipped: import guard, locks, typed markers, licence."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import jaxserve

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = Path(sys.executable).parent / "jaxserve"


def run(*args: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(args, cwd=cwd, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture(params=["models.py", "checkpoint.py", "schedules.py", "models/__init__.py"])
def foreign_directory(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    file = tmp_path / request.param
    file.parent.mkdir(exist_ok=True)
    file.write_text("raise RuntimeError('a foreign module was run')\n")
    return tmp_path


def test_console_script_works_beside_foreign_packages(foreign_directory: Path) -> None:
    done = run(SCRIPT, "models", cwd=foreign_directory)
    assert done.returncode == 0, done.stderr


def test_import_beside_foreign_packages_says_what_to_do(foreign_directory: Path) -> None:
    done = run(sys.executable, "-c", "import jaxserve", cwd=foreign_directory)
    assert done.returncode == 1
    message = done.stderr.splitlines()[-1]
    assert message.startswith("ImportError: jaxserve needs its own packages")
    assert str(foreign_directory.resolve()) in message
    assert "python -P" in message
    assert "was run" not in done.stderr  # looked at, not imported


def test_import_is_fine_with_the_safe_path(foreign_directory: Path) -> None:
    done = run(sys.executable, "-P", "-c", "import jaxserve, models", cwd=foreign_directory)
    assert done.returncode == 0, done.stderr


def test_a_folder_without_code_hides_nothing(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()  # a user's folder of model files
    done = run(sys.executable, "-c", "import jaxserve, models.config", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_guard_is_cheap() -> None:
    program = (
        "import sys, jaxserve; print(len({'jax', *jaxserve.SIBLING_PACKAGES} & set(sys.modules)))"
    )
    assert run(sys.executable, "-c", program, cwd=ROOT).stdout == "0\n"


def test_no_foreign_packages_here() -> None:
    assert jaxserve.foreign_packages() == {}


@pytest.mark.parametrize("name", ["uv", "runtime", "dev", "cuda12", "cuda13"])
def test_locks_pin_with_hashes_and_name_no_index(name: str) -> None:
    text = (ROOT / "requirements" / f"{name}.txt").read_text()
    pins = re.findall(r"^[a-z0-9]\S*==\S+ .*\\\n    --hash=sha256:", text, re.MULTILINE)
    lines = [line for line in text.splitlines() if line[:1].isalnum()]
    assert lines
    assert len(pins) == len(lines)
    assert not re.search(r"https?://|file:|--(extra-)?index-url|--find-links", text)


def test_dev_lock_holds_the_runtime_lock() -> None:
    runtime, dev = (
        {
            line
            for line in (ROOT / f"requirements/{name}.txt").read_text().splitlines()
            if "==" in line
        }
        for name in ("runtime", "dev")
    )
    assert runtime <= dev


def test_packages_are_typed_and_licensed() -> None:
    assert all(
        (ROOT / name / "py.typed").is_file() for name in ("jaxserve", *jaxserve.SIBLING_PACKAGES)
    )
    assert "Apache License" in (ROOT / "LICENSE").read_text()


@pytest.mark.long
def test_wheel_holds_the_packages_and_nothing_else(tmp_path: Path) -> None:
    import zipfile

    uv = SCRIPT.with_name("uv")
    build = [uv, "build", "--wheel", "--no-build-isolation", "--out-dir", tmp_path]
    done = run(*build, "--python", sys.executable, ROOT, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.partition("/")[0] for name in names}
    assert tops == {
        "jaxserve",
        "models",
        "checkpoint",
        "schedules",
        f"jaxserve-{jaxserve.__version__}.dist-info",
    }
    assert {f"{top}/py.typed" for top in ("jaxserve", *jaxserve.SIBLING_PACKAGES)} <= set(names)
