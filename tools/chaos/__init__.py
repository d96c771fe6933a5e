"""What `tools/soak.py` does to a server, and how it judges what that did to it."""
