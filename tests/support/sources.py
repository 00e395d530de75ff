"""Sources of the repository, each file parsed once in a process however many tests ask about it."""

import ast
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Source:
    """A module as tests look at it: how long it is, and its docstrings and strings, each with its line.

    The tree itself is not kept: the garbage collector would go through all of them again and again.
    """

    lines: int
    docstrings: tuple[tuple[int, str], ...]
    strings: tuple[tuple[int, str], ...]
    functions: tuple[tuple[str, int], ...]  # names, and how many lines each has


@cache
def modules(*folders: str) -> tuple[Path, ...]:
    """Return the modules in folders of the repository."""
    return tuple(sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py")))


@cache
def source_of(path: Path) -> Source:
    return parsed(path.read_text(encoding="utf-8"))


def parsed(text: str) -> Source:
    """Return what tests ask about a module of this text."""
    docstrings, strings, functions = [], [], []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Constant):
            if isinstance(node.value, str):
                strings.append((node.lineno, node.value))
        elif isinstance(node, DOCUMENTED):
            if docstring := ast.get_docstring(node):
                docstrings.append((node.body[0].lineno, docstring))
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                functions.append((node.name, (node.end_lineno or node.lineno) - node.lineno + 1))
    return Source(len(text.splitlines()), tuple(docstrings), tuple(strings), tuple(functions))
