"""Engines that `tools/compare_peers.py` compares: how each is installed, started and asked."""
