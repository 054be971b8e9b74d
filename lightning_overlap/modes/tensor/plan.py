"""Roles of a model's parts: its list of blocks, and how layers are cut over the tensor axis.

Roles come from the strategy's ``parallel_plan``, else from the module's attribute of that name, else from layers of
:mod:`lightning_overlap.nn`, else from a Hugging Face model's own plan. Keys are names of modules, or ends of names, with ``*`` for
one component: ``blocks.*.attention.qkv``.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from lightning_overlap.decision import ConfigError
from lightning_overlap.model.blocks import Blocks, find_blocks, names_matching
from lightning_overlap.model.roles import parse_role
from lightning_overlap.torch_seams import parameters_of

STYLES = {
    "colwise": "column",
    "rowwise": "row",
    "colwise_gather_output": "column_gathered",
    "colwise_rep": "column_gathered",
    "rowwise_split_input": "row_split",
    "rowwise_rep": "row_split",
    "packed_colwise": "column[2]",
    "embedding_rowwise": "vocab_embedding",
    "replicated_with_grad_allreduce": "",
    "moe_tp_experts": "",
    "moe_identity_expert": "",
}
"""Hugging Face's words for roles; the empty one: the layer stays as it is. (So do experts, whose weights are of no layer.)"""
_BERT = {
    **{f"attention.self.{name}": "column" for name in ("query", "key", "value")},
    "attention.output.dense": "row",
    "attention.output": "token_wise",
    "intermediate.dense": "column",
    "layer.*.output.dense": "row",
    "layer.*.output": "token_wise",
}
_PROJECTIONS = {f"{name}_proj": "column" for name in ("q", "k", "v")}
PLANS: dict[str, dict[str, str]] = {
    "gpt2": {
        "h.*.attn.c_attn": "column[3]",
        "h.*.attn.c_proj": "row",
        "h.*.mlp.c_fc": "column",
        "h.*.mlp.c_proj": "row",
    },
    "gptj": {**_PROJECTIONS, "attn.out_proj": "row", "mlp.fc_in": "column", "mlp.fc_out": "row"},
    "opt": {**_PROJECTIONS, "self_attn.out_proj": "row", "fc1": "column", "fc2": "row"},
    "bert": _BERT,
    "roberta": _BERT,
    "vit": {**_PROJECTIONS, "attention.o_proj": "row", "mlp.fc1": "column", "mlp.fc2": "row"},
}
"""By ``model_type``, plans of Hugging Face models that have none."""
FUSED = ("qkv", "qkv_proj", "c_attn", "Wqkv", "in_proj")
"""Names of layers with three times as many outputs as inputs that are q, k and v, one after the other."""
QUERY_HEADS = ("num_heads", "n_head", "n_heads", "heads", "num_attention_heads")
KEY_HEADS = ("num_key_value_heads", "n_kv_heads", "n_kv_head", "num_kv_heads")
COUNTS = (*QUERY_HEADS, *KEY_HEADS, "split_size")
"""Attributes of an attention module that are this rank's share while it is cut: numbers of heads, features of a fused part."""
TOKEN_WISE = (nn.Linear, nn.Embedding, nn.Identity, nn.Dropout, nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid)


@dataclass(frozen=True)
class Cut:
    """A layer whose weight is cut.

    Attributes:
        name: of the module.
        module: the layer.
        role: ``column``, ``row``, ``vocab_embedding`` or ``vocab_head``.
        parts: sizes along ``dim`` of what is fused (q, k, v; gate, up): each is cut by itself.
        dim: of the weight that is cut.
        whole: a column layer gives, and a row layer reads, all features on every rank.
        reads: a column layer reads its region's input; an adapter's does not.
        after: the layer that reads a row layer's output, where that is an adapter's.
    """

    name: str
    module: nn.Module
    role: str
    parts: tuple[int, ...]
    dim: int
    whole: bool = False
    reads: bool = True
    after: nn.Module | None = None

    @property
    def after_sum(self) -> list[nn.Parameter]:
        """Parameters that are used after the sum over the ranks."""
        bias = self.module.bias if self.role == "row" else None
        after = list(self.after.parameters()) if self.after is not None else []
        return [*after, bias] if isinstance(bias, nn.Parameter) else after


