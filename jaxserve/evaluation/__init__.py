"""Accuracy of a served model on small tasks: `jaxserve eval`."""
