#!/usr/bin/env bash
# The main job: train with two processes, resume, and load the checkpoint in plain Lightning.
set -euo pipefail
cd "$(dirname "$0")/.."
. examples/environment.sh
export OMP_NUM_THREADS=1
run() { .venv/bin/lightning-overlap fit -c configs/base.yaml -c configs/dp.yaml "$@"; }
run
echo "-- resumes from the checkpoint"
run --ckpt_path runs/last.ckpt --trainer.max_steps 130 --trainer.limit_val_batches 0 --trainer.logger.init_args.save_dir runs/resumed
echo "-- plain Lightning, one process, validates the checkpoint on the batches that the two processes shared"
.venv/bin/lightning-overlap validate -c configs/base.yaml --trainer.strategy auto --trainer.devices 1 \
    --trainer.limit_val_batches 20 --trainer.logger false --ckpt_path runs/last.ckpt
