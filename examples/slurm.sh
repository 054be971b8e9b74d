#!/usr/bin/env bash
# Two machines with 8 devices each: sbatch examples/slurm.sh. Lightning reads SLURM's variables; a requeue signal saves first.
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gres=gpu:8
#SBATCH --signal=SIGUSR1@120
srun .venv/bin/lightning-overlap fit -c configs/base.yaml -c configs/dp.yaml \
    --trainer.accelerator gpu --trainer.devices 8 --trainer.num_nodes 2
