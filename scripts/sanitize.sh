#!/usr/bin/env bash
# compute-sanitizer over every kernel, on small shapes: memory errors and races.
#
#   bash scripts/sanitize.sh                      # memcheck and racecheck
#   bash scripts/sanitize.sh memcheck synccheck   # the tools named
#
# Needs an NVIDIA GPU and compute-sanitizer (it comes with the CUDA toolkit). Ends with 1 if
# a tool finds anything. A tool that finds nothing proves little, so memcheck and racecheck must first
# find a mistake that is planted for them, by its kind and its kernel's name; and a clean run must
# have computed something, and the tool have summed up. memcheck takes two minutes on an H200; a
# part that takes longer than SANITIZER_LIMIT seconds (default 900) is stopped.
set -euo pipefail
cd "$(dirname "$0")/.."

# The interpreter whose torch sees the GPU: PYTHON, or the one of the active environment.
PY=${PYTHON:-python3}
SANITIZER=${COMPUTE_SANITIZER:-$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)}
LIMIT=${SANITIZER_LIMIT:-900}
FOUND=97 # exit status that means findings
if [ ! -x "$SANITIZER" ]; then
  echo "sanitize.sh needs compute-sanitizer: install the CUDA toolkit, or name it in COMPUTE_SANITIZER." >&2
  exit 2
fi

# Each tensor is an allocation of its own, so that a step past its end is seen.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
# Compile outside the tool once; both runs then load from the same cache.
WORK=$(mktemp -d)
export QLORA_KIT_CACHE=$WORK/cache
trap 'rm -rf "$WORK"' EXIT

# check TOOL [ARGUMENT...]: the driver under one tool. Our kernels only: racecheck does not follow
# every way in which cuBLAS orders its accesses. Failing API calls are no findings: some of
# cuda-core's look-ups in the driver fail while it is loaded, and Python raises what matters.
check() {
  local tool=$1 name options=(--report-api-errors no)
  shift
  if [ "$tool" = memcheck ]; then options+=(--padding 256); fi
  if [ "$tool" = racecheck ]; then options+=(--racecheck-report all); fi
  for name in nf4_ rms_norm_ rotary_ gated_activation_ low_rank_ column_products_ cross_entropy_ gather_; do
    options+=(--kernel-name "kns=$name")
  done
  timeout --kill-after=20 "$LIMIT" "$SANITIZER" --tool "$tool" --error-exitcode "$FOUND" \
    "${options[@]}" "$PY" -m tests.ops.sanitize "$@"
}

# refuse TOOL WHY: the end.
refuse() {
  echo "== $1: $2" >&2
  exit 1
}

# planted TOOL MISTAKE KERNEL WORDS: the tool finds the mistake in the kernel, in those words.
planted() {
  local tool=$1 mistake=$2 kernel=$3 words=$4 code=0
  check "$tool" --plant "$mistake" >"$WORK/planted" 2>&1 || code=$?
  if [ "$code" -ne "$FOUND" ] || ! grep -Eq "$words" "$WORK/planted" || ! grep -q "$kernel" "$WORK/planted"; then
    cat "$WORK/planted"
    refuse "$tool" "did not find the planted $mistake (status $code): what it says of the kernels is void"
  fi
  echo "== $tool finds the planted $mistake"
}

# clean TOOL: it finds nothing, having watched something. Part by part: a tool that gives up on one
# kernel says nothing of those after it.
clean() {
  local tool=$1 part code begin bad=() how=()
  # A warp whose lanes have met lets one of them arrive at a barrier for all. racecheck follows what a
  # thread itself announces, so for it every lane arrives; nothing else is different.
  if [ "$tool" = racecheck ]; then how=(--every-lane); fi
  for part in $PARTS; do
    if [ "$tool" = racecheck ] && [ "$part" = dense ]; then
      echo "== racecheck, dense: left out, the tool gives up on cuBLAS's 16-bit kernels; nf4_dequantize is in public_ops"
      continue
    fi
    code=0 begin=$SECONDS
    check "$tool" "${how[@]}" "$part" >"$WORK/log" 2>&1 || code=$?
    if [ "$code" -eq 0 ] && grep -Eq ': [1-9][0-9]* checks right' "$WORK/log" && grep -Eq 'SUMMARY: 0 (errors|hazards)' "$WORK/log"; then
      echo "== $tool, $part: clean, $((SECONDS - begin)) s"
      continue
    fi
    case $code in
      0) echo "== $tool, $part: nothing ran, or no summary of none" >&2 ;;
      "$FOUND") echo "== $tool, $part: findings" >&2 ;;
      124 | 137) echo "== $tool, $part: stopped after $LIMIT s (SANITIZER_LIMIT)" >&2 ;;
      *) echo "== $tool, $part: failed with $code" >&2 ;;
    esac
    grep -Ev '^frame #' "$WORK/log" | tail -40 >&2
    bad+=("$part")
  done
  if [ ${#bad[@]} -gt 0 ]; then refuse "$tool" "not clean: ${bad[*]}"; fi
}

echo "== without a tool"
"$PY" -m tests.ops.sanitize
"$PY" -m tests.ops.sanitize --every-lane hopper ahead
PARTS=$("$PY" -m tests.ops.sanitize --list)
tools=("$@")
if [ ${#tools[@]} -eq 0 ]; then tools=(memcheck racecheck); fi
for tool in "${tools[@]}"; do
  case $tool in
    memcheck) planted memcheck overrun nf4_planted_overrun 'Invalid __global__ write' ;;
    racecheck) planted racecheck race rms_norm_planted_race 'Race reported|hazard detected' ;;
  esac
  clean "$tool"
done
