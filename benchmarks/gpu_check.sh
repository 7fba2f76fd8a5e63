#!/usr/bin/env bash
# Everything that only a GPU can tell, in one command and at most nine minutes on 16 cores:
#
#     benchmarks/gpu_check.sh [FOLDER]        # default: gpu_check
#
# Needs python3 with torch, transformers, triton, pybind11, cmake, ninja, pytest, pytest-xdist and
# matplotlib, nvcc, compute-sanitizer, and no network. Builds in place for this GPU. A stage that
# fails or runs past its limit does not stop the next; logs and rows are left in FOLDER, and
# the last lines tell how each stage ended. Ends with the number of stages that failed.
set -u
cd "$(dirname "$0")/.."
OUT=${1:-gpu_check}
mkdir -p "$OUT"
PY=${PYTHON:-python3}
JOBS=${JOBS:-$(nproc)}
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD KINETO_LOG_LEVEL=99
declare -a NAMES=() LIMITS=() PIDS=() STARTS=() SUMMARY=()
FAILED=0

# begin NAME SECONDS COMMAND...: starts a stage; `finish` waits for all that were begun.
begin() {
  local name=$1 limit=$2
  shift 2
  timeout --kill-after=5 "$limit" "$@" >"$OUT/$name.log" 2>&1 &
  NAMES+=("$name") LIMITS+=("$limit") PIDS+=($!) STARTS+=("$SECONDS")
}

finish() {
  local i code state
  for i in "${!PIDS[@]}"; do
    wait "${PIDS[$i]}"
    code=$?
    state=ok
    case $code in
      0) ;;
      124 | 137) state="past its limit of ${LIMITS[$i]} s" ;;
      *) state="failed ($code)" ;;
    esac
    [ "$code" = 0 ] || FAILED=$((FAILED + 1))
    echo "== ${NAMES[$i]}: $state, $((SECONDS - STARTS[i])) s"
    tail -n 12 "$OUT/${NAMES[$i]}.log"
    SUMMARY+=("$(printf '%-12s %s' "${NAMES[$i]}" "$state")")
  done
  NAMES=() LIMITS=() PIDS=() STARTS=()
}

stage() {
  begin "$@"
  finish
}

machine() {
  set -e
  nvidia-smi
  nvcc --version | tail -n 2
  "$PY" -c 'import torch, triton, transformers as t; print(torch.__version__, triton.__version__, t.__version__)'
  git rev-parse HEAD
}
export -f machine
export PY

PARITY="python_tests/ops/test_parity.py"
sanitized() {
  compute-sanitizer --tool "$1" --error-exitcode 9 --target-processes all "$PY" -m pytest -q -x \
    -p no:cacheprovider "$PARITY" -m quick -k "cuda and not cuda_sim and bfloat16 and not master" \
    --require-backend=cuda
}
export -f sanitized
export PARITY

stage machine 30 bash -c machine
stage build 150 "$PY" setup.py build_ext --inplace
begin tests 170 "$PY" -m pytest -q -n "$((JOBS / 2))" --require-backend=cuda,triton
for tool in memcheck racecheck synccheck; do
  begin "$tool" 170 bash -c "sanitized $tool"
done
finish
# Alone on the GPU from here on.
stage roofline 30 "$PY" -m benchmarks.roofline --device cuda --dtypes bfloat16,float16
stage bench 150 "$PY" -m benchmarks.run --device cuda --no-compile --seconds 0.15 --json "$OUT/cuda.jsonl"
stage forms 10 "$PY" -m benchmarks.forms "$OUT/cuda.jsonl"
cp pelt_kernels/ops/forms.jsonl "$OUT"
stage compile 60 "$PY" -m benchmarks.run --device cuda --op gated_adapter --seconds 0.1 \
  --cases T8192-D768-R64,T8192-D4096-R64 --json "$OUT/cuda-compile.jsonl"
stage steps 45 "$PY" -m benchmarks.train_step --device cuda --methods head,unipelt,adapter,lora \
  --json "$OUT/cuda-steps.jsonl"
stage host 30 "$PY" -m benchmarks.host_overhead --json "$OUT/cuda-host.jsonl"

echo "== summary after $SECONDS s"
printf '%s\n' "${SUMMARY[@]}"
exit "$FAILED"
