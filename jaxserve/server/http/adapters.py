"""POST /v1/load_lora_adapter and /v1/unload_lora_adapter: which adapters requests can name."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from jaxserve.errors import InvalidRequest
from jaxserve.server.adapters import load_adapter
from jaxserve.server.http.replies import LoadedAdapter, UnloadedAdapter
from jaxserve.server.http.schema import LoadAdapterRequest, UnloadAdapterRequest
from jaxserve.server.http.service import HttpService, in_client_words

_NAMES = {"name": "lora_name", "path": "lora_path"}


async def load(service: HttpService, request: Request) -> Response:
    body = await service.read(request, LoadAdapterRequest)
    serving = service.state.require_accepting()
    try:
        adapter = await load_adapter(serving, service.lora_dir, body.lora_name, body.lora_path)
    except InvalidRequest as error:
        raise in_client_words(error, _NAMES) from error
    reply: LoadedAdapter = {
        "id": adapter.name,
        "object": "adapter",
        "rank": adapter.rank,
        "digest": adapter.digest,
    }
    return JSONResponse(reply)


async def unload(service: HttpService, request: Request) -> Response:
    body = await service.read(request, UnloadAdapterRequest)
    adapter = service.state.require_serving().require_adapters().unload(body.lora_name)
    reply: UnloadedAdapter = {"id": adapter.name, "object": "adapter.unloaded"}
    return JSONResponse(reply)
