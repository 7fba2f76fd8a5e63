"""Models that other libraries made, with this project's operators in them."""

from .acceleration import accelerate, accelerated, restore
from .report import Report

__all__ = ["Report", "accelerate", "accelerated", "restore"]
