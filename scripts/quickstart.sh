#!/usr/bin/env bash
# One command from nothing to a fine-tuned model:
#
#   bash scripts/quickstart.sh                       # CPU or GPU, whichever is there
#   bash scripts/quickstart.sh --method lora_fa      # arguments go to `qlora-kit train`
#
# Makes .venv, installs the package with the pinned versions, fetches the demo model and data
# (checked by SHA-256) into demo/, and trains examples/quickstart.yaml. A second run reuses all of
# it. QLORA_KIT_TORCH=cpu or =cuda decides which torch is installed; see scripts/common.sh.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/common.sh

VENV=.venv
make_venv "$VENV"
pick_torch "$VENV"
install_once "$VENV" "qlora_kit and what it needs" -e ".[demo]"

"$VENV/bin/python" scripts/prepare_demo.py quickstart
# A second quickstart replaces the first one's result, unless it goes somewhere else.
case " $* " in
  *" --output"* | *" --resume"*) ;;
  *) set -- --overwrite "$@" ;;
esac
echo "-- $VENV/bin/qlora-kit train examples/quickstart.yaml${*:+ $*}"
exec "$VENV/bin/qlora-kit" train examples/quickstart.yaml "$@"
