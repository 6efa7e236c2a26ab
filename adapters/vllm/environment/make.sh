#!/bin/sh
# Makes the environment of the vLLM adapter's tests: make.sh FOLDER. `uv` must be on the PATH.
# PIP_FIND_LINKS, where it is set, is a place with builds of torch.
set -eu
folder=$1
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../../.." && pwd)
rm -rf "$folder"
uv venv --quiet --python 3.11 "$folder"
uv pip install --quiet --python "$folder/bin/python" ${PIP_FIND_LINKS:+--find-links "$PIP_FIND_LINKS"} \
    --index-strategy unsafe-best-match --overrides "$here/overrides.txt" -r "$here/requirements.txt"
# vLLM's pins stand: what the distributions need beside them is in them already.
uv pip install --quiet --python "$folder/bin/python" --no-deps --no-build-isolation \
    -e "$root" -e "$root/adapters/hf" -e "$root/adapters/vllm"
"$folder/bin/python" -c "import vllm, eagle_target_vllm"
touch "$folder/.ready"
