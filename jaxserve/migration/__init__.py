"""Models from any format to any other: what `jaxserve checkpoint` does."""
