# Sourced by every script here: where the peers live, and which model and adapters they serve.
#
#   PEERS_DIR     environments, builds and converted models    (default: ~/.cache/quickchange/peers)
#   BASE_MODEL    the base model's folder, transformers' layout (needed to start a server)
#   ADAPTERS_DIR  a folder that holds lora-0, lora-1, …          (needed to start a server)
#   ADAPTERS      how many of them to serve                      (default: 8)
#   PORT, THREADS, SEQUENCES                                     (default: 8100, 2, 16)
#   CONTEXT       tokens of the longest sequence                 (default: 1024)
set -euo pipefail

HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
PEERS_DIR="${PEERS_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/quickchange/peers}"
ADAPTERS="${ADAPTERS:-8}"
PORT="${PORT:-8100}"
THREADS="${THREADS:-2}"
SEQUENCES="${SEQUENCES:-16}"
CONTEXT="${CONTEXT:-1024}"
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1
mkdir -p "$PEERS_DIR"

need_model() {
  : "${BASE_MODEL:?set BASE_MODEL to the base model folder}"
  : "${ADAPTERS_DIR:?set ADAPTERS_DIR to the folder that holds lora-0, lora-1, ...}"
  export BASE_MODEL ADAPTERS_DIR ADAPTERS PORT THREADS SEQUENCES CONTEXT
}

make_venv() { # name
  [ -x "$PEERS_DIR/$1/bin/python" ] || "${PYTHON:-python3}" -m venv "$PEERS_DIR/$1"
}
