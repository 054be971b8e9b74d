#!/usr/bin/env bash
# Passes the tests on a fresh machine: makes .venv when it is missing, then lint, types, tests.
set -euo pipefail
cd "$(dirname "$0")/.."
. examples/environment.sh
export OMP_NUM_THREADS=1
unset PYTHONDONTWRITEBYTECODE  # else each of the processes that tests start would compile the package again
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
# Two at a time: a test's ranks wait for each other for about 40% of its time.
.venv/bin/python -m pytest -n 2 --dist worksteal "$@"
