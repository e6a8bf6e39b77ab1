#!/usr/bin/env bash
# One command from nothing to a fine-tuned model:
#
#   bash scripts/quickstart.sh                       # CPU or GPU, whichever is there
#   bash scripts/quickstart.sh --method lora_fa      # arguments go to `qlora-kit train`
#
# Makes .venv, installs the package with the pinned versions, fetches the demo model and data
# (checked by SHA-256) into demo/, and trains examples/quickstart.yaml. A second run reuses all of
# it. QLORA_KIT_TORCH_INDEX can name another index for torch; see scripts/common.sh.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/common.sh

VENV=.venv
make_venv "$VENV"
pick_torch "$VENV"
extras=demo
if has_nvidia_gpu; then extras=demo,gpu; fi  # our CUDA kernels, compiled at first use
install_once "$VENV" "qlora_kit and what it needs" -e ".[$extras]"

"$VENV/bin/python" scripts/prepare_demo.py quickstart
# A second quickstart replaces the first one's result, unless it goes somewhere else.
case " $* " in
  *" --output"* | *" --resume"*) ;;
  *) set -- --overwrite "$@" ;;
esac
echo "-- $VENV/bin/qlora-kit train examples/quickstart.yaml${*:+ $*}"
exec "$VENV/bin/qlora-kit" train examples/quickstart.yaml "$@"
