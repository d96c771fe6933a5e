"""The process gives up what it does not need, and does not start on packages with known holes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from jaxserve.errors import ConfigError
from jaxserve.server.floors import FLOORS, check_floors
from jaxserve.server.hardening import Hardening, hardening

ROOT = Path(__file__).parents[2]
HARDEN = """
import dataclasses, json, os, resource, subprocess, sys
from jaxserve.server.hardening import harden, hardening
before = hardening()
after = harden()
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
child = subprocess.run(["grep", "NoNewPrivs", "/proc/self/status"], capture_output=True, text=True)
print(json.dumps({
    "before": dataclasses.asdict(before),
    "after": dataclasses.asdict(after),
    "kernel": status["NoNewPrivs"].strip(),
    "child": child.stdout.split()[1],
    "core": resource.getrlimit(resource.RLIMIT_CORE),
    "files": resource.getrlimit(resource.RLIMIT_NOFILE),
    "owner": os.stat("/proc/self/mem").st_uid,
}))
"""


def test_rights_that_are_not_needed_are_given_up():
    done = subprocess.run(
        [sys.executable, "-c", HARDEN], capture_output=True, text=True, check=True
    )
    told = json.loads(done.stdout)
    assert told["before"]["dumpable"]
    assert told["after"] | {"is_root": None} == {
        "no_new_privileges": True,
        "dumpable": False,
        "core_bytes": 0,
        "is_root": None,
    }
    assert (told["kernel"], told["child"]) == ("1", "1")
    assert told["core"] == [0, 0]
    assert told["files"][0] == told["files"][1]
    assert told["owner"] == 0  # Of a process that is not dumpable: nobody but root reads it.


def test_what_is_not_as_it_should_be_is_told():
    assert Hardening(True, False, 0, False).problems() == []
    problems = Hardening(False, True, 1, True).problems()
    assert len(problems) == 4
    assert any("root" in problem for problem in problems)
    assert hardening().dumpable  # This process has not been touched.


def test_packages_are_at_least_at_their_floors():
    check_floors()


@pytest.mark.parametrize("package", FLOORS)
def test_a_package_below_its_floor_is_refused(package):
    def installed(name: str) -> str:
        if name != package:
            return FLOORS[name]
        parts = [int(part) for part in FLOORS[name].split(".")]
        last = max(index for index, part in enumerate(parts) if part)
        return ".".join(map(str, [*parts[:last], parts[last] - 1, 99]))

    with pytest.raises(ConfigError, match=package):
        check_floors(installed)
    check_floors(FLOORS.__getitem__)


@pytest.mark.parametrize(
    ("version", "is_fine"),
    [("3.1.6", True), ("3.1.6.post1", True), ("3.2", True), ("4", True), ("10.0", True),
     ("3.1.5", False), ("3.1", False), ("3", False), ("2.99.99", False)],
)  # fmt: skip
def test_versions_compare_as_numbers(version, is_fine):
    def installed(name: str) -> str:
        return version if name == "jinja2" else "999"

    if is_fine:
        check_floors(installed)
    else:
        with pytest.raises(ConfigError, match=re.escape(f"jinja2 {version} (needs 3.1.6)")):
            check_floors(installed)


def test_the_lock_pins_every_package_by_hash():
    for name in ("runtime.txt", "dev.txt", "uv.txt"):
        text = (ROOT / "requirements" / name).read_text()
        blocks = re.split(
            r"\n(?=\S)",
            "\n".join(line for line in text.splitlines() if not line.strip().startswith("#")),
        )
        pinned = [block for block in blocks if block.strip()]
        assert pinned
        assert all("==" in block and "--hash=sha256:" in block for block in pinned), name
    versions = dict(
        re.findall(
            r"^([a-z0-9-]+)==([0-9.]+)", (ROOT / "requirements/runtime.txt").read_text(), re.M
        )
    )
    assert {name for name in FLOORS if name not in versions} == set()
