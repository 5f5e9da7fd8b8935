"""Divide a site's examples into training, validation and test splits."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable, Sequence

from polyclinic.client.data.manifest import DataError, Manifest, Row
from polyclinic.configs import wire
from polyclinic.configs.schema.data import LABEL_SEPARATOR, NO_LABEL, DataConfig, LabelKind

Splits = dict[str, list[Row]]
Groups = dict[str, list[Row]]
Rank = Callable[[str], str]  # maps a group to a uniform hash of 64 hexadecimal digits


def split_rows(
    manifest: Manifest, rows: Sequence[Row], config: DataConfig, key: bytes | None = None
) -> Splits:
    """Divide a site's rows into train, val and test.

    All rows of a group (patient) are in the same split. Rows with a split in the manifest keep it.
    The other groups are assigned by a hash of seed, site and group, so that the same data give the
    same splits on every machine. With a key, the hash is HMAC-SHA256 of the group, so that nobody
    without the key can compute or choose a group's split. There are two methods (``data.split``):

    - ``stratified`` divides the groups of each label (multi-label: of each set of labels) in the
      order of their hashes. If a label has too few groups for its share, the remainder is passed on
      to the next label, so that the site's totals are correct.
    - ``independent`` assigns each group by its own hash, independently of all other groups. Adding
      or removing a patient then changes only that patient's images in the training split, which
      differential privacy requires. Fractions are met on average only.

    Args:
        manifest: the site's manifest, for its name and path.
        rows: the rows to divide.
        config: the run's data settings.
        key: secret key of a private site (``client.data.split_key``); None: the hash is public.

    Raises:
        DataError: if a group's rows name different splits, or if a requested split is empty.
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.group, []).append(row)
    splits: Splits = {name: [] for name in wire.SPLITS}
    free: dict[str, list[Row]] = {}
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
            free[group] = members
    share = {wire.TEST_SPLIT: config.test_fraction, wire.VAL_SPLIT: config.val_fraction}
    rank = _public_rank(config.split_seed, manifest.site) if key is None else _keyed_rank(key)
    if config.split == "independent":
        places = _independent(rank, free, share)
    else:
        places = _stratified(rank, free, config.label_kind, share)
    for group, name in places.items():
        splits[name] += free[group]
    _check(manifest, splits, len(groups), share)
    return {name: sorted(members, key=lambda row: row.line) for name, members in splits.items()}


def _stratified(
    rank: Rank, groups: Groups, kind: LabelKind, share: dict[str, float]
) -> dict[str, str]:
    strata: dict[str, list[str]] = {}
    for group, members in groups.items():
        labels = sorted({_stratum(row, kind) for row in members})
        strata.setdefault("+".join(labels), []).append(group)
    places: dict[str, str] = {}
    owed = dict.fromkeys(share, 0.0)
    for stratum in sorted(strata):
        order = sorted(strata[stratum], key=rank)
        images = sum(len(groups[group]) for group in order)
        for name, fraction in share.items():
            owed[name] += fraction * images
        for group in order:
            size = len(groups[group])
            name = next((n for n in owed if owed[n] >= size / 2), wire.TRAIN_SPLIT)
            places[group] = name
            if name in owed:
                owed[name] -= size
    return places


def _independent(rank: Rank, groups: Groups, share: dict[str, float]) -> dict[str, str]:
    def of(group: str) -> str:
        place = int(rank(group), 16) / 16**64  # uniform in [0, 1)
        for name, fraction in share.items():
            if place < fraction:
                return name
            place -= fraction
        return wire.TRAIN_SPLIT

    return {group: of(group) for group in groups}


def _stratum(row: Row, kind: LabelKind) -> str:
    labels = row.labels(kind)
    if labels is None:
        return ""
    return LABEL_SEPARATOR.join(sorted(labels)) or NO_LABEL


def _public_rank(seed: int, site: str) -> Rank:
    return lambda group: hashlib.sha256(f"{seed}\0{site}\0{group}".encode()).hexdigest()


def _keyed_rank(key: bytes) -> Rank:
    return lambda group: hmac.new(key, group.encode(), hashlib.sha256).hexdigest()


def _check(manifest: Manifest, splits: Splits, groups: int, share: dict[str, float]) -> None:
    wanted = {wire.TRAIN_SPLIT: 1.0, **share}
    empty = [name for name in wire.SPLITS if wanted[name] > 0 and not splits[name]]
    if empty and all(row.split for rows in splits.values() for row in rows):
        raise DataError(
            f"site {manifest.site}: {manifest.path} names every row's split, but none is "
            f"{' or '.join(empty)}; add such rows, or leave the split of some rows empty"
        )
    if empty:
        images = sum(map(len, splits.values()))
        raise DataError(
            f"site {manifest.site}: {images} images of {groups} groups are too few to split: "
            f"none are left for {' and '.join(empty)}; add images, or change "
            "data.val-fraction and data.test-fraction"
        )
