# Sourced by quickstart.sh and tests/run.sh: a virtual environment of the tested versions.
if [ ! -x .venv/bin/lightning-overlap ]; then
    python3 -m venv .venv
    .venv/bin/pip install --quiet --constraint constraints.txt --editable '.[dev]'
fi
