"""Tool calls: how models of a kind write them, read as text comes, and forced by a grammar."""
