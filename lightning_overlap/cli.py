"""The command ``lightning-overlap``: LightningCLI's subcommands, ``plan``, ``tune``, ``verify``, ``bench`` and ``consolidate``."""

from __future__ import annotations

import os
import sys
from functools import partial
from importlib.metadata import version
from json import dumps
from pathlib import Path
from typing import Any, Literal

from jsonargparse import auto_cli
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.strategies import StrategyRegistry

from lightning_overlap.bench.measure import measure, ranking, record_steps
from lightning_overlap.bench.measure import sweep as rank_values
from lightning_overlap.bench.on_paper import describe_times
from lightning_overlap.bench.runs import Runs
from lightning_overlap.bench.verify import verify
from lightning_overlap.cli_errors import Parser, nearest, shorten
from lightning_overlap.config import OverlapConfig
from lightning_overlap.decision import ConfigError
from lightning_overlap.plan import Plan, resolve
from lightning_overlap.profiling.report import import_plotly, write_figures
from lightning_overlap.ranks.announcements import TransferError
from lightning_overlap.state.checkpoint import CheckpointError
from lightning_overlap.state.consolidate import consolidate
from lightning_overlap.steps.simulate import draw
from lightning_overlap.strategy.seams import facts_of
from lightning_overlap.strategy.strategy import OverlapStrategy
from lightning_overlap.tune.layouts import SECONDS
from lightning_overlap.tune.machine import Machine, find_network, memory_of_a_rank
from lightning_overlap.tune.rehearsal import memory_table
from lightning_overlap.tune.rehearser import Rehearser
from lightning_overlap.tune.training import Training
from lightning_overlap.tune.tune import tune

FLAGS = ("--schedule", "--peers", "--memory")
"""Options of the commands that are on or off."""


class _Trainer(Trainer):
    """A Trainer with four more commands: plan, tune, bench and verify."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        name = kwargs.get("strategy")
        if isinstance(name, str) and name not in (known := ["auto", *StrategyRegistry.available_strategies()]):
            raise ConfigError(f"trainer.strategy: unknown name {name!r}{nearest(name, known)}")
        super().__init__(*args, **kwargs)
        self._given = kwargs

    def _overlap(self) -> OverlapStrategy:
        if not isinstance(self.strategy, OverlapStrategy):
            raise ConfigError(f"the trainer's strategy is {type(self.strategy).__name__}; set trainer.strategy: overlap")
        return self.strategy

    def plan(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        schedule: bool = False,
        times: str | None = None,
        memory: bool = False,
    ) -> None:
        """Prints the plan for the trainer's devices and nodes, without a run.

        Args:
            model: the module.
            datamodule: the data, for memory.
            schedule: also print and draw the schedule of microbatches. A file with the printed text can be configured as schedule.
            times: milliseconds of a microbatch's forward on a stage, its backward, and a transfer, such as 30,60,8: also print the
                time that the schedule takes.
            memory: also run some steps as one rank of each pipeline stage, and print the memory that the rank needs.
        """
        strategy = self._overlap()
        print(self._resolve(model, strategy.config).explain())
        for mode in strategy.config.modes:
            microbatches = mode.schedule(strategy.config.of(mode), None)
            if microbatches is not None and schedule:
                print(microbatches.text() + draw(microbatches))
            if microbatches is not None and times is not None:
                print(describe_times(microbatches, times))
        if memory:
            with Rehearser(model, datamodule, strategy, self._given) as rehearser:
                print(f"\n{memory_table(rehearser.rehearse(strategy.config, self.num_devices * self.num_nodes, steps=1))}")

    def _resolve(self, model: LightningModule, config: OverlapConfig) -> Plan:
        """Decides a configuration for the trainer's devices and nodes."""
        facts = facts_of(
            self,
            model,
            config,
            world_size=self.num_devices * self.num_nodes,
            device=self.strategy.root_device.type,
            backend=self._overlap().backend_name,
        )
        return resolve(config, facts)

    def tune(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        hosts: int | None = None,
        link: str | None = None,
        inside_link: str | None = None,
        memory: str | None = None,
        seconds: float = SECONDS,
        measure: int = 0,
        output: str = "best.yaml",
    ) -> None:
        """Finds the fastest layout: rehearses layouts on this machine, simulates their transfers, and prints the best ten.

        The batch of a step, of all ranks together, is the same under each layout. What the configuration sets to another value than
        its default stays as set.

        Args:
            model: the module.
            datamodule: the data.
            hosts: the number of hosts of a machine on which this command does not run. --devices and --num-nodes set it.
            link: a host's link to others, such as 300mbit,0.5ms; by default measured.
            inside_link: the link inside a host, of each rank; by default measured.
            memory: of a rank, such as 80GB; by default the device's.
            seconds: after which no more layouts are rehearsed.
            measure: how many of the best are also measured.
            output: file for the configuration of the best, which is read after the others: fit -c base.yaml -c best.yaml.
        """
        strategy = self._overlap()
        ranks = self.num_devices * self.num_nodes
        if hosts is not None and (hosts < 1 or ranks % hosts):
            raise ConfigError(f"--hosts {hosts} cannot hold {ranks} ranks, as many on each. Change --hosts or the number of ranks")
        if not (folder := Path(output).absolute().parent).is_dir():
            raise ConfigError(f"--output {output}: there is no folder {folder}. Make it first")
        per_host = self.num_devices if hosts is None else ranks // hosts
        machine = Machine(ranks, per_host, hosts is None, strategy.root_device, strategy.backend_name)
        bytes_of_rank = memory_of_a_rank(machine, memory)
        network = find_network(machine, link, inside_link, strategy, self._given)
        training = Training(model, datamodule, strategy, self._given)
        comparison = tune(training, strategy.config, partial(self._resolve, model), machine, network, bytes_of_rank,
                     seconds=seconds, measure=measure)  # fmt: skip
        if self.is_global_zero:
            print(comparison.table())
            Path(output).write_text(training.recipe(comparison.best, machine))
            print(f"the best is written to {output}: lightning-overlap fit ... -c {output}")

    def bench(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        steps: int = 10,
        warmup: int = 3,
        repeats: int = 3,
        peers: bool = False,
        sweep: str | None = None,
        json: str | None = None,
        report: str | None = None,
    ) -> None:
        """Measures the gain of overlap: overlapped, plain, compute alone, communication alone, and peers.

        Args:
            model: the module.
            datamodule: the data.
            steps: timed steps of a run.
            warmup: untimed steps before them.
            repeats: runs of each variant; medians are printed.
            peers: also measure other libraries that can train the module under the same parallelism.
            sweep: instead, compare values of one setting, such as data_parallel.bucket_size=100000,400000,auto.
            json: file for all figures.
            report: file for a page with the table, its bars, and a step with and without overlap.
        """
        if report is not None:
            import_plotly()  # fails now, not after hours of measurements
        if sweep is not None:
            runs = Runs(model, datamodule, self._overlap(), self._given)
            rows = rank_values(runs, sweep, steps=steps, warmup=warmup, repeats=repeats)
            if self.is_global_zero:
                print(ranking(rows))
            return
        measured = measure(
            model, datamodule, self._overlap(), self._given, steps=steps, warmup=warmup, repeats=repeats, with_peers=peers
        )
        drawn = {} if report is None else record_steps(Runs(model, datamodule, self._overlap(), self._given), warmup)
        if self.is_global_zero:
            print(measured.table())
            if json is not None:
                Path(json).write_text(dumps(measured.as_dict(), indent=1))
            if report is not None:
                medians = {row.name: row.median for row in measured.rows}
                write_figures(measured.table(), medians, measured.limit, drawn, measured.plan, Path(report))

    def verify(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        steps: int = 5,
        against: Literal["off", "single"] = "off",
    ) -> None:
        """Trains some steps with overlap on and off, and compares every number. The exit status is 1 if one differs.

        Args:
            model: the module.
            datamodule: the data.
            steps: number of training steps.
            against: "single" also compares with one process on the batches of all ranks.
        """
        verdicts = verify(model, datamodule, self._overlap(), self._given, steps=steps, against=against)
        if self.is_global_zero:
            print("\n".join(map(str, verdicts)))
        if not all(verdict.equal for verdict in verdicts):
            sys.exit(1)


