#!/usr/bin/env bash
# Install what a command of the project needs into a virtual environment, and run the command.
#
#   bash launch/local.sh python -m dynfocus_jax.train --config configs/toy.py --workdir runs/toy
#   bash launch/local.sh --convert python -m dynfocus_jax.convert --config configs/align_7b.py --output DIR
#   bash launch/local.sh --plan python -m dynfocus_jax.plan --config configs/align_7b.py --machine v5p:2x2x4
#   bash launch/local.sh --test pytest -n 2
#
# The environment is .venv ($DYNFOCUS_VENV) with Python 3.11 or newer ($PYTHON, default python3). The script
# installs requirements.txt; with --convert also the readers of published weights (PyTorch, gguf), with --plan
# the compilers for other machines (1 GB), with --test all packages of the tests. It does so again only when a
# requirements file changes. For GPUs or TPUs, install jax[cuda12], jax[cuda13] or jax[tpu] there afterwards.
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
  echo "error: $python is $("$python" -V 2>&1), expected Python 3.11 or newer. Set PYTHON to another one." >&2
  exit 2
}

plan_site() { "$venv/plan/bin/python" -c 'import site; print(site.getsitepackages()[0])'; }

stamp="$venv/installed-$set_up-$(cat requirements*.txt | sha256sum | cut -c1-16)"
if [[ ! -e "$stamp" ]]; then
  [[ -x "$venv/bin/python" ]] || "$python" -m venv "$venv"
  echo "installing the requirements ($set_up) into $venv" >&2
  install=(-m pip install --quiet --disable-pip-version-check)
  case $set_up in
    package | plan) "$venv/bin/python" "${install[@]}" -r requirements.txt ;;
    *)
      "$venv/bin/python" "${install[@]}" -r requirements.txt -r "requirements-$set_up.txt"
      "$venv/bin/python" "${install[@]}" --no-deps -r requirements-nodeps.txt
      ;;
  esac
  if [[ $set_up == plan || $set_up == test ]]; then
    # The compilers get an environment of their own on top of the first, because with these plugins every JAX
    # program would print messages about missing GPUs.
    "$python" -m venv "$venv/plan"
    "$venv/bin/python" -c 'import site; print(site.getsitepackages()[0])' >"$(plan_site)/below.pth"
    "$venv/plan/bin/python" "${install[@]}" -r requirements-plan.txt
  fi
  touch "$stamp"
fi

# Huge pages for malloc make the CPU backend 1.4 times faster, because it allocates and frees large buffers.
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}
bin=$(cd "$venv/bin" && pwd)
export PATH="$bin:$PATH"
case $set_up in
  plan) export PATH="${bin%/bin}/plan/bin:$PATH" ;;
  test) DYNFOCUS_PLAN_SITE=$(plan_site) && export DYNFOCUS_PLAN_SITE ;;
esac
exec "$@"
