"""What mixes tokens inside the blocks, and is no attention, is refused before training: a rank would mix its own tokens only."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from torch import nn

from lightning_overlap.decision import ConfigError
from lightning_overlap.torch_seams import BatchNorm

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_MIXERS: Mapping[str, tuple[type[nn.Module], ...]] = {
    "a recurrent layer": (nn.RNNBase, nn.RNNCellBase),
    "a norm over all tokens": (BatchNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, nn.GroupNorm),
    "a pooling over tokens": (nn.AvgPool1d, nn.AvgPool2d, nn.MaxPool1d, nn.MaxPool2d, nn.AdaptiveAvgPool1d, nn.AdaptiveMaxPool1d),
    "a shift of tokens": (nn.ZeroPad1d, nn.ZeroPad2d, nn.ConstantPad1d, nn.ConstantPad2d),
}
_NAMES = re.compile(
    r"Mamba|Rwkv|RWKV|[ms]LSTM|Gated_?Delta|Delta(Net|Attention)|(Linear|Lightning|Recurrent)Attention|RecurrentBlock|ShortConv|Retention|"
    r"Hyena|Indexer"
)
"""Classes of state spaces, linear attentions, short convolutions, and of indexers that choose keys by themselves."""
_LAYER_TYPES = ("full_attention", "sliding_attention", "chunked_attention")
"""Hugging Face's types of layers in which tokens meet in an attention, and nowhere else."""


def refuse_mixers(blocks: Mapping[str, nn.Module], token_wise: Collection[str]) -> None:
    """Refuses blocks in which tokens meet outside an attention.

    Args:
        blocks: by name.
        token_wise: names of modules with the role ``token_wise``, which the user knows to work on each token by itself.

    Raises:
        ConfigError: naming the modules, or the types of layers.
    """
    modules = {name: module for block_name, block in blocks.items() for name, module in block.named_modules(prefix=block_name)}
    mixers = [
        f"{name} is {mixer}"
        for name, module in modules.items()
        if (mixer := _mixer(module)) and not any(f"{name}.".startswith(f"{known}.") for known in token_wise)
    ]
    if mixers:
        more = f", and {len(mixers) - 3} more" if len(mixers) > 3 else ""
        raise ConfigError(
            f"context_parallel shards the tokens of a sequence, and the blocks mix tokens in another place than an attention: "
            f"{'; '.join(mixers[:3])}{more}. A rank would mix its own tokens only. If such a module works on each token by itself, give "
            "it the role token_wise in parallel_plan; otherwise set context_parallel: 1"
        )
    configs = {id(config): config for module in modules.values() if (config := getattr(module, "config", None)) is not None}
    kinds = {kind for config in configs.values() for kind in getattr(config, "layer_types", None) or ()}
    unknown = kinds - set(_LAYER_TYPES)
    if unknown:
        raise ConfigError(
            f"context_parallel knows the layer types {', '.join(_LAYER_TYPES)}, and the model's config has "
            f"{', '.join(sorted(map(str, unknown)))}, in which tokens may meet in another way: set context_parallel: 1"
        )


def _mixer(module: nn.Module) -> str:
    """What a module is that mixes tokens; empty: it mixes none."""
    if isinstance(module, _CONVOLUTIONS):
        sizes = tuple(module.kernel_size)
        return f"a convolution of kernel size {'x'.join(map(str, sizes))}" if max(sizes) > 1 else ""
    for mixer, kinds in _MIXERS.items():
        if isinstance(module, kinds):
            return f"{mixer} ({type(module).__name__})"
    return f"a {type(module).__name__}" if _NAMES.search(type(module).__name__) else ""
