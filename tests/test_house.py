"""The rules of the house: who may import whom, and what stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT

from formats.dialects import DIALECTS, WRITERS

HEAVY = ("torch", "onnx", "onnxruntime", "onnxscript", "onnx_ir", "transformers", "numpy.random", "scipy", "gguf")
MODULES = sorted(path for package in ("formats", "surgery") for path in (ROOT / package).rglob("*.py"))


def imports(path: Path, *, at_import_time: bool) -> set[str]:
    """Modules a file imports: all of them, or only those that importing it would import."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if at_import_time and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return found


def reaches(found: set[str], *packages: str) -> set[str]:
    """Those of the imports that lie in one of the packages."""
    return {name for name in found if any(name == package or name.startswith(f"{package}.") for package in packages)}


UPPER = ("surgery.operations", "surgery.cli")
PATHS = ("formats.paths", "formats.destination", "formats.dialects", "pathlib")
FILES = ("formats.plain_file", "formats.sharded", "formats.staging")
ENGINE = ("surgery.pipeline.engine", "surgery.pipeline.job", "surgery.pipeline.workers")
# What the modules under a prefix must not import. The longest prefix that fits a module rules it.
RULES = {
    "formats/": ("surgery", "click", "rich"),
    "formats/spec.py": ("torch", "numpy", "surgery", "click"),
    "surgery/": ("surgery.cli", "click"),
    "surgery/cli/": ("torch", "onnx", "onnxruntime", "transformers", "safetensors"),
    "surgery/exact/": (*UPPER, *PATHS, "surgery.pipeline", "surgery.methods", "surgery.linalg", "click"),
    "surgery/linalg/": (*UPPER, *PATHS, "surgery.pipeline", "surgery.methods", "click"),
    "surgery/methods/": (*UPPER, *PATHS, *FILES, "surgery.pipeline", "click"),
    "surgery/model/": (*UPPER, *ENGINE, "surgery.onnx", "click"),
    "surgery/onnx/": (*UPPER, "surgery.pipeline.job", "click"),
    "surgery/pictures/": (*UPPER, *PATHS, "torch", "surgery.pipeline", "surgery.linalg", "surgery.methods", "click"),
    "surgery/pipeline/": (*UPPER, "surgery.methods", "surgery.onnx", "surgery.model", "click"),
    "surgery/pipeline/plan.py": (*UPPER, *PATHS, *ENGINE, "surgery.methods", "click"),
    "surgery/ranks/": (
        *(*UPPER, *PATHS, "formats.checkpoint", "torch", "surgery.pipeline", "surgery.linalg", "surgery.methods"),
        "click",
    ),
    "surgery/receipts/": (*UPPER, *ENGINE, "surgery.methods", "surgery.onnx", "surgery.linalg", "click"),
}


def rule(path: Path) -> tuple[str, ...]:
    """What a module must not import, by the longest prefix of its path that has a rule."""
    place = path.relative_to(ROOT).as_posix()
    return RULES[max((prefix for prefix in RULES if place.startswith(prefix)), key=len)]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_who_may_import_whom(path: Path) -> None:
    """By the longest prefix that fits; formats knows nothing of surgery, and only the command line knows click."""
    if path.parts[-2:] != ("surgery", "__init__.py"):  # the public face names everything for type checkers
        assert not reaches(imports(path, at_import_time=False), *rule(path))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_heavy_imports_stay_inside_functions(path: Path) -> None:
    """torch, onnx, onnxruntime and transformers load when they are needed, never before."""
    assert not reaches(imports(path, at_import_time=True), *HEAVY)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_nobody_outside_the_dialects_asks_which_one_it_is(path: Path) -> None:
    """What differs between dialects is an attribute of the Dialect protocol, never a comparison with a name."""
    if "dialects" in path.parts:
        return
    names = {dialect.name for dialect in DIALECTS}
    for node in ast.walk(ast.parse(path.read_text())):
        sides = [node.left, *node.comparators] if isinstance(node, ast.Compare) else []
        keys = node.keys if isinstance(node, ast.Dict) else []
        for side in (part for each in (*sides, *keys) if each is not None for part in ast.walk(each)):
            named = isinstance(side, ast.Constant) and side.value in names
            asked = isinstance(side, ast.Attribute) and ast.unparse(side).endswith((".dialect", ".dialect.name"))
            assert not named, f"line {node.lineno}: {ast.unparse(node)}"
            assert not (asked and sides), f"line {node.lineno}: {ast.unparse(node)}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_modules_are_short_and_say_what_they_are(path: Path) -> None:
    """Under 400 lines, opened by a docstring."""
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    assert ast.get_docstring(ast.parse(text))


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["inspect", "FILE"],
        ["diff", "--help"],
        ["fold", "--help"],
        ["convert", "--help"],
        ["extract", "--help"],
        ["spectrum", "--help"],
        ["bench", "--help"],
        ["compare", "--help"],
    ],
    ids=" ".join,
)
def test_light_commands_load_no_torch(pair: tuple[Path, Path], arguments: list[str]) -> None:
    """In a process of its own, so that nothing this test imported counts."""
    program = (
        "import sys\nfrom surgery.cli import main\n"
        "try: main(sys.argv[1:])\nexcept SystemExit as end: assert not end.code, end.code\n"
        f"heavy = [name for name in {HEAVY!r} if name in sys.modules]\nassert not heavy, heavy\n"
    )
    arguments = [str(pair[0]) if argument == "FILE" else argument for argument in arguments]
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_dialect_that_is_written_is_read() -> None:
    """Each writer has the name of a dialect, whose attributes hold for what it writes."""
    assert {writer.name for writer in WRITERS} <= {dialect.name for dialect in DIALECTS}


def test_importing_the_library_is_light() -> None:
    """`import surgery` loads nothing heavy; its names load when they are used."""
    program = (
        "import sys, surgery\nassert 'torch' not in sys.modules\nfor name in surgery.__all__: getattr(surgery, name)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_command_is_documented_with_an_example() -> None:
    """Each command's help ends with an example, and the reference in docs names it."""
    from click import Context

    from surgery.cli import COMMANDS, main

    reference = (ROOT / "docs" / "cli.md").read_text()
    for name in COMMANDS:
        command = main.get_command(Context(main), name)
        assert command is not None
        assert f"surgery {name} " in (command.epilog or "")
        assert f"## surgery {name}" in reference
