# shellcheck shell=bash
# Makes or reuses the virtual environment that quickstart.sh, test.sh and .ci/run work in. To be sourced; defines functions only.
# It never deletes anything, and installs only when pyproject.toml, launch/constraints.txt or the place of the clone has changed.

SO3KRATES_ROOT="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"

fail() {
  printf '%s: %s\n' "${0##*/}" "$*" >&2
  exit 1
}

is_supported_python() {
  "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' >/dev/null 2>&1
}

# Print the interpreter to use: the one that was asked for, or the first that fits.
find_python() {
  local wanted="$1" candidate
  if [[ -n "$wanted" ]]; then
    candidate="$(type -P -- "$wanted")" || fail "--python must name an interpreter; got $wanted. Give its path."
    is_supported_python "$candidate" || fail "--python must be Python 3.11 or 3.12; got $wanted. Name another one."
    printf '%s\n' "$candidate"
    return
  fi
  for candidate in python3 python python3.12 python3.11; do
    if is_supported_python "$candidate"; then
      printf '%s\n' "$candidate"
      return
    fi
  done
  fail "no Python 3.11 or 3.12 found. Install one, or name it with --python PATH."
}

# Print what the installation depends on, as one hash.
hash_of_installation() {
  { printf '%s\n' "$SO3KRATES_ROOT" && cat "$SO3KRATES_ROOT/pyproject.toml" "$SO3KRATES_ROOT/launch/constraints.txt"; } |
    sha256sum | cut -d' ' -f1
}

# Errors are shown, warnings (of indexes that lack a package, say) are not.
pip_install() {
  "$SO3KRATES_PYTHON" -m pip install --quiet --quiet --disable-pip-version-check --no-input \
    --constraint "$SO3KRATES_ROOT/launch/constraints.txt" "$@"
}

install_project() {
  local extras="$1" torch_index="$2"
  echo "installing PyTorch (the first time this takes minutes) ..."
  # Only PyTorch itself comes from another index, which need not have its dependencies in the versions that are pinned.
  [[ -z "$torch_index" ]] || pip_install --no-deps --index-url "$torch_index" torch ||
    fail "PyTorch could not be installed from $torch_index; see pip's message above."
  # First and alone: DeepSpeed's own build looks for it. Where it is there already, only its dependencies are installed.
  pip_install torch || fail "PyTorch could not be installed; see pip's message above."
  echo "installing so3krates-dist[$extras] ..."
  pip_install --editable "${SO3KRATES_ROOT}[$extras]" && return
  [[ "$extras" == generate ]] || fail "the project could not be installed; see pip's message above."
  echo "trying without RDKit ..."
  pip_install --editable "$SO3KRATES_ROOT" tblite || fail "the project could not be installed; see pip's message above."
}

# Usage: make_environment EXTRAS [PYTHON] [TORCH_INDEX]; sets SO3KRATES_PYTHON.
make_environment() {
  local extras="$1" wanted="${2:-}" torch_index="${3:-}" venv python key stamp
  venv="${SO3KRATES_VENV:-$SO3KRATES_ROOT/.venv}"
  SO3KRATES_PYTHON="$venv/bin/python"
  key="$(hash_of_installation)"
  for stamp in "$venv/.so3krates-$extras" "$venv/.so3krates-generate,longrange,s3,formats,dev"; do
    if [[ -f "$stamp" && "$(<"$stamp")" == "$key" ]] && is_supported_python "$SO3KRATES_PYTHON"; then
      check_same_python "$venv" "$wanted"
      return
    fi
  done
  if [[ -x "$SO3KRATES_PYTHON" ]]; then
    check_same_python "$venv" "$wanted"
    python="$SO3KRATES_PYTHON"
  else
    python="$(find_python "$wanted")" || exit 1
  fi
  # On Debian without python3-venv an environment without pip is left behind: made again over it, with its own interpreter.
  if [[ ! -x "$SO3KRATES_PYTHON" ]] || ! "$SO3KRATES_PYTHON" -m pip --version >/dev/null 2>&1; then
    echo "making the virtual environment $venv with $("$python" --version) ..."
    "$python" -m venv "$venv" || fail "no virtual environment could be made. On Debian: apt-get install python3-venv."
  fi
  install_project "$extras" "$torch_index"
  printf '%s\n' "$key" >"$venv/.so3krates-$extras"
}

# An existing environment is reused only where it is the Python that was asked for.
check_same_python() {
  local venv="$1" wanted="$2" there asked
  is_supported_python "$venv/bin/python" || fail "$venv is not Python 3.11 or 3.12. Remove it, or set SO3KRATES_VENV."
  [[ -n "$wanted" ]] || return 0
  wanted="$(find_python "$wanted")" || exit 1
  there="$("$venv/bin/python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')"
  asked="$("$wanted" -c 'import sys; print("%d.%d" % sys.version_info[:2])')"
  [[ "$there" == "$asked" ]] || fail "$venv is Python $there, --python is $asked. Remove it, or set SO3KRATES_VENV."
}

has_gpu() {
  compgen -G '/dev/nvidia[0-9]*' >/dev/null || [[ -e /dev/kfd ]]
}

# What every process shall see: compiled extensions in a place of our own (a lock left in the shared cache hangs every later
# start), and no search for accelerators where there is none.
export_settings() {
  export TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-${SO3KRATES_VENV:-$SO3KRATES_ROOT/.venv}/torch_extensions}"
  has_gpu || export DS_ACCELERATOR=cpu
}
