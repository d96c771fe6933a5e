"""Compares ways to make batches, and what classifiers add, on extreme classification."""
