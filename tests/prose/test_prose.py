"""The prose check: where it finds phrases of the substitution table."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.prose.check import CATEGORIES, Prose, all_prose, findings, rates, read_table

TABLE = read_table()
DIALECT = [
    "What is, not what is planned.",
    "has what is promised, and a table of what was broken to see",
    "It costs quality, on few images much.",
    "A folder a site",
    "has none of these edges",
    "it is waited for them to connect, but not for more",
    "A run cannot be gone on with.",
    "sent what is no good",
    "what was made of the sites' weights is no good",
    "Look after a site.",
    "Whether this site runs and hears its coordinator.",
    "by a way that nobody else reads",
    "And of the second.",
    "a check that can fail beside each that cannot be seen to",
    "what the user can mend ends with one line",
]
PLAIN = [
    "This page describes the system as it is built.",
    "One folder per site",
    "Number of sites to wait for.",
    "The run cannot be resumed.",
    "sent an invalid reply",
    "Manage a site.",
    "Decay rate of the second moment (FedAdam, FedYogi).",
]


@pytest.mark.parametrize("phrase", DIALECT)
def test_dialect_phrase_gives_one_finding(phrase: str) -> None:
    assert len(findings(Prose("docs", "README.md", 1, f"Some words. {phrase} More."), TABLE)) == 1


@pytest.mark.parametrize("phrase", PLAIN)
def test_plain_phrase_gives_no_finding(phrase: str) -> None:
    assert not findings(Prose("docs", "README.md", 1, phrase), TABLE)


def test_phrase_is_found_in_every_category(tmp_path: Path) -> None:
    """Plants a phrase in a page, a docstring, a comment, a help text, an error and a test name."""
    (tmp_path / "client").mkdir()
    (tmp_path / "tests").mkdir()
    (tmp_path / "README.md").write_text("# A\n\nThe site is told\nanew.\n\n```\ntold\n```\n")
    (tmp_path / "client" / "app.py").write_text(
        '"""Say what is told."""\n\nx = 1  # what is told\n'
        'field(help="What is told.")\nraise ValueError("it was told")\ntold = "told"\n'
    )
    (tmp_path / "tests" / "test_a.py").write_text("def test_site_is_told() -> None: ...\n")
    found = [line for piece in all_prose(tmp_path) for line in findings(piece, TABLE)]
    places = [line.split(": write")[0] for line in found]
    assert sorted(places) == [
        "README.md:3: docs: 'told'",
        "README.md:4: docs: 'anew'",
        "client/app.py:1: docstrings: 'told'",
        "client/app.py:3: docstrings: 'told'",
        "client/app.py:4: help and descriptions: 'told'",
        "client/app.py:5: errors: 'told'",
        "tests/test_a.py:1: test names: 'told'",
    ]


def test_dialect_words_are_rarer_than_8_in_10000_in_every_category() -> None:
    found = rates(list(all_prose()), TABLE.words)
    assert set(found) == set(CATEGORIES)
    for category, (hits, total) in found.items():
        assert total > 1000, category
        assert 1e4 * hits / total <= 8, category
