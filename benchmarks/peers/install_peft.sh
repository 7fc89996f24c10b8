#!/usr/bin/env bash
# PEFT with transformers, driven by peft_front.py. The environment also converts models for
# llama.cpp, whose converter imports sentencepiece even for models that don't use it.
. "$(dirname "$0")/common.sh"
make_venv v-peft
"$PEERS_DIR/v-peft/bin/python" -m pip install --quiet \
  torch==2.13.0 transformers==5.23.0 peft==0.21.2 sentencepiece httpx psutil