class _CLI(LightningCLI):
    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        parser = super().init_parser(**kwargs)
        parser.add_argument("--version", action="version", version=f"lightning-overlap {version('lightning-overlap')}")
        return parser

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except ValueError as error:  # jsonargparse joins the error of a class with those of the types that the value could have had
            if isinstance(error, ConfigError) or "Does not validate against" not in str(error):
                raise
            raise ConfigError(shorten(str(error))) from error

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        arguments = {"model", "datamodule"}
        return {**LightningCLI.subcommands(), "plan": arguments, "tune": arguments, "bench": arguments, "verify": arguments}


def main() -> None:
    """Runs the command. ``plan`` and ``tune`` accept ``--devices`` and ``--num-nodes`` in place of the trainer's arguments."""
    # so that class paths such as examples.train_gpt.GPTModule are found in the current folder
    sys.path.insert(0, os.getcwd())
    sys.argv[1:] = _with_values(sys.argv[1:])
    if sys.argv[1:2] in (["plan"], ["tune"]):
        sys.argv[1:] = _ranks(sys.argv[1:], name_hosts=sys.argv[1] == "tune")
    try:
        if sys.argv[1:2] == ["consolidate"]:  # it needs no trainer
            auto_cli(consolidate, args=sys.argv[2:])
            return
        _CLI(trainer_class=_Trainer, subclass_mode_model=True, subclass_mode_data=True, parser_class=Parser,
             model_class=LightningModule, save_config_kwargs={"overwrite": True})  # fmt: skip
    except (ConfigError, CheckpointError, TransferError, MisconfigurationException) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")


def _with_values(arguments: list[str]) -> list[str]:
    """Gives the options of :data:`FLAGS` the value true, if none follows."""
    following = [*arguments[1:], "--"]
    pairs = zip(arguments, following, strict=True)
    return [w for word, after in pairs for w in ([word, "true"] if word in FLAGS and after.startswith("-") else [word])]


def _ranks(arguments: list[str], *, name_hosts: bool) -> list[str]:
    """Replaces ``--devices 8 --num-nodes 2`` by 16 nodes of one device, because a plan needs no machine with 8 devices.

    With ``name_hosts`` it adds ``--hosts 2``.
    """
    numbers, rest = {"--devices": 0, "--num-nodes": 0}, []
    words = iter(word for given in arguments for word in (given.split("=", 1) if given.startswith("--") else [given]))
    for word in words:
        if word not in numbers:
            rest.append(word)
            continue
        count = next(words, "nothing")
        if not count.isdecimal() or int(count) == 0:
            sys.exit(f"error: {word} needs a number of at least 1, got {count}")
        numbers[word] = int(count)
    devices, nodes = numbers.values()
    if nodes and not devices:
        sys.exit("error: --num-nodes needs --devices, the processes on each node")
    if not devices:
        return rest
    hosts = ["--hosts", str(nodes or 1)] if name_hosts else []
    return [*rest, "--trainer.devices", "1", "--trainer.num_nodes", str(devices * (nodes or 1)), *hosts]


if __name__ == "__main__":
    main()
