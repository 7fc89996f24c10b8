#!/usr/bin/env bash
# The base model (float32, float16, Q8_0, Q4_K_M) and its adapters (float32) to GGUF, into $PEERS_DIR/gguf
# (made anew each time).
# CONVERT_PYTHON needs torch, transformers, safetensors and sentencepiece (default: install_peft's).
. "$(dirname "$0")/common.sh"
need_model
SOURCE="$PEERS_DIR/src/llama_cpp_python-0.3.36/vendor/llama.cpp"
PY="${CONVERT_PYTHON:-$PEERS_DIR/v-peft/bin/python}"
GGUF="$PEERS_DIR/gguf"
export PYTHONPATH="$SOURCE/gguf-py"
rm -rf "$GGUF.new"
mkdir -p "$GGUF.new"
for type in f32 f16 q8_0; do
  "$PY" "$SOURCE/convert_hf_to_gguf.py" "$BASE_MODEL" --outtype "$type" \
    --outfile "$GGUF.new/base-$type.gguf"
done
"$PEERS_DIR/llama-build/bin/llama-quantize" \
  "$GGUF.new/base-f32.gguf" "$GGUF.new/base-q4_k_m.gguf" Q4_K_M
for ((k = 0; k < ADAPTERS; k++)); do
  "$PY" "$SOURCE/convert_lora_to_gguf.py" "$ADAPTERS_DIR/lora-$k" --base "$BASE_MODEL" \
    --outtype f32 --outfile "$GGUF.new/lora-$k.gguf"
done
rm -rf "$GGUF"
mv "$GGUF.new" "$GGUF"
