"""Random numbers of one rank alone, for what is cut: masks of dropout must differ between the ranks there, and nowhere else."""

from __future__ import annotations

import torch

_SEEDS = 1 << 62


class OwnNumbers:
    """Random numbers from :meth:`start` to :meth:`stop` are this rank's own.

    They follow from the numbers that all ranks have in common, of which one is drawn: an activation checkpoint that goes back to
    an earlier state of these gets the same ones again.

    Args:
        rank: tells this rank from the others.
        device: whose random numbers these are, besides the CPU's.
    """

    def __init__(self, rank: int, device: torch.device) -> None:
        self._rank = rank
        self._device = device if device.type == "cuda" else None
        self._common: tuple[torch.Tensor, torch.Tensor | None] | None = None

    def start(self) -> None:
        """To be called at the same places on all ranks. Nothing, if they are this rank's own already."""
        if self._common is not None:
            return
        seed = int(torch.randint(_SEEDS, (), device="cpu"))
        self._common = torch.get_rng_state(), None if self._device is None else torch.cuda.get_rng_state(self._device)
        torch.manual_seed((seed + self._rank) % _SEEDS)

    def stop(self) -> None:
        """Nothing, if they are the common ones already."""
        if self._common is not None:
            cpu, cuda = self._common
            self._common = None
            torch.set_rng_state(cpu)
            if cuda is not None and self._device is not None:
                torch.cuda.set_rng_state(cuda, self._device)
