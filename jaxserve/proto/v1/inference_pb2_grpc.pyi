"""Generated from jaxserve/proto/v1/inference.proto by tools/generate_protos.py: do not edit."""

from typing import Any

import grpc
import grpc.aio

from jaxserve.proto.v1 import inference_pb2 as pb

class InferenceStub:
    def __init__(self, channel: grpc.Channel | grpc.aio.Channel) -> None: ...
    Generate: grpc.UnaryStreamMultiCallable[pb.GenerateRequest, pb.GenerateResponse]
    Embed: grpc.UnaryUnaryMultiCallable[pb.EmbedRequest, pb.EmbedResponse]
    Classify: grpc.UnaryUnaryMultiCallable[pb.ClassifyRequest, pb.ClassifyResponse]
    Tokenize: grpc.UnaryUnaryMultiCallable[pb.TokenizeRequest, pb.TokenizeResponse]
    Abort: grpc.UnaryUnaryMultiCallable[pb.AbortRequest, pb.AbortResponse]

class InferenceServicer:
    def Generate(self, request: pb.GenerateRequest, context: Any) -> Any: ...
    def Embed(self, request: pb.EmbedRequest, context: Any) -> Any: ...
    def Classify(self, request: pb.ClassifyRequest, context: Any) -> Any: ...
    def Tokenize(self, request: pb.TokenizeRequest, context: Any) -> Any: ...
    def Abort(self, request: pb.AbortRequest, context: Any) -> Any: ...

def add_InferenceServicer_to_server(
    servicer: InferenceServicer, server: grpc.Server | grpc.aio.Server
) -> None: ...
