"""Find phrases of the substitution table in the project's prose."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tests import ROOT

TABLE = Path(__file__).with_name("substitutions.toml")
PAGES = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "docs/**/*.md", "docker/kit/*.md")
SOURCES = (
    "apps.py",
    "polyclinic.py",
    *(f"{p}/**/*.py" for p in ("client", "configs", "mtl_model", "server", "simulation")),
)
TESTS = "tests/**/*.py"
CATEGORIES = ("docs", "docstrings", "help and descriptions", "errors", "test names")
HELP = {"description", "help", "short_help", "epilog", "metavar", "prompt"}
_CODE = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)


@dataclass(frozen=True)
class Prose:
    """One piece of text and its position."""

    category: str
    path: str
    line: int
    text: str


@dataclass(frozen=True)
class Table:
    """Patterns by what to write instead, and texts that may stay, by path."""

    patterns: tuple[tuple[re.Pattern[str], str], ...]
    words: re.Pattern[str]
    exceptions: Mapping[str, str]


def read_table(path: Path = TABLE) -> Table:
    content = tomllib.loads(path.read_text(encoding="utf-8"))
    both = {**content["phrases"], **content["words"]}
    return Table(
        tuple((_expression(pattern), plain) for pattern, plain in both.items()),
        _expression("|".join(content["words"])),
        content["exceptions"],
    )


def _expression(pattern: str) -> re.Pattern[str]:
    spaced = pattern.replace(" ", r"\s+")
    return re.compile(rf"\b(?:{spaced})\b", re.IGNORECASE)


def prose_of_page(path: str, text: str) -> Iterator[Prose]:
    """Yield a page's paragraphs without its code."""
    plain = _CODE.sub(lambda code: "\n" * code[0].count("\n"), text)
    line = 1
    for paragraph in re.split(r"(\n\s*\n)", plain):
        if paragraph.strip():
            yield Prose("docs", path, line + _leading(paragraph), paragraph)
        line += paragraph.count("\n")


def _leading(text: str) -> int:
    return text[: len(text) - len(text.lstrip())].count("\n")


def prose_of_source(path: str, source: str) -> Iterator[Prose]:
    """Yield docstrings, comments, help texts, descriptions, and other sentences in strings."""
    tree = ast.parse(source)
    docstrings = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                docstrings.add(first.value)
                yield Prose("docstrings", path, first.lineno, str(first.value.value))
    helps = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.keyword) and node.arg in HELP
        for inner in ast.walk(node.value)
        if isinstance(inner, ast.Constant)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if node in docstrings or " " not in node.value.strip():
                continue
            kind = "help and descriptions" if node in helps else "errors"
            yield Prose(kind, path, node.lineno, node.value)
    for number, text in enumerate(source.splitlines(), 1):
        comment = re.search(r"(?:^|\s\s)# (?!noqa|type:)(.*)", text)
        if comment:
            yield Prose("docstrings", path, number, comment[1])


def prose_of_tests(path: str, source: str) -> Iterator[Prose]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            yield Prose("test names", path, node.lineno, node.name.replace("_", " "))


def all_prose(root: Path = ROOT) -> Iterator[Prose]:
    for pattern in PAGES:
        for path in sorted(root.glob(pattern)):
            name = path.relative_to(root).as_posix()
            yield from prose_of_page(name, path.read_text(encoding="utf-8"))
    for patterns, reader in ((SOURCES, prose_of_source), ((TESTS,), prose_of_tests)):
        for pattern in patterns:
            for path in sorted(root.glob(pattern)):
                name = path.relative_to(root).as_posix()
                yield from reader(name, path.read_text(encoding="utf-8"))


def findings(prose: Prose, table: Table) -> list[str]:
    """Return one line per phrase of the table that a text contains."""
    text = prose.text
    for place, _ in table.exceptions.items():
        path, _, kept = place.partition(": ")
        if path in (prose.path, "*"):
            text = text.replace(kept, "")
    found: list[str] = []
    covered: list[tuple[int, int]] = []
    for pattern, plain in table.patterns:
        for hit in pattern.finditer(text):
            if any(start < hit.end() and hit.start() < end for start, end in covered):
                continue
            covered.append(hit.span())
            line = prose.line + text[: hit.start()].count("\n")
            words = " ".join(hit[0].split())
            found.append(f"{prose.path}:{line}: {prose.category}: {words!r}: write {plain}")
    return found


def rates(prose: list[Prose], words: re.Pattern[str]) -> dict[str, tuple[int, int]]:
    """Count dialect words and all words by category."""
    found = dict.fromkeys(CATEGORIES, (0, 0))
    for piece in prose:
        hits, total = found[piece.category]
        hits += len(words.findall(piece.text))
        found[piece.category] = (hits, total + len(piece.text.split()))
    return found


def main() -> None:
    table, prose = read_table(), list(all_prose())
    if "--count" in sys.argv:
        for category, (hits, total) in rates(prose, table.words).items():
            print(
                f"{category:24} {hits:4} in {total:6} words: {1e4 * hits / total:5.1f} per 10,000"
            )
        return
    lines = [line for piece in prose for line in findings(piece, table)]
    print("\n".join(lines) if lines else f"{len(prose)} pieces of prose, no finding")
    sys.exit(1 if lines else 0)


if __name__ == "__main__":
    main()
