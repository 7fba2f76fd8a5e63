"""Fused kernels for parameter-efficient tuning of transformers."""

__version__ = "0.1.0"
