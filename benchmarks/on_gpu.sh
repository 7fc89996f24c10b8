#!/usr/bin/env bash
# On a machine with an NVIDIA GPU: an environment, the tests that a GPU changes, and a load on our
# server with --device cuda. Results go to $OUT (default: benchmarks/results/gpu).
#
#   BASE_MODEL  folder of a base model; without it one with random weights is made, of $SHAPE
#               (smollm2-135m, llama-1b, llama-8b: see `quickchange bench make-base --help`)
#   PYTHON      Python 3.11 or later (default: python3). Where it has a CUDA build of torch and the
#               project's other dependencies, nothing is installed
set -euo pipefail
cd "$(dirname "$0")/.."
OUT="${OUT:-benchmarks/results/gpu}"
PYTHON="${PYTHON:-python3}"
SHAPE="${SHAPE:-llama-1b}"
mkdir -p "$OUT"
WORK="$(mktemp -d)"
trap 'rm -rf "$WORK"' EXIT
export PYTHONPATH="server:kernels:adapters_store:benchmarks${PYTHONPATH:+:$PYTHONPATH}"

needs="pytest, hypothesis, torch, transformers, peft, fastapi, uvicorn, httpx, typer, psutil, \
pydantic_settings, prometheus_client, multipart, matplotlib"
if ! "$PYTHON" -c "import $needs; torch.cuda.init()" 2>/dev/null; then
  [ -x .venv/bin/python ] || "$PYTHON" -m venv .venv
  PYTHON=".venv/bin/python"
  "$PYTHON" -m pip install --quiet -c constraints.txt -e '.[dev]'
fi
"$PYTHON" -c 'import torch; print(torch.__version__, torch.cuda.get_device_name())' |
  tee "$OUT/device.txt"

status=0
"$PYTHON" -m pytest tests/kernels tests/engine tests/reference 2>&1 | tee "$OUT/tests.txt" ||
  status=$?

if [ -z "${BASE_MODEL:-}" ]; then
  BASE_MODEL="$WORK/base"
  "$PYTHON" -m quickchange_bench make-base --out "$BASE_MODEL" --shape "$SHAPE" --dtype bfloat16
fi
export BASE_MODEL ADAPTERS_DIR="$WORK/adapters"
"$PYTHON" -m quickchange_bench make-adapters --model "$BASE_MODEL" --out "$ADAPTERS_DIR" --count 8
"$PYTHON" benchmarks/peers/compare.py --peers quickchange --device cuda --dtype bfloat16 \
  --concurrency 1,8,16,32 --out "$OUT/serving.json" --plot "$OUT/serving.png" |
  tee "$OUT/serving.txt" || status=$?
exit "$status"
