"""Methods inside transformers models."""

from .auto import (
    AutoPeltModel,
    AutoPeltModelForCausalLM,
    AutoPeltModelForQuestionAnswering,
    AutoPeltModelForSeq2SeqLM,
    AutoPeltModelForSequenceClassification,
    AutoPeltModelForTokenClassification,
)
from .export import Matrix, matrices_of
from .model import PeltModel, get_pelt_model
from .slots import FAMILIES, Slots
from .sparse_files import load_exported, save_exported, sparse_weights

__all__ = [
    "FAMILIES",
    "AutoPeltModel",
    "AutoPeltModelForCausalLM",
    "AutoPeltModelForQuestionAnswering",
    "AutoPeltModelForSeq2SeqLM",
    "AutoPeltModelForSequenceClassification",
    "AutoPeltModelForTokenClassification",
    "Matrix",
    "PeltModel",
    "Slots",
    "get_pelt_model",
    "load_exported",
    "matrices_of",
    "save_exported",
    "sparse_weights",
]
