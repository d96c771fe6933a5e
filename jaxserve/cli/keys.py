"""`jaxserve keys`: API keys for `jaxserve serve --api-keys-file`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(add_completion=False, no_args_is_help=True)


@app.callback()
def _root() -> None:
    """Make API keys, and the digests that a server knows them by."""


@app.command()
def new(
    tenant: Annotated[
        str, typer.Argument(help="Name of who gets the key, for the entry of the file.")
    ] = "NAME",
) -> None:
    """Make a key: it goes to the client, its digest into the server's keys file.

    The key is printed once and kept nowhere. The entry goes to stderr.

    Examples:
        jaxserve keys new search
        jaxserve keys new search 2>> keys.toml
    """
    from jaxserve.server.access.key_file import key_digest, new_key

    key = new_key()
    typer.echo(key)
    entry = f'[[tenants]]\nname = "{tenant}"\nkey_sha256 = ["{key_digest(key)}"]\n'
    typer.echo(entry, err=True, nl=False)


@app.command(name="hash")
def hash_key() -> None:
    """Print the digest of a key that is read from stdin, so that it stays out of the shell's
    history.

    Example:
        jaxserve keys hash < key.txt
    """
    from jaxserve.errors import ConfigError
    from jaxserve.server.access.key_file import key_digest

    key = sys.stdin.readline().strip()
    if len(key) < MIN_KEY_CHARS:
        raise ConfigError(
            f"a key has at least {MIN_KEY_CHARS} characters, since it could be guessed else: "
            "`jaxserve keys new` makes one"
        )
    typer.echo(key_digest(key))


@app.command()
def check(
    path: Annotated[Path, typer.Argument(help="A keys file.", metavar="FILE")],
) -> None:
    """Check a keys file, and list its tenants.

    Example:
        jaxserve keys check keys.toml
    """
    from jaxserve.server.access.key_file import read_key_file

    for tenant in read_key_file(path).by_name.values():
        roles = ", ".join(sorted(tenant.roles))
        typer.echo(f"{tenant.name}: {len(tenant.key_sha256)} keys, {roles}")


MIN_KEY_CHARS = 32
"""Of a key that somebody brings; a digest without salt would give a short one away."""