@dataclass(frozen=True)
class Region:
    """A module in a block (attention, mlp) that reads its input by column layers and gives its output by row layers.

    A layer that stands in a block itself, beside norms, is a region of its own.
    """

    name: str
    module: nn.Module
    columns: tuple[Cut, ...]


@dataclass(frozen=True)
class TensorPlan:
    """How a model is cut.

    Attributes:
        cuts: the layers.
        regions: of all blocks.
        blocks: name of the list of blocks.
        source: where the roles come from.
        counts: attributes, by the names of module and attribute, that are divided by the number of ranks.
        loose: modules that keep the blocks' tokens from being cut, by name.
        shared_by_blocks: parameters that are not cut, of the blocks and of a module outside of them, by name.
        shared_by_regions: the same of regions.
    """

    cuts: tuple[Cut, ...]
    regions: tuple[Region, ...]
    blocks: str
    source: str
    counts: dict[tuple[str, str], int]
    loose: tuple[str, ...]
    shared_by_blocks: tuple[str, ...]
    shared_by_regions: tuple[str, ...]


def find(model: nn.Module, given: Mapping[str, str], size: int) -> TensorPlan:
    """How a whole model is cut over so many ranks.

    Args:
        model: the LightningModule.
        given: the strategy's ``parallel_plan``.
        size: ranks of the tensor axis.

    Raises:
        ConfigError: there is no plan, or it does not fit the model; with every reason.
    """
    source, roles = _roles(model, given)
    asked = [name for name, role in {**roles, **given}.items() if role == "blocks"]
    blocks, _ = find_blocks(model, asked[0] if asked else None, 1)
    problems: list[str] = []
    cuts: dict[str, Cut] = {}
    whole: set[str] = set()
    for pattern, role in roles.items():
        if role in ("blocks", "per_token"):
            continue
        names = names_matching(model, pattern)
        if not names:
            near = difflib.get_close_matches(pattern, [name for name, _ in model.named_modules()], 3, 0.4)
            problems.append(f"{pattern!r} matches no module; near names are: {', '.join(near) or 'none'}")
        whole.update(name for name in names if role == "token_wise")
        for name in names if role != "token_wise" else ():
            try:
                cuts.update({cut.name: cut for cut in _cuts(name, model.get_submodule(name), role)})
            except ConfigError as error:
                problems.append(str(error))
    _add_tied(model, cuts, problems)
    regions, direct = _regions(model, blocks, cuts, whole, problems)
    for region in regions:
        weights = {id(cut.module.weight): cut.name for cut in region.columns}
        problems += [f"{c.name} shares its weight with {n}" for c in region.columns if (n := weights[id(c.module.weight)]) != c.name]
    counts = _counts(model, regions, cuts, size, problems)
    for cut in cuts.values():
        least = min(cut.parts)
        if cut.role in ("column", "row") and any(n % size for n in cut.parts):
            said = " + ".join(map(str, cut.parts))
            problems.append(f"{cut.name} has {said} features to cut, which {size} does not divide")
        elif least < size:
            problems.append(f"{cut.name} has {least} entries, fewer than ranks")
    if problems:
        raise ConfigError(f"tensor_parallel.size={size} with the {source} cannot cut the model: {'; '.join(dict.fromkeys(problems))}")
    loose = [*direct, *_mixing(model, blocks, regions, whole)]
    numbers = {id(c.module.weight) for c in cuts.values()}
    numbers |= {id(c.module.bias) for c in cuts.values() if c.role in ("column", "vocab_head")}
    biases = {id(p) for c in cuts.values() for p in c.after_sum}  # where tokens are not cut, their gradients are whole
    of_blocks, of_regions = ({name: model.get_submodule(name) for name in names} for names in ((blocks,), [r.name for r in regions]))
    return TensorPlan(
        tuple(cuts.values()),
        tuple(regions),
        blocks,
        source,
        counts,
        tuple(dict.fromkeys(loose)),
        _shared(model, of_blocks, numbers),
        _shared(model, of_regions, numbers | biases),
    )


