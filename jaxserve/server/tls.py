"""TLS: certificates of the server, read anew when their files change."""

from __future__ import annotations

import logging
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from jaxserve.errors import ConfigError
from jaxserve.server.access.watched_files import WatchedFiles

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files."""

    certificate: Path
    """Of the server, with what leads to its CA."""
    key: Path
    """The certificate's private key, without a password."""
    client_ca: Path | None = None
    """CAs of clients' certificates. Absent: clients need none."""

    @property
    def paths(self) -> tuple[Path, ...]:
        return tuple(path for path in (self.certificate, self.key, self.client_ca) if path)


@dataclass(frozen=True, slots=True)
class _Certificates:
    """One version of the files, as HTTP and gRPC take it."""

    context: ssl.SSLContext
    key: bytes
    chain: bytes
    client_ca: bytes | None


class TlsKeeper:
    """The certificates that new connections get. Those that are open keep theirs.

    Raises ConfigError if the files cannot be used.
    """

    def __init__(self, files: TlsFiles) -> None:
        self._files = files
        self._watched = WatchedFiles(files.paths)
        self._now = _read(files)
        self.num_failed_reloads = 0
        self.context = _make_context(files)
        """For a listener: it looks up the newest certificates at each handshake."""
        self.context.sni_callback = self._choose

    def reload_if_changed(self) -> None:
        """Takes changed files. Bad ones change nothing, and the log says so."""
        if not self._watched.changed():
            return
        try:
            self._now = _read(self._files)
        except ConfigError as error:
            _log.error("the certificates stay as they were: %s", error)
            self.num_failed_reloads += 1  # Whoever sees it finds the reason in the log.
            return
        _log.warning("the certificates were read anew")

    def grpc_credentials(self) -> grpc.ServerCredentials:
        """For a gRPC port: it asks for the newest certificates at each handshake."""
        given = self._now

        def fetch() -> Any:
            nonlocal given
            if given is self._now:
                return None
            given = self._now
            return _grpc_certificates(given)

        return grpc.dynamic_ssl_server_credentials(
            _grpc_certificates(given),
            fetch,
            require_client_authentication=self._files.client_ca is not None,
        )

    def _choose(self, connection: ssl.SSLObject, _name: str | None, _: ssl.SSLContext) -> None:
        # Called whether or not the client names a server.
        connection.context = self._now.context


def _grpc_certificates(now: _Certificates) -> Any:
    pairs = [(now.key, now.chain)]
    return grpc.ssl_server_certificate_configuration(pairs, root_certificates=now.client_ca)


def _read(files: TlsFiles) -> _Certificates:
    watched = WatchedFiles(files.paths)
    context = _make_context(files)
    try:
        found = _Certificates(
            context=context,
            key=files.key.read_bytes(),
            chain=files.certificate.read_bytes(),
            client_ca=None if files.client_ca is None else files.client_ca.read_bytes(),
        )
    except OSError as error:
        raise ConfigError(f"{error.filename}: {error.strerror}") from None
    if watched.changed():
        raise ConfigError(f"--tls-certificate {files.certificate} changed while it was read")
    return found


def _make_context(files: TlsFiles) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    for path in files.paths:
        if not path.is_file():
            raise ConfigError(f"{path}: there is no such file (--tls-certificate, --tls-key)")
    try:
        # An encrypted key would have OpenSSL ask for its password on the terminal.
        context.load_cert_chain(files.certificate, files.key, password=lambda: "")
    except (ssl.SSLError, ValueError, OSError) as error:
        raise ConfigError(
            f"--tls-certificate {files.certificate} and --tls-key {files.key} are no certificate "
            f"and its key in PEM, without a password ({_reason(error)})"
        ) from None
    if files.client_ca is not None:
        context.verify_mode = ssl.CERT_REQUIRED
        try:
            context.load_verify_locations(files.client_ca)
        except (ssl.SSLError, OSError) as error:
            raise ConfigError(
                f"--tls-client-ca {files.client_ca} is no certificate in PEM ({_reason(error)})"
            ) from None
    return context


def _reason(error: Exception) -> str:
    return getattr(error, "reason", None) or getattr(error, "strerror", None) or str(error)
