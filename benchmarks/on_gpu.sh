#!/usr/bin/env bash
# On a machine with a GPU, in eight minutes at most: every kernel checked, and timed beside torch and
# the time that its bytes take; the engine with CUDA graphs on a random Llama-8B under 1, 8 and 32
# adapters; the Triton tests where pytest is there. Prints tables, writes $OUT/gpu.json and logs.
#
#   benchmarks/on_gpu.sh [--dry-run]
#
#   PYTHON     default python3. It needs torch, triton, transformers, safetensors; no network
#   OUT        folder of the results, default benchmarks/results/gpu
#   --dry-run  the same path on a CPU with tiny sizes; its times mean nothing
set -uo pipefail
cd "$(dirname "$0")/.."
OUT="${OUT:-benchmarks/results/gpu}"
PYTHON="${PYTHON:-python3}"
mkdir -p "$OUT"
export PYTHONPATH="server:kernels:adapters_store:benchmarks${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1

status=0
timeout 330 "$PYTHON" -m quickchange_bench.gpu.gpu_run --out "$OUT" "$@" 2>&1 | tee "$OUT/gpu.txt" ||
  status=$?

case " $* " in *" --dry-run "*)
  echo "dry run: the Triton tests on a GPU are left out"
  exit "$status" ;;
esac
if "$PYTHON" -c 'import hypothesis, peft, pydantic_settings, pytest' 2>/dev/null; then
  timeout 140 "$PYTHON" -m pytest tests/triton_kernels 2>&1 | tee "$OUT/tests.txt" || status=$?
else
  echo "pytest or what the tests need is not there: the checks above stand alone" |
    tee "$OUT/tests.txt"
fi
exit "$status"
