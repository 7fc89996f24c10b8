#!/usr/bin/env bash
# mistral.rs behind its HTTP front. ADAPTERS=0 starts it without LoRA.
. "$(dirname "$0")/common.sh"
need_model
export RAYON_NUM_THREADS="$THREADS"
exec "$PEERS_DIR/v-mistralrs/bin/python" "$HERE/mistralrs_front.py"
