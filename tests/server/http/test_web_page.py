"""The page's files: what is sent, under which policy, and what they may not hold."""

from __future__ import annotations

import re

from jaxserve.server.http.web_page import page_routes
from tests.server.http.raw_http import ask

PATHS = [route.path for route in page_routes()]


def test_every_file_comes_with_a_strict_policy(service):
    for path in PATHS:
        status, headers, _ = ask(service, "GET", path)
        assert status == 200
        policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
        assert policy["default-src"] == "'none'"
        assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
        assert "unsafe" not in str(policy)
        assert headers["x-content-type-options"] == "nosniff"
        assert "access-control-allow-origin" not in headers


def test_whatever_the_page_names_is_there(service):
    _, headers, html = ask(service, "GET", "/")
    assert headers["content-type"] == "text/html; charset=utf-8"
    names = re.findall(r'(?:src|href)="([^"#]+)"', html)
    assert len(names) >= 4
    assert {f"/{name}" for name in names} <= set(PATHS)


def test_nothing_is_inline_and_nothing_comes_from_elsewhere(service):
    _, _, html = ask(service, "GET", "/")
    assert not re.search(r"<script(?![^>]*src=)|<style|\son\w+=|\sstyle=", html)
    texts = [ask(service, "GET", path)[2] for path in PATHS]
    for text in texts:
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text)
        assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", text)
        assert not re.search(r"localStorage|sessionStorage|document\.cookie|indexedDB", text)


def test_every_field_has_a_label(service):
    _, _, html = ask(service, "GET", "/")
    ids = set(re.findall(r'<(?:input|textarea|select)\b[^>]*\bid="([^"]+)"', html))
    assert ids == {"prompt", "temperature", "max-tokens", "api-key"}
    assert ids == set(re.findall(r'<label for="([^"]+)"', html))


def test_the_page_can_be_left_out(make_service):
    service = make_service(server_settings={"web_page": False})
    assert {ask(service, "GET", path)[0] for path in PATHS} == {404}
