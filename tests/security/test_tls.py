"""TLS on both ports: what is refused, and certificates that change under a running server."""

from __future__ import annotations

import http.client
import socket
import ssl
import warnings

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from jaxserve.client import Client, ClientTls
from jaxserve.errors import ConfigError
from jaxserve.server.tls import TlsFiles, TlsKeeper
from tests.security.certificates import issue, make_ca
from tests.server.scripted_service import start_service, wait_for


@pytest.fixture(scope="module")
def ca():
    return make_ca("test CA")


@pytest.fixture(scope="module")
def other_ca():
    return make_ca("another CA")


@pytest.fixture
def make_server(ca, tmp_path):
    """A function that starts a service with TLS; `mutual`: clients show certificates."""
    services = []

    def make(*, mutual: bool = False, certificate=None):
        paths = (certificate or issue("server", ca)).write(tmp_path, "server")
        client_ca = ca.write(tmp_path, "ca")[0] if mutual else None
        service = start_service(server_settings={"tls": TlsFiles(*paths, client_ca)})
        service.make_ready()
        services.append(service)
        return service

    yield make
    for service in services:
        service.close()


def _trusting(ca, client=None) -> ClientTls:
    if client is None:
        return ClientTls(ca.certificate_pem)
    return ClientTls(ca.certificate_pem, client.certificate_pem, client.key_pem)


def _grpc_answers(service, tls: ClientTls | None) -> bool:
    credentials = None if tls is None else tls.credentials()
    channel = (
        grpc.insecure_channel(service.address)
        if credentials is None
        else grpc.secure_channel(service.address, credentials)
    )
    with channel:
        try:
            health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
        except grpc.RpcError as error:
            return error.code() is not grpc.StatusCode.UNAVAILABLE
    return True


def _context(ca, client=None, folder=None) -> ssl.SSLContext:
    context = ssl.create_default_context(cadata=ca.certificate_pem.decode())
    if client is not None:
        context.load_cert_chain(*client.write(folder, "client"))
    return context


def _http_answers(service, context: ssl.SSLContext | None) -> bool:
    port = service.server.http_port
    if context is None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    else:
        connection = http.client.HTTPSConnection("127.0.0.1", port, timeout=10, context=context)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (ssl.SSLError, http.client.BadStatusLine, ConnectionError):
        return False
    finally:
        connection.close()


def _serial(service, port: int, ca) -> int:
    """Of the certificate that a new connection is shown."""
    context = _context(ca)
    with (
        socket.create_connection(("127.0.0.1", port), timeout=10) as raw,
        context.wrap_socket(raw, server_hostname="localhost") as end,
    ):
        from cryptography import x509

        return x509.load_der_x509_certificate(end.getpeercert(True)).serial_number


def test_requests_are_served_and_plain_text_is_not(make_server, ca):
    service = make_server()
    with Client(service.address, tls=_trusting(ca)) as client:
        assert list(client.generate("x", max_tokens=3))
    assert _http_answers(service, _context(ca))
    assert not _grpc_answers(service, None)
    assert not _http_answers(service, None)


def test_clients_refuse_another_ca_and_an_expired_certificate(make_server, ca, other_ca):
    service = make_server()
    assert not _grpc_answers(service, _trusting(other_ca))
    assert not _http_answers(service, _context(other_ca))
    expired = make_server(certificate=issue("server", ca, expired=True))
    assert not _grpc_answers(expired, _trusting(ca))
    assert not _http_answers(expired, _context(ca))


def test_a_client_must_show_a_certificate_of_the_ca(make_server, ca, other_ca, tmp_path):
    service = make_server(mutual=True)
    good = issue("client", ca)
    assert _grpc_answers(service, _trusting(ca, good))
    assert _http_answers(service, _context(ca, good, tmp_path))
    for bad in (None, issue("client", other_ca), issue("client", ca, expired=True)):
        assert not _grpc_answers(service, _trusting(ca, bad))
        assert not _http_answers(service, _context(ca, bad, tmp_path))


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1])
def test_old_protocols_are_refused_on_both_ports(make_server, ca, version):
    service = make_server()
    for port in (service.server.grpc_port, service.server.http_port):
        assert _handshake(ca, port, ssl.TLSVersion.TLSv1_2) == "TLSv1.2"
        assert _handshake(ca, port, version) is None


def _handshake(ca, port: int, version: ssl.TLSVersion) -> str | None:
    context = _context(ca)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context.minimum_version = context.maximum_version = version
    # Else this client itself would not even ask.
    context.set_ciphers("DEFAULT:@SECLEVEL=0")
    context.set_alpn_protocols(["h2", "http/1.1"])
    with socket.create_connection(("127.0.0.1", port), timeout=10) as raw:
        try:
            with context.wrap_socket(raw, server_hostname="localhost") as end:
                return end.version()
        except (ssl.SSLError, ConnectionError):
            return None


def test_a_new_certificate_is_shown_without_a_restart(make_server, ca, tmp_path):
    service = make_server()
    ports = (service.server.grpc_port, service.server.http_port)
    service.executor.step_s = 0.005
    with Client(service.address, tls=_trusting(ca)) as client:
        stream = iter(client.generate("x", max_tokens=400, request_id="long"))
        next(stream)
        new = issue("server", ca)
        new.write(tmp_path, "server")
        want = new.certificate.serial_number
        # gRPC shows what it has just fetched at the handshake after it, too.
        wait_for(lambda: all(_serial(service, port, ca) == want for port in ports), 30)
        assert next(stream).text
        client.abort("long")
    (tmp_path / "server.pem").write_text("nonsense")
    wait_for(lambda: service.server._tls.num_failed_reloads >= 1, 30)
    assert {_serial(service, port, ca) for port in ports} == {want}


def test_another_client_ca_takes_over(make_server, ca, other_ca, tmp_path):
    service = make_server(mutual=True)
    client = issue("client", other_ca)
    assert not _http_answers(service, _context(ca, client, tmp_path))
    other_ca.write(tmp_path, "ca")
    wait_for(lambda: _http_answers(service, _context(ca, client, tmp_path)), 30)
    wait_for(lambda: _grpc_answers(service, _trusting(ca, client)), 30)
    former = issue("client", ca)
    assert not _http_answers(service, _context(ca, former, tmp_path))
    assert not _grpc_answers(service, _trusting(ca, former))


def test_bad_files_are_named(ca, other_ca, tmp_path):
    certificate, key = issue("server", ca).write(tmp_path, "server")
    _, other_key = issue("server", ca).write(tmp_path, "other")
    junk = tmp_path / "junk.pem"
    junk.write_text("junk")
    for files, message in (
        (TlsFiles(certificate, other_key), "are no certificate and its key"),
        (TlsFiles(junk, key), "are no certificate and its key"),
        (TlsFiles(certificate, key, junk), "--tls-client-ca"),
        (TlsFiles(certificate, tmp_path / "none.key"), "none.key: there is no such file"),
    ):
        with pytest.raises(ConfigError, match=message):
            TlsKeeper(files)
