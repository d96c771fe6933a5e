"""Frames, handshake and gathering over real sockets."""

from __future__ import annotations

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from jaxserve.engine.group import handshake
from jaxserve.engine.group.config import GroupConfig, join_address, parse_address, read_token
from jaxserve.engine.group.errors import GroupError
from jaxserve.engine.group.follower_link import FollowerLink
from jaxserve.engine.group.frames import Frame, FrameError, FrameSocket, Kind
from jaxserve.engine.group.gathering import Gathering, versions
from jaxserve.engine.group.handshake import WrongToken, prove_to_follower, prove_to_leader
from jaxserve.engine.group.leader import Leader
from jaxserve.errors import ConfigError

TOKEN = b"a token of some length"


@pytest.fixture
def ends() -> tuple[FrameSocket, FrameSocket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        one = socket.create_connection(listener.getsockname())
        other, _ = listener.accept()
    return FrameSocket(one), FrameSocket(other)


@pytest.mark.parametrize("shape", [(0,), (3,), (2, 1, 5), (2, 3, 4, 1)])
def test_arrays_arrive_as_they_were(
    ends: tuple[FrameSocket, FrameSocket], shape: tuple[int, ...]
) -> None:
    array = np.random.default_rng(0).integers(-(2**31), 2**31, shape).astype(np.int32)
    ends[0].send(Frame.of_array(Kind.PROGRAM, array, number=2**40, rows=128))
    frame = ends[1].receive()
    assert frame is not None
    assert (frame.kind, frame.number, frame.rows) == (Kind.PROGRAM, 2**40, 128)
    np.testing.assert_array_equal(frame.array(), array)
    assert frame.array().shape == shape


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\x01",
        b"\x09\0\0\0",
        b"\xff\xff\xff\xff",
        b"\x01\0\0\0\x05\0\0\0\x01\0\0\0",
        b"\x02\0\0\0\xff\xff\xff\xff\xff\xff\xff\xff\x01\0\0\0",
    ],
)
def test_what_is_no_array_is_refused(payload: bytes) -> None:
    with pytest.raises(FrameError):
        Frame(Kind.PROGRAM, payload).array()


@pytest.mark.parametrize("payload", [b"", b"{", b"[1]", b"\xff"])
def test_what_is_no_json_object_is_refused(payload: bytes) -> None:
    with pytest.raises(FrameError):
        Frame(Kind.CONFIG, payload).json()


