"""Predicts the steps of some layouts as ``tune`` does, measures them as ``bench`` does, and prints both, for docs/results.md.

Run it on each host, with torchrun's environment variables, first to rehearse, then as often as runs are wanted, on each link:

    python -m tests.tune.compare rehearse FOLDER LAYOUTS -c configs/base.yaml -c configs/gpt15m.yaml --trainer.num_nodes 2 ...
    python -m tests.tune.compare measure FOLDER LAYOUTS LINK -c configs/base.yaml -c configs/gpt15m.yaml --trainer.num_nodes 2 ...
    python -m tests.tune.compare table FOLDER

With MALLOC_TRIM_THRESHOLD_=0 and MALLOC_MMAP_THRESHOLD_=65536 freed memory goes back to the system, so peaks are those of tensors.
LAYOUTS is a YAML list of arguments of ``OverlapStrategy``, each a layout; the word ``ddp`` is Lightning's DDP. LINK names the link.
"""

from __future__ import annotations

import gc
import pickle
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.strategies import DDPStrategy

from lightning_overlap import OverlapConfig, OverlapStrategy
from lightning_overlap.bench.measure import _Clock
from lightning_overlap.bench.runs import Runs
from lightning_overlap.cli import _CLI, _Trainer
from lightning_overlap.cli_errors import Parser
from lightning_overlap.messages import only_warnings
from lightning_overlap.ranks.world import all_gather_objects, rank
from lightning_overlap.tune.layouts import Layout, Space
from lightning_overlap.tune.machine import Machine, find_network
from lightning_overlap.tune.network import Network
from lightning_overlap.tune.rehearsal import Rehearsal
from lightning_overlap.tune.simulate import simulate
from lightning_overlap.tune.training import Training

STEPS, WARMUP = 3, 2
DDP = "ddp"
Waits = dict[str, float]
Figures = tuple[float, Waits, int]
"""Seconds of a step and of this rank's waits, and the bytes of the rank that holds most at the peak of a step."""


class ResidentPeak(Callback):
    """By how much a fit's third step makes this process larger at its peak than it was before the fit, in bytes. On Linux."""

    def __init__(self) -> None:
        gc.collect()
        self._before, self.bytes = _in_status("VmRSS"), 0

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 2:
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 3:
            self.bytes = _in_status("VmHWM") - self._before


def _in_status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


class Comparison:
    """What is to be compared: a training, and its layouts by name."""

    def __init__(self, arguments: list[str], listed: Path) -> None:
        classes = {"trainer_class": _Trainer, "model_class": LightningModule, "parser_class": Parser}
        modes = {"subclass_mode_model": True, "subclass_mode_data": True}
        command: Any = _CLI(**classes, **modes, save_config_callback=None, run=False, args=arguments)  # type: ignore[arg-type]
        trainer, self.given = command.trainer, command.trainer._given
        self.model, self.data, self.strategy = command.model, command.datamodule, trainer.strategy
        self.training = Training(self.model, self.data, self.strategy, self.given)
        self.machine = Machine(
            trainer.num_devices * trainer.num_nodes, trainer.num_devices, True, self.strategy.root_device, self.strategy.backend_name
        )
        resolve = partial(trainer._resolve, self.model)
        batch = self.training.batch(resolve(self.strategy.config).degrees.data)
        space = Space(self.strategy.config, batch, self.machine.ranks_per_host, resolve)
        specifications = yaml.safe_load(listed.read_text())
        self.layouts: dict[str, Layout | None] = {}
        for each in specifications:
            layout = None if each == DDP else space.layout(_config(each))
            self.layouts[DDP if layout is None else layout.name] = layout

    def network(self) -> Network:
        """Measures the links. Collective over the world, which it connects."""
        return find_network(self.machine, None, None, self.strategy, self.given)

    def rehearse(self) -> dict[str, list[Rehearsal]]:
        rehearsals = {}
        for name, layout in self.layouts.items():
            if layout is not None:
                start = time.perf_counter()
                rehearsals[name] = self.training.rehearse(layout, self.machine)
                if rank() == 0:
                    print(f"{name}: rehearsed in {time.perf_counter() - start:.1f} s", flush=True)
        self.training.close()
        return rehearsals

    def measure(self) -> dict[str, Figures]:
        """Measures one run of each layout, by name. Collective over the world."""
        figures: dict[str, Figures] = {}
        for name, layout in self.layouts.items():
            runs = Runs(self.model, self.data, self.strategy, self.given) if layout is None else self.training.runs(layout)
            strategy = DDPStrategy(process_group_backend=self.strategy.process_group_backend) if layout is None else runs.ours()
            clock, peak = _Clock(WARMUP, STEPS), ResidentPeak()
            with only_warnings():
                runs.fit(strategy, WARMUP + STEPS + 1, [clock, peak])
            figures[name] = clock.seconds, clock.waits, max(all_gather_objects(peak.bytes))
            if rank() == 0:
                print(f"{name}: {clock.seconds * 1e3:.0f} ms, {figures[name][2] / 1e6:.0f} MB", flush=True)
        return figures


