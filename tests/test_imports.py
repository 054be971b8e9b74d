"""The house rules that the source itself can show: who may import what, no circles, no state of modules, private names in one file."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest
from torchmetrics import Metric

import lightning_overlap
from lightning_overlap.strategy.seams import PRIVATE_NAMES, PrivateName, refuse_missing

PACKAGE = "lightning_overlap"
ROOT = Path(lightning_overlap.__file__).parent
FILES = {str(path.relative_to(ROOT)): path for path in ROOT.rglob("*.py")}

FLOORS = (
    ("decision", "messages", "tables", "torch_seams", "transformers_seams"),
    ("ranks",),
    ("model", "steps", "state", "profiling.intervals", "profiling.trace", "profiling.usage"),
    ("facts", "modes.base", "modes.descriptor", "config", "plan", "environment", "modes", "nn"),
    ("strategy", "bench", "tune", "cli", "cli_errors", "profiling"),
)
"""From the lowest to the highest: a module imports from its own floor and from those below it. The longest prefix counts."""
PURE = {
    *("config", "decision", "environment", "plan", "model.roles", "modes.data.layout", "modes.pipeline.layout"),
    *("steps.schedule", "steps.named_schedules", "steps.simulate", "steps.defer", "tune.network"),
}
"""Without torch and Lightning: decisions and plans are tested, and read, by themselves. So are the modes' ``config`` files."""
DISTRIBUTED = re.compile(r"torch_seams$|ranks\.|state\.|modes\.tensor\.symm_mem$|modes\.tensor\.userbuffers$|bench\.peers")
"""Who may import torch.distributed. The peers of a measurement are torch's own."""
ALLOWED: dict[str, set[str]] = {}
"""What still breaks a rule, by rule. It is empty when the house is in order."""


def module_of(file: str) -> str:
    return file.removesuffix(".py").replace("/", ".").removesuffix(".__init__").removesuffix("__init__")


MODULES = {module_of(file): file for file in FILES}


@cache
def tree_of(module: str) -> ast.Module:
    return ast.parse(FILES[MODULES[module]].read_text())


@cache
def imports(module: str) -> tuple[str, ...]:
    """The modules that a module names in its imports, those for the type checker included."""
    names = []
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None, "imports are absolute"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                is_module = inner.removeprefix(f"{PACKAGE}.") in MODULES and inner.startswith(PACKAGE)
                names.append(inner if is_module else node.module)
    return tuple(dict.fromkeys(names))


@cache
def neighbours(module: str) -> tuple[str, ...]:
    """The modules of this package that a module imports."""
    inside = [name.removeprefix(f"{PACKAGE}.") for name in imports(module) if name.startswith(f"{PACKAGE}.")]
    return tuple(name for name in inside if name in MODULES)


def floor(module: str) -> int:
    matches = [
        (len(prefix), number)
        for number, prefixes in enumerate(FLOORS)
        for prefix in prefixes
        if module == prefix or module.startswith(f"{prefix}.")
    ]
    assert matches, f"{module} is on no floor"
    return max(matches)[1]


def room(module: str) -> str | None:
    """The mode whose folder a module lies in."""
    parts = FILES[MODULES[module]].relative_to(ROOT).parts
    return parts[1] if parts[0] == "modes" and len(parts) > 2 else None


def check(rule: str, broken: set[str]) -> None:
    unexpected = broken - ALLOWED.get(rule, set())
    assert not unexpected, f"{rule}: {sorted(unexpected)}"


def test_imports_point_down():
    modules = [module for module in MODULES if module]
    arrows = [(a, b) for a in modules for b in neighbours(a)]
    check("directions", {f"{a} -> {b}" for a, b in arrows if floor(b) > floor(a)})


def test_there_are_no_circles():
    """A depth-first walk: an arrow to a module that is still being walked closes a circle."""
    state: dict[str, str] = {}
    circles: set[str] = set()

    def walk(module: str, path: tuple[str, ...]) -> None:
        state[module] = "open"
        for other in neighbours(module):
            if state.get(other) == "open":
                circles.add(" -> ".join([*path[path.index(other) :], other]))
            elif other not in state:
                walk(other, (*path, other))
        state[module] = "done"

    for module in sorted(MODULES):
        if module not in state:
            walk(module, (module,))
    check("circles", circles)


def test_modes_do_not_know_each_other():
    arrows = [(a, b) for a in MODULES if room(a) for b in neighbours(a) if room(b)]
    check("modes", {f"{a} -> {b}" for a, b in arrows if room(a) != room(b)})


def test_the_strategy_names_no_mode():
    arrows = [(a, b) for a in MODULES if a.startswith("strategy.") for b in neighbours(a) if room(b)]
    check("strategy", {f"{a} -> {b}" for a, b in arrows if not b.endswith(".config")})


def test_modes_do_not_know_lightning():
    modes = [module for module in MODULES if module.startswith(("modes", "ranks", "model", "steps"))]
    check("lightning", {f"{a} -> {b}" for a in modes for b in imports(a) if b.split(".")[0] == "lightning"})


def test_decisions_know_nothing_of_torch():
    pure = [module for module in MODULES if module in PURE or re.fullmatch(r"modes\.\w+\.config", module)]
    check("pure", {f"{a} -> {b}" for a in pure for b in imports(a) if b.split(".")[0] in ("torch", "lightning")})


