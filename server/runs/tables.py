"""Results as a person reads them: a row a site and one pooled; by class where there are several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from polyclinic.configs.run import RunConfig
from polyclinic.configs.schema.data import DataConfig
from polyclinic.mtl_model.metrics import Metrics
from polyclinic.server.runs.central_releases import CentralRelease
from polyclinic.server.runs.history import POOLED

if TYPE_CHECKING:  # it brings torch
    from polyclinic.mtl_model.summary import Summary

_VALUES = {
    "Dice": "dice",
    "IoU": "iou",
    "accuracy": "accuracy",
    "bal. acc.": "balanced_accuracy",
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
    """Lay out metrics by row name; a value that is undefined is a dash.

    n counts images; Dice and IoU are means over ``lesions`` of them (with several mask classes,
    the mean of each class's mean), the other values are computed from ``labelled`` of them. HD95
    has a column where it was measured.
    """
    measured = any(metrics.hd95 is not None for metrics in rows.values())
    values = _VALUES | (_HD95 if measured else {})
    table = _table(
        title,
        f"sens., spec., AUC: {positive} against the rest; -: undefined for lack of images",
        ("site",),
        ("n", "lesions", "labelled", *values),
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
    """What each site's cohort has spent, this run and all before included."""
    each = ", ".join(f"{site} {value:.2f}" for site, value in epsilon.items())
    return f"epsilon spent ({unit}): {each}"


def withheld_text(withheld: Mapping[str, Sequence[str]]) -> list[str]:
    """What sites' policies kept out of their sums, a line a site."""
    return [f"withheld by {site}: {'; '.join(words)}" for site, words in withheld.items()]


def central_text(release: CentralRelease) -> str:
    """What the consortium's averages have cost, this run's first to this one."""
    return f"central epsilon (site): {release.epsilon:.2f}, delta {release.delta:g}"


def class_tables(rows: Mapping[str, Metrics], data: DataConfig) -> list[Table]:
    """Lay out the same metrics by class, where one table cannot hold them.

    Returns:
        One table of the mask classes if there are several, and one of the image classes if there
        are more than two or an image may have several. None for a run that was recorded before
        there were values by class.
    """
    tables = []
    if len(data.mask_classes) > 1 and any(m.mask_classes for m in rows.values()):
        tables.append(_mask_classes(rows))
    several = len(data.classes) > 2 or data.label_kind == "multi-label"
    if several and any(m.image_classes for m in rows.values()):
        tables.append(_image_classes(rows))
    return tables


def _mask_classes(rows: Mapping[str, Metrics]) -> Table:
    of_each = [metrics.mask_classes for metrics in rows.values()]
    measured = any(c.hd95 is not None for classes in of_each for c in classes.values())
    values = _OF_MASK_CLASS | (_HD95_OF_CLASS if measured else {})
    caption = "Dice, IoU: means over the images in which the class is present"
    table = _table("By mask class", caption, ("site", "class"), tuple(values))
    for site, metrics in rows.items():
        _add_section(table, site, metrics.mask_classes, values)
    return table


def _image_classes(rows: Mapping[str, Metrics]) -> Table:
    caption = "each class against the rest"
    table = _table("By image class", caption, ("site", "class"), tuple(_OF_IMAGE_CLASS))
    for site, metrics in rows.items():
        _add_section(table, site, metrics.image_classes, _OF_IMAGE_CLASS)
    return table


def _table(title: str, caption: str, names: Sequence[str], values: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    for name in names:
        table.add_column(name)
    for name in values:
        table.add_column(name, justify="right")
    return table


def _add_section(
    table: Table, site: str, classes: Mapping[str, object], values: Mapping[str, str]
) -> None:
    for i, (name, of_class) in enumerate(classes.items()):
        last = i == len(classes) - 1
        table.add_row(site if i == 0 else "", name, *_cells(of_class, values), end_section=last)


def _cells(metrics: object, values: Mapping[str, str]) -> list[str]:
    return [_shown(getattr(metrics, field)) for field in values.values()]


def _shown(value: float | None) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.3f}"


def summary_table(summary: Summary, config: RunConfig) -> Table:
    """Lay out a network's size, a row a part and one in all."""
    data, model = config.data, config.model
    table = Table(
        title=(
            f"{model.backbone}, {model.block_order}, DFE {model.dfe}, {model.norm} norm; one image "
            f"of {data.image_height} x {data.image_width} pixels, {data.channels} channels"
        ),
        title_justify="left",
        caption=f"{summary.state_bytes / 1e6:.1f} MB of weights travel each way in a round",
        caption_justify="left",
    )
    table.add_column("part")
    for name in ("parameters", "GMACs"):
        table.add_column(name, justify="right")
    table.add_column("output (C, H, W)")
    for part in summary.parts:
        shapes = ", ".join("x".join(map(str, shape)) for shape in part.outputs)
        last = part is summary.parts[-1]
        table.add_row(
            part.name, f"{part.parameters:,}", f"{part.gmacs:.2f}", shapes, end_section=last
        )
    table.add_row("in all", f"{summary.parameters:,}", f"{summary.gmacs:.2f}", "")
    return table
