"""Parts of `tools/gpu_attention_check.py`."""
