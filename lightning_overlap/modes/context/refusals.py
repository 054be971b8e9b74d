"""What mixes tokens inside the blocks, and is no attention: a rank would mix its own tokens only."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from torch import nn

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
_LAYER_TYPES = {"full_attention", "sliding_attention", "chunked_attention"}
"""Hugging Face's types of layers in which tokens meet in an attention, and nowhere else."""


def find_mixers(name: str, blocks: nn.Module, token_wise: Collection[str] = ()) -> list[str]:
    """What mixes tokens in the blocks and is no attention, by name, with what it is.

    Args:
        name: of the list of blocks in the model.
        blocks: the list.
        token_wise: names of modules with the role ``token_wise``, which the user knows to work on each token by itself.
    """
    modules = dict(blocks.named_modules(prefix=name))
    mixers = [
        f"{path} ({mixer})"
        for path, module in modules.items()
        if (mixer := _mixer(module)) and not any(f"{path}.".startswith(f"{known}.") for known in token_wise)
    ]
    configs = {id(config): config for module in modules.values() if (config := getattr(module, "config", None)) is not None}
    kinds = {kind for config in configs.values() for kind in getattr(config, "layer_types", None) or ()}
    return mixers + [f"a layer of type {kind} in {name}" for kind in sorted(kinds - _LAYER_TYPES)]


def _mixer(module: nn.Module) -> str:
    """What a module is that mixes tokens; empty: it mixes none."""
    if isinstance(module, _CONVOLUTIONS):
        sizes = tuple(module.kernel_size)
        return f"a convolution of kernel size {'x'.join(map(str, sizes))}" if max(sizes) > 1 else ""
    for mixer, kinds in _MIXERS.items():
        if isinstance(module, kinds):
            return f"{mixer} ({type(module).__name__})"
    return f"a {type(module).__name__}" if _NAMES.search(type(module).__name__) else ""
