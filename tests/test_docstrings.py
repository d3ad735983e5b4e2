"""Every public name says what it is, takes, returns and raises, where it is published, and shows an
example.
"""

import ast
import functools
import importlib
import inspect
import itertools
import pkgutil
import re
import sys
import textwrap

import pytest

import diffjax

# What the other modules hold is this project's own: its contracts, its closed forms, its training
# loop.
PUBLISHED = {
    "couplings",
    "divergence",
    "dynamics",
    "features",
    "grids",
    "guidance",
    "likelihood",
    "losses",
    "metrics",
    "networks",
    "optimal_grids",
    "samplers",
    "schedules",
    "solve",
    "times",
    "weightings",
}
WITHOUT_A_SOURCE = {
    "alpha_sigma": "calls a schedule",
    "coefficients": "calls a schedule and differentiates it",
    "half_log_snr": "is a definition",
    "half_log_snr_inverse": "inverts that definition",
    "uniform": "spaces times evenly",
    "uniform_times": "draws uniform times",
    "increments": "changes variables",
    "from_increments": "changes the variables back",
    "load_grid": "reads a file",
    "save_grid": "writes a file",
    "sample": "runs any sampler",
    "trajectory": "runs any sampler",
    "final_state": "runs any sampler",
    "log_evidence": "is the mean of the weights that `twisted` returns",
    "one_step": "makes a sampler of any step",
    "kernel_sampler": "makes a sampler of any kernel",
    "standard_normal": "is a density from textbooks",
    "quantize": "inverts `dequantize`",
    "squared_distances": "is its formula",
    "moments": "is the sums that `frechet_distance` takes",
    "path_length": "is the length of a polygon",
    "ClassEmbedding": "looks up a table",
    "patchify": "moves axes",
    "unpatchify": "moves axes",
    "inception_v3": "reads a file for `InceptionV3`",
    "efficientnet_lite0": "reads a file for `EfficientNetLite0`",
}
# Calls of these raise errors that the caller is to see.
CHECKS = re.compile(r"as_float|as_scalar|_?check_\w+")


def public_names():
    """{path: value} of every `__all__` below the package. A value of many paths has the longest of
    them.
    """
    found = {}
    for module in pkgutil.walk_packages(diffjax.__path__, "diffjax."):
        if not any(part.startswith("_") for part in module.name.split(".")):
            namespace = importlib.import_module(module.name)
            for name in namespace.__all__:
                found[name, id(getattr(namespace, name))] = (
                    f"{module.name}.{name}",
                    getattr(namespace, name),
                )
    return {
        path.removeprefix("diffjax."): value
        for path, value in found.values()
        if not inspect.ismodule(value)
    }


NAMES = public_names()
FUNCTIONS = {
    path: value for path, value in NAMES.items() if inspect.isfunction(inspect.unwrap(value))
}
CLASSES = {path: value for path, value in NAMES.items() if inspect.isclass(value)}
TUPLES = {path: value for path, value in CLASSES.items() if issubclass(value, tuple)}
MODULES = {path: value for path, value in CLASSES.items() if path not in TUPLES}
VALUES = {
    path: value for path, value in NAMES.items() if path not in FUNCTIONS and path not in CLASSES
}


def each(*tables):
    table = {path: value for t in tables for path, value in t.items()}
    return pytest.mark.parametrize(("path", "value"), table.items(), ids=table)


def section(value, title):
    """The text below a title such as "Args:", as far as it is indented."""
    found = re.search(rf"^{title}:\n((?:    .*\n|\n)*)", inspect.getdoc(value) + "\n", re.MULTILINE)
    return textwrap.dedent(found[1]).strip() if found else ""


def syntax_of(value):
    return ast.parse(textwrap.dedent(inspect.getsource(value)))