def _config(arguments: dict[str, Any]) -> OverlapConfig:
    """Returns the configuration of a layout in the list: a size, or a table of settings, for each mode that it names."""
    default = OverlapConfig()
    tables = {name: type(getattr(default, name))(**value) for name, value in arguments.items() if isinstance(value, dict)}
    return OverlapStrategy(**{**arguments, **tables}).config


def table(folder: Path) -> str:
    """Formats the predictions, by the present simulation, beside the medians of the measured runs, in Markdown."""
    rehearsals: dict[str, list[Rehearsal]] = pickle.loads((folder / "rehearsals").read_bytes())
    runs: dict[str, list[tuple[Network, dict[str, Figures]]]] = defaultdict(list)
    for file in sorted(folder.glob("run-*")):
        runs[file.name.split("-")[1]].append(pickle.loads(file.read_bytes()))
    head = ["link", "layout", "predicted", "measured", "error", "spread", "order", "busy"]
    head += ["waits predicted", "waits measured", "MB predicted", "MB measured"]
    rows: list[Sequence[str]] = []
    for name_of_link, of_link in runs.items():
        network = of_link[0][0]
        measured = {name: [run[name] for _, run in of_link if name in run] for name in of_link[0][1]}
        medians = {name: statistics.median(seconds for seconds, *_ in figures) for name, figures in measured.items()}
        predictions = {name: simulate(rehearsals[name], network) for name in medians if name in rehearsals}
        order = {name: i for i, name in enumerate(sorted(predictions, key=lambda name: medians[name]), 1)}
        for name in [*sorted(predictions, key=lambda name: predictions[name].seconds), *(set(medians) - set(predictions))]:
            times = [seconds for seconds, *_ in measured[name]]
            held = f"{statistics.median(size for *_, size in measured[name]) / 1e6:.0f}"
            spread = f"{(max(times) - min(times)) / medians[name]:.0%}"
            if name not in predictions:
                rows.append((name_of_link, name, "", f"{medians[name] * 1e3:.0f}", "", spread, "", "", "", "", "", held))
                continue
            foreseen = predictions[name]
            busy = sum(rehearsal.seconds for rehearsal in rehearsals[name]) / len(rehearsals[name])
            waited = {kind: statistics.median(waits.get(kind, 0.0) for _, waits, _ in measured[name]) for kind in measured[name][0][1]}
            rows.append(
                (
                    name_of_link, name, f"{foreseen.seconds * 1e3:.0f}", f"{medians[name] * 1e3:.0f}",
                    f"{foreseen.seconds / medians[name] - 1:+.0%}", spread, str(order[name]), f"{busy * 1e3:.0f}",
                    _words({**foreseen.exposed, "late": foreseen.late}), _words(waited),
                    f"{max(rehearsal.memory.peak for rehearsal in rehearsals[name]) / 1e6:.0f}", held,
                )
            )  # fmt: skip
        rows.append((str(network.inter_host or network.intra_host), *[""] * (len(head) - 1)))
    ruled = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in ruled)


def _words(waits: Waits) -> str:
    return ", ".join(f"{kind} {seconds * 1e3:.0f}" for kind, seconds in waits.items() if seconds >= 0.001)


def main() -> None:
    verb, folder, *rest = sys.argv[1], Path(sys.argv[2]), *sys.argv[3:]
    if verb == "table":
        print(table(folder))
        return
    comparison = Comparison(rest[2 if verb == "measure" else 1 :], Path(rest[0]))
    network = comparison.network()
    if verb == "rehearse":
        content: Any = comparison.rehearse()
        if rank() == 0 and (folder / "rehearsals").exists():
            content = {**pickle.loads((folder / "rehearsals").read_bytes()), **content}
        file = folder / "rehearsals"
    else:
        content, file = (network, comparison.measure()), folder / f"run-{rest[1]}-{time.time():.0f}"
    if rank() == 0:
        folder.mkdir(exist_ok=True)
        file.write_bytes(pickle.dumps(content))


if __name__ == "__main__":
    main()
