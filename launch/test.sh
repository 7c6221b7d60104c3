#!/usr/bin/env bash
# Run the tests in an environment made for them: `bash launch/test.sh [--all] [pytest's arguments]`. --all: the slow ones too.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=environment.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"

arguments=()
for argument in "$@"; do
  case "$argument" in
    --all) arguments+=(-m "slow or not slow") ;;
    *) arguments+=("$argument") ;;
  esac
done

make_environment generate,longrange,s3,formats,dev
export_settings
export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
export WANDB_MODE="${WANDB_MODE:-offline}"
cd -- "$SO3KRATES_ROOT"
exec "$SO3KRATES_PYTHON" -m pytest "${arguments[@]}"
