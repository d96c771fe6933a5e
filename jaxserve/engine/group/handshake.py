"""Handshake: both ends prove that they know the group's token, without sending it.

    leader:   MAGIC, nonce_l
    follower: nonce_f, process id, HMAC(token, "follower" nonce_l nonce_f id)
    leader:   HMAC(token, "leader" nonce_f nonce_l)

What follows is neither encrypted nor signed, like JAX's own traffic between the processes:
a group belongs on a network of its own.
"""

from __future__ import annotations

import hmac
import secrets
import struct

from jaxserve.engine.group.frames import FrameError, FrameSocket

HANDSHAKE_TIMEOUT_S = 5.0
MAGIC = b"jaxserve group 1"
_NONCE_BYTES = 32
_MAC_BYTES = 32
_ID = struct.Struct("<I")


class WrongToken(FrameError):
    """The other side does not know the token, or is no process of a group."""


def prove_to_leader(
    connection: FrameSocket,
    token: bytes,
    process_id: int,
    greeting_timeout_s: float = HANDSHAKE_TIMEOUT_S,
) -> None:
    """The follower's part. Raises WrongToken or OSError.

    A leader listens before it has imported JAX, so its greeting can be long in coming.
    """
    connection.set_timeout(greeting_timeout_s)
    if _receive(connection, len(MAGIC)) != MAGIC:
        raise WrongToken("what answers there is no leader of this version")
    connection.set_timeout(HANDSHAKE_TIMEOUT_S)
    leader_nonce = _receive(connection, _NONCE_BYTES)
    nonce, number = secrets.token_bytes(_NONCE_BYTES), _ID.pack(process_id)
    proof = _mac(token, b"follower", leader_nonce, nonce, number)
    connection.send_bytes(nonce + number + proof)
    answer = _receive(connection, _MAC_BYTES)
    if not hmac.compare_digest(answer, _mac(token, b"leader", nonce, leader_nonce)):
        raise WrongToken("the leader has another token")
    connection.set_timeout(None)


def prove_to_follower(connection: FrameSocket, token: bytes) -> int:
    """The leader's part; returns the follower's process id. Raises WrongToken or OSError."""
    connection.set_timeout(HANDSHAKE_TIMEOUT_S)
    leader_nonce = secrets.token_bytes(_NONCE_BYTES)
    connection.send_bytes(MAGIC + leader_nonce)
    nonce = _receive(connection, _NONCE_BYTES)
    number = _receive(connection, _ID.size)
    proof = _receive(connection, _MAC_BYTES)
    if not hmac.compare_digest(proof, _mac(token, b"follower", leader_nonce, nonce, number)):
        raise WrongToken("a process has another token")
    connection.send_bytes(_mac(token, b"leader", nonce, leader_nonce))
    connection.set_timeout(None)
    return int(_ID.unpack(number)[0])


def _receive(connection: FrameSocket, num_bytes: int) -> bytes:
    try:
        return connection.receive_bytes(num_bytes) or b""
    except FrameError as error:
        raise WrongToken("the other side ended the handshake: it has another token") from error


def _mac(token: bytes, *parts: bytes) -> bytes:
    return hmac.digest(token, b"".join(parts), "sha256")
