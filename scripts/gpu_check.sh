#!/usr/bin/env bash
# Check and measure the project on a GPU machine: are the numbers right, and where does the time go? Takes six minutes.
#
#   bash scripts/gpu_check.sh OUT [PIECE ...]     all pieces, or: parity train_step edit breakdown klein
#   bash scripts/gpu_check.sh OUT train_step:compile --limit 540     some variants, and the peer
#   DEVICE=cpu bash scripts/gpu_check.sh OUT      everything on a CPU, at toy size
#   bash scripts/gpu_check.sh --wheels            how to collect packages for a machine without a network
#   WHEELS=FOLDER bash scripts/gpu_check.sh OUT   install the packages in that folder, for this run only
#
# The results are in OUT/gpu_check.json, also if it is interrupted. The printed text is in OUT/gpu_check.log.
# $PYTHON is the interpreter (default: python3), which needs torch and transformers. $COMMIT is the commit, if there is no
# git.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
paths=$root/scripts:$root
if [ -n "${WHEELS:-}" ]; then
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --target "$site" "$WHEELS"/*.whl
  paths=$site:$paths
fi
PYTHONPATH=$paths${PYTHONPATH:+:$PYTHONPATH} "$python" -m measurements.gpu_check "$@"
