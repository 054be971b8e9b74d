"""Balancing of experts in a fit: the numbers of one process, however tokens and layers are spread over ranks."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import transformers
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, DistributedSampler

from examples.train_moe import MoEBlock, MoEGPTModule
from lightning_overlap import (
    ContextParallel,
    DataParallel,
    ExpertParallel,
    OverlapProfiler,
    OverlapStrategy,
    PipelineParallel,
    TensorParallel,
)
from lightning_overlap.nn import MoELayer, TopKRouter, update_router_biases

VOCABULARY, TOKENS, BATCH, STEPS = 32, 8, 4, 3
QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


class Data(LightningModule):
    """Two batches a step, and a validation after each."""

    def train_dataloader(self) -> Any:
        samples = torch.randint(3, VOCABULARY, (2 * STEPS * BATCH, TOKENS + 1), generator=torch.Generator().manual_seed(2))
        share = self.trainer.distributed_sampler_kwargs or {"num_replicas": 1, "rank": 0}
        sampler = DistributedSampler(samples, shuffle=False, **share)  # type: ignore[arg-type]
        return DataLoader(samples, BATCH // share["num_replicas"], sampler=sampler)  # type: ignore[arg-type]

    val_dataloader = train_dataloader

    def validation_step(self, batch: Tensor, index: int) -> None:
        self.log("val_loss", self.loss(batch), sync_dist=True)

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        return self.loss(batch)

    def loss(self, batch: Tensor) -> Tensor:
        raise NotImplementedError

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.3, momentum=0.9)


class Own(Data, MoEGPTModule):
    """With all means of balancing, and activation checkpoints."""

    def __init__(self) -> None:
        MoEGPTModule.__init__(self, 2, 2, 16, TOKENS, VOCABULARY, n_experts=4)
        for block in self.model.blocks:
            block.__class__ = Checkpointed
            layer: MoELayer = block.mlp
            layer.aux_loss_coef, layer.z_loss_coef, layer.global_batch_balance = 0.5, 0.05, True
            layer.router.update_bias_rate, layer.router.e_score_correction_bias = 0.02, torch.zeros(4)

    loss, training_step, validation_step = MoEGPTModule.loss, Data.training_step, Data.validation_step
    configure_optimizers, log_dict = Data.configure_optimizers, MoEGPTModule.log_dict


class Checkpointed(MoEBlock):
    def forward(self, x: Tensor) -> Any:
        return checkpoint(super().forward, x, use_reentrant=False) if self.training else super().forward(x)


class OwnAlone(Own):
    """In one process, with the call of plain Lightning."""

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        update_router_biases(self, lambda counts: self.trainer.strategy.reduce(counts, reduce_op="sum"))


class Wavering(TopKRouter):
    """Rounds otherwise in the recompute of an activation checkpoint, which breaks ties."""

    def scores(self, logits: Tensor) -> Tensor:
        if torch._C._current_graph_task_id() != -1:  # inside a backward
            logits = logits + 1e-7 * torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
        return super().scores(logits)


class Tied(Own):
    """All scores are equal in the first step."""

    def __init__(self) -> None:
        super().__init__()
        for block in self.model.blocks:
            block.mlp.router.__class__ = Wavering
            nn.init.zeros_(block.mlp.router.weight)


class TiedAlone(OwnAlone):
    def __init__(self) -> None:
        super().__init__()
        for block in self.model.blocks:
            nn.init.zeros_(block.mlp.router.weight)


LLAMA = {
    **{"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 32},
    **{"intermediate_size": 16, "num_key_value_heads": 2, "head_dim": 4, "num_local_experts": 4, "num_experts_per_tok": 2},
}


class Mixtral(Data):
    """With the loss of all layers' routers, padding and activation checkpoints."""

    def __init__(self) -> None:
        super().__init__()
        config = transformers.MixtralConfig(**LLAMA, output_router_logits=True, router_aux_loss_coef=0.5)
        self.model = transformers.MixtralForCausalLM(config)
        self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def loss(self, batch: Tensor) -> Tensor:
        ids = batch[:, :-1]
        mask = (torch.arange(TOKENS) < TOKENS - batch[:, -1:] % 4).long()
        return self.model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss


