"""Finds the experts of a model.

The experts of a layer are one module, whose ``forward(hidden, indices, weights)`` gets all tokens and, for each, the experts that the
router has chosen and their weights. Each of its parameters has an entry an expert, along the first dim. So it is in transformers, and
in :mod:`lightning_overlap.nn`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_overlap.decision import ConfigError
from lightning_overlap.model.blocks import names_by_role, names_matching
from lightning_overlap.torch_seams import parameters_of

MODULE, SHARDED, REPLICATED = "ep_dispatch_experts", "grouped_gemm", "replicated_with_grad_allreduce"
"""Styles of a Hugging Face plan for experts: the module, a parameter with an entry an expert, one that all experts share."""
DENSE_STYLES = ("colwise", "rowwise")
"""Styles of layers beside the experts, in such plans: expert parallelism leaves these layers as they are."""
FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "has_post_expert_norm")
"""Attributes of the experts' module that say how an expert computes, as in ``transformers.integrations.moe``."""
ROUTERS = ("gate", "router")
SHARED = ("shared_experts", "shared_expert", "shared_mlp")
"""Names that modules beside the experts have in models of transformers."""


@dataclass(frozen=True, eq=False)
class ExpertLayer:
    """The experts of one layer.

    Attributes:
        name: of the module of all experts.
        module: the module.
        count: the number of experts.
        parameters: names in the module of the parameters that have an entry an expert.
        router: name of the module that chooses experts for each token; None if it is not known.
        shared: name of the module of the experts that every token takes; None if there is none.
    """

    name: str
    module: nn.Module
    count: int
    parameters: tuple[str, ...]
    router: str | None = None
    shared: str | None = None

    @property
    def spread_parameters(self) -> list[nn.Parameter]:
        """The parameters that have an entry an expert."""
        return [self.module.get_parameter(name) for name in self.parameters]

    @property
    def block(self) -> str:
        """Name of the module around the experts, in which their router and the shared experts are."""
        return self.name.rpartition(".")[0]


def locate_experts(model: nn.Module, given: Mapping[str, str]) -> tuple[str, list[str]]:
    """Finds the names of the experts' modules, one a layer.

    Args:
        model: the user's.
        given: by name of a part of the model, its role, from the strategy's ``parallel_plan``.

    Returns:
        The source of the names, and the names; none if the model has no experts that are known.
    """
    if names := names_by_role(model, given, "experts"):
        return "parallel_plan", names
    if names := [name for name, module in model.named_modules() if getattr(module, "parallel_role", None) == "experts"]:
        return "layers of lightning_overlap.nn", names
    for prefix, part in _models_of_transformers(model):
        patterns = [name for name, style in (part.ep_plan or {}).items() if style == MODULE]
        if names := [_joined(prefix, name) for pattern in patterns for name in names_matching(part, pattern)]:
            return f"plan of {type(part).__name__}", names
    return "", []


def routed_modules(model: nn.Module, given: Mapping[str, str], blocks: str) -> set[str]:
    """Names of the modules that work on each token by itself because they are experts or send tokens to them.

    Args:
        model: the user's.
        given: as in :func:`locate_experts`.
        blocks: name of the list of blocks. A module around experts that is such a block is not among them.
    """
    _, names = locate_experts(model, given)
    around = {name.rpartition(".")[0] for name in names}
    routers = {_joined(block, key) for block in around for key, _ in model.get_submodule(block).named_children() if key in ROUTERS}
    return {
        *names,
        *routers,
        *names_by_role(model, given, "router"),
        *(block for block in around if block.rpartition(".")[0] != blocks),
    }


def find_experts(model: nn.Module, given: Mapping[str, str], size: int) -> tuple[str, tuple[ExpertLayer, ...]]:
    """Finds the experts of a model that are spread over ranks.

    Args:
        model: the user's.
        given: by name of a part of the model, its role, from the strategy's ``parallel_plan``.
        size: the number of ranks.

    Returns:
        The source of the roles, and the layers.

    Raises:
        ConfigError: the model has no experts, or not such that can be spread; with every reason.
    """
    source, names = locate_experts(model, given)
    if not names:
        raise ConfigError(f"no experts were found to spread over {size} ranks: {_no_experts(model)}")
    problems = [*_unknown_styles(model)] if source.startswith("plan of") else []
    layers: list[ExpertLayer] = []
    for name in names:
        try:
            layers.append(_layer(model, given, name))
        except ConfigError as error:
            problems.append(str(error))
    problems += [f"{x.name} has {x.count} experts, fewer than the {size} ranks" for x in layers if x.count < size]
    problems += _tied(model, layers)
    if problems:
        raise ConfigError(f"experts ({source}) cannot be spread over {size} ranks: {'; '.join(dict.fromkeys(problems))}")
    return source, tuple(layers)


