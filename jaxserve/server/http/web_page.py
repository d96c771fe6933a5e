"""The web page at `/`: a chat, and charts of the load."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

_FOLDER = Path(__file__).parent / "page"
_MEDIA_TYPES = MappingProxyType(
    {
        ".html": "text/html",
        ".css": "text/css",
        ".js": "text/javascript",
        ".svg": "image/svg+xml",
    }
)
HEADERS = MappingProxyType(
    {
        # Only files of this page run, load and are asked for; text never becomes markup.
        "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
        "img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'",
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cross-origin-opener-policy": "same-origin",
        "cross-origin-resource-policy": "same-origin",
        "cache-control": "no-cache",
    }
)


def page_routes() -> Sequence[Route]:
    """Of the page's files. They are the same on every server, so no key is asked for: what they
    show is asked for with the key that the reader types in."""
    return [
        Route(
            "/" if file.name == "index.html" else f"/page/{file.name}",
            partial(_send, file.read_bytes(), _MEDIA_TYPES[file.suffix]),
            methods=["GET"],
        )
        for file in sorted(_FOLDER.iterdir())
    ]


async def _send(content: bytes, media_type: str, _: Request) -> Response:
    return Response(content, media_type=media_type, headers=dict(HEADERS))
