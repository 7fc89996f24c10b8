#!/usr/bin/env bash
# mistral.rs: the wheel is a library, mistralrs_front.py puts HTTP before it.
. "$(dirname "$0")/common.sh"
make_venv v-mistralrs
"$PEERS_DIR/v-mistralrs/bin/python" -m pip install --quiet mistralrs==0.9.5 fastapi uvicorn