def test_strange_headers_and_cut_frames_are_refused(ends: tuple[FrameSocket, FrameSocket]) -> None:
    ends[0].send_bytes(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    with pytest.raises(FrameError, match="a frame of kind"):
        ends[1].receive()


def test_a_frame_cut_short_is_an_error_and_an_end_between_frames_is_not(
    ends: tuple[FrameSocket, FrameSocket],
) -> None:
    ends[0].send(Frame(Kind.END))
    ends[0].send_bytes(b"\x03\0\0\0")
    ends[0].close()
    assert ends[1].receive() == Frame(Kind.END)
    with pytest.raises(FrameError, match="within a message"):
        ends[1].receive()
    ends[1].close()


def test_both_prove_the_token(ends: tuple[FrameSocket, FrameSocket]) -> None:
    with ThreadPoolExecutor(1) as pool:
        leader = pool.submit(prove_to_follower, ends[0], TOKEN)
        prove_to_leader(ends[1], TOKEN, 3)
        assert leader.result() == 3


def test_a_leader_that_is_still_importing_is_waited_for(
    ends: tuple[FrameSocket, FrameSocket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handshake, "HANDSHAKE_TIMEOUT_S", 0.2)
    with pytest.raises(TimeoutError):
        prove_to_leader(ends[1], TOKEN, 3, greeting_timeout_s=0.4)
    with ThreadPoolExecutor(1) as pool:
        follower = pool.submit(prove_to_leader, ends[1], TOKEN, 3, greeting_timeout_s=60)
        time.sleep(0.5)
        monkeypatch.undo()
        assert prove_to_follower(ends[0], TOKEN) == 3
        follower.result()


def test_another_token_convinces_neither(ends: tuple[FrameSocket, FrameSocket]) -> None:
    def lead() -> None:
        with pytest.raises(WrongToken):
            prove_to_follower(ends[0], TOKEN)
        ends[0].close()

    with ThreadPoolExecutor(1) as pool:
        leader = pool.submit(lead)
        with pytest.raises(WrongToken):
            prove_to_leader(ends[1], TOKEN + b"!", 3)
        leader.result()


def test_a_false_leader_that_echoes_is_found_out(ends: tuple[FrameSocket, FrameSocket]) -> None:
    """It does not know the token, so it can only guess the last message."""

    def pretend() -> None:
        ends[0].send_bytes(b"jaxserve group 1" + bytes(32))
        said = ends[0].receive_bytes(68)
        assert said is not None
        ends[0].send_bytes(said[-32:])

    with ThreadPoolExecutor(1) as pool:
        pool.submit(pretend)
        with pytest.raises(WrongToken, match="another token"):
            prove_to_leader(ends[1], TOKEN, 3)


def _config(num_processes: int = 3) -> GroupConfig:
    return GroupConfig(num_processes, 0, "127.0.0.1", 0, TOKEN)


def _join(port: int, process_id: int, *, token: bytes = TOKEN, **hello: object) -> FrameSocket:
    connection = FrameSocket(socket.create_connection(("127.0.0.1", port), timeout=5))
    prove_to_leader(connection, token, process_id)
    said = {"host": "h", "pid": 1, "num_processes": 3, "versions": versions(), **hello}
    connection.send(Frame.of_json(Kind.HELLO, said))
    return connection


def test_strangers_and_wrong_numbers_do_not_keep_a_group_from_forming() -> None:
    gathering = Gathering(_config())
    links: list[FollowerLink] = []
    thread = threading.Thread(
        target=lambda: links.extend(gathering.gather({}, lambda: 0.0, timeout_s=30))
    )
    thread.start()
    port = gathering.port
    with socket.create_connection(("127.0.0.1", port)) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n" + bytes(68))
    with pytest.raises(WrongToken):
        _join(port, 1, token=TOKEN + b"!")
    joined = [_join(port, 2)]
    refusals = [
        (_join(port, 2), "process 2 is there already"),
        (_join(port, 3), "--process-id must be in"),
        (_join(port, 1, num_processes=4), "--num-processes is 3 here, not 4"),
        (_join(port, 1, versions={"jax": "0"}), "install the same"),
    ]
    for connection, why in refusals:
        frame = connection.receive()
        assert frame is not None
        assert why in frame.json()["refused"]
    joined.append(_join(port, 1))
    thread.join(10)
    assert [link.process_id for link in links] == [1, 2]
    with pytest.raises(ConnectionRefusedError):  # It listens no more.
        socket.create_connection(("127.0.0.1", port), timeout=1)
    for end in (*links, *joined):
        end.close()


def test_who_does_not_come_is_named() -> None:
    with pytest.raises(GroupError, match=r"waited 0 s for process 1, 2 of 3"):
        Gathering(_config()).gather({}, lambda: 0.0, timeout_s=0.3)


def test_a_link_tells_of_beats_failures_and_the_end(ends: tuple[FrameSocket, FrameSocket]) -> None:
    link = FollowerLink(1, ends[0], {"host": "h", "pid": 7}, None, lambda: 5.0)
    link.start()
    ends[1].send(Frame.of_array(Kind.BEAT, np.asarray((9, 8, 1), np.int32)))
    ends[1].send(Frame.of_json(Kind.READY, {"fingerprint": "f"}))
    assert link.is_ready.wait(5)
    signs = link.signs()
    assert (signs.begun, signs.finished, signs.heard_s, link.num_compiles) == (9, 8, 5.0, 1)
    assert (signs.ended, signs.failure) == (None, None)
    ends[1].send(Frame.of_json(Kind.FAILED, {"why": "RuntimeError"}))
    ends[1].close()
    link.join(5)
    assert link.signs().ended == "has ended its connection"
    assert link.signs().failure == "RuntimeError"


def test_addresses() -> None:
    assert parse_address("10.0.0.1:50100") == ("10.0.0.1", 50100)
    assert parse_address("[::1]:5") == ("::1", 5)
    assert join_address("::1", 5) == "[::1]:5"
    for wrong in ("", "host", "host:", ":5", "host:0", "host:65536", "host:x"):
        with pytest.raises(ConfigError, match="--coordinator must be HOST:PORT"):
            parse_address(wrong)


def test_a_token_must_be_a_secret(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_bytes(b"  " + TOKEN + b"\n")
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        read_token(path)
    path.chmod(0o600)
    assert read_token(path) == TOKEN
    with pytest.raises(ConfigError, match="openssl rand"):
        read_token(tmp_path / "missing")
    with pytest.raises(ConfigError, match="16 or more"):
        GroupConfig(2, 0, "127.0.0.1", 1, b"short")


def test_a_follower_with_other_programs_is_refused_by_name(
    ends: tuple[FrameSocket, FrameSocket],
) -> None:
    leader = Leader(_config(2), Gathering(_config(2)), {}, lambda _: None)
    link = FollowerLink(1, ends[0], {"host": "h", "pid": 7}, None, lambda: 0.0)
    link.start()
    leader._links = [link]
    ends[1].send(Frame.of_json(Kind.READY, {"fingerprint": "f"}))
    leader.wait_until_ready("f")
    with pytest.raises(GroupError, match=r"process 1 \(h, pid 7\) has compiled for other settings"):
        leader.wait_until_ready("g")
    ends[1].close()
    link.join(5)
    leader.end()
