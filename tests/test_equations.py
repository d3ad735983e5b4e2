"""docs/equations.md lists every equation that the tree cites, and names only functions that exist."""

import importlib
import pathlib
import re

ROOT = pathlib.Path(__file__).parents[1]
FOLDERS = ("benchmarks", "diffjax", "docs", "experiments", "notebooks", "tests")
PAGE = (ROOT / "docs" / "equations.md").read_text()
ENTRY = re.compile(r"^- \*\*\(1\.(\d+)\)\*\*(?: to \*\*\(1\.(\d+)\)\*\*)?", re.MULTILINE)
LISTED = [
    n for first, last in ENTRY.findall(PAGE) for n in range(int(first), int(last or first) + 1)
]
# (1.9), (1.26, 1.27) or (1.31-1.33)
CITED = re.compile(r"(?<!\w)\((1\.[1-9]\d*(?:[-,]\s?1\.\d+)*)\)")


def test_the_page_lists_all_equations():
    assert list(range(1, 61)) == LISTED


def test_every_citation_is_an_equation():
    cited = {}
    files = [
        path
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".md")
    ]
    for path in [*ROOT.glob("*.md"), *files]:
        for numbers in CITED.findall(path.read_text()):
            cited.update({int(n): path.name for n in re.findall(r"1\.(\d+)", numbers)})
    assert len(cited) > 40  # the pattern finds them
    assert {n: name for n, name in cited.items() if n not in LISTED} == {}


def test_every_function_on_the_page_is_public():
    names = set(re.findall(r"`(\w+)\.(\w+)`", PAGE))
    assert len(names) > 30
    missing = [
        f"{m}.{f}" for m, f in names if f not in importlib.import_module(f"diffjax.{m}").__all__
    ]
    assert missing == []
