"""What of the base model a `PeltModel` gives as its own: modules, data, methods that suit it."""

from __future__ import annotations

from typing import Any

# transformers' methods of every model that mean the same of one with a method in it. Those of a
# model's own class and of generation all do.
FORWARDED = frozenset(
    {
        "activation_checkpointing_disable", "activation_checkpointing_enable", "can_generate",
        "disable_input_require_grads", "enable_input_require_grads", "estimate_tokens",
        "floating_point_ops", "get_compiled_call", "get_correct_attn_implementation",
        "get_decoder", "get_encoder", "get_extended_attention_mask", "get_head_mask",
        "get_input_embeddings", "get_memory_footprint", "get_output_embeddings",
        "get_parameter_or_buffer", "get_position_embeddings", "invert_attention_mask",
        "is_backend_compatible", "is_custom_code", "is_remote_code",
        "named_non_persistent_buffers", "num_parameters", "resize_position_embeddings",
        "resize_token_embeddings", "retrieve_modules_from_names", "set_input_embeddings",
        "set_output_embeddings", "tie_weights", "warn_if_padding_and_no_attention_mask",
    }
)  # fmt: skip
# The classes whose methods are forwarded by that list only.
GENERAL = frozenset(
    {
        "PreTrainedModel", "PushToHubMixin", "PeftAdapterMixin", "EmbeddingAccessMixin",
        "ModuleUtilsMixin", "DistributedMixin",
    }
)  # fmt: skip
INSTEAD = {
    "disable_adapters": "disable_adapter() is a context without the method",
    "disable_adapter_layers": "disable_adapter() is a context without the method",
    "enable_adapters": "the method is in the model outside of disable_adapter()",
    "enable_adapter_layers": "the method is in the model outside of disable_adapter()",
    "get_adapter_state_dict": "state_dict() holds what is trained",
    "get_base_model": "base_model is the model with the method in it, remove() gives it back plain",
    "merge_adapter": "export_dense() gives a plain model with what was learned",
    "merge_and_unload": "export_dense() gives a plain model with what was learned",
    "peft_config": "method_config is the active adapter's, adapter_configs has those of all",
    "set_attn_implementation": "choose the base model's attention before get_pelt_model",
    "unload": "remove() gives the plain base model",
}


def refusal(model: Any, name: str) -> str:
    """Why a base model's attribute is not forwarded, as one sentence; empty where it is, or where
    the base model has none of that name and nothing stands here for it.
    """
    instead = INSTEAD.get(name)
    origin = next((kind for kind in type(model).__mro__ if name in vars(kind)), None)
    is_general = origin is not None and origin.__name__ in GENERAL
    is_method = callable(getattr(type(model), name, None))
    if instead is None and (
        not (is_general and is_method) or name in FORWARDED or name.startswith("_")
    ):
        return ""
    way = instead or "base_model has it, for the model without regard to the method"
    return f"PeltModel (of {type(model).__name__}) has no {name!r}; {way}"
