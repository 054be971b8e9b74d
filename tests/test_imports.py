"""Who may import what: the design's directions of imports."""

import ast
from pathlib import Path

import pytest

import lightning_overlap

ROOT = Path(lightning_overlap.__file__).parent
FILES = {str(path.relative_to(ROOT)): path for path in ROOT.rglob("*.py")}
PURE = ["modes/data/layout.py", "modes/pipeline/layout.py", "steps/schedule.py", "steps/simulate.py", "steps/defer.py"]
STDLIB_ONLY = [
    "config.py",
    "decision.py",
    "environment.py",
    "plan.py",
    "model/roles.py",
    *PURE,
    *[f for f in FILES if f.endswith("/config.py")],
]
# The doors to collectives, and what reads and writes torch's distributed checkpoints.
DISTRIBUTED = {
    *[f for f in FILES if f.startswith("ranks/")],
    "strategy/launching.py",
    "state/checkpoint.py",
    "state/sharded.py",
    "state/shards.py",
    "modes/tensor/symm_mem.py",
    "bench/peers.py",
    "bench/pipelining.py",
    "bench/products.py",
}


def imports(path):
    """Modules that are imported when the file runs: not those for the type checker only."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


@pytest.mark.parametrize("name", STDLIB_ONLY)
def test_decisions_know_nothing_of_torch(name):
    assert not [m for m in imports(FILES[name]) if m.split(".")[0] in ("torch", "lightning")]


@pytest.mark.parametrize("name", sorted(FILES))
def test_directions(name):
    found = list(imports(FILES[name]))
    if name not in DISTRIBUTED:
        assert not [m for m in found if m.startswith("torch.distributed")]
    if name.startswith("modes/"):
        assert not [m for m in found if m.split(".")[0] == "lightning"], "modes do not know Lightning"
        own = "lightning_overlap." + ".".join(name.split("/")[:2])
        others = [m for m in found if m.startswith("lightning_overlap.modes.") and m != "lightning_overlap.modes.base"]
        if name.count("/") > 1:
            assert all(m.startswith(own) for m in others), "modes do not know each other"
    if name == "strategy/strategy.py":
        named = [m for m in found if m.startswith("lightning_overlap.modes.") and not m.endswith((".config", ".base"))]
        assert not named, "the strategy names no mode"


@pytest.mark.parametrize("name", sorted(FILES))
def test_no_state_of_modules(name):
    assert not [node for node in ast.walk(ast.parse(FILES[name].read_text())) if isinstance(node, ast.Global)]


@pytest.mark.parametrize("name", sorted(set(FILES) - {"ranks/mesh.py"}))
def test_axes_are_known_to_the_mesh_only(name):
    """Others ask it for groups by their meaning."""
    axes = {"pp", "dp", "cp", "tp", "ep"}
    nodes = list(ast.walk(ast.parse(FILES[name].read_text())))
    assert not [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in axes]
    assert not [node.attr for node in nodes if isinstance(node, ast.Attribute) and node.attr in axes]
    assert not [node.id for node in nodes if isinstance(node, ast.Name) and node.id in axes]
