"""How much communication is hidden in your own training: add one callback. Run: python -m examples.measure_overlap"""

from lightning.pytorch import Trainer, seed_everything

from examples.train_gpt import GPTModule, StandardLibraryText
from lightning_overlap import OverlapProfiler, OverlapStrategy


def main() -> None:
    seed_everything(1)
    profiler = OverlapProfiler(every_n_steps=5, warmup=5, prog_bar=True, report="runs/report.html", trace="runs/trace.json")
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        max_steps=40,
        limit_val_batches=0,
        log_every_n_steps=10,
        strategy=OverlapStrategy(),
        callbacks=[profiler],
        default_root_dir="runs",
    )
    trainer.fit(GPTModule(), datamodule=StandardLibraryText())
    if trainer.is_global_zero:
        hidden = profiler.summary.mean("data").hidden_percent
        print(f"{hidden:.0f}% hidden; runs/report.html opens in a browser, runs/trace.json in https://ui.perfetto.dev")


if __name__ == "__main__":
    main()
