#!/bin/sh
# The image's install steps. Containerfile runs them, and so do the tests, in an empty folder.
#
#   install.sh dependencies VENV    make VENV with requirements-base.txt, and flash-attn where a wheel of it is at hand
#   install.sh wheels WHEELS        download the wheels of requirements-base.txt into WHEELS, for this Python and machine
#   install.sh flash-attn WHEELS    build the wheels of requirements-gpu.txt into WHEELS; needs nvcc
#   install.sh code APP             check and compile the code in APP, and make its folders writable to group 0
#
# OFFLINE=1 takes wheels from WHEELHOUSE alone; FLASH_ATTN_WHEELS is where a flash-attn wheel may lie besides.
set -eu

here=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3.12}
wheelhouse=${WHEELHOUSE:-$here/image/wheelhouse}
wheels=${FLASH_ATTN_WHEELS:-$wheelhouse}

pip_install() { # ENVIRONMENT ARGUMENT...
    environment=$1
    shift
    if [ "${OFFLINE:-0}" = 1 ]; then
        set -- --no-index --find-links "$wheelhouse" "$@"
    fi
    "$environment/bin/python" -m pip install --disable-pip-version-check "$@"
}

case ${1:-} in
dependencies)
    "$python" -m venv "$2"
    pip_install "$2" -r "$here/requirements-base.txt"
    for wheel in "$wheels"/flash_attn-*.whl; do
        if [ -e "$wheel" ]; then # else the pattern itself, of no match
            pip_install "$2" --no-index --find-links "$wheels" -r "$here/requirements-gpu.txt"
        fi
    done
    "$2/bin/python" -m pip check
    ;;
wheels)
    "$python" -m pip download --disable-pip-version-check --only-binary=:all: -d "$2" -r "$here/requirements-base.txt"
    ;;
flash-attn)
    build=$(mktemp -d)
    "$python" -m venv "$build"
    torch=$(sed -n 's/^\(torch==[^ ]*\).*/\1/p' "$here/requirements-base.txt")
    # The package imports torch while it is built, so it is built against the torch it will meet.
    pip_install "$build" "$torch" ninja==1.13.2 packaging==26.3 psutil==5.9.8 setuptools==84.2.1 wheel==0.48.0
    "$build/bin/python" -m pip wheel --disable-pip-version-check --no-build-isolation --no-deps --wheel-dir "$2" -r "$here/requirements-gpu.txt"
    rm -rf "$build"
    ;;
code)
    "${VENV:-/opt/venv}/bin/python" -m compileall -q "$2/runtime"
    (cd "$2" && "${VENV:-/opt/venv}/bin/python" -m runtime --help >/dev/null)
    for folder in /cache /mnt/models; do
        mkdir -p "${ROOT:-}$folder"
        chgrp 0 "${ROOT:-}$folder"
        chmod g=u "${ROOT:-}$folder"
    done
    ;;
*)
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2
    exit 2
    ;;
esac
