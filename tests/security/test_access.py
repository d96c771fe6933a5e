"""Nothing but health is reached without a key, and nobody reaches what is another's."""

from __future__ import annotations

import hmac
import logging
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from typer.testing import CliRunner

from jaxserve.cli import keys
from jaxserve.errors import ConfigError, Forbidden, NotFound, Unauthenticated
from jaxserve.proto.v1 import control_pb2, inference_pb2
from jaxserve.server.access import key_file
from jaxserve.server.access.grpc_access import check_rules
from jaxserve.server.access.key_file import key_digest, new_key, read_key_file
from jaxserve.server.access.policy import GRPC_ACCESS, Access
from jaxserve.server.config import ServerConfig
from jaxserve.server.http.endpoints import ENDPOINTS
from jaxserve.server.http.web_page import page_routes
from tests.security.keys import KEYS, bearer, client_of, keyed_service, replace_file, write_keys
from tests.server.http.raw_http import ask, post
from tests.server.scripted_service import wait_for

SERVICES = [
    inference_pb2.DESCRIPTOR.services_by_name["Inference"],
    control_pb2.DESCRIPTOR.services_by_name["Control"],
    health_pb2.DESCRIPTOR.services_by_name["Health"],
    reflection_pb2.DESCRIPTOR.services_by_name["ServerReflection"],
]
METHODS = [
    (f"/{service.full_name}/{method.name}", method)
    for service in SERVICES
    for method in service.methods
]
HEALTH_METHODS = {name for name, _ in METHODS if "grpc.health" in name}
PAGE_PATHS = {route.path for route in page_routes()}
OPEN_PATHS = {"/health", "/health/ready"} | PAGE_PATHS


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    path = write_keys(tmp_path_factory.mktemp("keys") / "keys.toml")
    service = keyed_service(path, reflection=True)
    yield service
    service.assert_idle()
    service.close()


def _call(service, name, method, metadata=()):
    """The status of a call with an empty message."""
    kind = (
        "stream" if method.client_streaming else "unary",
        "stream" if method.server_streaming else "unary",
    )
    with grpc.insecure_channel(service.address) as channel:
        call = getattr(channel, "_".join(kind))(name)
        request = iter([b""]) if method.client_streaming else b""
        try:
            reply = call(request, metadata=metadata, timeout=10)
            if method.server_streaming:
                next(reply)
                reply.cancel()
        except grpc.RpcError as error:
            return error.code()
        except StopIteration:
            pass
    return grpc.StatusCode.OK


def _bearer(key):
    return (("authorization", f"Bearer {key}"),)


def test_every_method_has_a_rule_and_every_rule_a_method():
    assert {name for name, _ in METHODS} == set(GRPC_ACCESS)
    check_rules(SERVICES)
    with pytest.raises(LookupError, match="no rule for /jaxserve"):
        check_rules([_Planted])


class _Planted:
    full_name = "jaxserve.v1.Backdoor"
    methods = (inference_pb2.DESCRIPTOR.services_by_name["Inference"].methods[0],)


@pytest.mark.parametrize(("name", "method"), METHODS, ids=[name for name, _ in METHODS])
def test_every_rpc_but_health_asks_for_a_key(service, name, method):
    for metadata in ((), _bearer("wrong"), (("authorization", KEYS["alpha"]),), _bearer("")):
        code = _call(service, name, method, metadata)
        if name in HEALTH_METHODS:
            # The library's own servicer has no List.
            assert code in (grpc.StatusCode.OK, grpc.StatusCode.UNIMPLEMENTED)
        else:
            assert code is grpc.StatusCode.UNAUTHENTICATED
    with_key = _call(service, name, method, _bearer(KEYS["alpha"]))
    if GRPC_ACCESS[name] in (Access.METRICS, Access.ADMIN):
        assert with_key is grpc.StatusCode.PERMISSION_DENIED
    else:
        assert with_key not in (
            grpc.StatusCode.UNAUTHENTICATED,
            grpc.StatusCode.PERMISSION_DENIED,
        )


def test_a_method_that_is_not_there_asks_for_a_key_too(service):
    name, method = "/jaxserve.v1.Inference/Shutdown", METHODS[1][1]
    assert _call(service, name, method) is grpc.StatusCode.UNAUTHENTICATED
    code = _call(service, name, method, _bearer(KEYS["alpha"]))
    assert code is grpc.StatusCode.PERMISSION_DENIED


def test_every_path_but_health_asks_for_a_key(service):
    paths = {endpoint.path.replace("{model}", "script") for endpoint in ENDPOINTS}
    paths |= {"/openapi.json", "/nowhere", "/health/", "/health/../metrics", "//health"}
    paths |= PAGE_PATHS | {"/page", "/page/", "/page/key.py", "/page/../metrics", "/page//chat.js"}
    for path in paths:
        for method in ("GET", "POST", "DELETE", "OPTIONS", "PUT"):
            status, headers, _ = ask(service, method, path)
            if path in OPEN_PATHS:
                assert status in (200, 405), path
            else:
                assert status == 401, (method, path)
                assert headers["www-authenticate"] == "Bearer"
            if path not in OPEN_PATHS:
                wrong = {"authorization": "Bearer nobody's"}
                assert ask(service, method, path, headers=wrong)[0] == 401
        if path not in OPEN_PATHS:
            assert ask(service, "GET", path, headers=bearer("alpha"))[0] != 401


