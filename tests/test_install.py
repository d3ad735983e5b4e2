"""An editable install, built without a network and unpacked as pip would."""

import pathlib
import shutil
import subprocess
import sys
import zipfile

ROOT = pathlib.Path(__file__).parent.parent
BUILD = "import sys, setuptools.build_meta as build; build.build_editable(sys.argv[1])"
SCRIPT = """
import importlib.util, site, sys

site.addsitedir(sys.argv[1])
print(importlib.util.find_spec("diffjax").origin)
"""


def test_a_script_beside_an_editable_clone_finds_the_package(tmp_path):
    """`diffjax`, the folder of the clone, must not pass for the package."""
    clone, wheels, installed = tmp_path / "diffjax", tmp_path / "wheels", tmp_path / "installed"
    clone.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, clone)
    shutil.copytree(
        ROOT / "diffjax", clone / "diffjax", ignore=shutil.ignore_patterns("__pycache__")
    )
    subprocess.run(
        [sys.executable, "-c", BUILD, str(wheels)], cwd=clone, capture_output=True, check=True
    )
    (wheel,) = wheels.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(installed)
    (tmp_path / "script.py").write_text(SCRIPT)
    # -S leaves out the environment's own packages, among them this one.
    command = [sys.executable, "-S", "script.py", str(installed)]
    found = subprocess.run(
        command, cwd=tmp_path, env={}, stdout=subprocess.PIPE, text=True, check=True
    ).stdout
    assert found.strip() == str(clone / "diffjax" / "__init__.py")
