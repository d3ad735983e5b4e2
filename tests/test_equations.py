"""docs/equations.md lists every equation that the docstrings cite, and names only functions that exist."""

import importlib
import pathlib
import re

ROOT = pathlib.Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "equations.md").read_text()
CITED = re.compile(r"(?<!\w)\((1\.[1-9]\d*(?:[-,]\s?1\.\d+)*)\)")  # (1.9), (1.26, 1.27) or (1.31-1.33)


def test_the_page_lists_all_equations():
    entries = re.findall(r"^- \*\*\(1\.(\d+)\)\*\*(?: to \*\*\(1\.(\d+)\)\*\*)?", PAGE, re.MULTILINE)
    listed = [n for first, last in entries for n in range(int(first), int(last or first) + 1)]
    assert listed == list(range(1, 61))


def test_every_citation_is_an_equation():
    cited = {}
    for path in (ROOT / "diffjax").rglob("*.py"):
        for numbers in CITED.findall(path.read_text()):
            cited.update({int(n): path.name for n in re.findall(r"1\.(\d+)", numbers)})
    assert len(cited) > 30  # the pattern finds them
    assert {n: name for n, name in cited.items() if not 1 <= n <= 60} == {}


def test_every_function_on_the_page_is_public():
    names = set(re.findall(r"`(\w+)\.(\w+)`", PAGE))
    assert len(names) > 30
    missing = [f"{m}.{f}" for m, f in names if f not in importlib.import_module(f"diffjax.{m}").__all__]
    assert missing == []
