"""Fixtures of whole runs on a tiny encoder."""

from tiny_encoder import tiny_model, toy_files

__all__ = ["tiny_model", "toy_files"]
