"""Latency evidence for scheduling policies, taken in the real engine."""
