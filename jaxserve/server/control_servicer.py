"""Control: GetServerInfo, GetModelInfo, GetLoad; LoadAdapter, UnloadAdapter, ListAdapters."""

from __future__ import annotations

from pathlib import Path

import jaxserve
from jaxserve.engine.adapter_names import ServedAdapter
from jaxserve.proto.v1 import control_pb2 as pb
from jaxserve.proto.v1 import control_pb2_grpc
from jaxserve.server import convert
from jaxserve.server.adapters import load_adapter
from jaxserve.server.load import load_of
from jaxserve.server.state import Phase, ServerState
from jaxserve.server.status import Context, end_with_status

SCHEMA_REVISION = 6

_STATES = {
    Phase.STARTING: pb.SERVER_STATE_STARTING,
    Phase.READY: pb.SERVER_STATE_READY,
    Phase.DEGRADED: pb.SERVER_STATE_DEGRADED,
    Phase.DRAINING: pb.SERVER_STATE_DRAINING,
}


class ControlServicer(control_pb2_grpc.ControlServicer):
    def __init__(self, state: ServerState, lora_dir: Path | None = None) -> None:
        """`lora_dir`: below it lie the adapters that may be loaded."""
        self._state = state
        self._lora_dir = lora_dir

    async def GetServerInfo(  # noqa: N802
        self, request: pb.GetServerInfoRequest, context: Context
    ) -> pb.GetServerInfoResponse:
        try:
            convert.refuse_unknown_fields(request)
            return pb.GetServerInfoResponse(
                version=jaxserve.__version__,
                schema_revision=SCHEMA_REVISION,
                state=_STATES[self._state.phase],
                uptime_s=self._state.uptime_s,
                generate_fields=convert.generate_fields(),
            )
        except Exception as error:
            await end_with_status(context, error)

    async def GetModelInfo(  # noqa: N802
        self, request: pb.GetModelInfoRequest, context: Context
    ) -> pb.GetModelInfoResponse:
        try:
            convert.refuse_unknown_fields(request)
            serving = self._state.require_serving()
            card = serving.card
            return pb.GetModelInfoResponse(
                name=card.name,
                family=card.family,
                vocab_size=card.vocab_size,
                max_model_len=card.max_model_len,
                bos_token_id=card.bos_token_id,
                eos_token_ids=card.eos_token_ids,
                has_chat_template=serving.tokenizer.has_chat_template,
                dtype=card.dtype,
                page_size=card.page_size,
                num_pages=card.num_pages,
                max_num_seqs=card.max_num_seqs,
                token_budget=card.token_budget,
                buckets=card.buckets,
                policy=card.policy,
                max_prompt_bytes=serving.limits.max_prompt_bytes,
                weights=serving.weights_name(),
                embedding_size=card.embedding_size,
            )
        except Exception as error:
            await end_with_status(context, error)

    async def GetLoad(  # noqa: N802
        self, request: pb.GetLoadRequest, context: Context
    ) -> pb.GetLoadResponse:
        try:
            convert.refuse_unknown_fields(request)
            return pb.GetLoadResponse(**load_of(self._state))
        except Exception as error:
            await end_with_status(context, error)

    async def LoadAdapter(  # noqa: N802
        self, request: pb.LoadAdapterRequest, context: Context
    ) -> pb.LoadAdapterResponse:
        try:
            convert.refuse_unknown_fields(request)
            serving = self._state.require_accepting()
            adapter = await load_adapter(serving, self._lora_dir, request.name, request.path)
            return pb.LoadAdapterResponse(adapter=_adapter_message(adapter))
        except Exception as error:
            await end_with_status(context, error)

    async def UnloadAdapter(  # noqa: N802
        self, request: pb.UnloadAdapterRequest, context: Context
    ) -> pb.UnloadAdapterResponse:
        try:
            convert.refuse_unknown_fields(request)
            self._state.require_serving().require_adapters().unload(request.name)
            return pb.UnloadAdapterResponse()
        except Exception as error:
            await end_with_status(context, error)

    async def ListAdapters(  # noqa: N802
        self, request: pb.ListAdaptersRequest, context: Context
    ) -> pb.ListAdaptersResponse:
        try:
            convert.refuse_unknown_fields(request)
            loader = self._state.require_serving().require_adapters()
            return pb.ListAdaptersResponse(
                adapters=[_adapter_message(one) for one in loader.names.all()],
                max_adapters=loader.max_loras,
                max_rank=loader.max_rank,
            )
        except Exception as error:
            await end_with_status(context, error)


def _adapter_message(adapter: ServedAdapter) -> pb.Adapter:
    return pb.Adapter(
        name=adapter.name, rank=adapter.rank, digest=adapter.digest, path=adapter.path
    )
