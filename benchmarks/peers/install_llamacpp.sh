#!/usr/bin/env bash
# llama.cpp's llama-server, llama-quantize and llama-perplexity, built for this CPU from the sources
# inside llama-cpp-python's sdist.
# Needs cmake, ninja and a C++ compiler. JOBS: how many compilers at once (default 2).
. "$(dirname "$0")/common.sh"
VERSION=0.3.36
DOWNLOADS="$PEERS_DIR/downloads"
SOURCE="$PEERS_DIR/src/llama_cpp_python-$VERSION"
BUILD="$PEERS_DIR/llama-build"
mkdir -p "$DOWNLOADS" "$PEERS_DIR/src"

make_venv v-build
[ -f "$DOWNLOADS/llama_cpp_python-$VERSION.tar.gz" ] || "$PEERS_DIR/v-build/bin/python" -m pip \
  download --quiet --no-deps --no-binary :all: -d "$DOWNLOADS" "llama-cpp-python==$VERSION"
[ -d "$SOURCE" ] || tar xzf "$DOWNLOADS/llama_cpp_python-$VERSION.tar.gz" -C "$PEERS_DIR/src"

# No web page: its build would fetch files from a model hub.
cmake -S "$SOURCE/vendor/llama.cpp" -B "$BUILD" -G Ninja \
  -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DGGML_OPENMP=ON -DGGML_CCACHE=OFF \
  -DLLAMA_BUILD_NUMBER=0 -DLLAMA_BUILD_COMMIT="sdist-$VERSION" \
  -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF \
  -DLLAMA_BUILD_APP=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF
ninja -C "$BUILD" -j "${JOBS:-2}" llama-server llama-quantize llama-perplexity
