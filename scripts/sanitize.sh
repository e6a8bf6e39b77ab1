#!/usr/bin/env bash
# compute-sanitizer over every kernel, on small shapes: memory errors and races.
#
#   bash scripts/sanitize.sh                      # memcheck and racecheck
#   bash scripts/sanitize.sh memcheck synccheck   # the tools named
#
# Needs an NVIDIA GPU and compute-sanitizer (it comes with the CUDA toolkit). Ends with 1 on the
# first finding. A tool that finds nothing proves little, so memcheck and racecheck must first
# find a mistake that is planted for them.
set -euo pipefail
cd "$(dirname "$0")/.."

# The interpreter whose torch sees the GPU: PYTHON, or the one of the active environment.
PY=${PYTHON:-python3}
SANITIZER=${COMPUTE_SANITIZER:-$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)}
FOUND=97 # exit status that means findings
if [ ! -x "$SANITIZER" ]; then
  echo "sanitize.sh needs compute-sanitizer: install the CUDA toolkit, or name it in COMPUTE_SANITIZER." >&2
  exit 2
fi

# Each tensor is an allocation of its own, so that a step past its end is seen.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
# Compile outside the tool once; both runs then load from the same cache.
QLORA_KIT_CACHE=$(mktemp -d)
export QLORA_KIT_CACHE
trap 'rm -rf "$QLORA_KIT_CACHE"' EXIT

# check TOOL [ARGUMENT...]: the driver under one tool. Our kernels only: racecheck does not follow
# every way in which cuBLAS orders its accesses.
check() {
  local tool=$1 name options=()
  shift
  if [ "$tool" = memcheck ]; then options=(--padding 256); fi
  if [ "$tool" = racecheck ]; then options=(--racecheck-report all); fi
  for name in nf4_ rms_norm_ rotary_ gated_activation_ low_rank_; do options+=(--kernel-name "kns=$name"); done
  "$SANITIZER" --tool "$tool" --error-exitcode "$FOUND" "${options[@]}" "$PY" -m tests.ops.sanitize "$@"
}

planted() {
  local tool=$1 mistake=$2 code=0 output
  output=$(check "$tool" --plant "$mistake" 2>&1) || code=$?
  if [ "$code" -ne "$FOUND" ]; then
    echo "$output"
    echo "== $tool did not find the planted $mistake (status $code): what it says of the kernels is void" >&2
    exit 1
  fi
  echo "== $tool finds the planted $mistake"
}

echo "== without a tool"
"$PY" -m tests.ops.sanitize
tools=("$@")
if [ ${#tools[@]} -eq 0 ]; then tools=(memcheck racecheck); fi
for tool in "${tools[@]}"; do
  case $tool in
    memcheck) planted memcheck overrun ;;
    racecheck) planted racecheck race ;;
  esac
  code=0
  check "$tool" || code=$?
  if [ "$code" -ne 0 ]; then
    echo "== $tool: $([ "$code" -eq "$FOUND" ] && echo "findings, see above" || echo "failed with $code")" >&2
    exit 1
  fi
  echo "== $tool: clean"
done
