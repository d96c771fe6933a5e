"""Generated JSON schemas, and what an engine makes of them."""
