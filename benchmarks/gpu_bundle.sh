#!/usr/bin/env bash
# Install the wheels of a folder beside this machine's packages, without a network, and run
# benchmarks/gpu.py.
#   bash benchmarks/gpu_bundle.sh dist/gpu-bundle --output gpu-results
# PYTHON: the interpreter that has jax and PyTorch (default: python3).
set -euo pipefail
if [ $# -lt 1 ] || ! ls "$1"/*.whl >/dev/null 2>&1; then
  echo "usage: bash benchmarks/gpu_bundle.sh FOLDER_OF_WHEELS [options of benchmarks/gpu.py]" >&2
  echo "make gpu-bundle makes the folder" >&2
  exit 2
fi
here=$(cd "$(dirname "$0")" && pwd)
wheels=$1
shift
python=${PYTHON:-python3}
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
"$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-compile \
  --no-cache-dir --target "$site" "$wheels"/*.whl
export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
if ! [ -x "$site/bin/ptxas" ]; then
  echo "$wheels has no ptxas: run make gpu-bundle again" >&2
  exit 2
fi
# XLA takes the ptxas of CUDA_ROOT where that is set, else the first on PATH.
root=${CUDA_ROOT:-}
if [ -n "$root" ]; then  # a copy of that folder by links, with the bundle's ptxas
  mkdir -p "$site/cuda/bin"
  for entry in "$root"/*; do [ "$entry" = "$root/bin" ] || ln -s "$entry" "$site/cuda/"; done
  ln -s "$root"/bin/* "$site/cuda/bin/"
  ln -sf "$site/bin/ptxas" "$site/cuda/bin/ptxas"
  root=$site/cuda
fi
# Try it first: no program would run with a ptxas that this machine's driver does not accept.
program='import jax; jax.jit(lambda x: jax.numpy.sin(x) + x)(jax.numpy.ones(9)).block_until_ready()'
if env ${root:+"CUDA_ROOT=$root"} PATH="$site/bin:$PATH" "$python" -c "$program"; then
  export PATH="$site/bin:$PATH"
  if [ -n "$root" ]; then export CUDA_ROOT="$root"; fi
else
  echo "the bundle's ptxas does not work here: this machine's own is used" >&2
fi
# In the background, so that a signal to this script reaches the program at once.
"$python" "$here/gpu.py" "$@" &
program=$!
trap 'kill -TERM "$program" 2>/dev/null' TERM INT
status=0
wait "$program" || status=$?
while kill -0 "$program" 2>/dev/null; do  # `wait` returns when a signal comes
  status=0
  wait "$program" || status=$?
done
exit "$status"
