#!/usr/bin/env bash
# vLLM on the CPU. ADAPTERS=0 starts it without LoRA. CORES: which cores it binds to.
. "$(dirname "$0")/common.sh"
need_model
export VLLM_CPU_KVCACHE_SPACE="${KV_GIB:-1}" VLLM_CPU_NUM_OF_RESERVED_CPU=0
export VLLM_CPU_OMP_THREADS_BIND="${CORES:-0-$((THREADS - 1))}"
export VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1 VLLM_HOST_IP=127.0.0.1
export VLLM_CACHE_ROOT="$PEERS_DIR/vllm-cache"
export TORCHINDUCTOR_CACHE_DIR="$PEERS_DIR/vllm-cache/inductor"

lora=()
if [ "$ADAPTERS" -gt 0 ]; then
  lora=(--enable-lora --max-loras "$ADAPTERS" --max-lora-rank "${MAX_RANK:-16}" --lora-modules)
  for ((k = 0; k < ADAPTERS; k++)); do lora+=("lora-$k=$ADAPTERS_DIR/lora-$k"); done
fi
exec "$PEERS_DIR/v-vllm/bin/vllm" serve "$BASE_MODEL" --served-model-name base \
  --host 127.0.0.1 --port "$PORT" --dtype float32 --max-model-len 2048 \
  --max-num-seqs "$SEQUENCES" --enforce-eager "${lora[@]}"
