"""Options of `jaxserve serve`: who may come in, what is encrypted, how streams look."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jaxserve.errors import ConfigError

if TYPE_CHECKING:
    from jaxserve.server.tls import TlsFiles

_ACCESS = "Access"
_PACING = "Streams"

ApiKeysFile = Annotated[
    Path | None,
    typer.Option(
        help="TOML file of tenants, digests of their keys and their limits (docs/security.md); "
        "a change takes effect within seconds. `jaxserve keys new` makes a key.",
        rich_help_panel=_ACCESS,
    ),
]
AllowUnauthenticated = Annotated[
    bool,
    typer.Option(
        "--allow-unauthenticated",
        help="Open --host to whoever reaches it, when a gateway in front asks for keys.",
        rich_help_panel=_ACCESS,
    ),
]
TlsCertificate = Annotated[
    Path | None,
    typer.Option(
        help="PEM file of the server's certificate: both ports speak TLS. A changed file is "
        "taken without a restart.",
        rich_help_panel=_ACCESS,
    ),
]
TlsKey = Annotated[Path | None, typer.Option(help="PEM file of its key.", rich_help_panel=_ACCESS)]
TlsClientCa = Annotated[
    Path | None,
    typer.Option(
        help="PEM file of CAs: clients must show a certificate of one of them.",
        rich_help_panel=_ACCESS,
    ),
]
NoHardening = Annotated[
    bool,
    typer.Option(
        "--no-hardening",
        help="Keep core dumps, and let other processes of this user read the memory, to look "
        "for a defect.",
        rich_help_panel=_ACCESS,
    ),
]
FlushMs = Annotated[
    int | None,
    typer.Option(
        help="At least so long between two messages of a stream, but for the first token and "
        "the end. A request can ask for more.",
        show_default="none",
        rich_help_panel=_PACING,
    ),
]
FlushTokens = Annotated[
    int | None,
    typer.Option(
        help="At least so many tokens in a message.", show_default="1", rich_help_panel=_PACING
    ),
]
PadBytes = Annotated[
    int | None,
    typer.Option(
        help="Pad messages to a multiple of this.", show_default="none", rich_help_panel=_PACING
    ),
]
StrictPacing = Annotated[
    bool,
    typer.Option(
        "--strict-pacing",
        help="A message of --pad-bytes every --flush-ms, with or without tokens: an eavesdropper "
        "learns how long an answer is, and no more.",
        rich_help_panel=_PACING,
    ),
]


def tls_files(
    certificate: Path | None, key: Path | None, client_ca: Path | None
) -> TlsFiles | None:
    """The files of TLS; None without. Raises ConfigError if one is missing."""
    from jaxserve.server.tls import TlsFiles

    if certificate is None and key is None and client_ca is None:
        return None
    if certificate is None or key is None:
        raise ConfigError("TLS needs both --tls-certificate and --tls-key")
    return TlsFiles(certificate, key, client_ca)


def prepare_process(*, hardens: bool) -> list[str]:
    """Checks the packages that clients' bytes reach, and gives up rights that serving needs not.

    Returns what is not as it should be. Raises ConfigError for a package that is too old.
    """
    from jaxserve.server.floors import check_floors
    from jaxserve.server.hardening import harden

    check_floors()
    return harden().problems() if hardens else []
