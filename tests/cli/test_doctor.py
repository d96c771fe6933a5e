"""The doctor's checks against real sockets, directories and packages."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
from typer.testing import CliRunner

from jaxserve import doctor
from jaxserve.cli.doctor import app
from jaxserve.doctor import Finding, Status


def test_this_machine_is_examined_whole(tmp_path: Path) -> None:
    findings = doctor.examine(cache_root=tmp_path)
    names = {finding.name for finding in findings}
    assert {"python", "packages", "processor", "memory", "devices", "cache"} <= names
    assert [f for f in findings if f.status is Status.BROKEN] == []
    assert all(bool(f.fix) == (f.status is not Status.OK) for f in findings)


def test_json_is_one_object_with_a_verdict() -> None:
    result = CliRunner().invoke(app, ["--json"])
    report = json.loads(result.stdout)
    assert report["healthy"] is (result.exit_code == 0)
    assert {"name", "status", "value", "fix"} == set(report["findings"][0])


def test_a_broken_finding_gives_exit_code_1(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = [Finding("jax", Status.BROKEN, "not installed", "install it")]
    monkeypatch.setattr("jaxserve.cli.doctor.examine", lambda: broken)
    result = CliRunner().invoke(app, [])
    assert result.exit_code == 1
    assert "fix: install it" in result.stdout


def test_a_missing_package_is_broken() -> None:
    findings = list(doctor.check_packages(("jax", "jaxlib", "no-such-package")))
    assert [f.name for f in findings if f.status is Status.BROKEN] == ["no-such-package"]


def test_a_taken_port_is_noted_with_its_flag() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        (finding,) = doctor.check_port("gRPC port", "--grpc-port", port)
    assert finding.status is Status.NOTE
    assert "--grpc-port" in finding.fix
    (finding,) = doctor.check_port("gRPC port", "--grpc-port", port)
    assert finding.status is Status.OK


@pytest.mark.parametrize(
    ("mode", "expected"), [(0o700, Status.OK), (0o755, Status.BROKEN), (0o777, Status.BROKEN)]
)
def test_a_compilation_cache_open_to_others_is_broken(
    tmp_path: Path, mode: int, expected: Status
) -> None:
    path = tmp_path / "xla"
    path.mkdir()
    path.chmod(mode)
    finding = doctor.check_private_directory(path)
    assert finding.status is expected
    assert ("chmod 700" in finding.fix) is (expected is Status.BROKEN)


def test_a_directory_that_hides_our_packages_is_noted(tmp_path: Path) -> None:
    (tmp_path / "models.py").write_text("")
    (finding,) = doctor.check_own_packages(tmp_path)
    assert finding.status is Status.NOTE
    assert str(tmp_path / "models.py") in finding.value
    (finding,) = doctor.check_own_packages(tmp_path.parent)
    assert finding.status is Status.OK


def test_the_default_model_is_noted_until_it_is_downloaded(tmp_path: Path) -> None:
    (finding,) = doctor.check_default_model(tmp_path)
    assert finding.status is Status.NOTE
    assert finding.fix == "jaxserve pull smollm2-135m-instruct"


def test_an_unforeseen_failure_is_a_finding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "check_memory", lambda: 1 / 0)
    findings = {finding.name: finding for finding in doctor.examine(cache_root=tmp_path)}
    assert findings["memory"].status is Status.BROKEN
    assert "ZeroDivisionError" in findings["memory"].value
