#!/usr/bin/env bash
# On each of two machines: bash examples/two_nodes.sh 0 HOST, and bash examples/two_nodes.sh 1 HOST, where HOST is the first machine's
# address. DEVICES processes run on each (by default 1), and further arguments are those of `lightning-overlap fit`.
set -euo pipefail
node=$1 host=$2 devices=${DEVICES:-1}
shift 2
torchrun --nnodes 2 --node-rank "$node" --nproc-per-node "$devices" --master-addr "$host" --master-port "${PORT:-29500}" \
    -m lightning_overlap.cli fit -c configs/base.yaml -c configs/dp.yaml --trainer.num_nodes 2 --trainer.devices "$devices" "$@"
