#!/usr/bin/env bash
# openvino-genai behind its HTTP front, without adapters, on the float16 weights that
# convert_llamacpp.sh makes (it reads no float32 ones). OPENVINO_PRECISION: what it computes in, f32
# (default) or bf16.
. "$(dirname "$0")/common.sh"
need_model
export OPENVINO_MODEL="$PEERS_DIR/gguf/base-f16.gguf" OPENVINO_PRECISION="${OPENVINO_PRECISION:-f32}"
exec "$PEERS_DIR/v-openvino/bin/python" "$HERE/openvino_front.py"