DEEPSEEK = {
    **{**LLAMA, "num_key_value_heads": 4, "first_k_dense_replace": 1, "n_routed_experts": 4, "n_shared_experts": 1},
    **{"n_group": 2, "topk_group": 1, "moe_intermediate_size": 16, "q_lora_rank": None, "kv_lora_rank": 8},
    **{"qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4},
}
RATE = 0.02


class DeepSeek(Data):
    """With biases that the strategy moves, and activation checkpoints."""

    def __init__(self) -> None:
        super().__init__()
        self.model = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**DEEPSEEK))
        self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def loss(self, batch: Tensor) -> Tensor:
        return self.model(input_ids=batch[:, :-1], labels=batch[:, :-1]).loss


class DeepSeekAlone(DeepSeek):
    """Counts by hand, and without activation checkpoints."""

    def __init__(self) -> None:
        super().__init__()
        self.model.gradient_checkpointing_disable()
        self.routers = [module for module in self.modules() if hasattr(module, "e_score_correction_bias")]
        self.counts = [torch.zeros(4) for _ in self.routers]
        for number, router in enumerate(self.routers):
            router.register_forward_hook(partial(self.count, number))

    def count(self, number: int, router: Any, args: Any, output: Any) -> None:
        if router.training:
            self.counts[number] += torch.bincount(output[2].flatten(), minlength=4)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        for router, counts in zip(self.routers, self.counts, strict=True):
            router.e_score_correction_bias += RATE * (counts.mean() - counts).sign()
            counts.zero_()


