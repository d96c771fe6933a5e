"""llama.cpp's own server, through xllamacpp; runs in its environment.

PYTHON tools/peers/llama_cpp_server.py MODEL.gguf PORT NUM_THREADS NUM_STREAMS MAX_LEN
"""

from __future__ import annotations

import signal
import sys

import xllamacpp


def main() -> None:
    """Serve until SIGTERM."""
    model, port, num_threads, num_streams, max_len = sys.argv[1:]
    params = xllamacpp.CommonParams()
    params.model.path = model
    params.port = int(port)
    params.hostnames = ["127.0.0.1"]
    params.n_parallel = int(num_streams)
    params.n_ctx = int(num_streams) * int(max_len)
    params.cpuparams.n_threads = int(num_threads)
    params.cpuparams_batch.n_threads = int(num_threads)
    # Prompts never come twice here: what it would keep of them only costs.
    params.cache_ram_mib = 0
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    signal.sigwait([signal.SIGTERM, signal.SIGINT])


if __name__ == "__main__":
    main()
