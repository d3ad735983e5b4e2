"""The files that `make package` builds, and a first program in an environment that has only them."""

import os
import pathlib
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile

import diffjax

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
VERSION = diffjax.__version__
WHEEL = ROOT / "dist" / f"diffjax-{VERSION}-py3-none-any.whl"
SCRIPT = """
import importlib.metadata, importlib.resources, pkgutil, sys

import jax
import jax.numpy as jnp

import diffjax as dj

assert dj.__file__.startswith(sys.prefix), dj.__file__
assert dj.__version__ == importlib.metadata.version("diffjax")
assert importlib.resources.files("diffjax").joinpath("py.typed").is_file()
for module in pkgutil.walk_packages(dj.__path__, "diffjax."):
    importlib.import_module(module.name)
schedule = dj.linear()
sampler = dj.ddim(dj.exact.empirical(jnp.array([[3.0, 4.0]]), schedule), schedule)
print(dj.sample(jax.random.key(0), sampler, jnp.ones(2), dj.uniform(4)).tolist())
"""


def contents(path):
    """The files of a wheel. A zip archive also has the time at which each was written."""
    with zipfile.ZipFile(path) as wheel:
        return {name: wheel.read(name) for name in wheel.namelist()}


def test_the_wheel_of_the_sdist_is_the_wheel_of_the_tree():
    assert contents(WHEEL) == contents(ROOT / "dist" / "tree" / WHEEL.name)


def test_a_wheel_holds_the_package_alone():
    tree = {
        path
        for path in ROOT.joinpath("diffjax").rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    info = f"diffjax-{VERSION}.dist-info/"
    names = {name for name in contents(WHEEL) if not name.startswith(info)}
    assert names == {path.relative_to(ROOT).as_posix() for path in tree}


def test_an_sdist_holds_what_a_wheel_needs():
    with tarfile.open(ROOT / "dist" / f"diffjax-{VERSION}.tar.gz") as sdist:
        names = {name.split("/")[1] for name in sdist.getnames() if "/" in name}
    generated = {"PKG-INFO", "setup.cfg", "diffjax.egg-info"}
    assert names - generated == {"LICENSE", "MANIFEST.in", "README.md", "diffjax", "pyproject.toml"}


def test_the_installed_wheel_samples(tmp_path):
    """The dependencies come from this environment, and the package does not."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    venv.create(tmp_path / "venv", with_pip=False)
    pip = [sys.executable, "-m", "pip", "--python", tmp_path / "venv", "install", "--quiet"]
    subprocess.run([*pip, "--no-deps", "--no-index", WHEEL], env=env, check=True)
    (packages,) = tmp_path.glob("venv/lib/python*/site-packages")
    # Python reads no .pth file of a folder that a .pth file names, hence none of an editable
    # install.
    packages.joinpath("dependencies.pth").write_text(sysconfig.get_path("purelib"))
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [tmp_path / "venv" / "bin" / "python", "-W", "error", "script.py"]
    out = subprocess.run(
        command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, text=True, check=True
    ).stdout
    assert out.strip() == "[3.0, 4.0]"  # of data that are one point, every sample is that point
