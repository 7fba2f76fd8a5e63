"""Batches whose samples have different adapters: each sample's rows go through its own adapter's
parts, in one forward of the base model.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..methods import Parts, parts_of
from .attachment import Attachment
from .attributes import batch_of
from .encoder_hooks import FORWARDS_ATTRIBUTE, Forwards, begin_forward, end_forward
from .gated import GatedModel
from .inject import Injection
from .layer import READ_OWN_MASK, Hook, hooks_of, keep_ffn_input, read_mask
from .layer_state import STATE_ATTRIBUTE
from .replacement import Replacement
from .samples import MixedModule, MixedState, Samples
from .several import BASE_ADAPTER
from .task_inputs import FEATURES, TASKS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# The steps of a layer that read the whole batch. The others are the adapters' modules' own, or of
# training; and what would end a layer is cleared at the end of the call.
STEPS = (read_mask, keep_ffn_input, *READ_OWN_MASK.values())


def why_not_mixed(parts: Parts) -> str:
    """Why a method's parts cannot serve some samples of a batch only, or nothing."""
    if parts.tune != "none" or parts.tune_norms or (parts.lora and parts.lora.bias != "none"):
        return "parameters of the base model that it trains in place, which all samples share"
    if parts.pruning is not None:
        return "pruned weights, which all samples share"
    if parts.trainable_tokens:
        return "trained words, which all samples share"
    if parts.tasks or parts.hyper is not None:
        return "tasks, by which a call chooses for each sample already"
    if parts.attributes:
        return "attributes, by which a call chooses for each sample already"
    if parts.prefix is not None and parts.prefix.shift_positions:
        return "positions that begin behind its prefix, in all samples"
    return ""


