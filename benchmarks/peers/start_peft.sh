#!/usr/bin/env bash
# PEFT's static batches: arguments go to peft_static.py. PEFT_PYTHON: another environment's Python.
. "$(dirname "$0")/common.sh"
need_model
export PYTHONPATH="$HERE/.." OMP_NUM_THREADS="$THREADS"
exec "${PEFT_PYTHON:-$PEERS_DIR/v-peft/bin/python}" "$HERE/peft_static.py" "$@"
