#!/usr/bin/env bash
# Run a command of the project on this machine, with everything it needs set up first.
#
#   bash launch/local.sh python -m dynfocus_jax.train --config configs/toy.py --workdir runs/toy
#   bash launch/local.sh --convert python -m dynfocus_jax.convert --config configs/align_7b.py --output DIR
#   bash launch/local.sh --plan python -m dynfocus_jax.plan --config configs/align_7b.py --machine v5p:2x2x4
#   bash launch/local.sh --test pytest -n 2
#
# Makes a virtual environment (.venv, or $DYNFOCUS_VENV) with Python 3.11 or newer ($PYTHON, default python3)
# and installs requirements.txt, with --convert also what reads published weights (PyTorch, gguf), with --plan
# what compiles for other machines (1 GB), with --test what the tests need; all only when they have changed.
# JAX on a GPU or TPU: install jax[cuda12], jax[cuda13] or jax[tpu] into that environment afterwards.
set -euo pipefail

needs=(-r requirements.txt)
set_up=package
case "${1:-}" in
  --convert | --plan | --test)
    set_up=${1#--}
    needs+=(-r "requirements-$set_up.txt")
    shift
    ;;
esac
if [[ $# -eq 0 || "$1" == -h || "$1" == --help ]]; then
  sed -n '2,12s/^# \{0,1\}//p' "$0"
  exit 0
fi

cd "$(dirname "$0")/.."
venv=${DYNFOCUS_VENV:-.venv}
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "error: $python is $("$python" -V 2>&1), but Python 3.11 or newer is needed; set PYTHON." >&2
  exit 2
}

stamp="$venv/installed-$set_up-$(cat requirements*.txt | sha256sum | cut -c1-16)"
if [[ ! -e "$stamp" ]]; then
  [[ -x "$venv/bin/python" ]] || "$python" -m venv "$venv"
  echo "installing what the $set_up needs into $venv" >&2
  install=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check)
  "${install[@]}" "${needs[@]}"
  [[ "$set_up" == package || "$set_up" == plan ]] || "${install[@]}" --no-deps -r requirements-nodeps.txt
  touch "$stamp"
fi

# Large pages for malloc: the CPU backend frees and takes large buffers all the time (1.4 times faster).
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}
bin=$(cd "$venv/bin" && pwd)
export PATH="$bin:$PATH"
exec "$@"
