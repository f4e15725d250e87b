#!/usr/bin/env bash
# Train on all hosts of a Cloud TPU slice.
#
#   bash launch/tpu_vm.sh NAME ZONE --config configs/instruct_7b.py --workdir /mnt/shared/runs/instruct_7b \
#       --config.data.root=/mnt/shared/data --config.mesh.fsdp=16
#
# Run it on your own machine, in a terminal that stays open (tmux). It copies the committed state of this
# repository to every host of the TPU VM, installs the requirements there, starts the same training command on
# all hosts, and shows their output. Create the slice first, for example:
#
#   gcloud compute tpus tpu-vm create NAME --zone=ZONE --accelerator-type=v5p-32 --version=v2-alpha-tpuv5
#
# Assumes:
# - gcloud, logged in and with a project;
# - Python 3.11 or newer on the hosts ($TPU_PYTHON, default python3);
# - data and workdir on a file system that all hosts mount under the same path (Filestore, NFS).
# The hosts find each other with the TPU's metadata (config.distributed.mode=auto). Run the same command again to
# resume an interrupted run. If processes of it are still running on the hosts, end them first:
#
#   gcloud compute tpus tpu-vm ssh NAME --zone=ZONE --worker=all --command='pkill -f "[d]ynfocus_jax.train"'
set -euo pipefail

if [[ $# -lt 3 || "$1" == -* ]]; then
  sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//p;}' "$0"
  exit 2
fi
name=$1 zone=$2
shift 2
cd "$(dirname "$0")/.."

archive=$(mktemp --suffix=.tar.gz)
trap 'rm -f "$archive"' EXIT
git archive --format=tar.gz --output="$archive" HEAD
gcloud compute tpus tpu-vm scp "$archive" "$name:dynfocus_jax.tar.gz" --zone="$zone" --worker=all

# %q quotes the arguments for the shell on the hosts.
arguments=$(printf '%q ' "$@")
remote=$(
  cat <<EOF
set -eu
rm -rf dynfocus_jax && mkdir dynfocus_jax && tar -xzf dynfocus_jax.tar.gz -C dynfocus_jax && cd dynfocus_jax
export DYNFOCUS_VENV=\$HOME/dynfocus_venv PYTHON=${TPU_PYTHON:-python3}
bash launch/local.sh pip install --quiet 'jax[tpu]>=0.10,<0.12'
exec bash launch/local.sh python -m dynfocus_jax.train $arguments \
  --config.distributed.mode=auto --config.distributed.timeout=300
EOF
)
gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$remote"