def _roles(model: nn.Module, given: Mapping[str, str]) -> tuple[str, dict[str, str]]:
    """Where they come from, and the roles by pattern."""
    if any(role not in ("blocks", "per_token") for role in given.values()):
        return "strategy's parallel_plan", dict(given)
    own = getattr(model, "parallel_plan", None)
    if isinstance(own, Mapping):
        return f"parallel_plan of {type(model).__name__}", {pattern: str(role) for pattern, role in own.items()}
    if said := {name: m.parallel_role for name, m in model.named_modules() if isinstance(getattr(m, "parallel_role", None), str)}:
        return "layers of lightning_overlap.nn", said
    for name, module in model.named_modules():
        if hasattr(module, "tp_plan") and hasattr(module, "get_input_embeddings"):
            return f"plan of {type(module).__name__}", dict(_of_hugging_face(name, module))
    raise ConfigError(
        "tensor_parallel needs to know which layers to cut: no Hugging Face model with a plan was found. Give the "
        "strategy parallel_plan={'attention.qkv': 'column[3]', 'attention.proj': 'row', 'mlp.up': 'column', 'mlp.down': 'row'}, say, "
        "or the module an attribute of that name, or take layers of lightning_overlap.nn"
    )


def _of_hugging_face(prefix: str, model: Any) -> Iterator[tuple[str, str]]:
    styles: dict[str, str] = {name: style for name, style in (model.tp_plan or {}).items() if "*" in name}
    kind = model.config.model_type
    if not styles and kind not in PLANS:
        raise ConfigError(
            f"{type(model).__name__} ({kind}) has no plan of its own for tensor_parallel: give OverlapStrategy(parallel_plan=...) "
            "with the roles of its layers: 'column' for q, k, v and what goes up, 'row' for what comes out of attention and mlp"
        )
    for name, style in styles.items():
        if style not in STYLES:
            raise ConfigError(
                f"{type(model).__name__}'s own plan has the style {style!r} for {name}, which is not in this version; there are "
                f"{', '.join(STYLES)}. Give OverlapStrategy(parallel_plan=...) with roles for all its layers"
            )
        pattern = f"{prefix}.{name}".lstrip(".")
        if STYLES[style] and names_matching(model, name):  # dense layers of a model that has experts only, say
            yield pattern, STYLES[style]
    if not styles:
        yield from PLANS[kind].items()
    for role, kinds, module in (
        ("vocab_embedding", nn.Embedding, model.get_input_embeddings()),
        ("vocab_head", nn.Linear, model.get_output_embeddings()),
    ):
        if isinstance(module, kinds):
            yield from ((f"{prefix}.{name}".lstrip("."), role) for name, found in model.named_modules() if found is module)


def _is_linear(module: nn.Module) -> bool:
    """Of torch, or transformers' Conv1D, whose weight is (in, out)."""
    return type(module).forward is nn.Linear.forward or type(module).__name__ == "Conv1D"


def _cuts(name: str, module: nn.Module, role: str) -> Iterator[Cut]:
    """The layer's, or those of a layer with adapters by peft: what reads or gives features that are cut is cut with it."""
    kinds = [kind.__name__ for kind in type(module).__mro__ if kind.__module__.partition(".")[0] == "peft"]
    adapters: Any = module
    if not kinds:
        yield _cut(name, module, role)
        return
    column, row = role.startswith("column"), role.startswith("row")
    variant = next((type(v).__name__ for v in getattr(module, "lora_variant", {}).values()), None)
    if "LoraLayer" not in kinds or variant is not None or not (column or row):
        what = f"{type(module).__name__} with {variant}" if variant else type(module).__name__
        raise ConfigError(
            f"{name} is peft's {what}, which cannot be {role!r}: plain LoRA of linear layers can be cut. Use that, or leave the "
            "layers of its attention or mlp out of the parallel_plan"
        )
    base = _cut(f"{name}.base_layer", adapters.base_layer, role)
    yield base
    for key in adapters.lora_A:
        if column:
            yield replace(_cut(f"{name}.lora_B.{key}", adapters.lora_B[key], role), parts=base.parts, reads=False)
        else:
            yield replace(_cut(f"{name}.lora_A.{key}", adapters.lora_A[key], role), after=adapters.lora_B[key])


