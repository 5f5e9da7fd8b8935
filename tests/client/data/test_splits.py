"""Train, validation and test splits: by patient, deterministic, stratified and never empty."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyclinic.client.data.manifest import DataError, Manifest, Row
from polyclinic.client.data.splits import split_rows
from polyclinic.configs.schema.data import DataConfig


def manifest(labels_by_group: list[list[str | None]], site: str = "a") -> Manifest:
    """Build a manifest with one row for each label of each group."""
    rows = [
        Row(line, Path(f"{line}.png"), None, label, f"g{group}", None)
        for line, (group, label) in enumerate(
            (group, label) for group, labels in enumerate(labels_by_group) for label in labels
        )
    ]
    return Manifest(site, Path("labels.csv"), tuple(rows))


def split(m: Manifest, **changes: object) -> dict[str, list[Row]]:
    return split_rows(m, m.rows, DataConfig(**changes))


@given(
    st.lists(
        st.lists(st.sampled_from(["benign", "malignant", None]), min_size=1, max_size=3),
        min_size=12,
        max_size=80,
    )
)
def test_split_assigns_every_row_once_and_keeps_groups_whole(groups) -> None:
    m = manifest(groups)
    splits = split(m)
    assert sorted(r.line for rows in splits.values() for r in rows) == [r.line for r in m.rows]
    where = [{row.group for row in rows} for rows in splits.values()]
    assert sum(map(len, where)) == len(set().union(*where))


def test_fractions_and_label_shares_are_kept() -> None:
    splits = split(manifest([["benign"]] * 60 + [["malignant"]] * 40))
    counts = {name: Counter(row.label for row in rows) for name, rows in splits.items()}
    assert counts["test"] == {"benign": 12, "malignant": 8}
    assert counts["val"] == {"benign": 9, "malignant": 6}


def test_split_with_rare_labels_keeps_total_fractions() -> None:
    splits = split(manifest([["benign"]] * 3 + [["malignant"]] * 3 + [[None]] * 14))
    assert [len(splits[name]) for name in ("train", "val", "test")] == [13, 3, 4]


def test_split_is_deterministic_and_depends_on_seed_and_site() -> None:
    groups = [["benign"]] * 40
    first = split(manifest(groups))
    assert first == split(manifest(groups))
    assert first["test"] != split(manifest(groups), split_seed=1)["test"]
    assert first["test"] != split(manifest(groups, site="b"))["test"]


def test_split_does_not_depend_on_row_order() -> None:
    m = manifest([["benign"], ["malignant"]] * 20)
    assert split(m) == split_rows(m, m.rows[::-1], DataConfig())


def test_row_with_explicit_split_keeps_it() -> None:
    m = manifest([["benign"]] * 10)
    rows = [Row(r.line, r.image, None, r.label, r.group, "test") for r in m.rows[:5]]
    splits = split_rows(m, [*rows, *m.rows[5:]], DataConfig(test_fraction=0.0, val_fraction=0.2))
    assert [r.line for r in splits["test"]] == [0, 1, 2, 3, 4]


def test_group_in_two_splits_is_refused_with_row_numbers() -> None:
    m = manifest([["benign", "benign"]] * 10)
    rows = list(m.rows)
    for i, name in ((0, "train"), (1, "test")):
        rows[i] = Row(i, rows[i].image, None, "benign", "g0", name)
    with pytest.raises(DataError, match=r"rows 0, 1: group 'g0' is in splits test and train"):
        split_rows(m, rows, DataConfig())


@pytest.mark.parametrize("groups", [[["benign"]], [["benign"]] * 2, [["benign"] * 30]])
def test_too_few_groups_to_split_are_refused_with_counts(groups) -> None:
    with pytest.raises(DataError, match=r"site a: \d+ images of \d groups are too few to split"):
        split(manifest(groups))


def test_independent_split_of_a_group_ignores_other_groups() -> None:
    groups = [["benign" if i % 3 else "malignant"] * (1 + i % 4) for i in range(200)]
    m = manifest(groups)
    whole = split(m, split="independent")

    def places(splits: dict[str, list[Row]]) -> dict[str, str]:
        return {row.group: name for name, rows in splits.items() for row in rows}

    assert all(len(rows) > 20 for rows in whole.values())
    shares = {name: len(rows) / len(m.rows) for name, rows in whole.items()}
    assert shares == pytest.approx({"train": 0.65, "val": 0.15, "test": 0.2}, abs=0.06)
    moved = 0
    for gone in sorted({row.group for row in m.rows})[:40]:
        rows = [row for row in m.rows if row.group != gone]
        left = places(split_rows(m, rows, DataConfig(split="independent")))
        assert left == {g: n for g, n in places(whole).items() if g != gone}
        stratified = places(split_rows(m, rows, DataConfig()))
        moved += stratified != {g: n for g, n in places(split(m)).items() if g != gone}
    assert moved > 0  # negative control: a stratified split moves other groups