def _layer(model: nn.Module, given: Mapping[str, str], name: str) -> ExpertLayer:
    module: Any = model.get_submodule(name)
    if lacking := [flag for flag in FLAGS if not isinstance(getattr(module, flag, None), bool)]:
        raise ConfigError(
            f"{name} is a {type(module).__name__} without {', '.join(lacking)}: the module of all experts must have stacked "
            "parameters and these attributes, like experts of transformers. Use lightning_overlap.nn.MoELayer"
        )
    products = ["gate_up_proj" if module.has_gate else "up_proj", "down_proj"]
    expected = [*products, *(f"{product}_bias" for product in products if module.has_bias)]
    parameters = parameters_of(module)
    if lacking := [key for key in expected if not isinstance(parameters.get(key), nn.Parameter)]:
        raise ConfigError(f"{name} ({type(module).__name__}) has no parameter {', '.join(lacking)}, which its flags promise")
    if further := [key for key in parameters if key not in expected]:
        raise ConfigError(f"{name} ({type(module).__name__}) has the parameters {', '.join(further)}, which are not known")
    counts = {parameter.shape[0] for key in expected if (parameter := parameters[key]) is not None}
    if len(counts) > 1:
        raise ConfigError(f"the parameters of {name} have different first dims: {sorted(counts)}")
    router, shared = (_beside(model, given, name, role, keys) for role, keys in (("router", ROUTERS), ("shared_experts", SHARED)))
    return ExpertLayer(name, module, counts.pop(), tuple(expected), router, shared)


def _beside(model: nn.Module, given: Mapping[str, str], name: str, role: str, keys: tuple[str, ...]) -> str | None:
    """Name of the module with a role, or else with one of the usual names, in the module around the experts."""
    around = name.rpartition(".")[0]
    names = names_by_role(model, given, role)
    names += [path for path, module in model.named_modules() if getattr(module, "parallel_role", None) == role]
    names += [_joined(around, key) for key, _ in model.get_submodule(around).named_children() if key in keys]
    return next((path for path in names if path.rpartition(".")[0] == around), None)


def _models_of_transformers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Names and modules of the outermost models of transformers in the user's."""
    outer: str | None = None
    for name, module in model.named_modules():
        if (outer is None or not name.startswith(outer)) and hasattr(module, "ep_plan") and hasattr(module, "get_input_embeddings"):
            outer = f"{name}." if name else ""
            yield name, module


def _unknown_styles(model: nn.Module) -> Iterator[str]:
    """Problems: what a plan of transformers says of experts and this version does not know."""
    known = (MODULE, SHARDED, REPLICATED, *DENSE_STYLES)
    for _, part in _models_of_transformers(model):
        for pattern, style in (part.ep_plan or {}).items():
            if style not in known:
                yield f"the plan of {type(part).__name__} has the style {style!r} for {pattern}; known are {', '.join(known)}"


def _no_experts(model: nn.Module) -> str:
    """Why no experts were found, and what to do."""
    advice = "give the module of all experts of a layer the role 'experts' in parallel_plan, or set expert_parallel: 1"
    parts = [part for _, part in _models_of_transformers(model)]
    if not parts:
        return f"the model has no layer of lightning_overlap.nn.MoELayer, and is no model of transformers; use that layer, or {advice}"
    kinds = ", ".join(f"{type(part).__name__} ({part.config.model_type})" for part in parts)
    return (
        f"{kinds} of transformers has no plan for experts (base_model_ep_plan), or none of its layers has experts. (Llama 4 has none "
        f"because its tokens are scaled before the experts, so there is nothing to dispatch.) {advice[0].upper()}{advice[1:]}"
    )


def _tied(model: nn.Module, layers: list[ExpertLayer]) -> Iterator[str]:
    """Problems: parameters of experts that another module has, too."""
    experts = {id(p): f"{x.name}.{key}" for x in layers for key, p in zip(x.parameters, x.spread_parameters, strict=True)}
    seen: set[int] = set()
    for module in model.modules():
        for parameter in parameters_of(module).values():
            if id(parameter) in experts and id(parameter) in seen:
                yield f"{experts[id(parameter)]} is shared with another module"
            seen.add(id(parameter))


def _joined(prefix: str, name: str) -> str:
    return f"{prefix}.{name}".strip(".")
