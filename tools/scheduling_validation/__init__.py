"""Bands of published results, each checked in the simulator."""
