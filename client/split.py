"""Which of a site's examples train, which choose the model, which test it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from client.manifest import DataError, Manifest, Row
from configs import wire
from configs.run import LABEL_SEPARATOR, NO_LABEL, DataConfig, LabelKind

Splits = dict[str, list[Row]]


def split_rows(manifest: Manifest, rows: Sequence[Row], config: DataConfig) -> Splits:
    """Divide a site's rows into train, val and test.

    A group (patient) is never divided. Rows that name their split keep it. The others are
    stratified by label (multi-label: by the set of labels) and ordered by a hash of seed, site and
    group, so that the same data give the same split on every machine. Where a label has too few
    groups for its share, what is left over is passed on to the next label, so that the site's
    totals hold.

    Raises:
        DataError: if a group's rows name different splits, or a split that was asked for is empty.
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.group, []).append(row)
    splits: Splits = {name: [] for name in wire.SPLITS}
    strata: dict[str, list[str]] = {}
    for group, members in groups.items():
        named = {row.split for row in members if row.split}
        if len(named) > 1:
            lines = ", ".join(str(row.line) for row in members)
            raise DataError(
                f"{manifest.path}: rows {lines}: group {group!r} is in splits "
                f"{' and '.join(sorted(named))}; a group must stay in one"
            )
        if named:
            splits[named.pop()] += members
        else:
            labels = sorted({_stratum(row, config.label_kind) for row in members})
            strata.setdefault("+".join(labels), []).append(group)
    owed = {wire.TEST_SPLIT: 0.0, wire.VAL_SPLIT: 0.0}
    share = {wire.TEST_SPLIT: config.test_fraction, wire.VAL_SPLIT: config.val_fraction}
    for stratum in sorted(strata):
        order = sorted(strata[stratum], key=lambda g: _rank(config.split_seed, manifest.site, g))
        images = sum(len(groups[group]) for group in order)
        for name, fraction in share.items():
            owed[name] += fraction * images
        for group in order:
            members = groups[group]
            name = next((n for n in owed if owed[n] >= len(members) / 2), wire.TRAIN_SPLIT)
            splits[name] += members
            if name in owed:
                owed[name] -= len(members)
    _check(manifest, splits, len(groups), share)
    return {name: sorted(members, key=lambda row: row.line) for name, members in splits.items()}


def _stratum(row: Row, kind: LabelKind) -> str:
    labels = row.labels(kind)
    if labels is None:
        return ""
    return LABEL_SEPARATOR.join(sorted(labels)) or NO_LABEL


def _rank(seed: int, site: str, group: str) -> str:
    return hashlib.sha256(f"{seed}\0{site}\0{group}".encode()).hexdigest()


def _check(manifest: Manifest, splits: Splits, groups: int, share: dict[str, float]) -> None:
    wanted = {wire.TRAIN_SPLIT: 1.0, **share}
    empty = [name for name in wire.SPLITS if wanted[name] > 0 and not splits[name]]
    if empty and all(row.split for rows in splits.values() for row in rows):
        raise DataError(
            f"site {manifest.site}: {manifest.path} names every row's split, but none is "
            f"{' or '.join(empty)}; add such rows, or leave the cells of some empty"
        )
    if empty:
        images = sum(map(len, splits.values()))
        raise DataError(
            f"site {manifest.site}: {images} images of {groups} groups are too few to split: "
            f"nothing is left for {' and '.join(empty)}; add images, or set "
            "data.val-fraction and data.test-fraction"
        )