def test_the_page_tells_nothing_of_its_server(service, make_service):
    other = make_service()
    for path in PAGE_PATHS:
        assert ask(service, "GET", path)[2] == ask(other, "GET", path)[2]


def test_roles_divide_what_keys_are_good_for(service):
    assert ask(service, "GET", "/metrics", headers=bearer("alpha"))[0] == 403
    assert ask(service, "GET", "/metrics", headers=bearer("watcher"))[0] == 200
    assert ask(service, "GET", "/v1/load", headers=bearer("alpha"))[0] == 403
    assert ask(service, "GET", "/v1/load", headers=bearer("watcher"))[0] == 200
    body = {"prompt": "x", "max_tokens": 2}
    assert post(service, "/v1/completions", body, bearer("watcher"))[0] == 403
    assert post(service, "/v1/completions", body, bearer("alpha"))[0] == 200
    with client_of(service, "watcher") as client:
        assert client.load().num_running == 0
        with pytest.raises(Forbidden):
            client.tokenize("x")


def test_another_tenants_request_is_not_found(service):
    service.executor.step_s = 0.02
    with client_of(service, "alpha") as alpha, client_of(service, "beta") as beta:
        running = iter(alpha.generate("x", max_tokens=400, request_id="mine"))
        next(running)
        stub = beta._inference
        for request_id in ("mine", "alpha/mine", "none"):
            request = inference_pb2.AbortRequest(request_id=request_id)
            with pytest.raises(NotFound):
                beta._unary(stub.Abort, request)
        # The same id is another request to another tenant, and does not tell of the first.
        assert len(list(beta.generate("x", max_tokens=3, request_id="mine"))) > 0
        assert alpha.abort("mine")
        assert [output.finish_reason for output in running][-1] == "cancelled"
        assert not alpha.abort("mine")
    service.executor.step_s = 0.0
    service.assert_idle()


def test_a_reply_carries_the_clients_own_id(service):
    with client_of(service, "alpha") as client:
        call = client.generate("x", max_tokens=1, request_id="abc")
        assert call.request_id == "abc"
        assert {output.request_id for output in call} == {"abc"}
    body = {"prompt": "x", "max_tokens": 1}
    _, headers, reply = post(
        service, "/v1/completions", body, bearer("beta") | {"x-request-id": "abc"}
    )
    assert (headers["x-request-id"], reply["id"]) == ("abc", "cmpl-abc")


def test_keys_are_compared_in_constant_time(tmp_path, monkeypatch):
    tenants = read_key_file(write_keys(tmp_path / "keys.toml"))
    compared = []

    def compare(one, other):
        compared.append((one, other))
        return hmac.compare_digest(one, other)

    class Hmac:
        compare_digest = staticmethod(compare)

    monkeypatch.setattr(key_file, "hmac", Hmac)
    assert tenants.of_key(KEYS["alpha"]).name == "alpha"
    # All of them, and digests: neither the place of a match nor its length is told.
    assert len(compared) == len(KEYS)
    assert {len(value) for pair in compared for value in pair} == {32}
    assert tenants.of_key("nobody's") is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "tenants"),
        ("tenants = []", "names no tenants"),
        ("[[tenants]]\nname = 'a'", "has no key_sha256"),
        ("[[tenants]]\nname = 'a'\nkey_sha256 = ['abc']", "key_sha256"),
        ("[[tenants]]\nname = 'a/b'\nkey_sha256 = ['{a}']", "name 'a/b' must be"),
        ("[[tenants]]\nname = '../a'\nkey_sha256 = ['{a}']", "must be 1 to 64"),
        ("[[tenants]]\nname = 'a'\nkey_sha256 = ['{a}']\nrole = 'x'", "role"),
        ("[[tenants]]\nname = 'a'\nkey_sha256 = ['{a}']\nroles = ['root']", "roles"),
        ("[[tenants]]\nname = 'a'\nkey_sha256 = ['{a}']\nweight = 0", "weight"),
        ("[[tenants]]\nname = 'a'\nkey_sha256 = ['{a}']\nweight = nan", "weight"),
        ("[[tenants]]\nname = 'a'\nkey_sha256 = ['{a}']\npriority = 10", "priority"),
        ("[[tenants]]\nname = 'a'\nkey_sha256 = ['{a}']\ntokens_per_minute = 0", "tokens_per"),
        ("[[tenants]]\nname = 'a'\nkey_sha256 = ['{a}']\nburst_tokens = 9", "needs tokens_per"),
        ("[[tenants]]\nname = 'a'\nkey_sha256 = ['{a}']\ncache_share = 0.6", "cache_share"),
        ("[[tenants]]\nname = 'a'\nkey_sha256 = ['{a}', '{a}']", "key .* 2 times"),
        (
            "tenants = [{name = 'a', key_sha256 = ['{a}']}, {name = 'a', key_sha256 = ['{b}']}]",
            "name a is there 2 times",
        ),
        ("[[tenants]", "is no TOML"),
        ("x = 5", "tenants"),
    ],
)
def test_a_bad_keys_file_is_refused_by_name(tmp_path, text, message):
    path = tmp_path / "keys.toml"
    replace_file(path, text.replace("{a}", key_digest("a")).replace("{b}", key_digest("b")))
    with pytest.raises(ConfigError, match=message) as error:
        read_key_file(path)
    assert str(error.value).startswith(f"--api-keys-file {path}: ")


