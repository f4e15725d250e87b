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
# what compiles for other machines (1 GB), with --test all that the tests need; only when they have changed.
# JAX on a GPU or TPU: install jax[cuda12], jax[cuda13] or jax[tpu] into that environment afterwards.
set -euo pipefail

set_up=package
case "${1:-}" in
  --convert | --plan | --test)
    set_up=${1#--}
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

plan_site() { "$venv/plan/bin/python" -c 'import site; print(site.getsitepackages()[0])'; }

stamp="$venv/installed-$set_up-$(cat requirements*.txt | sha256sum | cut -c1-16)"
if [[ ! -e "$stamp" ]]; then
  [[ -x "$venv/bin/python" ]] || "$python" -m venv "$venv"
  echo "installing what the $set_up needs into $venv" >&2
  install=(-m pip install --quiet --disable-pip-version-check)
  case $set_up in
    package | plan) "$venv/bin/python" "${install[@]}" -r requirements.txt ;;
    *)
      "$venv/bin/python" "${install[@]}" -r requirements.txt -r "requirements-$set_up.txt"
      "$venv/bin/python" "${install[@]}" --no-deps -r requirements-nodeps.txt
      ;;
  esac
  if [[ $set_up == plan || $set_up == test ]]; then
    # In an environment of its own on top: with these plugins every JAX program talks of GPUs that are not there.
    "$python" -m venv "$venv/plan"
    "$venv/bin/python" -c 'import site; print(site.getsitepackages()[0])' >"$(plan_site)/below.pth"
    "$venv/plan/bin/python" "${install[@]}" -r requirements-plan.txt
  fi
  touch "$stamp"
fi

# Large pages for malloc: the CPU backend frees and takes large buffers all the time (1.4 times faster).
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}
bin=$(cd "$venv/bin" && pwd)
export PATH="$bin:$PATH"
case $set_up in
  plan) export PATH="${bin%/bin}/plan/bin:$PATH" ;;
  test) DYNFOCUS_PLAN_SITE=$(plan_site) && export DYNFOCUS_PLAN_SITE ;;
esac
exec "$@"
