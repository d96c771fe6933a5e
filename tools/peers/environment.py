"""PeerEnvironment: a virtual environment with another engine's own packages."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

Install = Callable[[Path], None]
"""Installs more, given the environment's Python."""


@dataclass(frozen=True, slots=True)
class PeerEnvironment:
    """Made at first use, and anew when what belongs into it has changed."""

    folder: Path
    packages: tuple[str, ...]
    """Arguments of `pip install`."""
    also: Install | None = None
    """Called after them."""

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    def make(self) -> None:
        """Nothing is done if it is there. Raises CalledProcessError if pip fails."""
        done = self.folder / "packages.json"
        if done.is_file() and json.loads(done.read_text()) == list(self.packages):
            return
        print(f"installing {self.folder.name}: {' '.join(self.packages)}", file=sys.stderr)
        done.unlink(missing_ok=True)
        command = [sys.executable, "-m", "venv", "--clear", str(self.folder)]
        subprocess.run(command, check=True)
        pip_install(self.python, self.packages)
        if self.also is not None:
            self.also(self.python)
        done.write_text(json.dumps(self.packages))


def pip_install(python: Path, arguments: Sequence[str]) -> None:
    """`pip install` in the environment of `python`."""
    subprocess.run([str(python), "-m", "pip", "install", "-q", *arguments], check=True)


def output_of(python: Path, code: str) -> str:
    """What a line of Python prints there."""
    done = subprocess.run([str(python), "-c", code], check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout.strip()
