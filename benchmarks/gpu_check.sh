#!/usr/bin/env bash
# Everything that only a GPU can tell, in one command; benchmarks/gpu_check.py describes it.
#
#     benchmarks/gpu_check.sh [FOLDER] [--seconds 540] [--stages NAME,NAME]
#     DEVICE=cpu benchmarks/gpu_check.sh FOLDER     # the same stages without a GPU, to try them
#
# PYTHON, DEVICE and GPU_CHECK_SECONDS may stand in the environment.
set -eu
cd "$(dirname "$0")/.."
export PATH="$PATH:/usr/local/cuda/bin" PYTHONPATH="$PWD" PYTHONUNBUFFERED=1 KINETO_LOG_LEVEL=99
exec "${PYTHON:-python3}" -m benchmarks.gpu_check ${DEVICE:+--device "$DEVICE"} \
  ${GPU_CHECK_SECONDS:+--seconds "$GPU_CHECK_SECONDS"} "$@"
