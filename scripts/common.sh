# What the scripts share; source it. Defines ROOT, VENV, PYTHON, and functions.
# FASTWEIGHTS_TORCH_VERSION=2.11 works with that torch, in an environment and build folders of its own.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
SUFFIX=${FASTWEIGHTS_TORCH_VERSION:+-torch-$FASTWEIGHTS_TORCH_VERSION}
VENV=$ROOT/.venv$SUFFIX
PYTHON=$VENV/bin/python

say() { printf '==> %s\n' "$*"; }
fail() {
  printf '\nerror: %s\n' "$*" >&2
  exit 1
}

# build_folder PRESET: where that preset is built.
build_folder() { printf '%s/build/%s%s' "$ROOT" "$1" "$SUFFIX"; }

# build PRESET [TARGET...]: configures where that has not been done, and builds. FASTWEIGHTS_CMAKE_ARGUMENTS
# go to the configuration.
build() {
  local preset=$1 folder
  shift
  folder=$(build_folder "$preset")
  # shellcheck disable=SC2086  # several arguments
  mkdir -p "$ROOT/build"
  (cd "$ROOT" && cmake --preset "$preset" -B "$folder" -DFASTWEIGHTS_PYTHON_EXECUTABLE="$PYTHON" \
    ${FASTWEIGHTS_CMAKE_ARGUMENTS:-}) >"$folder.log" 2>&1 ||
    { cat "$folder.log"; return 1; }
  cmake --build "$folder" ${1:+--target "$@"}
}

# Lets Python import the package from the build tree of a preset.
use_python_package() { export PYTHONPATH="$(build_folder "$1")/python${PYTHONPATH:+:$PYTHONPATH}"; }
