#!/usr/bin/env bash
# Everything that is measured on a GPU, in one command, in slices: what OUT holds already is not measured again.
#
#     benchmarks/gpu.sh [OUT]        # default: gpu.json; exit code 3: call it again, 0: all is there
#
# Weights are random and made on the device, at the released sizes (PRESET=7b; tiny: a dry run). SECONDS_AT_ONCE (480)
# is how long one call may take. PYTHON: an interpreter with torch for the device (default: .venv's, else python3).
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
exec "$python" -m benchmarks.gpu --out "${1:-gpu.json}" --preset "${PRESET:-7b}" --seconds "${SECONDS_AT_ONCE:-480}"
