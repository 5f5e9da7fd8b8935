"""Format results as tables: one row per site and a pooled row, and further tables per class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from polyclinic.configs.output import new_table
from polyclinic.configs.run import RunConfig
from polyclinic.configs.schema.data import DataConfig
from polyclinic.mtl_model.metrics import Metrics
from polyclinic.server.runs.central_releases import CentralRelease
from polyclinic.server.runs.history import POOLED

if TYPE_CHECKING:  # this import loads torch
    from polyclinic.mtl_model.summary import Summary

_VALUES = {
    "Dice": "dice",
    "IoU": "iou",
    "acc.": "accuracy",
    "bal.": "balanced_accuracy",
    "sens.": "sensitivity",
    "spec.": "specificity",
    "AUC": "auc",
}
_OF_MASK_CLASS = {
    "annotated": "annotated",
    "present": "present",
    "Dice": "dice",
    "IoU": "iou",
    "pooled Dice": "pooled_dice",
    "false pos.": "false_positive_rate",
}
_OF_IMAGE_CLASS = {
    "positives": "positives",
    "negatives": "negatives",
    "sens.": "sensitivity",
    "spec.": "specificity",
    "AUC": "auc",
}
_HD95 = {"HD95": "hd95"}
_HD95_OF_CLASS = {"HD95": "hd95", "n of HD95": "hd95_images"}


def metrics_table(title: str, rows: Mapping[str, Metrics], positive: str) -> Table:
    """Create a table of metrics with one row per name; undefined values are shown as a dash.

    The column n counts images. Dice and IoU are means over the images with a lesion (the column
    lesions); with several mask classes they are the mean of the class means. The other values are
    computed from the images with a label (the column labels). The column HD95 is present if HD95
    was measured.

    Args:
        title: title of the table.
        rows: metrics by row name, usually the sites and ``pooled``.
        positive: name of the positive class.
    """
    measured = any(metrics.hd95 is not None for metrics in rows.values())
    values = _VALUES | (_HD95 if measured else {})
    table = new_table(
        ("site",),
        ("n", "lesions", "labels", *values),
        title,
        f"acc., bal.: (balanced) accuracy; sens., spec., AUC: {positive}; -: undefined",
    )
    for name, metrics in rows.items():
        table.add_row(
            name,
            str(metrics.images),
            str(metrics.lesions),
            str(metrics.labelled),
            *_cells(metrics, values),
            end_section=len(rows) > 1 and list(rows)[-2:] == [name, POOLED],
        )
    return table


def spent_text(epsilon: Mapping[str, float], unit: str) -> str:
    """Format the epsilon that each site's cohort has spent in this and all earlier runs."""
    each = ", ".join(f"{site} {value:.2f}" for site, value in epsilon.items())
    return f"epsilon spent ({unit}): {each}"


def withheld_text(withheld: Mapping[str, Sequence[str]]) -> list[str]:
    """Format what the sites' policies withheld from their sums, one line per site."""
    return [f"withheld by {site}: {'; '.join(words)}" for site, words in withheld.items()]


def central_text(release: CentralRelease) -> str:
    """Format the total privacy cost of a run's releases up to the given one."""
    return f"central epsilon (site): {release.epsilon:.2f}, delta {release.delta:g}"


def class_tables(rows: Mapping[str, Metrics], data: DataConfig) -> list[Table]:
    """Create the tables of metrics per class.

    Returns:
        A table of the mask classes if there are several, and a table of the image classes if there
        are more than two or if an image can have several. Empty for a run that an earlier version
        recorded without values per class.
    """
    tables = []
    if len(data.mask_classes) > 1 and any(m.mask_classes for m in rows.values()):
        tables.append(_mask_classes(rows))
    several = len(data.classes) > 2 or data.label_kind == "multi-label"
    if several and any(m.image_classes for m in rows.values()):
        tables.append(_image_classes(rows))
    return tables


def _mask_classes(rows: Mapping[str, Metrics]) -> Table:
    per_row = [metrics.mask_classes for metrics in rows.values()]
    measured = any(c.hd95 is not None for classes in per_row for c in classes.values())
    values = _OF_MASK_CLASS | (_HD95_OF_CLASS if measured else {})
    caption = "Dice, IoU: means over the images in which the class is present"
    table = new_table(("site", "class"), tuple(values), "By mask class", caption)
    for site, metrics in rows.items():
        _add_section(table, site, metrics.mask_classes, values)
    return table


def _image_classes(rows: Mapping[str, Metrics]) -> Table:
    caption = "each class against the rest"
    table = new_table(("site", "class"), tuple(_OF_IMAGE_CLASS), "By image class", caption)
    for site, metrics in rows.items():
        _add_section(table, site, metrics.image_classes, _OF_IMAGE_CLASS)
    return table


def _add_section(
    table: Table, site: str, classes: Mapping[str, object], values: Mapping[str, str]
) -> None:
    for i, (name, metrics) in enumerate(classes.items()):
        last = i == len(classes) - 1
        table.add_row(site if i == 0 else "", name, *_cells(metrics, values), end_section=last)


def _cells(metrics: object, values: Mapping[str, str]) -> list[str]:
    return [_shown(getattr(metrics, field)) for field in values.values()]


def _shown(value: float | None) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.3f}"


def summary_table(summary: Summary, config: RunConfig) -> Table:
    """Create a table of a network's size, with one row per part and a total."""
    data, model = config.data, config.model
    table = new_table(
        ("part", "output (C, H, W)"),
        ("parameters", "GMACs"),
        f"{model.backbone}, {model.block_order}, DFE {model.dfe}, {model.norm} norm; one image "
        f"of {data.image_height} x {data.image_width} pixels, {data.channels} channels",
        f"{summary.state_bytes / 1e6:.1f} MB of weights are sent each way per round",
    )
    for part in summary.parts:
        shapes = ", ".join("x".join(map(str, shape)) for shape in part.outputs)
        last = part is summary.parts[-1]
        table.add_row(
            part.name, shapes, f"{part.parameters:,}", f"{part.gmacs:.2f}", end_section=last
        )
    table.add_row("total", "", f"{summary.parameters:,}", f"{summary.gmacs:.2f}")
    return table
