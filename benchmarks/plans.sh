#!/usr/bin/env bash
# Writes the plans under benchmarks/plans: what the 7B stages need on machines of 1 to 32 chips.
#
#   bash launch/local.sh --plan bash benchmarks/plans.sh          all of them
#   bash launch/local.sh --plan bash benchmarks/plans.sh v5e      those whose file name holds "v5e"
#
# Needs no GPU, TPU or data. A TPU's programs take about ten minutes each on two idle cores, a GPU's two.
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p benchmarks/plans
chosen=${1:-}

plan() { # name config machine [arguments]
  local name="${1}_${3//:/_}"
  [[ "$name" == *"$chosen"* ]] || return 0
  PYTHONPATH=. python -m dynfocus_jax.plan --config "configs/$2" --machine "$3" \
    --output "benchmarks/plans/$name.json" "${@:4}" 2>"benchmarks/plans/$name.log" |
    tee "benchmarks/plans/$name.txt"
  rm "benchmarks/plans/$name.log" # kept where a plan fails
}

plan align_7b align_7b.py a100-80gb:8 --steps=train
plan instruct_7b instruct_7b.py a100-80gb:8
plan instruct_7b_lora instruct_7b.py:train=lora a100-80gb:8 --steps=train
plan instruct_7b instruct_7b.py v5p:2x2x4
plan instruct_7b instruct_7b.py v5e:4x8
# One GPU: batches that it holds.
plan align_7b align_7b.py h200:1 --steps=train --config.stages[0].batch_size=32
plan instruct_7b_lora instruct_7b.py:train=lora h200:1 --steps=train --config.stages[0].batch_size=4
plan instruct_7b instruct_7b.py h200:1 --steps=train --config.stages[0].batch_size=4
