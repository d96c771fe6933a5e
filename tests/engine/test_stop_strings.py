from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.engine.stop_strings import StopStringMatcher


def oracle(text: str, stop: list[str], include: bool) -> tuple[str, str | None]:
    """Reads one character at a time and looks at everything so far."""
    for end in range(1, len(text) + 1):
        ending = [one for one in stop if text[:end].endswith(one)]
        if ending:
            longest = max(ending, key=len)
            return text[: end if include else end - len(longest)], longest
    return text, None


def run(stop: list[str], chunks: list[str], include: bool) -> tuple[list[str], str | None]:
    matcher = StopStringMatcher(stop, include_in_output=include)
    out = [matcher.push(chunk) for chunk in chunks]
    if matcher.matched is None:
        out.append(matcher.flush())
    return out, matcher.matched


SMALL = st.text("abc", max_size=20)
STOPS = st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=4)


@settings(max_examples=400, deadline=None)
@given(chunks=st.lists(SMALL, max_size=10), stop=STOPS, include=st.booleans())
def test_result_is_the_oracles_whatever_the_chunks(
    chunks: list[str], stop: list[str], include: bool
) -> None:
    out, matched = run(stop, chunks, include)
    assert ("".join(out), matched) == oracle("".join(chunks), stop, include)


@settings(max_examples=400, deadline=None)
@given(text=SMALL, stop=STOPS)
def test_nothing_that_could_begin_a_stop_string_leaves_early(text: str, stop: list[str]) -> None:
    matcher = StopStringMatcher(stop)
    emitted = ""
    for index, character in enumerate(text):
        emitted += matcher.push(character)
        if matcher.matched is not None:
            break
        seen = text[: index + 1]
        held = seen[len(emitted) :]
        starts = {one[:size] for one in stop for size in range(1, len(one))}
        longest = max((len(s) for s in starts if seen.endswith(s)), default=0)
        assert len(held) == longest, "holds exactly what it must"


@pytest.mark.parametrize("cut", range(1, 8))
def test_a_stop_string_split_anywhere_is_met(cut: int) -> None:
    text = "xx<stop>yy"
    out, matched = run(["<stop>"], [text[: cut + 1], text[cut + 1 :]], include=False)
    assert ("".join(out), matched) == ("xx", "<stop>")


def test_a_near_miss_is_given_back() -> None:
    out, matched = run(["STOP"], ["S", "T", "O", "!"], include=False)
    assert (out, matched) == (["", "", "", "STO!", ""], None)


def test_text_after_the_match_is_dropped() -> None:
    matcher = StopStringMatcher(["b"])
    assert [matcher.push("abc"), matcher.push("more"), matcher.flush()] == ["a", "", ""]


def test_without_stop_strings_nothing_is_held() -> None:
    assert StopStringMatcher([]).push("anything") == "anything"


def test_a_hostile_stop_string_costs_little() -> None:
    stop = ["a" * 255 + chr(ord("b") + index) for index in range(16)]
    matcher = StopStringMatcher(stop)
    started = time.process_time()  # Which a busy machine does not stretch.
    for _ in range(1000):
        matcher.push("a")
    assert (time.process_time() - started) / 1000 < 2e-3
