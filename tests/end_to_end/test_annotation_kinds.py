"""Whole runs in one process with several mask classes, multi-label images and learned weights."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Message
from rich.console import Console
from safetensors.torch import load_file

from polyclinic.configs import wire
from polyclinic.configs.presets import read_run_config
from polyclinic.mtl_model.network import network_of
from polyclinic.mtl_model.packing import Layout
from polyclinic.server.app import run
from polyclinic.server.commands import show
from polyclinic.server.runs.history import POOLED, read_history
from polyclinic.server.runs.tables import class_tables, metrics_table
from tests.site_images import THINGS, write_exclusive_site, write_overlapping_site

KINDS = {
    "data__classes": ",".join(THINGS),
    "data__positive": "scar",
    "data__mask_classes": ",".join(THINGS),
    "data__channels": 3,
    "train__learning_rate": 3e-3,
}
SEVERAL = {
    **KINDS,
    "data__mask_kind": "overlapping",
    "data__label_kind": "multi-label",
    "loss__classification": "soft-margin",
}


def lines_of(folder) -> dict[str, object]:
    """Return the lines of the last round on validation images by site."""
    lines = read_history(folder.history)
    return {line.site: line for line in lines if line.split == "val" and line.round == 2}


def tables_of(folder) -> str:
    rows = {site: line.metrics for site, line in lines_of(folder).items()}
    console = Console(width=110)
    with console.capture() as shown:
        for table in class_tables(rows, read_run_config(folder.config).data):
            console.print(table)
    return shown.get()


def test_exclusive_masks_and_labels_in_colour_run(tiny, grid, tmp_path: Path, capsys) -> None:
    for number, images in enumerate((16, 24)):
        write_exclusive_site(tmp_path / f"sites/site-{number + 1}", images)
    config = tiny(
        data__root=str(tmp_path / "sites"),
        loss__segmentation="dice+focal",
        loss__label_smoothing=0.1,
        evaluate__hd95=True,
        **KINDS,
    )
    folder = run(grid(config, sites=2), config)
    lines = lines_of(folder)
    assert set(lines) == {"site-1", "site-2", POOLED}
    for line in lines.values():
        metrics = line.metrics
        assert list(metrics.mask_classes) == list(metrics.image_classes) == list(THINGS)
        assert all(c.annotated == metrics.images for c in metrics.mask_classes.values())
        assert sum(c.positives for c in metrics.image_classes.values()) == metrics.labelled
    pooled = lines[POOLED].metrics.mask_classes["cyst"]
    sites = [line.metrics.mask_classes["cyst"] for s, line in lines.items() if s != POOLED]
    assert pooled.present == sum(c.present for c in sites) > 0
    assert pooled.dice == pytest.approx(
        sum((c.dice or 0) * c.present for c in sites) / pooled.present
    )
    results = json.loads(folder.results.read_text())
    assert set(results[POOLED]["mask_classes"]["scar"]) >= {"dice", "iou", "present", "hd95"}
    state = load_file(folder.checkpoint(2))
    assert state["decoder.mask.weight"].shape[0] == 4  # background and three
    at_the_end = capsys.readouterr().out
    show(str(folder.path))
    shown_again = capsys.readouterr().out
    for text in ("By mask class", "By image class", *THINGS):
        assert text in at_the_end
        assert text in shown_again


def test_overlapping_multi_label_run_with_an_unannotated_class(tiny, grid, tmp_path: Path) -> None:
    write_overlapping_site(tmp_path / "sites/site-1", 16)
    write_overlapping_site(tmp_path / "sites/site-2", 24, annotated=("fluid",))
    config = tiny(data__root=str(tmp_path / "sites"), **SEVERAL)
    folder = run(grid(config, sites=2), config)
    lines = lines_of(folder)
    one, two, pooled = (lines[site].metrics for site in ("site-1", "site-2", POOLED))
    assert one.mask_classes["scar"].annotated == one.images
    assert two.mask_classes["scar"].annotated == 0
    assert two.mask_classes["scar"].dice is None
    assert two.mask_classes["fluid"].annotated == two.images
    assert pooled.mask_classes["scar"].dice == one.mask_classes["scar"].dice
    assert pooled.labelled == pooled.images
    for of_class in pooled.image_classes.values():
        assert 0 < of_class.positives < pooled.labelled
        assert of_class.positives + of_class.negatives == pooled.labelled
    assert lines["site-2"].train.loss_segmentation > 0
    environment = json.loads(folder.environment.read_text())["sites"]["site-2"]
    assert environment["with_mask"] == environment["examples"]
    assert sum(environment["classes"]["train"]) > environment["examples"]["train"]
    assert "-" in tables_of(folder)


def test_learned_task_weights_are_averaged_per_task(tiny, grid) -> None:
    """With masks at sites 2 and 3 only, the segmentation weight is their average by masks."""
    config = tiny(
        loss__weighting="uncertainty",
        phantom__without_masks="site-1",
        train__learning_rate=1e-2,
        rounds__count=2,
    )
    network = network_of(config.model, config.data, config.loss, seed=0)
    layout = Layout.of(network)
    replies: dict[int, tuple[dict[str, float], int, int]] = {}

    def keep(partition: int, reply: Message) -> Message:
        if reply.has_content() and wire.WEIGHTS in reply.content.array_records:
            record = reply.content.array_records[wire.WEIGHTS]
            state = layout.unpack({key: array.numpy() for key, array in record.items()})
            found = {name: state[f"uncertainty.{name}.value"].item() for name in start}
            sums = reply.content.metric_records[wire.SUMS]
            replies[partition] = found, sums[wire.WITH_MASK], sums[wire.WITH_LABEL]
        return reply

    start = {"segmentation": 0.0, "classification": math.log(4)}
    federation = grid(config)
    federation.tamper = keep
    folder = run(federation, config)
    state = load_file(folder.checkpoint(2))
    last = list(replies.values())
    for name, counts in (
        ("segmentation", [masks for _, masks, _ in last]),
        ("classification", [labels for _, _, labels in last]),
    ):
        averaged = state[f"uncertainty.{name}.value"].item()
        values = [found[name] for found, _, _ in last]
        assert averaged == pytest.approx(np.average(values, weights=counts), rel=1e-6)
        assert averaged != pytest.approx(start[name], abs=1e-3)
        assert len({round(value, 6) for value in values}) > 1
    assert last[0][1] == 0


def test_single_class_run_shows_only_the_main_table(tiny, grid) -> None:
    config = tiny(rounds__count=2)
    folder = run(grid(config), config)
    assert tables_of(folder) == ""
    rows = {site: line.metrics for site, line in lines_of(folder).items()}
    columns = [c.header for c in metrics_table("", rows, "malignant").columns]
    assert columns[:5] == ["site", "n", "lesions", "labels", "Dice"]
    assert "HD95" not in columns


def test_missing_distance_package_refuses_before_training(tiny, grid, monkeypatch) -> None:
    from polyclinic.mtl_model.distance import DistanceError
    from polyclinic.server.rounds.errors import RunRefused

    def missing() -> None:
        raise DistanceError("pip install 'polyclinic[metrics]'")

    monkeypatch.setattr("polyclinic.client.app.check_distances", missing)
    config = tiny(evaluate__hd95=True)
    federation = grid(config)
    with pytest.raises(RunRefused, match=r"polyclinic\[metrics\]"):
        run(federation, config)
    assert {m.metadata.message_type for m in federation.sent} == {wire.DESCRIBE}


OPTIONS = [
    {"block_order": "parallel", "upsample": "bilinear", "drop_path": 0.2},
    {"token_mixing": "published", "window": 2, "swin_depth": 2},
    {"head_stages": "1,2,3,4", "dfe": "concat", "dfe_rates": "1,2,3"},
    {"preset": "light", "width": 0, "depths": ""},
    {"backbone": "tf_efficientnet_lite0", "width": 0, "depths": "", "norm": "batch"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_network_option_trains_and_evaluates(tiny, grid, options: dict[str, object]) -> None:
    """Uses four-channel images that are neither square nor multiples of 16."""
    config = tiny(
        **{f"model__{name}": value for name, value in options.items()},
        data__image_height=40,
        data__image_width=56,
        data__channels=4,
        rounds__count=1,
    )
    federation = grid(config, 2)
    folder = run(federation, config)
    results = json.loads(folder.results.read_text())
    assert set(results["sites"]) == {"site-1", "site-2"}
    for site in results["sites"].values():
        assert site["dice"] >= 0
        assert site["accuracy"] >= 0
    before = network_of(config.model, config.data, config.loss, seed=config.run.seed).state_dict()
    after = load_file(folder.best)
    still = [n for n in before if torch.equal(after[n], before[n]) and "num_batches" not in n]
    assert not still


def test_missing_timm_backbone_at_a_site_fails_with_its_name(tiny, grid, monkeypatch) -> None:
    from polyclinic.mtl_model.backbone import BackboneError
    from polyclinic.server.rounds.errors import RunFailed

    def missing(*_: object, **__: object) -> None:
        raise BackboneError("model.backbone: timm 0.9 has no resnet18")

    monkeypatch.setattr("polyclinic.client.app.network_of", missing)
    monkeypatch.setattr("polyclinic.client.app._network", missing)
    config = tiny()
    with pytest.raises(RunFailed, match=r"timm 0\.9 has no resnet18"):
        run(grid(config), config)
