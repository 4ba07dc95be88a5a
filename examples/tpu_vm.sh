#!/usr/bin/env bash
# Train on a Cloud TPU VM with one host, and copy the run to this machine.
#
#   PROJECT=my-project ZONE=europe-west4-b examples/tpu_vm.sh --config=small
#
# The arguments are those of chargpt_jax. The TPU is deleted at the end, also after an error; KEEP=1 keeps it, and then the
# same command resumes the run. v5litepod-8 has one host; larger slices have several, which one run cannot use yet.
set -euo pipefail
: "${PROJECT:?set PROJECT to your Google Cloud project}"
ZONE="${ZONE:-europe-west4-b}" TPU="${TPU:-chargpt}" TYPE="${TYPE:-v5litepod-8}" VERSION="${VERSION:-v2-alpha-tpuv5-lite}"
tpu() { gcloud compute tpus tpu-vm "$1" "${2:-$TPU}" --project="$PROJECT" --zone="$ZONE" "${@:3}"; }
on_tpu() { tpu ssh "$TPU" --command="$1"; }

cd "$(dirname "$0")/.."
tpu describe > /dev/null 2>&1 || tpu create "$TPU" --accelerator-type="$TYPE" --version="$VERSION"
[ "${KEEP:-0}" = 1 ] || trap 'tpu delete "$TPU" --quiet' EXIT

archive="$(mktemp -d)/chargpt.tar.gz"
git archive --format=tar.gz --output="$archive" HEAD
gcloud compute tpus tpu-vm scp "$archive" "$TPU": --project="$PROJECT" --zone="$ZONE"
on_tpu 'mkdir -p chargpt && tar -xzf chargpt.tar.gz -C chargpt && python3 -m venv venv && venv/bin/pip install -q -e "chargpt[tpu]"'
on_tpu "cd chargpt && ../venv/bin/python -m chargpt_jax.main $(printf '%q ' "$@") --workdir=../runs/tpu"
mkdir -p runs
gcloud compute tpus tpu-vm scp --recurse "$TPU":runs/tpu runs/tpu --project="$PROJECT" --zone="$ZONE"
echo "open runs/tpu/report.html"
