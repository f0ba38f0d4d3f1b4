"""House rules that no linter here holds: lengths, docstrings, and what may be imported before options are checked."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LONGEST_FUNCTION = 60
LONGEST_FILE = 500
LONGEST_SCRIPT = 350
DOCUMENTED_SHARE = 0.9
OPTIONAL = ("xformers", "wandb", "deepspeed")
"""Packages imported where they are used, whose absence is a sentence with the pip command."""
COMES_WITH = {"pydantic_core": "pydantic", "annotated_types": "pydantic"}
"""Packages that are parts of a required one."""

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def product_files() -> list[Path]:
    """Every Python file of the product: scripts, rooms and examples, without tests."""
    folders = ("library", "networks", "tools", "finetune", "examples")
    rooms = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    return sorted(rooms + list(ROOT.glob("*.py")))


@cache
def syntax(path: Path) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse(path.read_text(encoding="utf-8"))


def is_command(path: Path) -> bool:
    """Say whether people start a file."""
    return 'if __name__ == "__main__":' in path.read_text(encoding="utf-8")


def definitions(path: Path) -> Iterator[Definition]:
    """All functions and classes of a file, nested ones included."""
    for node in ast.walk(syntax(path)):
        if isinstance(node, Definition):
            yield node


def public_definitions(path: Path) -> Iterator[Definition]:
    """The public functions, classes and methods of a file; what is defined inside a function is private to it."""

    def visit(body: list[ast.stmt]) -> Iterator[Definition]:
        for node in body:
            if isinstance(node, Definition) and not node.name.startswith("_"):
                yield node
                if isinstance(node, ast.ClassDef):
                    yield from visit(node.body)

    return visit(syntax(path).body)


def at(path: Path, node: Definition) -> str:
    """Where a definition stands, as an editor opens it."""
    return f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"


def test_no_function_is_longer_than_a_screen() -> None:
    functions = [(path, node) for path in product_files() for node in definitions(path) if not isinstance(node, ast.ClassDef)]
    too_long = [at(path, node) for path, node in functions if (node.end_lineno or 0) - node.lineno >= LONGEST_FUNCTION]
    assert functions
    assert too_long == []


def test_no_file_does_two_jobs() -> None:
    too_long = {}
    for path in product_files():
        length = len(path.read_text(encoding="utf-8").splitlines())
        if length > (LONGEST_SCRIPT if is_command(path) else LONGEST_FILE):
            too_long[str(path.relative_to(ROOT))] = length
    assert too_long == {}


def test_public_things_say_what_they_are_for() -> None:
    public = [(path, node) for path in product_files() for node in public_definitions(path)]
    silent = [at(path, node) for path, node in public if ast.get_docstring(node) is None]
    assert len(silent) <= (1 - DOCUMENTED_SHARE) * len(public), "\n".join(silent)


def test_options_are_read_without_torch() -> None:
    code = (
        "import importlib, pkgutil, sys, library.options\n"
        "for module in pkgutil.walk_packages(library.options.__path__, 'library.options.'): importlib.import_module(module.name)\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize("script", [*sorted(path.name for path in ROOT.glob("sdxl_*.py")), "tools/bench.py"])
def test_help_comes_without_torch(script: str) -> None:
    code = (
        "import runpy, sys\n"
        f"sys.argv = [{script!r}, '--help']\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as stop: status = stop.code\n"
        "sys.exit(99 if 'torch' in sys.modules else status)"
    )
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert shown.returncode in (0, None), shown.stderr
    assert "--mixed_precision" in shown.stdout or "--ckpt" in shown.stdout


def required_distributions() -> set[str]:
    """The names in requirements.txt, as pip compares them."""
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return {re.split(r"[<>=!~;\[ ]", line)[0].lower().replace("_", "-") for line in lines if line and not line.startswith("#")}


def imported_packages(path: Path) -> set[str]:
    """The top-level packages a file imports by an import statement."""
    found: set[str] = set()
    for node in ast.walk(syntax(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


def test_a_fresh_installation_has_every_package_that_is_imported() -> None:
    required, distributions = required_distributions(), packages_distributions()
    scripts = [*ROOT.glob("*.py"), *ROOT.glob("examples/toy/*.py")]
    ours = {path.stem for path in scripts} | {"library", "networks", "tools", "finetune"}
    missing = {}
    for path in product_files():
        for package in imported_packages(path) - ours - sys.stdlib_module_names - set(OPTIONAL) - set(COMES_WITH):
            names = {name.lower().replace("_", "-") for name in distributions.get(package, [package])}
            if not names & required:
                missing[str(path.relative_to(ROOT))] = package
    assert missing == {}
    assert set(COMES_WITH.values()) <= required


@pytest.mark.parametrize("picture", sorted(path.name for path in (ROOT / "examples/photos/images").glob("*.[jp]*g")))
def test_every_photograph_has_a_caption_a_source_and_a_licence(picture: str) -> None:
    folder = ROOT / "examples" / "photos"
    assert (folder / "images" / picture).with_suffix(".txt").read_text(encoding="utf-8").strip()
    rows = [line for line in (folder / "SOURCES.md").read_text(encoding="utf-8").splitlines() if line.startswith(f"| `{picture}`")]
    assert len(rows) == 1
    assert any(licence in rows[0] for licence in ("CC0 1.0", "CC BY 2.0", "CC BY 4.0", "public domain"))


def test_the_photographs_are_few_and_of_every_kind() -> None:
    from PIL import Image

    files = list((ROOT / "examples" / "photos" / "images").glob("*.[jp]*g"))
    sizes = [Image.open(file).size for file in files]
    assert len(files) == 12
    assert sum(file.stat().st_size for file in files) < 2_000_000
    assert {file.suffix for file in files} == {".jpg", ".png"}
    assert any(w > h for w, h in sizes)
    assert any(w < h for w, h in sizes)
