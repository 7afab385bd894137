#!/usr/bin/env bash
# Install what the tests need into .venv-tests, and run them: tests/run.sh [pytest arguments].
#
# Where a ComfyUI is found ($COMFYUI_PATH, the one this pack is installed in, or ~/comfy/ComfyUI), the tests run on its
# Python and its libraries, and so do the ones that need ComfyUI and a browser; its own environment is not changed.
# Elsewhere those are skipped, and the last lines say so.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

find_host() {
    local folder
    for folder in "${COMFYUI_PATH:-}" "$PWD/../.." "$HOME/comfy/ComfyUI"; do
        [[ -n "$folder" && -f "$folder/main.py" && -d "$folder/comfy" ]] && (cd "$folder" && pwd) && return
        [[ -n "${COMFYUI_PATH:-}" ]] && return
    done
}

find_host_python() {
    local python
    for python in "${COMFYUI_PYTHON:-}" "$1/.venv/bin/python" "$1/venv/bin/python"; do
        [[ -x "$python" ]] && echo "$python" && return
    done
}

# Two environments: libraries of ComfyUI beside a torch of our own would not fit together.
host=$(find_host || true)
python=$([[ -n "$host" ]] && find_host_python "$host" || true)
if [[ -n "$python" ]]; then
    environment=.venv-tests/comfyui packages=("pytest>=8" pytest-xdist playwright torchmetrics accelerate)
else
    environment=.venv-tests/alone packages=(-e ".[test]")
fi

"${python:-python3}" -m venv "$environment"
if [[ -n "$python" ]]; then
    libraries=$("$environment/bin/python" -c "import sysconfig; print(sysconfig.get_path('purelib'))")
    "$python" -c "import sysconfig; print(sysconfig.get_path('purelib'))" >"$libraries/comfyui.pth"
    export COMFYUI_PATH=$host COMFYUI_PYTHON=$python
fi
"$environment/bin/python" -m pip install --quiet --disable-pip-version-check "${packages[@]}"

# A process for each core, of one thread: small models gain nothing from more. The tests of a file share what they set up.
cores=$(nproc 2>/dev/null || echo 2)
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "$environment/bin/python" -m pytest -q -rfs --numprocesses $((cores < 4 ? cores : 4)) --dist loadfile "$@"
