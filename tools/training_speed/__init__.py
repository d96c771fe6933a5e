"""Engines that `tools/bench_training.py` compares, each a process that steps when it is told."""
