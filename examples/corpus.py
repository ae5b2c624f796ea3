"""A task that every Python machine carries: does this docstring describe this function?

Pairs of a function's signature and a docstring's first paragraph, from the standard library and the installed torch,
read as text and never imported. Half of the pairs are the function's own docstring, half that of a
neighbour in the same file. Train and held-out pairs come from different files.
"""

from __future__ import annotations

import ast
import hashlib
import random
import sysconfig
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

HELD_OUT = 6  # every sixth file, by the hash of its name
_SKIPPED = {"site-packages", "test", "tests", "idlelib", "lib2to3", "_vendor"}
_LARGEST = 200_000  # bytes; larger files are generated ones
_FEWEST = 3  # functions of a file, so that there is a neighbour to confuse it with


@dataclass(frozen=True)
class Pair:
    """A signature, a docstring, and whether they belong together (1 or 0)."""

    signature: str
    docstring: str
    label: int


def pairs(limit_train: int, limit_test: int, seed: int = 0) -> tuple[list[Pair], list[Pair]]:
    """Train and held-out pairs, shuffled; no file and no docstring is in both."""
    train: list[Pair] = []
    test: list[Pair] = []
    seen: set[str] = set()
    for name, path in _files():
        functions = [item for item in _functions(path) if item[1] not in seen]
        seen.update(docstring for _, docstring in functions)
        if len(functions) >= _FEWEST:
            (test if _hash(name) % HELD_OUT == 0 else train).extend(_paired(functions, random.Random(_hash(name))))
    shuffle = random.Random(seed).shuffle
    shuffle(train)
    shuffle(test)
    return train[:limit_train], test[:limit_test]


def _files() -> list[tuple[str, Path]]:
    roots = {"stdlib": Path(sysconfig.get_path("stdlib"))}
    torch = find_spec("torch")
    if torch is not None and torch.origin is not None:
        roots["torch"] = Path(torch.origin).parent
    return [
        (f"{label}/{path.relative_to(root).as_posix()}", path)
        for label, root in roots.items()
        for path in sorted(root.rglob("*.py"))
        if not _SKIPPED & set(path.relative_to(root).parts) and path.stat().st_size < _LARGEST
    ]


def _functions(path: Path) -> list[tuple[str, str]]:
    """Signature and first paragraph of each documented function."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return []
    found: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not node.name.startswith("__"):
            docstring = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())[:200]
            if len(docstring.split()) >= 5:
                arguments = ", ".join(arg.arg for arg in node.args.args if arg.arg not in ("self", "cls"))
                found.setdefault(docstring, f"{node.name.replace('_', ' ').strip()} ({arguments})")
    return [(signature, docstring) for docstring, signature in found.items()]


def _paired(functions: list[tuple[str, str]], lot: random.Random) -> list[Pair]:
    made = []
    for index, (signature, docstring) in enumerate(functions):
        if lot.random() < 0.5:
            made.append(Pair(signature, docstring, 1))
        else:
            other = lot.choice([i for i in range(len(functions)) if i != index])
            made.append(Pair(signature, functions[other][1], 0))
    return made


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
