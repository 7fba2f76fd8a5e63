"""Putting a method's parts into a model, and taking them out again. What they do there is in
`layer.py`, what stands for what in `replacement.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..methods import HyperPELTConfig, Parts
from ..nn import StackSizes, TaskAdapters
from .attachment import Attachment
from .call import Call, carry_no_more
from .checks import (
    check_apart,
    check_chunking,
    check_decoder,
    check_in_memory,
    check_own_attention,
    check_places,
    check_quantised,
)
from .encoder_hooks import (
    FORWARDS_ATTRIBUTE,
    STACK_ATTRIBUTE,
    Forwards,
    StackNotes,
    begin_forward,
    end_forward,
    start_gradient,
)
from .layer import hooks_of
from .layer_state import PREFIX_ATTRIBUTE, STATE_ATTRIBUTE, LayerPrefix
from .lora_targets import chosen_linears
from .positions import shifted_positions
from .prefix_sets import key_heads, make_prefixes
from .replacement import Replacement, StandIns, branched_linears, parameter_placement
from .slots import Slots, stacks_of
from .stack import Stack
from .task_parts import (
    Written,
    WrittenAdapter,
    WrittenPrefix,
    make_task_adapters,
    make_written,
)
from .vocabulary import input_embeddings

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Injection(Attachment):
    """The parts of a method inside one model. `attach` puts them in, `detach` takes them out; both
    may be repeated.

    Attributes:
        prefix: the prefixes: of all layers (`PrefixAttention`), or, in a model with several kinds
            of attention, of each kind by name (``encoder``, ``decoder``, ``cross``); or None.
        stacks: the model's, an encoder before a decoder.
        states: what is known about each layer of all stacks.
        task_adapters: VLM's, of all layers; or None.
        written: what HyperPELT's networks write; or None.
        replacements: which modules of the base model give way to which.
        packs_tokens: whether layers are given real tokens only.
        call: what a call of the model gives its layers.
    """

    def __init__(self, model: PreTrainedModel, parts: Parts) -> None:
        super().__init__(model)
        self.parts = parts
        self.call = Call()
        self.stacks: list[Stack] = []
        for slots in _stacks_for(model, parts):
            number = sum(len(stack.layers) for stack in self.stacks)
            self.stacks.append(Stack(model, slots, parts, number, self.call))
        self.states = [state for stack in self.stacks for state in stack.states]
        self._check()
        stacks = [(stack.slots, stack.layers) for stack in self.stacks]
        chosen = chosen_linears(model, parts.lora, stacks)
        for slots, layers in stacks:
            check_apart(layers, slots, parts, chosen)
        check_own_attention(model, [slots for slots, _ in stacks], parts, chosen)
        check_chunking(model, parts, chosen)
        placement: dict[str, Any] = {}
        if self.stacks:
            query = self.stacks[0].slots.places("query")[0][1].path
            placement = parameter_placement(self.stacks[0].layers[0].get_submodule(query))
        self.shifted = shifted_positions(model, self.stacks, parts.prefix)
        self.prefix = make_prefixes(model, self.stacks, parts.prefix, placement)
        self.task_adapters = self._make_task_adapters(placement)
        self.written = self._make_written(placement)
        self.set_packing(False)
        self.replacements: list[Replacement] = []
        for stack in self.stacks:
            stand_ins = StandIns(stack.slots, parts, chosen, placement, stack.is_causal)
            for layer, state, prefixes in zip(
                stack.layers, stack.states, stack.prefixes, strict=True
            ):
                own = prefixes.get(stack.slots.attention.module)
                has_pooled_gate = own is not None and own.gate == "pooled"
                self.replacements += stand_ins.in_layer(layer, state, has_pooled_gate)
        placed = {id(replacement.original) for replacement in self.replacements}
        others = [linear for key, linear in chosen.items() if key not in placed]
        self.replacements += branched_linears(model, parts.lora, others)

    def set_packing(self, packs_tokens: bool) -> None:
        """Whether layers are given real tokens only, from the next `attach` on."""
        self.packs_tokens = packs_tokens
        self.uses_pelt_attention = (
            packs_tokens
            or any(any(stack.prefixes) for stack in self.stacks)
            or any(stack.needs_mask and not stack.slots.attention.own_mask for stack in self.stacks)
        )
        self.views = self.make_views() if self.stacks else []

    def _make_task_adapters(self, placement: dict[str, Any]) -> nn.ModuleList | None:
        """VLM's adapters of all layers; and tells each layer its own."""
        if self.parts.vlm is None:
            return None
        made = make_task_adapters(self.parts.vlm, self.model, len(self.states), placement)
        for state, adapters in zip(self.states, made, strict=True):
            assert isinstance(adapters, TaskAdapters)
            state.task_adapters = adapters
        return made

    def _make_written(self, placement: dict[str, Any]) -> Written | None:
        """What HyperPELT's networks write; and tells each layer where its own is."""
        config = self.parts.hyper
        if config is None:
            return None
        hidden_size = self.model.config.hidden_size
        sizes = {}
        for stack in self.stacks:
            attentions = [attention for _, attention in stack.sites()]
            heads = {key_heads(self.model, stack.layers[0], each) for each in attentions}
            if len(heads) > 1:
                raise ValueError(
                    "HyperPELTConfig: expected the attentions of a layer to have keys of one "
                    f"shape, got {sorted(heads)} (heads, size)"
                )
            shape = (len(stack.layers), hidden_size, len(attentions), *heads.pop())
            sizes[stack.slots.name] = StackSizes(*shape)
        weights = make_written(config, hidden_size, sizes, placement)
        written = Written(weights, config.activation, self.call)
        for stack in self.stacks:
            self._tell_written(stack, written, config)
        return written

    def _tell_written(self, stack: Stack, written: Written, config: HyperPELTConfig) -> None:
        name = stack.slots.name
        for row, state in enumerate(stack.states):
            state.written_adapter = WrittenAdapter(written, name, row)
            for block, (_, attention) in enumerate(stack.sites() if config.prefix_length else ()):
                own = WrittenPrefix(written, name, block)
                prefix = LayerPrefix(own, row, None, is_cross=bool(attention.site))
                stack.prefixes[row][attention.module] = prefix

    def _check(self) -> None:
        """Raises ValueError for a model that the parts cannot be put into."""
        if any(STACK_ATTRIBUTE in module.__dict__ for module in self.model.modules()):
            raise_occupied()
        check_in_memory(self.model)
        check_quantised(self.model)
        for stack in self.stacks:
            check_places(self.model, stack.layers, stack.slots, self.parts)
        if self.stacks:
            check_decoder(self.model, [stack.slots for stack in self.stacks])

    def attach(self) -> None:
        """Puts the parts in: modules, the attention's name, the hooks of each layer."""
        needs_mask = any(stack.needs_mask for stack in self.stacks)
        if self.uses_pelt_attention or needs_mask or self.parts.has_parallel_adapter:
            encoder = self.model.base_model
            self.mark(encoder, FORWARDS_ATTRIBUTE, Forwards(self.states))
            self.hook(encoder.register_forward_pre_hook(begin_forward))
            self.hook(encoder.register_forward_hook(end_forward, always_call=True))
        if self.shifted is not None:
            hook = self.model.base_model.register_forward_pre_hook(self.shifted, with_kwargs=True)
            self.hook(hook)
        for replacement in self.replacements:
            replacement.put_in()
        self.show_views()
        for stack in self.stacks:
            self._attach_stack(stack)
        if not self.stacks:
            self._attach_without_stacks()

    def _attach_stack(self, stack: Stack) -> None:
        for layer, state, prefixes in zip(stack.layers, stack.states, stack.prefixes, strict=True):
            for path, prefix in prefixes.items():
                attention = layer.get_submodule(path)
                self.mark(attention, PREFIX_ATTRIBUTE, prefix)
                self.mark(attention, STATE_ATTRIBUTE, state)
            uses_mask = self.uses_pelt_attention
            for hook in hooks_of(
                stack.slots, self.parts, uses_mask, stack.needs_mask, self.packs_tokens
            ):
                module = layer.get_submodule(hook.path)
                self.mark(module, STATE_ATTRIBUTE, state)
                register: Any = module.register_forward_pre_hook
                if hook.is_after:
                    register = module.register_forward_hook
                options = {"with_kwargs": hook.takes_kwargs, "prepend": hook.is_first}
                self.hook(register(hook.call, **options))
        notes = StackNotes(stack.layers, self.call)
        self.mark(stack.embeddings, STACK_ATTRIBUTE, notes)
        self.hook(stack.embeddings.register_forward_hook(start_gradient))

    def _attach_without_stacks(self) -> None:
        """A model of another family: what embeds its input begins the gradient of layers that are
        checkpointed, as far as transformers knows both.
        """
        layers = [m for m in self.model.modules() if hasattr(m, "gradient_checkpointing")][:1]
        notes = StackNotes(nn.ModuleList(layers), self.call)
        self.mark(self.model.base_model, STACK_ATTRIBUTE, notes)
        for module in _readers_of_the_input(self.model) if layers else ():
            self.mark(module, STACK_ATTRIBUTE, notes)
            self.hook(module.register_forward_hook(start_gradient))

    def check_detachable(self, who: str) -> None:
        """Raises ValueError where `detach` would not leave the base model."""
        for replacement in self.replacements:
            replacement.check_removable(who)

    def detach(self) -> None:
        """Takes the parts out: the model has its own modules, configuration and attention."""
        self.clear()
        for stack in self.stacks:
            carry_no_more(stack.layers)
        for replacement in self.replacements:
            replacement.take_out()
        self.hide_views()


def raise_occupied() -> None:
    """The one answer to a second method in the same model."""
    raise ValueError(
        "get_pelt_model: expected a plain model, got one that has a method in it; remove() it "
        "first, or have PeltModel.add_adapter make another one beside it"
    )


def _stacks_for(model: PreTrainedModel, parts: Parts) -> tuple[Slots, ...]:
    """The stacks of the model's family; none of a model of another one, where LoRA without gates is
    all that has to be put into it.
    """
    try:
        return stacks_of(model)
    except ValueError:
        others = (parts.adapter, parts.prefix, parts.mixture, parts.pruning)
        needs_family = any(part is not None for part in others) or bool(parts.gated)
        if parts.lora is None or needs_family:
            raise
        return ()


def _readers_of_the_input(model: PreTrainedModel) -> list[nn.Module]:
    """What embeds the input: the module that transformers names, and those that share its table."""
    named = input_embeddings(model)
    table = getattr(named, "weight", None)
    if named is None or not isinstance(table, Tensor):
        return [] if named is None else [named]
    readers = (module for module in model.modules() if isinstance(module, nn.Embedding))
    return [module for module in readers if module.weight is table]
