"""An adapter and the base model that it names, opened together."""

from __future__ import annotations

import os
from typing import Any, ClassVar

import transformers

from .adapter_files import FORMER_CONFIG_FILE, files_in, read_described
from .formats.peft_writer import TASKS
from .hub import local_folder
from .model import PeltModel

# By PEFT's task, which of transformers' classes loads the base model.
CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
}


class AutoPeltModel:
    """Loads the base model that an adapter names, and the adapter into it. Which of transformers'
    Auto classes loads the base, the adapter says.
    """

    auto_class: ClassVar[str | None] = None

    @classmethod
    def from_pretrained(
        cls,
        adapter: str | os.PathLike[str],
        *,
        is_trainable: bool = False,
        revision: str | None = None,
        **options: Any,
    ) -> PeltModel:
        """The model of an adapter.

        Args:
            adapter: a folder, or the id of a repository on the hub.
            is_trainable: as in `PeltModel.from_pretrained`.
            revision: of the adapter.
            options: for the base model's from_pretrained, such as ``dtype``.

        Raises:
            FileNotFoundError: a file is missing. ValueError: the adapter names no base model, or
                does not say of which class it is.
        """
        folder = local_folder(adapter, revision)
        described = read_described(files_in(folder).config)
        if files_in(folder).config.name == FORMER_CONFIG_FILE and "peft_type" in described:
            base = described
            name, task = base.get("base_model_name_or_path"), base.get("task_type")
        else:
            base = described["base"] if isinstance(described.get("base"), dict) else {}
            name, kind = base.get("name_or_path"), str(base.get("architecture"))
            task = next((task for end, task in TASKS.items() if kind.endswith(end)), None)
            if base.get("num_labels") is not None and task in ("SEQ_CLS", "TOKEN_CLS"):
                options.setdefault("num_labels", base["num_labels"])
        auto_class = cls.auto_class or CLASSES.get(str(task))
        if not name or auto_class is None:
            lacks = "the class of its base model" if name else "its base model"
            raise ValueError(
                f"{cls.__name__}: expected {adapter} to name {lacks}, got none; load the base "
                "model and use PeltModel.from_pretrained(base, folder)"
            )
        model = getattr(transformers, auto_class).from_pretrained(name, **options)
        if base.get("vocab_added"):
            model.resize_token_embeddings(base["vocab_size"], mean_resizing=False)
        return PeltModel.from_pretrained(model, folder, is_trainable)


class AutoPeltModelForSequenceClassification(AutoPeltModel):
    """`AutoPeltModel` of a model that gives each text a class or a score."""

    auto_class = "AutoModelForSequenceClassification"


class AutoPeltModelForTokenClassification(AutoPeltModel):
    """`AutoPeltModel` of a model that gives each token a class."""

    auto_class = "AutoModelForTokenClassification"


class AutoPeltModelForQuestionAnswering(AutoPeltModel):
    """`AutoPeltModel` of a model that finds answers in a text."""

    auto_class = "AutoModelForQuestionAnswering"


class AutoPeltModelForCausalLM(AutoPeltModel):
    """`AutoPeltModel` of a decoder."""

    auto_class = "AutoModelForCausalLM"


class AutoPeltModelForSeq2SeqLM(AutoPeltModel):
    """`AutoPeltModel` of an encoder-decoder."""

    auto_class = "AutoModelForSeq2SeqLM"
