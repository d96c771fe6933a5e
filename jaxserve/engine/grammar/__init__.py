"""Structured output: what a request's text must look like, and which tokens keep to it."""
