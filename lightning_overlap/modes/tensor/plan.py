"""Finds which layers of a model are sharded over the tensor axis, and how.

Roles come from the strategy's ``parallel_plan``, else from the module's attribute of that name, else from layers of
:mod:`lightning_overlap.nn`, else from a Hugging Face model's own plan. Keys are names of modules (for ``per_head`` of parameters), or
ends of names; ``*`` stands for one component: ``blocks.*.attention.qkv``.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from lightning_overlap.decision import ConfigError
from lightning_overlap.model.blocks import Blocks, blocks_by_role, names_matching, parameters_matching
from lightning_overlap.model.expert_layers import routed_modules
from lightning_overlap.model.roles import EXPERT_ROLES, parse_role
from lightning_overlap.modes.tensor.huggingface import roles_of_model
from lightning_overlap.state.pieces import Piece
from lightning_overlap.torch_seams import parameters_of

FUSED = ("qkv", "qkv_proj", "c_attn", "Wqkv", "in_proj")
"""Names of layers that compute q, k and v one after the other, if they have three times as many outputs as inputs."""
QUERY_HEADS = ("num_heads", "n_head", "n_heads", "heads", "num_attention_heads")
KEY_HEADS = ("num_key_value_heads", "n_kv_heads", "n_kv_head", "num_kv_heads")
COUNTS = (*QUERY_HEADS, *KEY_HEADS, "split_size")
"""Attributes of an attention module that are divided by the number of ranks: numbers of heads, features of a fused part."""
NO_LAYERS = ("blocks", "token_table", "per_head", *EXPERT_ROLES)
"""Roles that say nothing of layers to shard."""
TOKEN_WISE = (nn.Linear, nn.Embedding, nn.Identity, nn.Dropout, nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid)


@dataclass(frozen=True)
class ShardedLayer:
    """A layer whose weight is sharded.

    Attributes:
        name: of the module.
        module: the layer.
        role: ``column``, ``row``, ``vocab_embedding`` or ``vocab_head``.
        parts: sizes along ``dim`` of the fused layers (q, k, v; gate, up), each of which is sharded by itself.
        dim: the dim of the weight that is sharded.
        has_all_features: a column layer's output, or a row layer's input, has all features on every rank.
        reads_input: whether a column layer reads its region's input. An adapter's second layer does not.
        next_layer: the layer that reads a row layer's output, in an adapter.
    """

    name: str
    module: nn.Module
    role: str
    parts: tuple[int, ...]
    dim: int
    has_all_features: bool = False
    reads_input: bool = True
    next_layer: nn.Module | None = None

    @property
    def after_sum(self) -> list[nn.Parameter]:
        """Parameters that are used after the sum over the ranks, so that their gradients are the same on all ranks."""
        bias = self.module.bias if self.role == "row" else None
        after = list(self.next_layer.parameters()) if self.next_layer is not None else []
        return [*after, bias] if isinstance(bias, nn.Parameter) else after


def pieces_of(layers: Iterable[ShardedLayer], per_head: Iterable[nn.Parameter]) -> dict[nn.Parameter, Piece]:
    """How parameters are sharded: those of layers, and those with an entry a head.

    A parameter that several layers share is sharded once, as in the first of them.
    """
    pieces = {parameter: Piece(parameter.shape, 0, (len(parameter),)) for parameter in per_head}
    for layer in layers:
        weight, bias = layer.module.weight, getattr(layer.module, "bias", None)
        assert isinstance(weight, nn.Parameter), "roles are given to layers with weights"
        pieces.setdefault(weight, Piece(weight.shape, layer.dim, layer.parts))
        if isinstance(bias, nn.Parameter) and layer.role != "row":
            pieces.setdefault(bias, Piece(bias.shape, 0, layer.parts))
    return pieces


@dataclass(frozen=True)
class Region:
    """A module in a block (attention, mlp) whose column layers read its input and whose row layers make its output.

    A layer that is a direct child of a block, beside norms, is a region of its own.
    """

    name: str
    module: nn.Module
    columns: tuple[ShardedLayer, ...]


@dataclass(frozen=True)
class TensorPlan:
    """How a model is sharded.

    Attributes:
        layers: the layers that are sharded.
        regions: the regions of all blocks.
        blocks: the name of the list of blocks.
        source: where the roles come from, for texts.
        counts: by the names of a module and its attribute, a number that is divided by the number of ranks.
        per_head: parameters with an entry a head, by name.
        loose: names of modules that may mix tokens, so that tokens cannot be sharded.
        shared_by_blocks: names of unsharded parameters that the blocks share with other modules.
        shared_by_regions: names of unsharded parameters that the regions share with other modules.
    """

    layers: tuple[ShardedLayer, ...]
    regions: tuple[Region, ...]
    blocks: str
    source: str
    counts: dict[tuple[str, str], int]
    per_head: dict[str, nn.Parameter]
    loose: tuple[str, ...]
    shared_by_blocks: tuple[str, ...]
    shared_by_regions: tuple[str, ...]


def find_plan(model: nn.Module, parallel_plan: Mapping[str, str], size: int) -> TensorPlan:
    """Finds how an unsharded model is sharded.

    Args:
        model: the LightningModule.
        parallel_plan: the strategy's.
        size: the number of ranks of the tensor axis.

    Raises:
        ConfigError: there is no plan, or it does not fit the model; with every reason.
    """
    source, roles = _roles(model, parallel_plan)
    blocks, _ = blocks_by_role(model, parallel_plan, 1)
    problems: list[str] = []
    layers, token_wise = _layers(model, roles, problems)
    _add_tied(model, layers, problems)
    regions, direct = _regions(model, blocks, layers, token_wise, problems)
    problems += _shared_columns(regions)
    counts = _counts(model, regions, layers, size, problems)
    problems += _indivisible(layers.values(), size)
    per_head = _per_head(model, roles, regions, size, problems)
    if problems:
        reasons = "; ".join(dict.fromkeys(problems))
        raise ConfigError(f"tensor_parallel.size={size} with the {source} cannot shard the model: {reasons}")
    token_wise |= routed_modules(model, {**roles, **parallel_plan}, blocks)
    loose = dict.fromkeys([*direct, *_mixing(model, blocks, regions, token_wise)])
    sharded = {id(layer.module.weight) for layer in layers.values()}
    sharded |= {id(layer.module.bias) for layer in layers.values() if layer.role in ("column", "vocab_head")}
    # If tokens are not sharded, the gradients of these are the same on all ranks.
    unsummed = {id(p) for layer in layers.values() for p in layer.after_sum}
    return TensorPlan(
        tuple(layers.values()),
        tuple(regions),
        blocks,
        source,
        counts,
        per_head,
        tuple(loose),
        _shared(model, {blocks: model.get_submodule(blocks)}, sharded),
        _shared(model, {region.name: region.module for region in regions}, sharded | unsummed),
    )


def _layers(model: nn.Module, roles: Mapping[str, str], problems: list[str]) -> tuple[dict[str, ShardedLayer], set[str]]:
    """The sharded layers by name, and the names of modules with the role ``token_wise``."""
    layers: dict[str, ShardedLayer] = {}
    token_wise: set[str] = set()
    for pattern, role in roles.items():
        if role in NO_LAYERS:
            continue
        names = names_matching(model, pattern)
        if not names:
            problems.append(_matches_nothing(pattern, "module", [name for name, _ in model.named_modules()]))
        if role == "token_wise":
            token_wise.update(names)
            continue
        for name in names:
            try:
                layers.update({layer.name: layer for layer in _sharded_layers(name, model.get_submodule(name), role)})
            except ConfigError as error:
                problems.append(str(error))
    return layers, token_wise


def _per_head(
    model: nn.Module, roles: Mapping[str, str], regions: Sequence[Region], size: int, problems: list[str]
) -> dict[str, nn.Parameter]:
    """The parameters with an entry a head, by name."""
    per_head: dict[str, nn.Parameter] = {}
    sharded = [f"{region.name}." for region in regions if region.columns and not any(c.has_all_features for c in region.columns)]
    for pattern in (pattern for pattern, role in roles.items() if role == "per_head"):
        matching = parameters_matching(model, pattern)
        if not matching:
            problems.append(_matches_nothing(pattern, "parameter", [name for name, _ in model.named_parameters()]))
        per_head |= matching
    for name, parameter in per_head.items():
        if not name.startswith(tuple(sharded)):
            problems.append(
                f"{name} has the role 'per_head', and no layer of its attention has the role 'column', which shards the heads"
            )
        elif not parameter.dim() or len(parameter) % size:
            heads = len(parameter) if parameter.dim() else "no"
            problems.append(f"{name} has {heads} heads, which are not divisible by {size}")
    return per_head


def _matches_nothing(pattern: str, what: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(pattern, list(names), 3, 0.4)
    return f"{pattern!r} matches no {what}; near names are: {', '.join(near) or 'none'}"


def _shared_columns(regions: Iterable[Region]) -> Iterator[str]:
    """Problems: column layers of one region that share a weight."""
    for region in regions:
        names = {id(layer.module.weight): layer.name for layer in region.columns}
        yield from (f"{c.name} shares its weight with {n}" for c in region.columns if (n := names[id(c.module.weight)]) != c.name)


def _indivisible(layers: Iterable[ShardedLayer], size: int) -> Iterator[str]:
    """Problems: layers that cannot be divided by the number of ranks."""
    for layer in layers:
        smallest = min(layer.parts)
        if layer.role in ("column", "row") and any(n % size for n in layer.parts):
            yield f"{layer.name} has {' + '.join(map(str, layer.parts))} features, which are not divisible by {size}"
        elif smallest < size:
            yield f"{layer.name} has {smallest} entries, fewer than the {size} ranks"


def _roles(model: nn.Module, parallel_plan: Mapping[str, str]) -> tuple[str, dict[str, str]]:
    """The source of the roles, and the roles by pattern."""
    if any(role not in NO_LAYERS for role in parallel_plan.values()):
        return "strategy's parallel_plan", dict(parallel_plan)
    attribute = getattr(model, "parallel_plan", None)
    if isinstance(attribute, Mapping) and not all(role in EXPERT_ROLES for role in attribute.values()):
        return f"parallel_plan of {type(model).__name__}", {pattern: str(role) for pattern, role in attribute.items()}
    named = ((name, getattr(module, "parallel_role", None)) for name, module in model.named_modules())
    if roles := {name: role for name, role in named if isinstance(role, str) and role not in EXPERT_ROLES}:
        return "layers of lightning_overlap.nn", roles
    for name, module in model.named_modules():
        if hasattr(module, "tp_plan") and hasattr(module, "get_input_embeddings"):
            return f"plan of {type(module).__name__}", dict(roles_of_model(name, module))
    raise ConfigError(
        "tensor_parallel needs roles for the layers to shard, and the model has no plan. Give the strategy a parallel_plan such as "
        "{'attention.qkv': 'column[3]', 'attention.proj': 'row', 'mlp.up': 'column', 'mlp.down': 'row'}, give the module an "
        "attribute of that name, or use layers of lightning_overlap.nn"
    )


def _is_linear(module: nn.Module) -> bool:
    """Whether it is torch's linear layer, or transformers' Conv1D, whose weight is (in, out)."""
    return type(module).forward is nn.Linear.forward or type(module).__name__ == "Conv1D"


def _sharded_layers(name: str, module: nn.Module, role: str) -> Iterator[ShardedLayer]:
    """The layer; of a layer with adapters by peft, also the adapter layers that read or make its sharded features."""
    kinds = [kind.__name__ for kind in type(module).__mro__ if kind.__module__.partition(".")[0] == "peft"]
    adapters: Any = module
    if not kinds:
        yield _sharded_layer(name, module, role)
        return
    column, row = role.startswith("column"), role.startswith("row")
    variant = next((type(v).__name__ for v in getattr(module, "lora_variant", {}).values()), None)
    if "LoraLayer" not in kinds or variant is not None or not (column or row):
        kind = f"{type(module).__name__} with {variant}" if variant else type(module).__name__
        raise ConfigError(
            f"{name} is peft's {kind}, which cannot be {role!r}: only plain LoRA of linear layers can be sharded. Use that, or leave "
            "the layers of its attention or mlp out of the parallel_plan"
        )
    base = _sharded_layer(f"{name}.base_layer", adapters.base_layer, role)
    yield base
    for key in adapters.lora_A:
        if column:
            second = _sharded_layer(f"{name}.lora_B.{key}", adapters.lora_B[key], role)
            yield replace(second, parts=base.parts, reads_input=False)
        else:
            first = _sharded_layer(f"{name}.lora_A.{key}", adapters.lora_A[key], role)
            yield replace(first, next_layer=adapters.lora_B[key])


def _sharded_layer(name: str, module: nn.Module, role: str) -> ShardedLayer:
    kind, proportions = parse_role(role)
    has_all_features, kind = "_" in kind and not kind.startswith("vocab"), kind if kind.startswith("vocab") else kind.partition("_")[0]
    fits = isinstance(module, nn.Embedding) if kind == "vocab_embedding" else _is_linear(module)
    if kind == "vocab_head":
        fits = type(module).forward is nn.Linear.forward
    if not fits:
        raise ConfigError(f"{name} is a {type(module).__name__}, which cannot be {role!r}")
    if isinstance(module, nn.Embedding) and (module.max_norm is not None or module.sparse or module.scale_grad_by_freq):
        raise ConfigError(f"{name} has max_norm, sparse or scale_grad_by_freq, which need all its entries")
    if not all(getattr(module, key, None) is parameters_of(module).get(key) for key in ("weight", "bias")):
        raise ConfigError(
            f"{name} computes its weight or bias from other parameters (weight_norm, spectral_norm, a parametrization), which cannot "
            "be sharded: remove the parametrization before the fit (torch.nn.utils.parametrize.remove_parametrizations, "
            "torch.nn.utils.remove_weight_norm), or leave the layers of its attention or mlp out of the parallel_plan"
        )
    transposed = not isinstance(module, nn.Linear | nn.Embedding)
    dim = int(kind == "row") ^ int(transposed)
    weight: Any = module.weight
    features = weight.shape[dim]
    fused = name.removesuffix(".base_layer").rpartition(".")[2] in FUSED and features == 3 * weight.shape[1 - dim]
    if kind == "column" and proportions is None and fused and not has_all_features:
        proportions = (1, 1, 1)
    proportions = proportions or (1,)
    if features % sum(proportions):
        raise ConfigError(f"{name} has {features} outputs, which are not in the proportions {proportions}")
    parts = tuple(features // sum(proportions) * n for n in proportions)
    return ShardedLayer(name, module, kind, parts, dim, has_all_features)


def _add_tied(model: nn.Module, layers: dict[str, ShardedLayer], problems: list[str]) -> None:
    """Adds the embedding or head that shares its weight with a sharded one."""
    by_weight = {id(layer.module.weight): layer for layer in layers.values()}
    for name, module in model.named_modules():
        for parameter in parameters_of(module).values():
            first = by_weight.get(id(parameter))
            if first is None or name in layers or module is first.module:
                continue
            if first.role in ("vocab_embedding", "vocab_head") and isinstance(module, nn.Linear | nn.Embedding):
                role = "vocab_embedding" if isinstance(module, nn.Embedding) else "vocab_head"
                layers[name] = _sharded_layer(name, module, role)
            else:
                problems.append(f"{name} shares its weight with {first.name}, which is sharded, and has no role")


def _regions(
    model: nn.Module, blocks: str, layers: Mapping[str, ShardedLayer], token_wise: set[str], problems: list[str]
) -> tuple[list[Region], list[str]]:
    """The regions, and the names of layers that are direct children of a block."""
    depth = blocks.count(".") + 1  # dots in the name of a block
    regions: dict[str, list[ShardedLayer]] = {}
    direct: list[str] = []
    separate: set[str] = set()
    """Blocks with a row layer outside of any region that has column layers."""
    columns = {name: layer for name, layer in layers.items() if layer.role == "column" and layer.reads_input}
    rows = [name for name, layer in layers.items() if layer.role == "row"]

    def block_of(name: str) -> str:
        return ".".join(name.split(".")[: depth + 1])

    for name in (*columns, *rows):
        if not name.startswith(f"{blocks}."):
            problems.append(f"{name} is not in the list of blocks, {blocks}")
    for row in rows:
        if any(row.startswith(f"{name}.") for name in token_wise):  # beside the norm, after an attention that ends before it (BERT)
            separate.add(block_of(row))
            continue
        parent = row.rpartition(".")[0]
        while parent.count(".") >= depth and not any(name.startswith(f"{parent}.") for name in columns):
            parent = parent.rpartition(".")[0]
        if parent.count(".") < depth:
            problems.append(f"{row} is a row layer without column layers before it, in the same block")
        elif parent.count(".") == depth:  # the block
            direct.append(row)
        else:
            regions.setdefault(parent, [])
    for name, layer in columns.items():
        around = [region for region in regions if name.startswith(f"{region}.")]
        parent = name.rpartition(".")[0]
        if around:
            regions[max(around, key=len)].append(layer)
        elif block_of(name) in separate and parent.count(".") > depth:
            regions[parent] = [layer]
        else:
            direct.append(name)
            regions[name] = [layer]
            if not any(row.startswith(f"{block_of(name)}.") for row in rows):
                problems.append(f"{name} is a column layer without a row layer after it, in the same block")
    for name, in_region in regions.items():
        inside = [layers[row] for row in rows if row.startswith(f"{name}.")]
        if len({layer.has_all_features for layer in (*in_region, *inside)}) > 1:
            problems.append(
                f"{name} has column and row layers of two kinds: column_gathered and row_split go together, and column and row"
            )
    return [Region(name, model.get_submodule(name), tuple(in_region)) for name, in_region in regions.items()], direct


def _counts(
    model: nn.Module, regions: list[Region], layers: Mapping[str, ShardedLayer], size: int, problems: list[str]
) -> dict[tuple[str, str], int]:
    """The attributes that count heads, of which every rank has its share."""
    counts: dict[tuple[str, str], int] = {}
    for region in regions:
        if any(layer.has_all_features for layer in region.columns):
            continue  # every rank has all heads
        owner = region.name.rpartition(".")[0] if region.name in layers else region.name
        module = model.get_submodule(owner)
        values = {name: value for name in COUNTS if isinstance(value := getattr(module, name, None), int)}
        head_dim = next(
            (v for name in ("head_dim", "head_size", "attention_head_size") if isinstance(v := getattr(module, name, None), int)), None
        )
        if not values and head_dim is None:
            continue
        configured = getattr(module, "config", None)
        for names in (QUERY_HEADS, KEY_HEADS):
            for name in names:
                value = values.get(name, getattr(configured, name, None))
                if isinstance(value, int) and value % size:
                    problems.append(f"{name}={value} is not divisible by {size}")
        for layer in region.columns if head_dim else ():
            for part in layer.parts:
                if part % (head_dim or 1) == 0 and part // (head_dim or 1) % size:
                    problems.append(
                        f"{layer.name} has {part // (head_dim or 1)} heads of {head_dim} features, which are not divisible by {size}"
                    )
        counts |= {(owner, name): value for name, value in values.items()}
    return counts


def _mixing(model: nn.Module, blocks: str, regions: list[Region], token_wise: set[str]) -> Iterator[str]:
    """Names of modules in the blocks, outside of regions, that may read more than one token."""
    inside = {region.name for region in regions}

    def look(name: str, module: nn.Module) -> Iterator[str]:
        if name in inside or name in token_wise or _is_token_wise(module):
            return
        children = list(module.named_children())
        is_container = isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict) or any(
            r.startswith(f"{name}.") for r in inside
        )
        if not children or not is_container:  # its own forward may do anything: it may be an attention without a role
            yield name
            return
        for key, child in children:
            yield from look(f"{name}.{key}", child)

    for key, block in model.get_submodule(blocks).named_children():
        yield from look(f"{blocks}.{key}", block)


def _shared(model: nn.Module, parts: Mapping[str, nn.Module], exempt: set[int]) -> tuple[str, ...]:
    """Names of parameters that these parts share with other modules, except those with an id in ``exempt``."""
    # A second name of a part, or of a block in the list, is no other module.
    own_modules = {id(m) for part in parts.values() for m in (part, *(part.children() if isinstance(part, Blocks) else ()))}
    elsewhere: set[int] = set()

    def walk(module: nn.Module) -> None:
        if id(module) not in own_modules:
            elsewhere.update(id(parameter) for parameter in parameters_of(module).values())
            for child in module.children():
                walk(child)

    walk(model)
    inside = {id(p): f"{name}.{path}" for name, part in parts.items() for path, p in part.named_parameters()}
    return tuple(name for number, name in inside.items() if number in elsewhere - exempt)


def _is_token_wise(module: nn.Module) -> bool:
    """Whether a module computes each token separately, as far as its class tells."""
    kind = type(module)
    norm = "Norm" in kind.__name__ and not any(other in kind.__name__ for other in ("Batch", "Instance", "Group"))
    return norm or isinstance(module, TOKEN_WISE) or _is_linear(module) or kind.__module__ == "transformers.activations"
