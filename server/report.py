"""Results as a person reads them: one table, a row a site and one pooled."""

from __future__ import annotations

from collections.abc import Mapping

from rich.table import Table

from mtl_model.metrics import Metrics
from server.history import POOLED

_VALUES = {
    "Dice": "dice",
    "IoU": "iou",
    "accuracy": "accuracy",
    "bal. acc.": "balanced_accuracy",
    "sens.": "sensitivity",
    "spec.": "specificity",
    "AUC": "auc",
}


def metrics_table(title: str, rows: Mapping[str, Metrics], positive: str) -> Table:
    """Lay out metrics by row name; a value that is undefined is a dash.

    n counts images; Dice and IoU are means over ``lesions`` of them, the other values are
    computed from ``labelled`` of them.
    """
    table = Table(
        title=title,
        title_justify="left",
        caption=f"sens., spec., AUC: {positive} against the rest; -: undefined for lack of images",
        caption_justify="left",
    )
    table.add_column("site")
    for name in ("n", "lesions", "labelled", *_VALUES):
        table.add_column(name, justify="right")
    for name, metrics in rows.items():
        values = [getattr(metrics, field) for field in _VALUES.values()]
        table.add_row(
            name,
            str(metrics.images),
            str(metrics.lesions),
            str(metrics.labelled),
            *("-" if value is None else f"{value:.3f}" for value in values),
            end_section=len(rows) > 1 and list(rows)[-2:] == [name, POOLED],
        )
    return table
