"""Which parameters of a model are trained: they must stay the same from setup to the end of a fit."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.optim import Optimizer

from lightning_overlap.decision import ConfigError
from lightning_overlap.model.markers import has_late_gradient, is_counted_elsewhere, is_expert, stage_of
from lightning_overlap.modes.data.buckets import Kind
from lightning_overlap.modes.data.config import DataChoices
from lightning_overlap.ranks.group import Group


class TrainedParameters:
    """Sorts a model's parameters, and refuses parameters that are trained later and belong to no bucket.

    Args:
        choices: sharding; whether frozen parameters may be trained later.

    Attributes:
        sparse: names and parameters whose gradients stay sparse, for an optimizer that updates unsharded parameters.
    """

    def __init__(self, choices: DataChoices) -> None:
        self.sparse: list[tuple[str, nn.Parameter]] = []
        self._sharded = choices.is_sharded
        self._later = choices.later_parameters
        self._frozen: list[tuple[str, nn.Parameter]] = []
        self._known: set[int] = set()
        self._lengths: dict[Optimizer, list[int]] = {}

    def sort(self, model: nn.Module, group: Group, experts: Group | None, divisor: float) -> list[Kind]:
        """Returns the parameters that get buckets, by kind, in the order in which the kinds are reduced.

        Args:
            model: the user's.
            group: as in :class:`Kind`, of all parameters except those of experts that are spread over ranks.
            experts: as in :class:`Kind`, of these; None if there are none.
            divisor: as in :class:`Kind`. The same for experts: their gradients have the tokens of all ranks that sent any.
        """
        # Gradients that another mode completes after backward are sent last, no stage waits for another stage's backward, and the
        # global norm counts a shard completely or not at all.
        kinds: dict[tuple[bool, int, bool, bool, str, str], list[tuple[str, nn.Parameter]]] = {}
        sparse = {id(part.weight) for part in model.modules() if is_lookup(part) and part.sparse} if not self._sharded else set()
        for name, parameter in model.named_parameters():
            if id(parameter) in sparse and not has_late_gradient(parameter):
                self.sparse.append((name, parameter))
            elif parameter.requires_grad or self._later:
                late, elsewhere = has_late_gradient(parameter), is_counted_elsewhere(parameter)
                kind = late, -stage_of(parameter), is_expert(parameter), elsewhere, str(parameter.dtype), str(parameter.device)
                kinds.setdefault(kind, []).append((name, parameter))
            else:
                self._frozen.append((name, parameter))
        self._known = {id(p) for named in (self.sparse, *kinds.values()) for _, p in named}
        return [Kind(tuple(kinds[k]), experts if k[2] and experts else group, divisor) for k in sorted(kinds, key=lambda k: k[:3])]

    def set_optimizers(self, optimizers: Sequence[Optimizer]) -> None:
        """Remembers the optimizers' parameters.

        Raises:
            ConfigError: an optimizer has a parameter that the model did not have at setup.
        """
        parameters = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
        unknown = [p for p in parameters if p.requires_grad and not self._knows(p)]
        if unknown:
            raise ConfigError(
                f"{len(unknown)} parameters of the optimizer are not parameters of the module at setup. Create parameters in "
                "__init__ or configure_model, and give the optimizer only those of self.parameters()."
            )
        self._lengths = {optimizer: _lengths(optimizer) for optimizer in optimizers}

    def refuse_changes(self) -> None:
        """Checks that no parameter has been added or unfrozen.

        Raises:
            ConfigError: with its name, or with what was added to ``param_groups``.
        """
        unfrozen = [name for name, parameter in self._frozen if parameter.requires_grad]
        if unfrozen:
            raise ConfigError(
                f"{unfrozen[0]} ({len(unfrozen)} in all) was frozen at setup and is trained now, but has no bucket. Freeze and "
                "unfreeze between fits, or leave it trainable and set the learning rate of its group to 0 until then."
            )
        if not self._sharded and all(self._knows(p) for o in self._lengths for group in o.param_groups for p in group["params"]):
            return
        if any(_lengths(optimizer) != lengths for optimizer, lengths in self._lengths.items()):
            raise ConfigError(
                "param_groups changed after setup. The sharded optimizer has no state for added parameters. "
                "Pass all parameters to the optimizer in configure_optimizers."
            )

    def _knows(self, parameter: nn.Parameter) -> bool:
        return id(parameter) in self._known


def is_lookup(part: nn.Module) -> bool:
    """Whether a module looks rows of its weight up."""
    return isinstance(part, nn.Embedding | nn.EmbeddingBag)


def _lengths(optimizer: Optimizer) -> list[int]:
    return [len(group["params"]) for group in optimizer.param_groups]
