# Sourced by the other scripts: find a Python, make a virtual environment, install once.
# Works with bash 3.2 (macOS) and later; sets no options of its own.

# Print the first interpreter that is Python 3.11 or newer, or explain and fail.
# A name on PATH is not enough: version managers put shims there that do not run, in front of
# interpreters that do. So every match is tried.
find_python() {
  local name candidate
  for name in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.14 python}; do
    while IFS= read -r candidate; do
      if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
        echo "$candidate"
        return 0
      fi
    done < <(type -ap "$name")
  done
  name=$("${PYTHON:-python3}" --version 2>/dev/null || echo "no ${PYTHON:-python3}")
  echo "qlora_kit needs Python 3.11 or newer, and found $name." >&2
  echo "Install one (python.org, your package manager, pyenv, uv), or name one:" >&2
  echo "PYTHON=/path/to/python3.12 bash $0" >&2
  return 1
}

# make_venv FOLDER: create it unless it is there and works.
make_venv() {
  local folder=$1 python
  if [ -x "$folder/bin/python" ] && "$folder/bin/python" -c 'import pip' >/dev/null 2>&1; then
    return 0
  fi
  python=$(find_python) || return 1
  echo "-- $folder with $("$python" --version) ($python)"
  rm -rf "$folder"
  if ! "$python" -m venv "$folder" >/dev/null; then
    rm -rf "$folder"
    echo "$python cannot make virtual environments. On Debian and Ubuntu: apt install python3-venv" >&2
    return 1
  fi
}

has_nvidia_gpu() {
  nvidia-smi -L 2>/dev/null | grep -q GPU
}

# pick_torch FOLDER: which build of torch. constraints.txt pins its version only, and pip's index
# decides the build: on Linux usually the CUDA one, several GB with its libraries. Without a GPU,
# QLORA_KIT_TORCH_INDEX names an index that serves CPU builds (PyTorch's install page has it), and
# torch is installed from there first.
pick_torch() {
  local folder=$1 version
  [ -n "${QLORA_KIT_TORCH_INDEX:-}" ] || return 0
  if "$folder/bin/python" -c 'import torch' >/dev/null 2>&1; then return 0; fi
  version=$(sed -n 's/^torch==//p' constraints.txt)
  echo "-- torch $version from QLORA_KIT_TORCH_INDEX"
  "$folder/bin/python" -m pip install -qq --disable-pip-version-check \
    --index-url "$QLORA_KIT_TORCH_INDEX" "torch==$version"
}

# fingerprint FILE...: changes when an install has to be repeated.
fingerprint() {
  cat "$@" | cksum
}

# install_once FOLDER LABEL PIP_ARGUMENTS...: skipped while pyproject.toml, constraints.txt and
# the arguments are those of the last success.
install_once() {
  local folder=$1 label=$2 stamp mark
  shift 2
  stamp="$folder/.installed"
  mark="$(fingerprint pyproject.toml constraints.txt) $PWD $*"
  if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$mark" ]; then
    echo "-- $label: unchanged since the last install"
    return 0
  fi
  echo "-- installing $label (several hundred MB the first time)"
  rm -f "$stamp"
  "$folder/bin/python" -m pip install -qq --disable-pip-version-check -c constraints.txt "$@" || return 1
  printf '%s' "$mark" >"$stamp"
}
