#!/usr/bin/env bash
# Plan the 7B stages on machines of 1 to 32 chips, as in benchmarks/plans.
#
#   bash launch/local.sh --plan bash benchmarks/plans.sh DIR          all plans, into the folder DIR
#   bash launch/local.sh --plan bash benchmarks/plans.sh DIR v5e      the plans whose file name contains "v5e"
#
# Needs no GPU, TPU or data. On two idle cores, a plan takes about ten minutes for TPUs and two for GPUs.
set -euo pipefail
if [[ $# -eq 0 || "$1" == -h || "$1" == --help ]]; then
  sed -n '2,7s/^# \{0,1\}//p' "$0"
  exit 0
fi
root=$(cd "$(dirname "$0")/.." && pwd)
folder=$1
filter=${2:-}
mkdir -p "$folder"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"

plan() { # name config machine [arguments]
  local name="${1}_${3//:/_}"
  [[ "$name" == *"$filter"* ]] || return 0
  python -m dynfocus_jax.plan --config "$root/configs/$2" --machine "$3" \
    --output "$folder/$name.json" "${@:4}" 2>"$folder/$name.log" |
    tee "$folder/$name.txt"
  rm "$folder/$name.log" # kept if the plan fails
}

plan align_7b align_7b.py a100-80gb:8 --steps=train
plan instruct_7b instruct_7b.py a100-80gb:8
plan instruct_7b_lora instruct_7b.py:train=lora a100-80gb:8 --steps=train
plan instruct_7b instruct_7b.py v5p:2x2x4
plan instruct_7b instruct_7b.py v5e:4x8
# One GPU, with batches that fit its memory.
plan align_7b align_7b.py h200:1 --steps=train --config.stages[0].batch_size=32
plan instruct_7b_lora instruct_7b.py:train=lora h200:1 --steps=train --config.stages[0].batch_size=4
plan instruct_7b instruct_7b.py h200:1 --steps=train --config.stages[0].batch_size=4
