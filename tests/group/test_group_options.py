"""Options of `jaxserve serve` about other processes: what is taken, what is refused and how."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jaxserve.cli.group_options import GroupOptions
from jaxserve.cli.serve_group import check_follower_options
from jaxserve.engine.config import EngineConfig
from jaxserve.errors import ConfigError
from jaxserve.server.config import ServerConfig

NONE: dict[str, Any] = {
    "processes": 1,
    "coordinator": None,
    "process_id": None,
    "num_processes": None,
    "token_file": None,
    "follower_timeout_s": 10.0,
}


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.write_text("a secret for this test alone\n")
    path.chmod(0o600)
    return path


def test_one_process_is_no_group() -> None:
    assert GroupOptions(**NONE).config() is None


def test_followers_on_this_host_get_a_secret_of_their_own() -> None:
    one = GroupOptions(**{**NONE, "processes": 3}).config()
    other = GroupOptions(**{**NONE, "processes": 3}).config()
    assert one is not None
    assert other is not None
    assert (one.num_processes, one.process_id, one.host) == (3, 0, "127.0.0.1")
    assert one.token != other.token
    assert one.token.decode() not in repr(one)


def test_a_process_of_several_hosts(token_file: Path) -> None:
    given = {"coordinator": "10.0.0.1:50100", "process_id": 1, "num_processes": 2}
    group = GroupOptions(**{**NONE, **given, "token_file": token_file}).config()
    assert group is not None
    assert (group.host, group.port, group.process_id) == ("10.0.0.1", 50100, 1)
    assert group.token == b"a secret for this test alone"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"processes": 0}, "--processes must be at least 1"),
        ({"processes": 2, "coordinator": "h:1"}, "--processes for one host, or --coordinator"),
        ({"coordinator": "h:1", "process_id": 0}, "--num-processes and --group-token-file"),
        ({"process_id": 1}, "--process-id is for several hosts and needs --coordinator"),
        ({"num_processes": 2}, "--num-processes is for several hosts"),
        ({"processes": 2, "follower_timeout_s": 0.5}, "--follower-timeout-s must be at least 1"),
        (
            {"coordinator": "h:1", "process_id": 2, "num_processes": 2},
            r"--process-id must be in \[0, 2\)",
        ),
        ({"coordinator": "h:1", "process_id": 0, "num_processes": 1}, "must be at least 2"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(
    given: dict[str, Any], message: str, token_file: Path
) -> None:
    if given.keys() >= {"coordinator", "process_id", "num_processes"}:
        given = {**given, "token_file": token_file}
    with pytest.raises(ConfigError, match=message):
        GroupOptions(**{**NONE, **given}).config()


@pytest.mark.parametrize(
    ("engine", "server", "flag"),
    [
        ({"token_budget": 64}, {}, "--token-budget"),
        ({"prefix_caching": False}, {}, "--no-prefix-caching"),
        ({}, {"grpc_port": 0}, "--grpc-port"),
        ({}, {"allowed_hosts": ("a",)}, "--allowed-host"),
    ],
)
def test_a_follower_refuses_what_the_leader_decides(
    engine: dict[str, Any], server: dict[str, Any], flag: str
) -> None:
    with pytest.raises(ConfigError, match=f"^{flag} is for process 0"):
        check_follower_options(1, EngineConfig(**engine), ServerConfig(**server))


def test_a_follower_has_a_model_and_a_cache_of_its_own(tmp_path: Path) -> None:
    config = EngineConfig(model="other", compilation_cache_dir=tmp_path)
    check_follower_options(1, config, ServerConfig())
