#!/usr/bin/env bash
# On a machine with a GPU, in eight minutes at most, each part's result kept if a later one fails:
# every kernel against float64; a real start of a random Llama-8B in bfloat16, with what it takes;
# 1, 16 and 64 requests under 0, 1, 16 and 64 adapters, with tokens/s, host time, the device's idle
# gaps, late compilations and captures; prefill; drafts on and off; kernels beside torch. Prints all
# of it, writes $OUT/gpu.json and gpu.txt.
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
timeout 480 "$PYTHON" -m quickchange_bench.gpu.gpu_run --out "$OUT" "$@" 2>&1 | tee "$OUT/gpu.txt"