def _cut(name: str, module: nn.Module, role: str) -> Cut:
    kind, proportions = parse_role(role)
    whole, kind = "_" in kind and not kind.startswith("vocab"), kind if kind.startswith("vocab") else kind.partition("_")[0]
    fits = isinstance(module, nn.Embedding) if kind == "vocab_embedding" else _is_linear(module)
    if kind == "vocab_head":
        fits = type(module).forward is nn.Linear.forward
    if not fits:
        raise ConfigError(f"{name} is a {type(module).__name__}, which cannot be {role!r}")
    if isinstance(module, nn.Embedding) and (module.max_norm is not None or module.sparse or module.scale_grad_by_freq):
        raise ConfigError(f"{name} has max_norm, sparse or scale_grad_by_freq, which look at all its entries")
    if not all(getattr(module, key, None) is parameters_of(module).get(key) for key in ("weight", "bias")):
        raise ConfigError(
            f"{name} computes its weight or bias from other parameters (weight_norm, spectral_norm, a parametrization), of which it "
            "needs all: take the parametrization away before the fit (torch.nn.utils.parametrize.remove_parametrizations, "
            "torch.nn.utils.remove_weight_norm), or leave the layers of its attention or mlp out of the parallel_plan"
        )
    transposed = not isinstance(module, nn.Linear | nn.Embedding)
    dim = int(kind == "row") ^ int(transposed)
    weight: Any = module.weight
    features = weight.shape[dim]
    fused = name.removesuffix(".base_layer").rpartition(".")[2] in FUSED and features == 3 * weight.shape[1 - dim]
    if kind == "column" and proportions is None and fused and not whole:
        proportions = (1, 1, 1)
    proportions = proportions or (1,)
    if features % sum(proportions):
        raise ConfigError(f"{name} has {features} outputs, which are not in the proportions {proportions}")
    return Cut(name, module, kind, tuple(features // sum(proportions) * n for n in proportions), dim, whole)


def _add_tied(model: nn.Module, cuts: dict[str, Cut], problems: list[str]) -> None:
    """What shares a weight with a layer that is cut is cut with it, if it is an embedding or a head."""
    cut_by = {id(cut.module.weight): cut for cut in cuts.values()}
    for name, module in model.named_modules():
        for parameter in parameters_of(module).values():
            first = cut_by.get(id(parameter))
            if first is None or name in cuts or module is first.module:
                continue
            if first.role in ("vocab_embedding", "vocab_head") and isinstance(module, nn.Linear | nn.Embedding):
                role = "vocab_embedding" if isinstance(module, nn.Embedding) else "vocab_head"
                cuts[name] = _cut(name, module, role)
            else:
                problems.append(f"{name} shares its weight with {first.name}, and is not cut")


def _regions(
    model: nn.Module, blocks: str, cuts: Mapping[str, Cut], token_wise: set[str], problems: list[str]
) -> tuple[list[Region], list[str]]:
    """The regions, and the names of layers that stand in a block itself."""
    depth = blocks.count(".") + 1  # of a block
    regions: dict[str, list[Cut]] = {}
    direct: list[str] = []
    apart: set[str] = set()
    columns = {name: cut for name, cut in cuts.items() if cut.role == "column" and cut.reads}
    rows = [name for name, cut in cuts.items() if cut.role == "row"]

    def block_of(name: str) -> str:
        return ".".join(name.split(".")[: depth + 1])

    for name in (*columns, *rows):
        if not name.startswith(f"{blocks}."):
            problems.append(f"{name} is not in the list of blocks, {blocks}")
    for row in rows:
        if any(row.startswith(f"{name}.") for name in token_wise):  # beside the norm, say, after an attention that ends before it
            apart.add(block_of(row))
            continue
        place = row.rpartition(".")[0]
        while place.count(".") >= depth and not any(name.startswith(f"{place}.") for name in columns):
            place = place.rpartition(".")[0]
        if place.count(".") < depth:
            problems.append(f"{row} is a row layer without column layers before it, in the same block")
        elif place.count(".") == depth:  # the block itself
            direct.append(row)
        else:
            regions.setdefault(place, [])
    for name, cut in columns.items():
        places = [place for place in regions if name.startswith(f"{place}.")]
        parent = name.rpartition(".")[0]
        if places:
            regions[max(places, key=len)].append(cut)
        elif block_of(name) in apart and parent.count(".") > depth:
            regions[parent] = [cut]
        else:
            direct.append(name)
            regions[name] = [cut]
            if not any(row.startswith(f"{block_of(name)}.") for row in rows):
                problems.append(f"{name} is a column layer without a row layer after it, in the same block")
    for place, found in regions.items():
        inside = [cuts[row] for row in rows if row.startswith(f"{place}.")]
        if len({cut.whole for cut in (*found, *inside)}) > 1:
            problems.append(
                f"{place} has column and row layers of two kinds: column_gathered and row_split go together, and column and row"
            )
    return [Region(name, model.get_submodule(name), tuple(found)) for name, found in regions.items()], direct


def _counts(
    model: nn.Module, regions: list[Region], cuts: Mapping[str, Cut], size: int, problems: list[str]
) -> dict[tuple[str, str], int]:
    """Attributes that count heads, which every rank has a share of."""
    counts: dict[tuple[str, str], int] = {}
    for region in regions:
        if any(cut.whole for cut in region.columns):
            continue  # every rank has all heads there
        direct = region.name in cuts
        owner = region.name.rpartition(".")[0] if direct else region.name
        module = model.get_submodule(owner)
        found = {name: value for name in COUNTS if isinstance(value := getattr(module, name, None), int)}
        head_dim = next(
            (v for name in ("head_dim", "head_size", "attention_head_size") if isinstance(v := getattr(module, name, None), int)), None
        )
        if not found and head_dim is None:
            continue
        configured = getattr(module, "config", None)
        for names in (QUERY_HEADS, KEY_HEADS):
            for name in names:
                value = found.get(name, getattr(configured, name, None))
                if isinstance(value, int) and value % size:
                    problems.append(f"{name}={value} is not divisible by {size}")
        for cut in region.columns if head_dim else ():
            for part in cut.parts:
                if part % (head_dim or 1) == 0 and part // (head_dim or 1) % size:
                    problems.append(
                        f"{cut.name} has {part // (head_dim or 1)} heads of {head_dim} features, which {size} does not divide"
                    )
        counts |= {(owner, name): value for name, value in found.items()}
    return counts


def _mixing(model: nn.Module, blocks: str, regions: list[Region], token_wise: set[str]) -> Iterator[str]:
    """Modules in the blocks, outside of regions, that may look at more than one token."""
    inside = {region.name for region in regions}

    def look(name: str, module: nn.Module) -> Iterator[str]:
        if name in inside or name in token_wise or _is_token_wise(module):
            return
        children = list(module.named_children())
        around = isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict) or any(r.startswith(f"{name}.") for r in inside)
        if not children or not around:  # its own forward may do anything with them: an attention that has no role, say
            yield name
            return
        for key, child in children:
            yield from look(f"{name}.{key}", child)

    for key, block in model.get_submodule(blocks).named_children():
        yield from look(f"{blocks}.{key}", block)


def _shared(model: nn.Module, parts: Mapping[str, nn.Module], whole: set[int]) -> tuple[str, ...]:
    """Parameters of these parts that a module outside of them has, too; but those with an id in ``whole``."""
    # Another name for a part, or for one of the list's blocks, is no other use of it.
    parted = {id(m) for part in parts.values() for m in (part, *(part.children() if isinstance(part, Blocks) else ()))}
    elsewhere: set[int] = set()

    def walk(module: nn.Module) -> None:
        if id(module) not in parted:
            elsewhere.update(id(parameter) for parameter in parameters_of(module).values())
            for child in module.children():
                walk(child)

    walk(model)
    inside = {id(p): f"{name}.{own}" for name, part in parts.items() for own, p in part.named_parameters()}
    return tuple(name for number, name in inside.items() if number in elsewhere - whole)


def _is_token_wise(module: nn.Module) -> bool:
    kind = type(module)
    norm = "Norm" in kind.__name__ and not any(other in kind.__name__ for other in ("Batch", "Instance", "Group"))
    return norm or isinstance(module, TOKEN_WISE) or _is_linear(module) or kind.__module__ == "transformers.activations"
