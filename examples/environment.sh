# Sourced by quickstart.sh and tests/run.sh: a virtual environment of the tested versions.
command=.venv/bin/lightning-overlap
if [ ! -x $command ] || [ pyproject.toml -nt $command ] || [ constraints.txt -nt $command ]; then
    python3 -m venv .venv
    .venv/bin/pip install --quiet --constraint constraints.txt --editable '.[dev]'
fi
