"""`jaxserve top` beside a server on real sockets, and the arithmetic of its windows."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import threading
import time

import pytest
from typer.testing import CliRunner

from jaxserve.cli import top
from jaxserve.cli.top_view import sparkline
from jaxserve.errors import ConfigError, Forbidden, NotAccepting
from jaxserve.load_window import LoadWindow, quantile
from jaxserve.proto.v1 import control_pb2 as pb
from jaxserve.server.tls import TlsFiles
from tests.security.certificates import issue, make_ca
from tests.security.keys import KEYS, keyed_service, write_keys
from tests.server.conftest import make_service, service
from tests.server.scripted_service import start_service

__all__ = ["make_service", "service"]


def run(*arguments: str):
    return CliRunner().invoke(top.app, ["--once", "--interval-s", "0.3", *arguments])


def values(*arguments: str):
    done = run("--json", *arguments)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_one_window_of_a_busy_server(service):
    service.executor.step_s = 0.05
    calls = [service.client.generate("hello", max_tokens=480) for _ in range(4)]
    streams = [threading.Thread(target=list, args=(call,)) for call in calls]
    for stream in streams:
        stream.start()
    seen = values("--server", service.address)
    for call in calls:
        call.cancel()
    for stream in streams:
        stream.join(timeout=30)
    assert (seen["server"]["state"], seen["model"]["name"]) == ("ready", "script")
    assert seen["load"]["num_running"] >= 1
    assert seen["load"]["num_compiles_after_ready"] == 0
    assert seen["window"]["window_s"] >= 0.3
    assert seen["window"]["output_tokens_per_s"] > 0
    assert 0 < seen["window"]["step_fill"] <= 1
    assert seen["window"]["itl"]["p50_ms"] > 0


def test_the_view_names_what_there_is(service):
    done = run("--server", service.address)
    assert done.exit_code == 0, done.output
    for part in ("script", "ready", "KV pages", "0 / 128", "time to first token", "0 after READY"):
        assert part in done.stdout
    assert "Traceback" not in done.output


def test_a_key_needs_the_role(tmp_path):
    service = keyed_service(write_keys(tmp_path / "keys.toml"))
    try:
        for tenant in ("alpha", "watcher"):
            (tmp_path / tenant).write_text(f"{KEYS[tenant]}\n")
        key = ["--api-key-file", str(tmp_path / "alpha"), "--server", service.address]
        assert isinstance(run(*key).exception, Forbidden)
        # `watcher` is good for figures alone, and model and state are for any key.
        key = ["--api-key-file", str(tmp_path / "watcher"), "--server", service.address]
        assert values(*key)["server"]["state"] == "ready"
    finally:
        service.close()


def test_over_tls_with_a_certificate_of_its_own(tmp_path):
    ca = make_ca("test CA")
    ca_file, _ = ca.write(tmp_path, "ca")
    server, client = (issue(name, ca).write(tmp_path, name) for name in ("server", "client"))
    service = start_service(server_settings={"tls": TlsFiles(*server, ca_file)})
    service.make_ready()
    try:
        trusting = ["--server", service.address, "--tls-ca", str(ca_file)]
        own = ["--tls-certificate", str(client[0]), "--tls-key", str(client[1])]
        assert values(*trusting, *own)["model"]["name"] == "script"
        assert isinstance(run(*trusting).exception, NotAccepting)
    finally:
        service.close()


def test_what_is_wrong_is_told(tmp_path, make_service):
    assert isinstance(run("--server", "127.0.0.1:1").exception, NotAccepting)
    starting = make_service(ready=False)
    assert "starting" in str(run("--server", starting.address).exception)
    with pytest.raises(ConfigError, match="--once"):
        CliRunner().invoke(top.app, ["--json"], catch_exceptions=False)
    with pytest.raises(ConfigError, match="no terminal"):
        CliRunner().invoke(top.app, [], catch_exceptions=False)
    with pytest.raises(ConfigError, match=r"--api-key-file .*none"):
        raise run("--api-key-file", str(tmp_path / "none")).exception
    (tmp_path / "two").write_text("a b")
    with pytest.raises(ConfigError, match="one key and nothing else"):
        raise run("--api-key-file", str(tmp_path / "two")).exception
    with pytest.raises(ConfigError, match="go together"):
        raise run("--tls-key", str(tmp_path / "two")).exception


def test_the_live_view_in_a_terminal_ends_with_ctrl_c(service):
    keyboard, terminal = pty.openpty()
    command = [sys.executable, "-m", "jaxserve", "top", "--server", service.address]
    process = subprocess.Popen(
        [*command, "--interval-s", "0.2"],
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "40"},
        start_new_session=True,
    )
    os.close(terminal)
    shown, end_s = b"", time.monotonic() + 120
    try:
        while b"time to first token" not in shown and time.monotonic() < end_s:
            if select.select([keyboard], [], [], 1.0)[0]:
                shown += os.read(keyboard, 65536)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(keyboard)
    text = re.sub(rb"\x1b\[[0-9;?]*[a-zA-Z]", b"", shown).decode(errors="replace")
    assert "time to first token" in text
    assert "Traceback" not in text


def _load(**fields) -> pb.GetLoadResponse:
    return pb.GetLoadResponse(**fields)


def test_a_window_is_the_difference_of_two_reports():
    bounds = [0.1, 0.2, 0.4]
    before = _load(num_steps=10, num_generation_tokens=100, num_step_rows=80, num_step_tokens=40)
    after = _load(num_steps=20, num_generation_tokens=150, num_step_rows=160, num_step_tokens=100)
    for load, counts in ((before, [5, 0, 0, 0]), (after, [5, 10, 10, 0])):
        for name in ("step_s", "ttft_s", "itl_s", "queue_s"):
            getattr(load, name).CopyFrom(pb.Histogram(upper_bounds=bounds, counts=counts))
    window = LoadWindow.between(before, after, 2.0)
    assert (window.output_tokens_per_s, window.steps_per_s, window.step_fill) == (25, 5, 0.75)
    assert window.prefix_hits is None
    assert window.ttft.p50_ms == pytest.approx(200)
    assert window.ttft.p90_ms == pytest.approx(360)
    with pytest.raises(NotAccepting, match="started anew"):
        LoadWindow.between(after, before, 1.0)


@pytest.mark.parametrize(
    ("counts", "q", "value"),
    [
        ([0, 0, 0], 0.5, None),
        ([4, 0, 0], 0.5, 0.5),
        ([0, 4, 0], 0.5, 2.0),
        ([0, 0, 4], 0.5, 3.0),
        ([2, 2, 0], 0.5, 1.0),
        ([1, 1, 2], 1.0, 3.0),
    ],
)
def test_quantiles_of_a_histogram(counts, q, value):
    assert quantile([1.0, 3.0], counts, q) == value


def test_a_sparkline_is_relative_to_its_highest():
    assert sparkline([0, 4, 8]) == " ▄█"
    assert sparkline([]) == sparkline([0.0]) == ""
