#!/usr/bin/env bash
# From nothing to a trained force field: environment, data set, training, evaluation, dynamics. `--help` says more.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=environment.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"

usage() {
  cat <<'END'
usage: bash launch/quickstart.sh [--ranks N] [--out DIR] [--python PY] [--torch-index URL]

Makes a virtual environment, labels about 2,000 conformers of small organic molecules with GFN2-xTB, trains a So3krates
potential on them with DeepSpeed, evaluates it on held-out conformers and runs 1 ps of dynamics. Started again, it goes on
where it stopped; it never deletes or overwrites a data set or a run.

  --ranks N          training processes (default: one per GPU; without GPU two, or one where there is one core)
  --out DIR          where everything goes: DIR/data and DIR/run (default: runs/quickstart in the clone)
  --python PY        Python 3.11 or 3.12 that the environment is made with (default: the first one found)
  --torch-index URL  take PyTorch from this index, e.g. https://download.pytorch.org/whl/cpu (default: like all else)
  --help             this text

SO3KRATES_VENV is the virtual environment to make or use (default: .venv in the clone).
END
}

ranks="" out="$SO3KRATES_ROOT/runs/quickstart" python="" torch_index=""
while (($#)); do
  case "$1" in
    --help | -h)
      usage
      exit 0
      ;;
    --ranks | --out | --python | --torch-index)
      [[ $# -ge 2 && -n "$2" ]] || fail "$1 must be followed by a value. --help shows the options."
      case "$1" in
        --ranks) ranks="$2" ;;
        --out) out="$2" ;;
        --python) python="$2" ;;
        --torch-index) torch_index="$2" ;;
      esac
      shift 2
      ;;
    --ranks=* | --out=* | --python=* | --torch-index=*)
      set -- "${1%%=*}" "${1#*=}" "${@:2}"
      ;;
    *) fail "$1 is no option. --help shows the options." ;;
  esac
done
[[ -z "$ranks" || "$ranks" =~ ^[1-9][0-9]*$ ]] || fail "--ranks must be an integer from 1; got $ranks."

make_environment generate "$python" "$torch_index"
export_settings
exec "$SO3KRATES_PYTHON" "$SO3KRATES_ROOT/launch/quickstart.py" --out "$out" ${ranks:+--ranks "$ranks"}
