#!/usr/bin/env bash
# llama-server. A request picks adapters with "lora": [{"id": K, "scale": 1.0}]; ADAPTERS=0: none.
# LLAMACPP_TYPE: how the base's weights are stored, f32 (default), f16, q8_0 or
# q4_k_m.
. "$(dirname "$0")/common.sh"
need_model
GGUF="$PEERS_DIR/gguf"
lora=()
if [ "$ADAPTERS" -gt 0 ]; then
  files="$GGUF/lora-0.gguf"
  for ((k = 1; k < ADAPTERS; k++)); do files+=",$GGUF/lora-$k.gguf"; done
  lora=(--lora "$files" --lora-init-without-apply)
fi
exec "$PEERS_DIR/llama-build/bin/llama-server" -m "$GGUF/base-${LLAMACPP_TYPE:-f32}.gguf" --alias base \
  --host 127.0.0.1 --port "$PORT" --threads "$THREADS" --threads-batch "$THREADS" \
  --parallel "$SEQUENCES" --ctx-size "$((SEQUENCES * CONTEXT))" --cache-ram 0 --no-webui "${lora[@]}"