def raises(value, seen=()):
    """Whether a function or class, or a private function of its module that it calls, has a `raise`
    or calls a check.
    """
    nodes = list(ast.walk(syntax_of(value)))
    called = {
        node.func.id
        for node in nodes
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    helpers = [
        getattr(sys.modules[value.__module__], name, None)
        for name in called
        if name.startswith("_")
    ]
    helpers = [f for f in helpers if inspect.isfunction(inspect.unwrap(f)) and f not in seen]
    return (
        any(isinstance(node, ast.Raise) for node in nodes)
        or any(map(CHECKS.fullmatch, called))
        or any(raises(f, (*seen, value)) for f in helpers)
    )


def test_the_tables_are_not_empty():
    assert len(FUNCTIONS) > 130 and len(TUPLES) > 20 and len(MODULES) > 5 and len(VALUES) > 10
    assert {path.partition(".")[0] for path in NAMES} > PUBLISHED
    names = {
        path.rpartition(".")[2]
        for path in (*FUNCTIONS, *MODULES)
        if path.partition(".")[0] in PUBLISHED
    }
    assert names > set(WITHOUT_A_SOURCE)


@each(FUNCTIONS, CLASSES)
def test_it_begins_with_a_sentence_or_a_formula(path, value):
    first = inspect.getdoc(value).partition("\n\n")[0]
    assert re.fullmatch(r"\S+ .*[.:`]", first, re.DOTALL)


@each(FUNCTIONS, MODULES)
def test_it_names_its_arguments(path, value):
    signature = inspect.signature(value.__init__ if path in MODULES else value)
    named = [
        head.split(", ")
        for head in re.findall(r"^(\*{0,2}\w[\w*, ]*):", section(value, "Args"), re.MULTILINE)
    ]
    assert [name.lstrip("*") for names in named for name in names] == [
        p for p in signature.parameters if p != "self"
    ]


@each(FUNCTIONS)
def test_it_says_what_it_returns(path, value):
    assert section(value, "Returns") or inspect.signature(value).return_annotation is None


@each(MODULES)
def test_a_network_says_what_it_takes_and_returns(path, value):
    assert re.search(r"^Call with .*\bReturns\b", inspect.getdoc(value), re.MULTILINE | re.DOTALL)


@each(FUNCTIONS, MODULES)
def test_it_says_what_it_raises(path, value):
    assert section(value, "Raises") or not raises(value)


@each(FUNCTIONS, MODULES)
def test_it_shows_an_example(path, value):
    assert re.search(r"^>>> ", inspect.getdoc(value), re.MULTILINE)


@each(FUNCTIONS, MODULES)
def test_it_names_its_source(path, value):
    named = re.search(r"^Reference: |\(1\.\d+[-,)]", inspect.getdoc(value), re.MULTILINE)
    wanted = path.partition(".")[0] in PUBLISHED and path.rpartition(".")[2] not in WITHOUT_A_SOURCE
    assert named or not wanted


@functools.cache
def documented(name):
    """Whether some module assigns to the name, and a string follows."""
    found = False
    for module in pkgutil.walk_packages(diffjax.__path__, "diffjax."):
        body = syntax_of(importlib.import_module(module.name)).body
        for node, after in itertools.pairwise(body):
            targets = (
                [node.target] if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [])
            )
            if name in [getattr(target, "id", None) for target in targets]:
                found |= isinstance(after, ast.Expr) and isinstance(
                    ast.literal_eval(after.value), str
                )
    return found


@each(VALUES)
def test_a_string_below_a_value_says_what_it_is(path, value):
    assert documented(path.rpartition(".")[2])


@each(TUPLES)
def test_every_field_is_explained(path, value):
    """By a string below it, or in the formula or sentence of its class."""
    body = syntax_of(value).body[0].body
    pairs = zip(body, [*body[1:], None], strict=True)
    below = {
        node.target.id
        for node, after in pairs
        if isinstance(node, ast.AnnAssign) and isinstance(after, ast.Expr)
    }
    assert set(value._fields) <= below | set(re.findall(r"\w+", inspect.getdoc(value)))