def test_who_may_import_torch_distributed():
    arrows = [(a, b) for a in MODULES for b in imports(a) if b.startswith("torch.distributed") and not DISTRIBUTED.match(a)]
    check("torch.distributed", {f"{a} -> {b}" for a, b in arrows})


def test_modules_have_no_state():
    """No ``global``, and no list, dictionary, set or object of a module that its functions change."""
    broken = set()
    for module in MODULES:
        constants = {
            target.id
            for node in tree_of(module).body
            if isinstance(node, ast.Assign | ast.AnnAssign)
            for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
            if isinstance(target, ast.Name)
        }
        for function in ast.walk(tree_of(module)):
            if not isinstance(function, ast.FunctionDef):
                continue
            for node in ast.walk(function):
                if isinstance(node, ast.Global):
                    broken |= {f"{module}: global {name}" for name in node.names}
                if (name := changed_name(node)) in constants and name not in local_names(function):
                    broken.add(f"{module}: {function.name} changes {name}")
        broken |= {f"{module}: {name}" for name in constants if name.islower() and name not in ("__all__", "__version__")}
    check("state", broken)


CHANGES = {"append", "extend", "add", "update", "pop", "clear", "setdefault", "insert", "remove", "discard", "popitem", "appendleft"}


def changed_name(node: ast.AST) -> str | None:
    """The name whose content a statement or a call changes."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in CHANGES:
        owner = node.func.value
    elif isinstance(node, ast.Subscript | ast.Attribute) and isinstance(node.ctx, ast.Store | ast.Del):
        owner = node.value
    else:
        return None
    return owner.id if isinstance(owner, ast.Name) else None


def local_names(function: ast.FunctionDef) -> set[str]:
    arguments = function.args
    names = {a.arg for a in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]}
    return names | {n.id for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}


def test_axes_are_known_to_the_mesh_only():
    """Others ask it for groups by their meaning."""
    axes = {"pp", "dp", "cp", "tp", "ep"}
    broken = set()
    for module in set(MODULES) - {"ranks.mesh"}:
        for node in ast.walk(tree_of(module)):
            text = getattr(node, "value", None) if isinstance(node, ast.Constant) else getattr(node, "attr", getattr(node, "id", None))
            if isinstance(text, str) and text in axes:
                broken.add(f"{module}: {text}")
    check("axes", broken)


PRINTS = {"cli", "bench.peers.tensor_products"}
"""The command, and a program that a measurement starts and whose output it reads."""


def test_messages_go_through_one_logger():
    """Others call neither ``print`` nor Lightning's ``rank_zero_info``, and make no logger."""
    broken = set()
    for module in set(MODULES) - PRINTS - {"messages"}:
        for node in ast.walk(tree_of(module)):
            if isinstance(node, ast.Call):
                name = getattr(node.func, "id", getattr(node.func, "attr", None))
                # rich's Console.print writes to a string
                if name in ("rank_zero_info", "getLogger") or (name == "print" and isinstance(node.func, ast.Name)):
                    broken.add(f"{module}: {name}")
    check("messages", broken)


# -- private names of other libraries ------------------------------------------------------------------------------------------

SEAMS = {"strategy.seams", "torch_seams", "transformers_seams", "model.materialize"}
"""One file for Lightning and torchmetrics, one for torch, one for transformers, and what initialises modules, which may be both."""
INHERITED = {name.name for name in PRIVATE_NAMES if name.owner.__name__ == "DDPStrategy"}
"""What a strategy uses of its base class, which no function in another file could do for it."""


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


@cache
def defined_names(module: str) -> frozenset[str]:
    """The names that a module defines: functions, classes, attributes that are set on ``self`` or in a class."""
    names = set()
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_self(node.value):
            names.add(node.attr)
        elif isinstance(node, ast.AnnAssign | ast.Assign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return frozenset(names)


def is_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def test_private_names_of_libraries_lie_in_seams():
    ours = set().union(*map(defined_names, MODULES)) - INHERITED
    foreign = {"_parameters", "_buffers", "_modules"}  # of torch's modules, also where a class of ours has such a name
    broken = set()
    for module in set(MODULES) - SEAMS:
        for node in ast.walk(tree_of(module)):
            if isinstance(node, ast.ImportFrom | ast.Import):
                names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                outside = not names[-1].startswith(PACKAGE)
                broken |= {f"{module}: imports {name}" for name in names if outside and any(map(private, name.split(".")))}
            elif isinstance(node, ast.Attribute) and private(node.attr) and node.attr not in ("_replace", "_fields"):
                inherited = is_self(node.value) and node.attr in INHERITED and module.startswith("strategy.")
                here = node.attr in defined_names(module)
                known = here if node.attr not in foreign else here and is_self(node.value)
                known = known or (is_self(node.value) and node.attr in ours - foreign)
                if not inherited and not known:
                    broken.add(f"{module}: {node.attr}")
    check("private names", broken)


def test_a_missing_private_name_is_told():
    with pytest.raises(ImportError, match=r"this version of torchmetrics has no Metric\._gone \(a test\)\. lightning_overlap supp"):
        refuse_missing([PrivateName(Metric, "_gone", "a test")])
