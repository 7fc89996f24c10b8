#!/usr/bin/env bash
# openvino-genai: the wheel is a library, openvino_front.py puts HTTP before it.
. "$(dirname "$0")/common.sh"
make_venv v-openvino
"$PEERS_DIR/v-openvino/bin/python" -m pip install --quiet openvino-genai==2026.4.1.0 fastapi uvicorn
