"""Training data: prepared once into an indexed cache, then read by example id."""
