"""The only file that uses private names of transformers, and imports them. Import it only where a model is one of transformers'."""

from __future__ import annotations

from typing import Any

SUPPORTED = "lightning_overlap supports the versions of transformers in its requirements: install one of these."
try:
    from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
    from transformers.cache_utils import Cache
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function
    from transformers.utils.output_capturing import _active_collector as active_recording
except ImportError as error:
    raise ImportError(f"this version of transformers lacks a part that is needed ({error}). {SUPPORTED}") from error

__all__ = [
    "AttentionInterface",
    "AttentionMaskInterface",
    "Cache",
    "PreTrainedConfig",
    "PreTrainedModel",
    "bidirectional_mask_function",
    "causal_mask_function",
]

PRIVATE_NAMES: tuple[tuple[Any, str, str], ...] = (
    (PreTrainedConfig, "_attn_implementation", "the name of the attention function, by which a model finds it in the registry"),
    (PreTrainedModel, "_can_set_attn_implementation", "whether a model finds its attention function in the registry"),
    (PreTrainedModel, "_supports_sdpa", "whether a model calls torch's attention"),
)
"""The object that has the name, the name, what it is used for."""
for _owner, _name, _use in PRIVATE_NAMES:
    if not hasattr(_owner, _name):
        raise ImportError(f"this version of transformers has no {_name} of {_owner!r} ({_use}). {SUPPORTED}")


def has_registered_attention(model: PreTrainedModel) -> bool:
    """Whether the model calls the attention function that its config names. Older models call torch's, or have their own."""
    return bool(model._can_set_attn_implementation())


def calls_torch_attention(model: PreTrainedModel) -> bool:
    """Whether the model can call torch's attention."""
    return bool(model._supports_sdpa)


def attention_of(config: PreTrainedConfig) -> str | None:
    """The name of the attention function of the modules with this config."""
    name: str | None = config._attn_implementation
    return name


def set_attention(config: PreTrainedConfig, name: str | None) -> None:
    """Names the attention function of the modules with this config; configs in it (of a vision tower, say) keep theirs."""
    config._attn_implementation = {"": name}


def recorded_outputs() -> dict[str, list[Any]]:
    """What hooks in the modules of the model that runs in this thread have recorded so far, in order, by kind of output: the model
    reads these lists when its modules have run. Empty: it records nothing."""
    recording = active_recording.get() or {}
    return {kind: values for kind, values in recording.items() if isinstance(values, list)}
