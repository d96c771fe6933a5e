"""Generated from jaxserve/proto/v1/control.proto by tools/generate_protos.py: do not edit."""

from typing import Any

import grpc
import grpc.aio

from jaxserve.proto.v1 import control_pb2 as pb

class ControlStub:
    def __init__(self, channel: grpc.Channel | grpc.aio.Channel) -> None: ...
    GetServerInfo: grpc.UnaryUnaryMultiCallable[pb.GetServerInfoRequest, pb.GetServerInfoResponse]
    GetModelInfo: grpc.UnaryUnaryMultiCallable[pb.GetModelInfoRequest, pb.GetModelInfoResponse]
    GetLoad: grpc.UnaryUnaryMultiCallable[pb.GetLoadRequest, pb.GetLoadResponse]
    LoadAdapter: grpc.UnaryUnaryMultiCallable[pb.LoadAdapterRequest, pb.LoadAdapterResponse]
    UnloadAdapter: grpc.UnaryUnaryMultiCallable[pb.UnloadAdapterRequest, pb.UnloadAdapterResponse]
    ListAdapters: grpc.UnaryUnaryMultiCallable[pb.ListAdaptersRequest, pb.ListAdaptersResponse]

class ControlServicer:
    def GetServerInfo(self, request: pb.GetServerInfoRequest, context: Any) -> Any: ...
    def GetModelInfo(self, request: pb.GetModelInfoRequest, context: Any) -> Any: ...
    def GetLoad(self, request: pb.GetLoadRequest, context: Any) -> Any: ...
    def LoadAdapter(self, request: pb.LoadAdapterRequest, context: Any) -> Any: ...
    def UnloadAdapter(self, request: pb.UnloadAdapterRequest, context: Any) -> Any: ...
    def ListAdapters(self, request: pb.ListAdaptersRequest, context: Any) -> Any: ...

def add_ControlServicer_to_server(
    servicer: ControlServicer, server: grpc.Server | grpc.aio.Server
) -> None: ...
