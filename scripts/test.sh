#!/usr/bin/env bash
# Everything that has to pass, from nothing: environment, lint, types, docstrings, import order,
# documentation, tests with coverage, and the tests that touch transformers once more with the
# oldest supported one.
#
#   bash scripts/test.sh                    # what CI runs
#   bash scripts/test.sh --fast             # active environment, no slow tests, no coverage
#   bash scripts/test.sh --fast -k merge    # other arguments go to pytest
#
# Stops at the first failure.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/common.sh

VENV=.venv-test
CORE_ROOMS="core quant ops nn adapters"
CORE_COVERAGE=90
OLD_TRANSFORMERS=5.17.0
OLD_FOLDER=.cache/transformers-$OLD_TRANSFORMERS

started=$(date +%s)
step() {
  local now
  now=$(date +%s)
  echo
  echo "== $* (after $((now - started)) s)"
}
trap 'code=$?; [ $code -eq 0 ] || echo "== failed after $(($(date +%s) - started)) s, exit code $code" >&2' EXIT

fast=
if [ "${1:-}" = --fast ]; then
  fast=1
  shift
fi

step environment
if [ -n "$fast" ]; then
  PY=$(command -v python || true)
  if [ -z "$PY" ] || ! "$PY" -c 'import pytest, ruff, torch' >/dev/null 2>&1; then PY=$VENV/bin/python; fi
  if [ ! -x "$PY" ]; then
    echo "--fast needs an environment: activate one with \`pip install -e .[dev]\`, or run without." >&2
    exit 2
  fi
else
  make_venv "$VENV"
  pick_torch "$VENV"
  install_once "$VENV" "qlora_kit, its tests and its checks" -e ".[dev,demo]"
  PY=$VENV/bin/python
fi
BIN=$(dirname "$PY")
"$PY" --version

# Two test processes of one thread each are faster on small models than one of two threads.
export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
# A file's tests stay in one process; files come in the order of tests/conftest.py, slow ones first
# (xdist would take those with the most tests first, and end with few tests of a minute each).
processes=(-n "${QLORA_KIT_TEST_WORKERS:-2}" --dist loadfile --no-loadscope-reorder)

step "lint: ruff"
"$BIN/ruff" check .
"$BIN/ruff" format --check --quiet .
for script in scripts/*.sh .ci/run; do bash -n "$script"; done

step "types: mypy"
"$BIN/mypy"

step "docstrings: pydoclint"
"$BIN/pydoclint" --quiet qlora_kit

step "import order of the rooms: import-linter"
"$BIN/lint-imports" --no-logo

step "generated documentation is up to date"
"$PY" scripts/generate_docs.py --check

if [ -n "$fast" ]; then
  step "tests, without the slow ones"
  "$PY" -m pytest -q "${processes[@]}" -m "not slow" --doctest-modules qlora_kit tests "$@"
  step "passed"
  exit 0
fi

step "tests and doctests, with coverage"
"$PY" -m coverage erase
"$PY" -m pytest -q "${processes[@]}" --durations 15 --doctest-modules \
  --cov --cov-report= qlora_kit tests "$@"

step "coverage of the core rooms, each at least $CORE_COVERAGE%"
for room in $CORE_ROOMS; do
  "$PY" -m coverage report --include "qlora_kit/$room/*" --fail-under "$CORE_COVERAGE"
done

step "the tests that touch transformers, with transformers $OLD_TRANSFORMERS"
if [ ! -f "$OLD_FOLDER/.installed" ]; then
  echo "-- installing transformers $OLD_TRANSFORMERS beside the pinned one, into $OLD_FOLDER"
  rm -rf "$OLD_FOLDER"
  "$PY" -m pip install -qq --disable-pip-version-check --no-deps --target "$OLD_FOLDER" \
    "transformers==$OLD_TRANSFORMERS" "huggingface_hub<2" httpx httpcore
  touch "$OLD_FOLDER/.installed"
fi
PYTHONPATH="$PWD/$OLD_FOLDER" QLORA_KIT_EXPECT_TRANSFORMERS=$OLD_TRANSFORMERS \
  "$PY" -m pytest -q "${processes[@]}" -m "transformers_compat and not slow" tests

step "everything passed"