def test_a_keys_file_that_others_may_write_is_refused(tmp_path):
    path = write_keys(tmp_path / "keys.toml")
    path.chmod(0o662)
    with pytest.raises(ConfigError, match="chmod go-w"):
        read_key_file(path)
    with pytest.raises(ConfigError, match="is no regular file"):
        read_key_file(Path("/dev/null"))
    with pytest.raises(ConfigError, match="Is a directory"):
        read_key_file(tmp_path)
    with pytest.raises(ConfigError, match="No such file"):
        read_key_file(tmp_path / "none.toml")


def test_the_file_is_read_anew_and_a_bad_one_changes_nothing(tmp_path, caplog):
    path = write_keys(tmp_path / "keys.toml")
    service = keyed_service(path)
    try:
        key, client = new_key(), client_of(service, "alpha")
        assert client.model_info().name == "script"
        replace_file(path, "[[tenants]")
        wait_for(lambda: service.server._ring.num_failed_reloads == 1, 30)
        assert client.model_info().name == "script"
        assert "the API keys stay as they were" in caplog.text
        replace_file(path, f"[[tenants]]\nname = 'new'\nkey_sha256 = ['{key_digest(key)}']\n")
        wait_for(lambda: "new" in service.server._ring.tenants, 30)
        with pytest.raises(Unauthenticated):
            client.model_info()
        headers = {"authorization": f"Bearer {key}"}
        assert ask(service, "GET", "/v1/models", headers=headers)[0] == 200
        path.unlink()
        wait_for(lambda: service.server._ring.num_failed_reloads == 2, 30)
        assert ask(service, "GET", "/v1/models", headers=headers)[0] == 200
        client.close()
    finally:
        service.close()


def test_a_refused_share_of_the_cache_changes_nothing(tmp_path, caplog):
    path = write_keys(tmp_path / "keys.toml")
    # 32 of 60 pages are one sequence's, so half of them can't be kept.
    service = keyed_service(path, limits={"num_pages": 60})
    try:
        write_keys(path, alpha={"cache_share": 0.5}, beta={"weight": 2.0})
        wait_for(lambda: service.server._ring.num_failed_reloads == 1, 30)
        assert "cache_share of all tenants" in caplog.text
        assert service.server._ring.tenants["beta"].weight == 1.0
    finally:
        service.close()


def test_an_open_interface_needs_keys_or_a_word():
    with pytest.raises(ConfigError, match="--allow-unauthenticated"):
        ServerConfig(host="0.0.0.0")
    ServerConfig(host="0.0.0.0", allow_unauthenticated=True)


def test_no_key_is_logged(tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    service = keyed_service(write_keys(tmp_path / "keys.toml"))
    try:
        with client_of(service, "alpha") as client:
            list(client.generate("x", max_tokens=2))
        ask(service, "GET", "/v1/models", headers={"authorization": "Bearer canary-4711"})
        metrics = ask(service, "GET", "/metrics", headers=bearer("watcher"))[2]
    finally:
        service.close()
    secret = service.server._door.claims.server_key
    for text in (KEYS["alpha"], key_digest(KEYS["alpha"]), "canary-4711", secret.hex()):
        assert text not in caplog.text + metrics
    assert repr(secret) not in repr(service.server._door)


def test_the_command_makes_and_hashes_keys(tmp_path):
    def run(*arguments, text=""):
        return CliRunner().invoke(keys.app, arguments, input=text)

    made = run("new", "search")
    key = made.stdout.strip()
    path = tmp_path / "keys.toml"
    replace_file(path, made.stderr)
    assert read_key_file(path).of_key(key).name == "search"
    assert run("hash", text=f"{key}\n").stdout.strip() == key_digest(key)
    assert run("check", str(path)).stdout == "search: 1 keys, inference\n"
    short = run("hash", text="secret\n")
    assert isinstance(short.exception, ConfigError)
    assert (short.stdout, "at least 32" in str(short.exception)) == ("", True)
