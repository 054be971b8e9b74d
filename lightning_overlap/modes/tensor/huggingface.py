"""Roles of the layers of Hugging Face's models: by the plan that a model has (``base_model_tp_plan``), or by ours."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from lightning_overlap.decision import ConfigError
from lightning_overlap.model.blocks import names_matching

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
"""Hugging Face's style -> our role. Empty: the layer is not sharded. (Nor are experts, whose weights belong to no layer.)"""
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
    "gpt_oss": {**_PROJECTIONS, "self_attn.o_proj": "row", "self_attn.sinks": "per_head"},
    "opt": {**_PROJECTIONS, "self_attn.out_proj": "row", "fc1": "column", "fc2": "row"},
    "bert": _BERT,
    "roberta": _BERT,
    "vit": {**_PROJECTIONS, "attention.o_proj": "row", "mlp.fc1": "column", "mlp.fc2": "row"},
}
"""By ``model_type``, plans for Hugging Face models that have none of their own."""


def roles_of_model(prefix: str, model: Any) -> Iterator[tuple[str, str]]:
    """Yields patterns and roles of a model of Hugging Face, by its own plan or ours.

    Args:
        prefix: name of the model in the user's module.
        model: of the library transformers.

    Raises:
        ConfigError: there is no plan, or it has a style that is not known.
    """
    styles: dict[str, str] = {name: style for name, style in (model.tp_plan or {}).items() if "*" in name}
    kind = model.config.model_type
    if not styles and kind not in PLANS:
        raise ConfigError(
            f"{type(model).__name__} ({kind}) has no plan for tensor_parallel: give OverlapStrategy(parallel_plan=...) the roles of "
            "its layers: 'column' for the first layers of attention (q, k, v) and mlp, 'row' for their last ones"
        )
    for name, style in styles.items():
        if style not in STYLES:
            raise ConfigError(
                f"{type(model).__name__}'s plan has the style {style!r} for {name}, which this version does not support. It supports "
                f"{', '.join(STYLES)}. Give OverlapStrategy(parallel_plan=...) roles for all layers"
            )
        pattern = f"{prefix}.{name}".lstrip(".")
        if STYLES[style] and names_matching(model, name):  # a model with experts only may have no dense layers
            yield pattern, STYLES[style]
    if not styles:
        yield from PLANS[kind].items()
    for role, kinds, module in (
        ("vocab_embedding", nn.Embedding, model.get_input_embeddings()),
        ("vocab_head", nn.Linear, model.get_output_embeddings()),
    ):
        if isinstance(module, kinds):
            yield from ((f"{prefix}.{name}".lstrip("."), role) for name, other in model.named_modules() if other is module)
