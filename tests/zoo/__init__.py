"""The zoo: tiny models of many kinds, each trained under every layout of two ranks and compared with one plain process.

The tests run a sample of it. All of it, with a table of what came of each run: ``python -m tests.zoo``; as tests:
``pytest tests/zoo --zoo whole``. What is expected is in ``table.py``: a model that is supported from now on, or refused, shows there.
"""
