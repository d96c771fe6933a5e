"""Attention over pages: one op, `ragged_paged_attention`, and its parts.

`reference` is the XLA implementation and the oracle; `registry` names the
implementations of each platform; `dense` is plain causal attention.
"""