class MixedBatch(Attachment):
    """Several adapters in one model, for a call in which each sample has its own.

    `attach` needs the model without a method, and leaves it like that after `detach`.

    Args:
        injections: of the adapters that the samples have, by name.
        heads: by adapter, or `BASE_ADAPTER`, the values of the head's parameters where they are
            others than those in the model.

    Raises:
        ValueError: a head that cannot be run for some samples only.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        injections: Mapping[str, Injection],
        heads: Mapping[str, Mapping[str, Tensor]],
        samples: Samples,
    ) -> None:
        super().__init__(model)
        self.injections, self.samples = injections, samples
        pelt = [each for each in injections.values() if each.uses_pelt_attention]
        self.uses_pelt_attention = bool(pelt)
        self.views = next(iter([*pelt, *injections.values()])).views if injections else []
        self.states = [state for each in injections.values() for state in each.states]
        self._replacements = [*self._parts(), *self._heads(heads)]

    def _lent(self) -> Iterator[Replacement]:
        for injection in self.injections.values():
            yield from injection.replacements

    def _parts(self) -> Iterator[Replacement]:
        """What stands for the modules that some adapter replaces."""
        members: dict[int, dict[str, nn.Module]] = {}
        places: dict[int, Replacement] = {}
        for name, injection in self.injections.items():
            for each in injection.replacements:
                places[id(each.original)] = each
                members.setdefault(id(each.original), {})[name] = each.adapted
        for key, place in places.items():
            mixed = MixedModule(place.original, members[key], self.samples)
            yield Replacement(place.parent, place.name, place.original, mixed)

    def _heads(self, heads: Mapping[str, Mapping[str, Tensor]]) -> Iterator[Replacement]:
        """What stands for the modules of the head."""
        names = dict.fromkeys(name for values in heads.values() for name in values)
        for path in dict.fromkeys(name.rpartition(".")[0] for name in names):
            module = self.model.get_submodule(path)
            if not path or any(True for _ in module.children()):
                raise ValueError(
                    "adapter_names: expected a head of plain modules, such as a classifier, got "
                    f"parameters of {path or type(self.model).__name__} itself, which all samples "
                    "share; call it with the samples of one adapter at a time"
                )
            members = {}
            for adapter, values in heads.items():
                start = f"{path}."
                own = {n.removeprefix(start): v for n, v in values.items() if n.startswith(start)}
                members[adapter] = _with_values(module, own)
            parent, _, name = path.rpartition(".")
            mixed = MixedModule(module, members, self.samples)
            yield Replacement(self.model.get_submodule(parent), name, module, mixed)

    def attach(self) -> None:
        """Puts all of it in."""
        encoder = self.model.base_model
        self.mark(encoder, FORWARDS_ATTRIBUTE, Forwards(self.states))
        self.hook(encoder.register_forward_pre_hook(begin_forward))
        self.hook(encoder.register_forward_hook(end_forward, always_call=True))
        for each in self._lent():
            each.lend()
            each.adapted.train(each.original.training)
        for each in self._replacements:
            setattr(each.parent, each.name, each.adapted)
        self.show_views()
        first = next(iter(self.injections.values()), None)
        for number, stack in enumerate(first.stacks if first is not None else ()):
            for row, layer in enumerate(stack.layers):
                self._attach_layer(number, row, layer)

    def _attach_layer(self, number: int, row: int, layer: nn.Module) -> None:
        stacks = {name: each.stacks[number] for name, each in self.injections.items()}
        states = {name: stack.states[row] for name, stack in stacks.items()}
        hooks: dict[Hook, None] = {}
        for name, stack in stacks.items():
            injection = self.injections[name]
            uses_attention = injection.uses_pelt_attention
            own = hooks_of(stack.slots, injection.parts, uses_attention, stack.needs_mask)
            hooks |= dict.fromkeys(hook for hook in own if hook.call in STEPS)
        attentions = {path for stack in stacks.values() for path in stack.prefixes[row]}
        for path in {hook.path for hook in hooks} | attentions:
            prefixes = {
                name: stack.prefixes[row][path]
                for name, stack in stacks.items()
                if path in stack.prefixes[row]
            }
            state = MixedState(self.samples, states, prefixes)
            self.mark(layer.get_submodule(path), STATE_ATTRIBUTE, state)
        for hook in hooks:
            module = layer.get_submodule(hook.path)
            self.hook(module.register_forward_pre_hook(hook.call, with_kwargs=hook.takes_kwargs))

    def detach(self) -> None:
        """Takes all of it out."""
        self.clear()
        self.hide_views()
        for each in self._replacements:
            setattr(each.parent, each.name, each.original)
        for each in self._lent():
            each.take_back()
        for state in self.states:
            state.in_flight.clear()


def _with_values(module: nn.Module, values: Mapping[str, Tensor]) -> nn.Module:
    """The module with other values of its parameters, and everything else shared."""
    made = copy.copy(module)
    made._parameters = dict(module._parameters)
    for name, value in values.items():
        parameter: Any = module._parameters[name]
        made._parameters[name] = nn.Parameter(value.to(parameter), requires_grad=False)
    return made


class MixingModel(GatedModel):
    """What a `PeltModel` does about a call whose samples have different adapters."""

    def generate(
        self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any
    ) -> Any:
        """The base model's generate: greedy, sampling or beams, with or without a cache of either
        kind.

        Args:
            adapter_names: as in `forward`; all beams and samples of a sentence have its adapter.
            kwargs: attributes, tasks and features are those of the B sentences that are read, as in
                `forward`: all beams and samples of a sentence have its own. The others are the base
                model's.
        """
        self._check_skipping()
        if adapter_names is None:
            return super().generate(*args, **kwargs)
        with self._mixed(adapter_names, args, kwargs) as mixed, mixed.shown_to_generate():
            generate: Any = self.base_model.generate
            return generate(*args, **kwargs)

    @contextmanager
    def _mixed(
        self, names: Sequence[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Iterator[MixedBatch]:
        """Inside, each sample of a call has the adapter of its name."""
        self._check_mixed(names, args, kwargs)
        waiting = {parked.name: parked for parked in self._waiting()}
        heads: dict[str, Mapping[str, Tensor]] = {}
        injections: dict[str, Injection] = {}
        base = self._base_values("adapter_names").values
        for name in dict.fromkeys(names):
            if name == BASE_ADAPTER:
                heads[name] = base
            elif name == self.active_adapter:
                injections[name] = self._injection
            else:
                injections[name] = waiting[name].injection
                heads[name] = {**base, **waiting[name].values_in_place()}
        mixed = MixedBatch(self.base_model, injections, heads, Samples(names))
        for state in mixed.states:
            state.gate_values = {}
        self._injection.detach()
        try:
            mixed.attach()
            yield mixed
        finally:
            mixed.detach()
            self._injection.attach()

    def _check_mixed(
        self, names: Sequence[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        """Raises ValueError for a call whose samples cannot have adapters of their own."""
        who = "adapter_names"
        self._check_attached(who)
        is_list = isinstance(names, (list, tuple))
        if not is_list or not names:
            raise ValueError(
                f"{who}: expected a list of names, one for each sample, got {names!r:.80}"
            )
        self._check_known(who, [name for name in names if name != BASE_ADAPTER])
        batch = batch_of(args, kwargs)
        if batch is None:
            read = kwargs.get(self.base_model.main_input_name)
            batch = read.shape[0] if isinstance(read, Tensor) else None
        if batch not in (None, len(names)):
            raise ValueError(
                f"{who}: expected {batch} names, one for each sample of the batch, got {len(names)}"
            )
        if self.base_model.training or torch.compiler.is_compiling():
            got = "one in training" if self.base_model.training else "one in torch.compile"
            raise ValueError(f"{who}: expected a model in evaluation, not compiled, got {got}")
        given = [name for name in ("attributes", TASKS, FEATURES) if kwargs.get(name) is not None]
        if given:
            raise ValueError(f"{who}: expected no {given[0]} beside it, got both")
        configs = self.adapter_configs
        for name in dict.fromkeys((*names, self.active_adapter)):
            reason = why_not_mixed(parts_of(configs[name])) if name in configs else ""
            if reason:
                is_active = "" if name in names else ", the active one (set_adapter another)"
                raise ValueError(
                    f"{who}: expected adapters that may serve some samples of a batch only, got "
                    f"{name!r}{is_active} with {reason}"
                )
