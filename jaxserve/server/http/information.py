"""What the server is and how it does: models, version, health, metrics."""

from __future__ import annotations

import time

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

import jaxserve
from jaxserve.server.engine_collector import EngineCollector
from jaxserve.server.http.replies import LoadReport, Model, Models, Version
from jaxserve.server.http.service import HttpService, check_model_name
from jaxserve.server.load import load_of
from jaxserve.server.state import Phase, Serving
from jaxserve.server.tenant_collector import TenantCollector


async def list_models(service: HttpService, _: Request) -> Response:
    serving = service.state.require_serving()
    names = (serving.card.name, *serving.adapter_names())
    reply: Models = {"object": "list", "data": [_model(service, serving, name) for name in names]}
    return JSONResponse(reply)


async def get_model(service: HttpService, request: Request) -> Response:
    serving = service.state.require_serving()
    name = request.path_params["model"]
    check_model_name(name, serving)
    return JSONResponse(_model(service, serving, name))


def _model(service: HttpService, serving: Serving, name: str) -> Model:
    """The model, or an adapter beside it."""
    return {
        "id": name,
        "object": "model",
        "created": int(time.time() - service.state.uptime_s),
        "owned_by": "jaxserve",
        "max_model_len": serving.card.max_model_len,
        "parent": None if name == serving.card.name else serving.card.name,
    }


async def version(_service: HttpService, _: Request) -> Response:
    reply: Version = {"version": jaxserve.__version__}
    return JSONResponse(reply)


async def load(service: HttpService, _: Request) -> Response:
    state = service.state
    card = state.require_serving().card
    reply: LoadReport = {
        "state": state.phase.value,
        "uptime_s": state.uptime_s,
        "version": jaxserve.__version__,
        "model": card.name,
        "family": card.family,
        "max_num_seqs": card.max_num_seqs,
        "load": load_of(state),
    }
    return JSONResponse(reply, headers={"cache-control": "no-store"})


async def health(service: HttpService, _: Request) -> Response:
    """Live, which is more than "the process answers": a stuck engine is not."""
    phase = service.state.phase
    return PlainTextResponse(f"{phase}\n", 503 if phase is Phase.DEGRADED else 200)


async def ready(service: HttpService, _: Request) -> Response:
    """A request that is sent now will be worked on."""
    phase = service.state.phase
    return PlainTextResponse(f"{phase}\n", 200 if phase is Phase.READY else 503)


async def metrics(service: HttpService, _: Request) -> Response:
    registry = CollectorRegistry(auto_describe=False)
    registry.register(EngineCollector(service.state))
    registry.register(TenantCollector(service.door))
    return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)
