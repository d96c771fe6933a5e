"""Whether a port can be had, and the right advice when it cannot."""

from __future__ import annotations

import errno
import socket

from jaxserve.errors import ConfigError


def check_can_listen(flag: str, host: str, port: int) -> None:
    """Binds a socket for a moment, since gRPC names no cause when it cannot.

    Raises ConfigError when no address of the host can be bound, or another
    program has the port on one of them.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise listen_error(flag, host, port, error) from error
    failures = []
    for family, kind, protocol, _, address in found:
        try:
            with socket.socket(family, kind, protocol) as probe:
                # As the servers do: a port of a connection that has just ended is free.
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise listen_error(flag, host, port, error) from error
            failures.append(error)
    # A name may have an IPv6 address on a machine that has none.
    if len(failures) == len(found):
        raise listen_error(flag, host, port, failures[0]) from failures[0]


def listen_error(flag: str, host: str, port: int, error: OSError) -> ConfigError:
    """What to mend: the host, or the port that `flag` sets."""
    if isinstance(error, socket.gaierror):
        return ConfigError(
            f"--host {host} cannot be resolved ({error.strerror}): give an address of this "
            "machine, e.g. 127.0.0.1"
        )
    if error.errno == errno.EADDRNOTAVAIL:
        return ConfigError(
            f"--host {host} is not an address of this machine: give one that is, e.g. 127.0.0.1"
        )
    if error.errno == errno.EADDRINUSE:
        return ConfigError(
            f"cannot listen on {host}:{port}: another program uses the port. Choose another with "
            f"{flag} (0: any free port)"
        )
    if error.errno == errno.EACCES:
        return ConfigError(
            f"cannot listen on {host}:{port}: this user may not use the port. Choose one above "
            f"1023 with {flag} (0: any free port)"
        )
    return ConfigError(
        f"cannot listen on {host}:{port}: {error.strerror}. Choose another with {flag} or --host"
    )
