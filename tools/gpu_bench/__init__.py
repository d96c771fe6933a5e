"""Parts of `tools/bench_gpu.py`; each runs in a process of its own, which has the GPU to itself."""
