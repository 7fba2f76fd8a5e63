"""Methods inside transformers models."""

from .model import PeltModel, get_pelt_model
from .slots import FAMILIES, Slots

__all__ = ["FAMILIES", "PeltModel", "Slots", "get_pelt_model"]