class Writing(DeepSeek):
    """Writes a text after each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.logits: list[Tensor] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.eval()
        start = torch.arange(3, 3 + TOKENS).view(1, -1)
        options = {"max_new_tokens": 2, "min_new_tokens": 2, "do_sample": False, "output_logits": True}
        self.logits.append(torch.stack(self.model.generate(start, return_dict_in_generate=True, **options).logits))
        self.train()

    def on_train_end(self) -> None:
        self.register_buffer("written", torch.stack(self.logits))


class WritingAlone(DeepSeekAlone, Writing):
    """The same in one process."""


MODULES: dict[str, tuple[Callable[[], Data], Callable[[], Data]]] = {
    "own": (OwnAlone, Own),
    "tied": (TiedAlone, Tied),
    "mixtral": (Mixtral, Mixtral),
    "deepseek": (DeepSeekAlone, DeepSeek),
    "writing": (WritingAlone, Writing),
}
"""By kind, the module for one process and for ranks."""


def train(kind: str, layout: dict[str, Any] | None, accumulated: int = 2) -> Any:
    warnings.simplefilter("ignore")
    seed_everything(5, verbose=False)
    module = MODULES[kind][layout is not None]()
    strategy: Any = SingleDeviceStrategy(torch.device("cpu"))
    if layout is not None:
        env = {"cluster_environment": TorchElasticEnvironment(), "process_group_backend": "gloo"}
        strategy = OverlapStrategy(**layout, **env)
    trainer = Trainer(
        accelerator="cpu",
        devices=1 if layout is None else torch.distributed.get_world_size(),
        strategy=strategy,
        max_epochs=1,
        accumulate_grad_batches=accumulated,
        val_check_interval=2,
        use_distributed_sampler=False,
        log_every_n_steps=1,
        callbacks=[OverlapProfiler(every_n_steps=1, warmup=0)] if layout is not None else [],
        **QUIET,
    )
    trainer.fit(module)
    state = {name: value.detach().clone() for name, value in module.state_dict().items()}
    plan = strategy.plan.explain() if layout is not None else ""
    return state, {name: float(value) for name, value in trainer.callback_metrics.items()}, plan


SMALL = DataParallel(bucket_size=500)  # the optimizer updates buckets in backward, while others are not complete
SHARED: dict[str, dict[str, Any]] = {
    "data": {"data_parallel": SMALL},
    "experts": {"data_parallel": SMALL, "expert_parallel": ExpertParallel(size=2, log_expert_load=True)},
}
APART = {
    "tensor": {"tensor_parallel": TensorParallel(size=2, vocab_parallel=False)},
    "whole tokens": {"tensor_parallel": TensorParallel(size=2, vocab_parallel=False, sequence_parallel=False)},
    "context": {"context_parallel": ContextParallel(size=2)},
    "experts of context ranks": {"context_parallel": ContextParallel(size=2), "expert_parallel": ExpertParallel(size=2)},
    "pipeline": {
        "pipeline_parallel": PipelineParallel(size=2, microbatches=1),
        "expert_parallel": ExpertParallel(log_expert_load=True),
    },
}
CROSSED: dict[str, dict[str, Any]] = {
    "context x pipeline": {"context_parallel": 2, "pipeline_parallel": PipelineParallel(size=2, microbatches=1)},
    "tensor x pipeline": {**APART["tensor"], "pipeline_parallel": PipelineParallel(size=2, microbatches=1)},
}
MOVED = {
    "data": {"expert_parallel": ExpertParallel(update_bias_rate=RATE)},
    "experts": {"expert_parallel": ExpertParallel(size=2, update_bias_rate=RATE)},
    "pipeline": {
        "pipeline_parallel": PipelineParallel(size=2, microbatches=1),
        "expert_parallel": ExpertParallel(update_bias_rate=RATE),
    },
}


@pytest.mark.parametrize(("layout", "accumulated"), [*((layout, 2) for layout in [*SHARED, *APART]), ("experts", 1)])
def test_own_layers_balance_as_in_one_process(world: Any, layout: str, accumulated: int) -> None:
    """Megatron-LM 5047 and 5798, AutoModel 3359 (losses), torchtitan 4148 and 1593, AutoModel 3247 (biases)."""
    expected, metrics, _ = train("own", None, accumulated)
    biases = [value for name, value in expected.items() if name.endswith("e_score_correction_bias")]
    steps = 2 * STEPS // accumulated
    moves = torch.stack(biases) / 0.02
    torch.testing.assert_close(moves, moves.round(), rtol=0.0, atol=1e-3)
    assert moves.any()
    assert moves.abs().max() < steps + 0.5, "they move once a step"
    results = world(2).run(train, "own", {**SHARED, **APART}[layout], accumulated)
    for state, found, plan in results:
        assert "balance" in plan
        assert found["val_loss"] == pytest.approx(metrics["val_loss"], rel=1e-5)
        for name, value in expected.items():
            torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")

    ranks = {"experts": 2, "pipeline": 1}.get(layout)
    for block in range(2 if ranks else 0):  # in the pipeline, of both stages
        loads = {name.rpartition("/")[2]: value for name, value in results[0][1].items() if f"blocks.{block}.mlp.router/" in name}
        for kind, count in (("expert", 4), ("rank", ranks)):
            each = [loads[f"tokens_of_{kind}_{number}"] for number in range(count)]
            assert sum(each) == accumulated * BATCH * TOKENS * 2, "two experts a token"
            assert loads[f"{kind}s_max_over_mean"] == pytest.approx(max(each) * count / sum(each))


def test_a_recompute_sends_tokens_to_the_same_ranks(world: Any) -> None:
    """AutoModel 3325 and 3140, torchtitan 3336: near-ties flip in a recompute, and rows of another shape would be sent."""
    expected, _, _ = train("tied", None)
    for state, _, _ in world(2).run(train, "tied", SHARED["experts"]):
        for name, value in expected.items():
            torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("layout", ["context", "tensor", "pipeline", "experts of context ranks", *CROSSED])
def test_hugging_faces_balancing_loss_is_that_of_one_process(world: Any, layout: str) -> None:
    """Megatron-LM 5047 and 5798, AutoModel 3359: with padding, accumulation and activation checkpoints."""
    expected, metrics, _ = train("mixtral", None)
    size, strategy = (2, APART[layout]) if layout in APART else (4, CROSSED[layout])
    for state, found, _ in world(size).run(train, "mixtral", strategy):
        assert found["val_loss"] == pytest.approx(metrics["val_loss"], rel=1e-5)
        for name, value in expected.items():
            torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("layout", MOVED)
def test_hugging_faces_biases_move_once_a_step(world: Any, layout: str) -> None:
    """torchtitan 1304, 4148 and 1593, AutoModel 3247: accumulation, validation and activation checkpoints do not count."""
    expected, metrics, _ = train("deepseek", None)
    assert sum(name.endswith("e_score_correction_bias") and bool(value.any()) for name, value in expected.items()) == 2
    for state, found, plan in world(2).run(train, "deepseek", MOVED[layout]):
        assert "routers' biases move once an optimizer" in plan
        assert found["val_loss"] == pytest.approx(metrics["val_loss"], rel=1e-5)
        for name, value in expected.items():
            torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_a_text_is_written_with_biases_that_have_moved(world: Any) -> None:
    """Their sums over the ranks travel until the next forward, and that of a text may be the next one."""
    expected, _, _ = train("writing", None)
    assert expected["written"].unique(dim=0).shape[0] == STEPS + 1, "each optimizer step changes what is written"
    for state, _, _ in world(2).run(train, "writing", MOVED["experts"]):
        torch.testing.assert_close(state["written"], expected["written"], rtol=1e-4, atol=1e-4)
