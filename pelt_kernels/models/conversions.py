"""What a model with a method can be made into: collapsed, merged, plain again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..methods import AdaMixConfig, HyperPELTConfig, MethodConfig, parts_of, with_part_changes
from ..nn import Bank, GeneratedWeights
from .checkpoint import prefix_sets, without_reparametrisation
from .export import merged_weights, why_not_mergeable
from .first_values import FirstValues, put_values
from .inject import Injection
from .task_inputs import TaskInputs
from .vocabulary import ADDED_ROWS, word_embeddings
from .wrapped import WrappedModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ConvertibleModel(WrappedModel):
    """A model with a method in it and the ways out of it."""

    prefix: nn.Module | None
    written: nn.Module | None
    method_config: MethodConfig
    _injection: Injection
    _task_inputs: TaskInputs
    _first_values: FirstValues | None
    _requires_grad: dict[str, bool]
    _is_detached: bool
    _compares_passes: bool

    def get_nb_stored_parameters(self) -> int:
        """How many numbers are stored of the active adapter once its training is over: those of
        `trained_parameters`, but of prefixes their keys and values in the place of the network that
        computes them (`collapse_prefix`), of AdaMix's experts their average (`merge_experts`); and
        the rows of words that no file of the base model holds. Nothing is computed or changed, so
        it holds of a model without values, too.

        It is what ``merge_experts()`` and ``save_pretrained(collapse_prefix=True)`` write. PST's
        masks are not stored: what they and the update come from is, its factors and scores. Of
        HyperPELT its networks are counted, which write for all its tasks; `materialize` leaves what
        they write for one.

        Raises:
            ValueError: the method is not in the model.
        """
        self._check_attached("get_nb_stored_parameters")
        counts = {name: p.numel() for name, p in self.trained_parameters().items()}
        if self.prefix is not None:
            counts = {name: n for name, n in counts.items() if not name.startswith("prefix.")}
            sets = prefix_sets(self.prefix).values()
            counts["prefix"] = sum(prefixes.collapsed_numbers for prefixes in sets)
        for path, module in self.named_modules():
            for name, bank in module.banks().items() if isinstance(module, Bank) else ():
                if f"{path}.{name}" in counts:  # those of an adapter that waits are not
                    counts[f"{path}.{name}"] //= len(bank)
        added = self._added_words()
        if added:
            counts[ADDED_ROWS] = added * word_embeddings(self.base_model)[1].shape[1]
        return sum(counts.values())

    def print_trainable_parameters(self) -> None:
        """Prints the two numbers of `get_nb_trainable_parameters` and their ratio, as PEFT does,
        and then what is stored (`get_nb_stored_parameters`) of a method that is in the model.
        """
        trainable, total = self.get_nb_trainable_parameters()
        line = (
            f"trainable params: {trainable:,} || all params: {total:,} || trainable%: "
            f"{100 * trainable / total:.4f}"
        )
        if not self._is_detached:
            line += f" || stored params: {self.get_nb_stored_parameters():,}"
        print(line)

    def collapse_prefix(self) -> None:
        """Replaces the prefix's reparametrisation by the keys and values it computes: the same
        attention for less work.

        For inference: what is saved afterwards cannot resume training of the reparametrisation, and
        an optimizer made before holds parameters that are gone.

        Raises:
            ValueError: the method has no prefix.
        """
        if self.prefix is None:
            raise ValueError(
                "collapse_prefix: expected a method with a prefix, got "
                f"{self.method_config.method!r}"
            )
        for prefixes in prefix_sets(self.prefix).values():
            prefixes.collapse()
        self.method_config = without_reparametrisation(self.method_config)
        prefix = {f"prefix.{name}" for name, _ in self.prefix.named_parameters()}
        self._set_trained(prefix.union(self._trained))

    def merge_experts(self) -> None:
        """Replaces AdaMix's experts by their average, a single adapter: the evaluation's logits bit
        for bit, with the memory of one. What is saved afterwards is that adapter.

        An optimizer made before holds parameters that are gone.

        Raises:
            ValueError: the method has no experts.
        """
        if parts_of(self.method_config).mixture is None:
            raise ValueError(
                "merge_experts: expected the method 'adamix', alone or as a part, got "
                f"{self.method_config.method!r}"
            )
        self._check_attached("merge_experts")
        for module in self.modules():
            if isinstance(module, Bank):
                module.merge()
        self.method_config = with_part_changes(self.method_config, AdaMixConfig, experts=1)
        self._compares_passes = False

    def materialize(self, task: str | int) -> None:
        """Replaces HyperPELT's networks by what they write for one task: an adapter and prefixes in
        each layer, with the same outputs. What is saved afterwards is that.

        An optimizer made before holds parameters that are gone.

        Raises:
            ValueError: another method, weights that depend on images, or an unknown task.
        """
        written, config = self._injection.written, self.method_config
        if (
            not isinstance(config, HyperPELTConfig)
            or written is None
            or not isinstance(written.weights, GeneratedWeights)
        ):
            raise ValueError(
                "materialize: expected the method 'hyperpelt' with its networks, got "
                f"{config.method!r}{' without' if written is not None else ''}"
            )
        if config.features is not None:
            raise ValueError(
                "materialize: expected weights that depend on the task alone, got a method whose "
                "weights depend on each sample's image_features"
            )
        number = self._task_inputs.number(task)
        is_trained = any(parameter.requires_grad for parameter in written.weights.parameters())
        written.weights = written.weights.stored(number).requires_grad_(is_trained)
        self.written = written.weights.train(self.training)
        self.method_config = replace(config, tasks=(config.tasks[number],), materialized=True)
        self._task_inputs = TaskInputs(parts_of(self.method_config))
        new = {f"written.{name}" for name, _ in written.weights.named_parameters()}
        self._set_trained(new.union(self._trained))

    def why_not_dense(self) -> str:
        """Empty where `export_dense` can serve, else the reason it cannot, as one clause."""
        return why_not_mergeable(parts_of(self.method_config))

    @torch.no_grad()
    def export_dense(self) -> PreTrainedModel:
        """Takes the method out and leaves what was learned in the plain base model's weights: the
        same logits, without this package. This object is of no use afterwards.

        PST's pruned weights are written with their exact number of zeros, bit for bit what the
        forward used. LoRA becomes ``W + alpha / R · B A``, computed in float64 and rounded once;
        AdaMix's experts are averaged before. Trained words, biases and heads stay.

        Raises:
            ValueError: a part that no weight can hold (adapters, prefixes, gated LoRA), LoRA over
                16-bit weights, which would round it away, or a method that is not in the model.
        """
        self._check_attached("export_dense")
        refusal = self.why_not_dense()
        if refusal:
            raise ValueError(f"export_dense: expected parts that weights can hold, got {refusal}")
        self._injection.check_detachable("export_dense")
        weights = merged_weights(self.base_model)
        self._take_out()
        put_values(self.base_model, {f"{name}.weight": w for name, w in weights.items()})
        if self.tokens is not None:
            self.tokens.write_into(self.base_model)
        return self.base_model

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Inside, the model computes what the untouched base model computes, with the trained head
        left in place.

        The parts are out of the model meanwhile, so do not train, save or copy it inside.

        Raises:
            ValueError: the method is full fine-tuning, which has no untouched base.
        """
        first_values = self._base_values("disable_adapter")
        if self._is_detached:
            yield
            return
        self._injection.check_detachable("disable_adapter")
        first_values.check(self.base_model, "disable_adapter", keep_head=True)
        self._detach()
        trained_values = first_values.put(self.base_model, keep_head=True)
        try:
            yield
        finally:
            put_values(self.base_model, trained_values)
            self._attach()

    def remove(self, keep_head: bool = False) -> PreTrainedModel:
        """Takes the method out and gives back the very base model, bit for bit as it was: its
        modules, configuration, attention implementation, weights and requires_grad flags. This
        object is of no use afterwards.

        Args:
            keep_head: leave the trained head on it. By default the head, too, has the values it
                came with; where `resize_token_embeddings` changed it since, the words that it came
                with.

        Raises:
            ValueError: the method is full fine-tuning, which has no untouched base;
                ``model.base_model`` is its result. Or a parameter has another shape now, or is
                computed from others; the model is as it was.
        """
        first_values = self._base_values("remove")
        self._check_attached("remove")
        self._injection.check_detachable("remove")
        first_values.check(self.base_model, "remove", keep_head)
        self._take_out()
        first_values.put(self.base_model, keep_head)
        return self.base_model

    def _attach(self) -> None:
        for part in self._in_model:
            part.attach()
        self._is_detached = False

    def _detach(self) -> None:
        for part in self._in_model:
            part.detach()
        self._is_detached = True

    def _take_out(self) -> None:
        """Leaves the base model; what was trained in place keeps its values."""
        self._detach()
        for name, parameter in self.base_model.named_parameters():
            parameter.requires_grad_(self._requires_grad.get(name, parameter.requires_grad))
            parameter.grad = None

    def _base_values(self, who: str) -> FirstValues:
        """What the base model held before. Raises ValueError for full fine-tuning."""
        if self._first_values is None:
            raise ValueError(
                f"{who}: expected a method that leaves the base model alone, got "
                f"{self.method_config.method!r}, which "
                "trains it in place; keep a copy of the model, or load it again"
            )
        return self._first_values

    def _check_attached(self, who: str) -> None:
        if self._is_detached:
            got = "one inside disable_adapter() or removed"
            raise ValueError(f"{who}: expected the method to be in the model, got {got}")
