"""Modules import from floors below; the core needs jax and diffrax alone, and leaves jit to the
caller.
"""

import ast
import pathlib
import subprocess
import sys

import pytest

import diffjax

ROOT = pathlib.Path(__file__).resolve().parent.parent / "diffjax"
FLOORS = [
    {"_bind", "typing", "_checks", "_numerics", "_varying", "_calls", "_once", "divergence"},
    {"schedules", "grids", "times", "process"},
    {"parametrizations", "exact", "dynamics", "guidance"},
    {"weightings", "losses", "samplers", "solve", "likelihood", "optimal_grids"},
    {
        "networks",
        "features",
        "training",
        "metrics",
        "distillation",
        "couplings",
        "torch_files",
        "_torch_pickles",
    },
]
FLOOR = {module: i for i, modules in enumerate(FLOORS) for module in modules}
CORE = {
    "__future__",
    "jax",
    "jaxtyping",
    "diffrax",
    "equinox",
    "lineax",
    "numpy",
    *sys.stdlib_module_names,
}
FILES = [path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py"]
EACH = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))


def module_of(path):
    return path.relative_to(ROOT).with_suffix("").parts[0]


def imports(path):
    """(our modules, others' packages) that a file imports."""
    ours, others = set(), set()
    package = ("diffjax", *path.relative_to(ROOT).parent.parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1]] if node.level else []
            base += node.module.split(".") if node.module else []
            names = [[*base, alias.name] for alias in node.names]
        else:
            continue
        for name in names:
            if name[0] == "diffjax":
                ours.add(name[1])
            else:
                others.add(name[0])
    return ours, others


@EACH
def test_imports_come_from_below(path):
    module = module_of(path)
    assert module in FLOOR, f"{module} stands on no floor: add it to FLOORS"
    ours, others = imports(path)
    above = {name for name in ours if name != module and FLOOR[name] > FLOOR[module]}
    assert not above, f"floor {FLOOR[module]} imports from above: {above}"
    if FLOOR[module] < 4:
        assert others <= CORE, f"the core imports {others - CORE}"


@EACH
def test_the_core_does_not_print_log_or_jit(path):
    # `_once` jits what the caller runs outside of any transformation.
    if FLOOR[module_of(path)] == 4 or module_of(path) == "_once":
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Assert):
            raise AssertionError(f"line {node.lineno}: assert is not an error message")
        if isinstance(node, (ast.Name, ast.Attribute)):
            name = node.id if isinstance(node, ast.Name) else node.attr
            assert name not in {"print", "logging", "jit", "pmap"}, f"line {node.lineno}: {name}"


@EACH
def test_denoisers_and_networks_are_called_where_their_result_is_checked(path):
    if FLOOR[module_of(path)] == 4 or module_of(path) in ("_calls", "_once"):
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in {"denoise", "network"}, (
                f"line {node.lineno}: use _calls.call_{node.func.id}..."
            )


def test_the_import_of_the_core_is_light():
    heavy = "flax optax orbax safetensors sklearn matplotlib tensorboardX".split()
    code = f"import sys, diffjax; print([m for m in {heavy} if m in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent, check=True
    )
    assert result.stdout.strip() == "[]"


def test_every_module_is_an_attribute_of_the_package():
    for name in {module_of(path) for path in FILES}:
        if not name.startswith("_"):
            assert getattr(diffjax, name).__name__ == f"diffjax.{name}" and name in dir(diffjax)
    with pytest.raises(AttributeError, match="'diffjax' has no attribute 'nothing'"):
        diffjax.nothing  # noqa: B018
