"""Inference: Generate, Embed, Tokenize, Abort."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence
from concurrent.futures import Executor
from contextlib import aclosing
from functools import partial

from jaxserve.engine.encoder.texts import EncodedText, tokenize_texts
from jaxserve.engine.request import FinishReason, GenerationRequest, RequestOutput, joined
from jaxserve.errors import InvalidRequest, NotAccepting
from jaxserve.proto.v1 import inference_pb2 as pb
from jaxserve.proto.v1 import inference_pb2_grpc
from jaxserve.server import convert
from jaxserve.server.access.door import Door
from jaxserve.server.access.grpc_access import authorize
from jaxserve.server.access.tenant import Tenant
from jaxserve.server.grammars import grammar_of
from jaxserve.server.metadata import REQUEST_ID_KEY, TRACE_PARENT_KEY
from jaxserve.server.pacing import IMMEDIATE, Pacing, paced
from jaxserve.server.prompt_limits import check_request_id
from jaxserve.server.ranked_labels import ranked_labels
from jaxserve.server.state import ServerState, Serving
from jaxserve.server.status import Context, abort_internal, abort_late, end_with_status
from models.chat_sandbox import ChatTemplateError
from models.tokenizer import TokenizerError


class InferenceServicer(inference_pb2_grpc.InferenceServicer):
    """Handlers run on the event loop; text is tokenised on `workers`, so that
    a long prompt delays nobody's stream."""

    def __init__(
        self, state: ServerState, workers: Executor, door: Door, pacing: Pacing = IMMEDIATE
    ) -> None:
        self._state = state
        self._workers = workers
        self._door = door
        self._pacing = pacing

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> None:  # noqa: N802
        # Writing to the context, rather than yielding, puts a cancellation
        # inside this coroutine, so that the engine hears of it at once.
        request_id = "-"
        try:
            request_id = _request_id(request, context)
            serving = self._state.require_accepting()
            serving.require_generation()
            tenant = self._tenant("Generate", context)
            pacing = convert.pacing(request, self._pacing)
            generation = await self._accept(request, serving, request_id, context)
            generation = self._door.claims.claim(tenant, generation, _trace_parent(context))
            self._state.promises.make(context)
            await context.send_initial_metadata(((REQUEST_ID_KEY, request_id),))
            await self._stream(generation, request_id, pacing, serving, context)
        except InvalidRequest as error:
            self._state.note_refusal(error)
            await end_with_status(context, _in_client_words(error, request))
        except Exception as error:
            self._state.note_refusal(error)
            await end_with_status(context, error, request_id)

    async def Embed(  # noqa: N802
        self, request: pb.EmbedRequest, context: Context
    ) -> pb.EmbedResponse:
        request_id = uuid.uuid4().hex
        try:
            serving = self._state.require_accepting()
            serving.require_embeddings()
            tenant = self._tenant("Embed", context)
            convert.check_embed_request(request, serving.limits)
            texts, outputs = await self._encode(request, serving, tenant, request_id, context)
            return convert.embed_response(texts, outputs, serving.card.embedding_size)
        except Exception as error:
            self._state.note_refusal(error)
            await end_with_status(context, error, request_id)

    async def Classify(  # noqa: N802
        self, request: pb.ClassifyRequest, context: Context
    ) -> pb.ClassifyResponse:
        request_id = uuid.uuid4().hex
        try:
            serving = self._state.require_accepting()
            serving.require_classes()
            tenant = self._tenant("Classify", context)
            top_k = convert.check_classify_request(
                request, serving.limits, serving.card.num_classes
            )
            texts, outputs = await self._encode(request, serving, tenant, request_id, context)
            ranked = [
                ranked_labels(output.embedding, serving, top_k)
                for output in outputs
                if output.embedding is not None
            ]
            return convert.classify_response(texts, outputs, ranked)
        except Exception as error:
            self._state.note_refusal(error)
            await end_with_status(context, error, request_id)

    async def Tokenize(  # noqa: N802
        self, request: pb.TokenizeRequest, context: Context
    ) -> pb.TokenizeResponse:
        try:
            serving = self._state.require_serving()
            convert.check_prompt(request, serving.limits)
            convert.refuse_unknown_fields(request)
            token_ids = await self._token_ids(request, serving)
            return pb.TokenizeResponse(token_ids=token_ids)
        except InvalidRequest as error:
            await end_with_status(context, _in_client_words(error, request))
        except Exception as error:
            await end_with_status(context, error)

    async def Abort(  # noqa: N802
        self, request: pb.AbortRequest, context: Context
    ) -> pb.AbortResponse:
        try:
            convert.refuse_unknown_fields(request)
            request_id = check_request_id(request.request_id)
            serving = self._state.require_serving()
            tenant = self._tenant("Abort", context)
            own_id = self._door.running_id(serving, tenant, request_id)
            aborted = serving.engine.abort(own_id, FinishReason.CANCELLED)
            outcome = pb.ABORT_OUTCOME_ABORTED if aborted else pb.ABORT_OUTCOME_ALREADY_FINISHED
            return pb.AbortResponse(outcome=outcome)
        except Exception as error:
            await end_with_status(context, error)

    async def _accept(
        self, request: pb.GenerateRequest, serving: Serving, request_id: str, context: Context
    ) -> GenerationRequest:
        """The validated, tokenised request. Raises InvalidRequest."""
        convert.check_request(request, serving.limits)
        sampling = convert.sampling_params(request)
        sampling.validate(vocab_size=serving.limits.vocab_size)
        grammar = await grammar_of(sampling.constraint, serving)
        deadline_s = self._deadline_s(context)
        if request.WhichOneof("prompt") == "token_ids":
            token_ids = tuple(request.token_ids.ids)
        else:
            token_ids = await self._token_ids(request, serving)
        return GenerationRequest(
            request_id=request_id,
            prompt_token_ids=token_ids,
            sampling=sampling,
            deadline_s=deadline_s,
            cache_salt=request.cache.cache_salt,
            adapter=request.adapter,
            grammar=grammar,
        )

    def _tenant(self, method: str, context: Context) -> Tenant:
        """Who calls. Its key may have gone since the call was let in; then raises as that does."""
        metadata = context.invocation_metadata()
        return authorize(self._door.ring, f"/jaxserve.v1.Inference/{method}", metadata)

    async def _encode(
        self,
        request: pb.EmbedRequest | pb.ClassifyRequest,
        serving: Serving,
        tenant: Tenant,
        request_id: str,
        context: Context,
    ) -> tuple[list[EncodedText], list[RequestOutput]]:
        """Runs all texts through the encoder; every output has a result."""
        deadline_s = self._deadline_s(context)
        loop = asyncio.get_running_loop()
        tokenize = partial(
            tokenize_texts,
            serving.tokenizer,
            tuple(request.texts),
            max_tokens=serving.card.max_model_len,
            truncate=request.truncate,
        )
        texts = await loop.run_in_executor(self._workers, tokenize)
        requests = [
            self._door.claims.claim(
                tenant,
                GenerationRequest(f"{request_id}-{index}", text.token_ids, deadline_s=deadline_s),
                _trace_parent(context),
            )
            for index, text in enumerate(texts)
        ]
        self._state.promises.make(context)
        await context.send_initial_metadata(((REQUEST_ID_KEY, request_id),))
        outputs = await serving.async_engine.complete_all(requests)
        await _end_unless_embedded(outputs, context, request_id)
        return texts, outputs

    def _deadline_s(self, context: Context) -> float | None:
        """When the client's patience ends, on the engine's clock."""
        remaining_s = context.time_remaining()
        return None if remaining_s is None else self._state.clock() + remaining_s

    async def _stream(
        self,
        generation: GenerationRequest,
        request_id: str,
        pacing: Pacing,
        serving: Serving,
        context: Context,
    ) -> None:
        """
        Args:
            request_id: the client's own.
        """
        async with aclosing(serving.async_engine.generate(generation)) as outputs:
            if pacing.is_immediate:
                async for output in outputs:
                    await _write(output, pacing, request_id, context)
                return
            batches = paced(
                outputs,
                pacing,
                num_tokens=lambda output: len(output.token_ids),
                fits=lambda batch: convert.fits(joined(batch), pacing),
            )
            # A generator, which its type, an iterator, does not say.
            async with aclosing(batches):  # type: ignore[type-var]
                async for batch in batches:
                    output = joined(batch) if batch else NOTHING
                    await _write(output, pacing, request_id, context)

    async def _token_ids(
        self, request: pb.GenerateRequest | pb.TokenizeRequest, serving: Serving
    ) -> tuple[int, ...]:
        tokenizer = serving.tokenizer
        if request.WhichOneof("prompt") == "chat":
            messages = [
                {"role": message.role, "content": message.content}
                for message in request.chat.messages
            ]
            encode = partial(tokenizer.encode_chat, messages, as_text=True)
        else:
            text = request.text
            add = text.add_special_tokens if text.HasField("add_special_tokens") else True
            encode = partial(tokenizer.encode, text.text, add_special_tokens=add)
        try:
            loop = asyncio.get_running_loop()
            return tuple(await loop.run_in_executor(self._workers, encode))
        except (ChatTemplateError, TokenizerError) as error:
            raise InvalidRequest("prompt", str(error)) from error


