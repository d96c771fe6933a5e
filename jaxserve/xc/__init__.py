"""Extreme classification: texts to a few of very many labels, by a dual encoder and classifiers."""
