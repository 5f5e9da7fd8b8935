"""Read a site's manifest: its images and their annotations.

A data folder has a file ``labels.csv`` with a column ``image`` and any of ``mask``,
``mask-<class>``, ``label``, ``group``, ``split``, ``site``; other columns are ignored. Paths are
relative to the folder. An empty cell means "not annotated". docs/data.md is the user's guide.
"""

from __future__ import annotations

import csv
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from polyclinic.configs import wire
from polyclinic.configs.schema.data import LABEL_SEPARATOR, NO_LABEL, LabelKind

MANIFEST = "labels.csv"
MASK_OF = "mask-"  # prefix of the columns for overlapping masks: mask-mass, mask-vessel
_COLUMNS = ("image", "mask", "label", "group", "split", "site")


class DataError(ValueError):
    """A site's data cannot be used as they are. The message says what to fix."""


@dataclass(frozen=True)
class Row:
    """One row of the manifest, which describes one example."""

    line: int  # line number in labels.csv; the header is line 1
    image: Path
    mask: Path | None
    label: str | None
    group: str  # usually the patient, who must not be divided; the image path if not given
    split: str | None
    masks_of: tuple[tuple[str, Path], ...] = ()  # pairs of mask class and file, if separate

    def labels(self, kind: LabelKind) -> frozenset[str] | None:
        """Parse the image's classes from its label cell; None if it is not annotated."""
        if self.label is None:
            return None
        if kind == "exclusive":
            return frozenset({self.label})
        if self.label == NO_LABEL:
            return frozenset()
        return frozenset(name.strip() for name in self.label.split(LABEL_SEPARATOR))


@dataclass(frozen=True)
class Manifest:
    """All examples of one site."""

    site: str
    path: Path
    rows: tuple[Row, ...]


def read_sites(root: Path) -> dict[str, Manifest]:
    """Read the manifests of all sites in a folder, sorted by name.

    The folder has either one ``labels.csv`` (one site, or several that its column ``site``
    distinguishes) or one subfolder per site.

    Raises:
        DataError: if there is no site, or a manifest cannot be read.
    """
    if not root.is_dir():
        raise DataError(f"data folder {root.absolute()}: expected a folder, found none")
    if (root / MANIFEST).is_file():
        return _by_site(root)
    sites = {}
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        if (folder / MANIFEST).is_file():
            for manifest in _by_site(folder).values():
                sites[folder.name] = Manifest(folder.name, manifest.path, manifest.rows)
    if not sites:
        raise DataError(
            f"data folder {root.absolute()}: expected {MANIFEST}, or one folder per site with "
            f"{MANIFEST} in it, found neither; docs/data.md describes both"
        )
    return sites


def read_site(folder: Path, name: str) -> Manifest:
    """Read the manifest of a single site; its column ``site`` is ignored.

    Args:
        folder: the site's data folder.
        name: name to give the site.

    Raises:
        DataError: if there is no manifest, or it cannot be read.
    """
    if not (folder / MANIFEST).is_file():
        raise DataError(f"data folder {folder.absolute()}: expected {MANIFEST}, found none")
    return Manifest(name, folder / MANIFEST, tuple(row for row, _ in _read(folder)))


def chosen_sites(sites: dict[str, Manifest], names: Collection[str]) -> dict[str, Manifest]:
    """Select sites by name; select all if no name is given.

    Raises:
        DataError: if there is no site of a given name.
    """
    for name in names:
        if name not in sites:
            raise DataError(f"data.sites: no site {name!r}; the data have {', '.join(sites)}")
    return {name: m for name, m in sites.items() if not names or name in names}


def _by_site(folder: Path) -> dict[str, Manifest]:
    rows: dict[str, list[Row]] = {}
    for row, site in _read(folder):
        rows.setdefault(site or folder.absolute().name, []).append(row)
    return {site: Manifest(site, folder / MANIFEST, tuple(rows[site])) for site in sorted(rows)}


def _read(folder: Path) -> list[tuple[Row, str]]:
    """Read all rows of a folder's manifest, each with the contents of its column ``site``."""
    path = folder / MANIFEST
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            header = reader.fieldnames or ()
            if "image" not in header:
                raise DataError(
                    f"{path}: expected a column 'image' and any of {', '.join(_COLUMNS[1:])}, "
                    f"got {', '.join(header) or 'an empty file'}"
                )
            rows = [_row(path, reader.line_num, cells) for cells in reader]
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: expected a CSV file in UTF-8, {error}") from None
    if not rows:
        raise DataError(f"{path}: expected one row per image, got only a header")
    seen: dict[Path, int] = {}
    for row, _ in rows:
        if row.image in seen:
            raise DataError(
                f"{path}: row {row.line}: {row.image.name} is already in row {seen[row.image]}; "
                "an image listed twice could be in both training and test data"
            )
        seen[row.image] = row.line
    return rows


def _row(path: Path, line: int, cells: dict[str, str | None]) -> tuple[Row, str]:
    text = {name: (cells.get(name) or "").strip() for name in _COLUMNS}
    if not text["image"]:
        raise DataError(f"{path}: row {line}: expected the path of an image, got an empty cell")
    if text["split"] and text["split"] not in wire.SPLITS:
        raise DataError(
            f"{path}: row {line}: split: expected {', '.join(wire.SPLITS)} or nothing, "
            f"got {text['split']!r}"
        )
    row = Row(
        line=line,
        image=path.parent / text["image"],
        mask=path.parent / text["mask"] if text["mask"] else None,
        label=text["label"] or None,
        group=text["group"] or text["image"],
        split=text["split"] or None,
        masks_of=tuple(
            (column.removeprefix(MASK_OF), path.parent / cell.strip())
            for column, cell in cells.items()
            if column and column.startswith(MASK_OF) and cell and cell.strip()
        ),
    )
    return row, text["site"]