NOTHING = RequestOutput(request_id="", token_ids=(), text="")


async def _write(output: RequestOutput, pacing: Pacing, request_id: str, context: Context) -> None:
    """Sends what an output tells, or ends the call with the status that it stands for.

    Raises the output's failure.
    """
    if output.failure is not None:
        raise output.failure
    if output.finish_reason is FinishReason.ERROR:
        await abort_internal(context, request_id)
    for response in convert.responses(output, pacing):
        await context.write(response)
    if output.finish_reason is FinishReason.DEADLINE:
        # The engine's clock may be first; the client gets one status either way.
        await abort_late(context)


async def _end_unless_embedded(
    outputs: Sequence[RequestOutput], context: Context, request_id: str
) -> None:
    """Ends the call with a status when a text has no embedding."""
    reasons = {output.finish_reason for output in outputs if output.embedding is None}
    if FinishReason.ERROR in reasons:
        await abort_internal(context, request_id)
    if FinishReason.DEADLINE in reasons:
        await abort_late(context)
    if reasons:
        raise NotAccepting("the server stopped before all texts were embedded: use another one")


def _request_id(request: pb.GenerateRequest, context: Context) -> str:
    """The field, else the metadata, else a new one. Raises InvalidRequest."""
    if request.HasField("request_id"):
        return check_request_id(request.request_id)
    given = _metadata(context, REQUEST_ID_KEY)
    return uuid.uuid4().hex if given is None else check_request_id(given, REQUEST_ID_KEY)


def _trace_parent(context: Context) -> str:
    return _metadata(context, TRACE_PARENT_KEY) or ""


def _metadata(context: Context, wanted: str) -> str | None:
    """The first value of this key that the client sent."""
    for key, value in context.invocation_metadata() or ():
        if key == wanted:
            return value.decode("latin-1") if isinstance(value, bytes) else value
    return None


def _in_client_words(
    error: InvalidRequest, request: pb.GenerateRequest | pb.TokenizeRequest
) -> InvalidRequest:
    message = str(error).removeprefix(f"{error.field}: ")
    return InvalidRequest(convert.client_field(error.field, request), message)
