"""examples/deploy: every metric, path and option that is named there is there."""

from __future__ import annotations

import configparser
import json
import re
import shlex
from pathlib import Path

import pytest
import typer.main
import yaml

from jaxserve.cli import serve
from jaxserve.server.http.endpoints import ENDPOINTS
from tests.security.keys import bearer, keyed_service, write_keys
from tests.server.http.raw_http import ask, post

FOLDER = Path(__file__).parents[2] / "examples" / "deploy"
OPTIONS = {
    name: option for option in typer.main.get_command(serve.app).params for name in option.opts
}
PATHS = {endpoint.path for endpoint in ENDPOINTS}
OF_ADAPTERS = {"jaxserve_adapter_requests_total", "jaxserve_adapter_requests_open"}
"""Of servers with room for adapters, which this one is not: `test_adapter_api.py` has them."""
DRAIN = "--drain-timeout-s"


@pytest.fixture(scope="module")
def metrics(tmp_path_factory) -> set[str]:
    """Names of all series of a server that has worked and refused."""
    keys = write_keys(tmp_path_factory.mktemp("keys") / "k.toml", alpha={"max_queued_requests": 1})
    service = keyed_service(keys)
    try:
        assert post(service, "/v1/completions", {"prompt": "x"}, bearer("alpha"))[0] == 200
        status, _, text = ask(service, "GET", "/metrics", headers=bearer("watcher"))
        assert status == 200
    finally:
        service.close()
    # A family without series yet has its type told.
    declared = re.findall(r"^# TYPE (\w+) counter", text, re.MULTILINE)
    return {*re.findall(r"^(\w+)[{ ]", text, re.MULTILINE), *declared, *OF_ADAPTERS}


def options_of(command: list[str]) -> dict[str, str]:
    """The options of a `jaxserve serve` command line, each checked to exist and to be valid."""
    assert command[0] == "serve"
    context = typer.main.get_command(serve.app).make_context("serve", command[1:])
    assert not context.args
    assert set(context.params) == {o.name for o in OPTIONS.values()}
    return {
        name: context.params[option.name]
        for name, option in OPTIONS.items()
        if any(part.split("=")[0] == name for part in command)
    }


def test_the_dashboard_asks_for_metrics_that_there_are(metrics):
    dashboard = json.loads((FOLDER / "grafana-dashboard.json").read_text())
    text = json.dumps(dashboard)
    named = set(re.findall(r"\bjaxserve_\w+", text))
    assert len(named) > 20
    assert named - metrics == set()
    panels = dashboard["panels"]
    assert (
        len({panel["id"] for panel in panels}) == len({p["title"] for p in panels}) == len(panels)
    )
    places = [
        (column, row)
        for panel in panels
        for place in [panel["gridPos"]]
        for column in range(place["x"], place["x"] + place["w"])
        for row in range(place["y"], place["y"] + place["h"])
    ]
    assert len(places) == len(set(places)), "panels overlap"
    assert max(column for column, _ in places) < 24
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    used = set(re.findall(r"\$\{?([a-z]\w*)", text))
    assert used <= variables


def test_prometheus_asks_the_right_path():
    (job,) = yaml.safe_load((FOLDER / "prometheus.yml").read_text())["scrape_configs"]
    assert job["metrics_path"] in PATHS
    assert job["static_configs"][0]["targets"] == [f"127.0.0.1:{OPTIONS['--http-port'].default}"]


def test_kubernetes_probes_what_there_is_and_gives_time_to_drain():
    documents = list(yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text()))
    by_kind = {document["kind"]: document for document in documents}
    assert set(by_kind) == {"Deployment", "Service", "PodDisruptionBudget"}
    labels = by_kind["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert by_kind["Service"]["spec"]["selector"] == labels
    assert by_kind["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    pod = by_kind["Deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    options = options_of(container["args"])
    assert ports == {
        "grpc": OPTIONS["--grpc-port"].default,
        "http": OPTIONS["--http-port"].default,
    }
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert container[probe]["httpGet"]["path"] in PATHS
        assert container[probe]["httpGet"]["port"] in ports
    assert container["livenessProbe"]["httpGet"]["path"] == "/health"
    _, pause_s = container["lifecycle"]["preStop"]["exec"]["command"]
    assert pod["terminationGracePeriodSeconds"] > float(pause_s) + options[DRAIN]
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    assert set(mounts.values()) == {volume["name"] for volume in pod["volumes"]}
    assert mounts[str(options["--api-keys-file"].parent)] == "keys"
    assert str(options["--compilation-cache-dir"]).startswith("/home/jaxserve/.cache/")


def test_the_systemd_unit_runs_a_command_that_there_is():
    unit = configparser.ConfigParser(interpolation=None, strict=True)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(FOLDER / "jaxserve.service")
    service = unit["Service"]
    program, *command = shlex.split(service["ExecStart"])
    assert Path(program).name == "jaxserve"
    assert float(service["TimeoutStopSec"]) > options_of(command)[DRAIN]
    assert service["KillSignal"] == "SIGTERM"
    # XLA's programs are written and then run.
    assert "MemoryDenyWriteExecute" not in service
    for name in ("NoNewPrivileges", "ProtectHome", "PrivateTmp", "RestrictNamespaces"):
        assert service[name] == "yes"
