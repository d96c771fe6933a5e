"""Metadata keys of the protocol, shared by server and client."""

from __future__ import annotations

REQUEST_ID_KEY = "x-request-id"
"""Of a request, when its body names no id; and of every reply."""
FIELD_KEY = "jaxserve-field"
"""With INVALID_ARGUMENT: the path of the field that is wrong."""
RETRY_KEY = "retry-after-ms"
"""With RESOURCE_EXHAUSTED: when the queue may have room again."""
TRACE_PARENT_KEY = "traceparent"
"""W3C trace context of the client's span; a header of the same name over HTTP."""
