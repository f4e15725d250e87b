#!/usr/bin/env bash
# Writes the plans under benchmarks/plans: what the 7B stages need on machines of 8 to 32 chips.
#
#   pip install -r requirements-plan.txt
#   bash benchmarks/plans.sh
#
# Assumes an environment with requirements.txt on PATH; no GPU, TPU or data. A TPU's programs take about ten
# minutes each on two idle cores, a GPU's two.
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p benchmarks/plans

plan() { # config machine [arguments]
  local name
  name="$(basename "$1" .py)_${2//:/_}"
  PYTHONPATH=. python -m dynfocus_jax.plan --config "configs/$1" --machine "$2" \
    --output "benchmarks/plans/$name.json" "${@:3}" 2>"benchmarks/plans/$name.log" |
    tee "benchmarks/plans/$name.txt"
  rm "benchmarks/plans/$name.log" # kept where a plan fails
}

plan align_7b.py a100-80gb:8 --steps=train
plan instruct_7b.py a100-80gb:8
plan instruct_7b.py v5p:2x2x4
plan instruct_7b.py v5e:4x8
