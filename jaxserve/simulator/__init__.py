"""Drives the engine's own scheduler and loop in virtual time."""
