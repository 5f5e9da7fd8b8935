"""Send single messages to a deployed site's app in this process, as a coordinator would."""

from __future__ import annotations

import csv
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from PIL import Image

from polyclinic.configs import wire
from polyclinic.configs.run import RunConfig
from polyclinic.mtl_model.network import MultiTaskUNet, network_of
from polyclinic.mtl_model.packing import Layout, Packed
from polyclinic.mtl_model.personal import personal_names

TINY = {
    "data.image-height": 32,
    "data.image-width": 32,
    "data.split": "independent",
    "model.backbone": "resnet18",
    "model.width": 16,
    "model.depths": "1,1,1,1",
    "model.swin-depth": 1,
    "model.head-channels": 8,
    "model.dfe": "sum",
    "model.drop-path": 0.0,
    "train.batch-size": 4,
    "evaluate.batch-size": 64,
    "rounds.count": 2,
}
PRIVATE = {
    "privacy.mode": "dp-sgd",
    "privacy.noise-multiplier": 1.0,
    "privacy.delta": 1e-3,
    "loss.class-weights": "none",
}
BUDGET = {"epsilon": 3, "delta": 0.001, "unit": "patient"}
COHORT = {"examples": 100, "patients": 100}
SITE_DATA = {
    "classes": ["benign", "malignant"],
    "mask-classes": ["lesion"],
    "val-fraction": 0.15,
    "test-fraction": 0.2,
}
RUN = secrets.token_hex(16)


@dataclass(frozen=True)
class Person:
    """One row of a site: a patient with one image."""

    group: str
    label: str
    side: int = 10  # side of the square lesion in pixels
    mask: bool = True


def people(count: int) -> list[Person]:
    """Make patients P000, P001, ...; a third of them are malignant."""
    return [Person(f"P{i:03d}", "benign" if i % 3 else "malignant") for i in range(count)]


def write_images(folder: Path, persons: Sequence[Person], size: int = 40) -> None:
    """Write a site's folder with one image per person, determined by the person's group."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for person in persons:
        random = np.random.default_rng(int.from_bytes(person.group.encode(), "little") % 2**31)
        image = random.integers(0, 256, (size, size), dtype=np.uint8)
        mask = np.zeros((size, size), np.uint8)
        mask[5 : 5 + person.side, 5 : 5 + person.side] = 255
        image[mask > 0] //= 3
        Image.fromarray(image).save(folder / f"{person.group}.png")
        row = {"image": f"{person.group}.png", "label": person.label, "group": person.group}
        if person.mask:
            Image.fromarray(mask).save(folder / f"{person.group}_mask.png")
            row["mask"] = f"{person.group}_mask.png"
        rows.append(row)
    with (folder / "labels.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def run_config(**changes: object) -> RunConfig:
    """Build a config of a tiny network, with changes by keyword (``data__split_seed=1``)."""
    named = {key.replace("__", ".").replace("_", "-"): value for key, value in changes.items()}
    return RunConfig.from_flat({**TINY, **named})


def private_config(**changes: object) -> RunConfig:
    """Build the same config with differential privacy at the sites."""
    named = {key.replace("__", ".").replace("_", "-"): value for key, value in changes.items()}
    return RunConfig.from_flat({**TINY, **PRIVATE, **named})


def network_weights(config: RunConfig, seed: int = 0) -> tuple[Layout, Packed, MultiTaskUNet]:
    """Return layout and weights as the server sends them, and their network."""
    network = network_of(config.model, config.data, config.loss, seed=seed)
    return *packed(config, network), network


def packed(config: RunConfig, network: torch.nn.Module) -> tuple[Layout, Packed]:
    """Pack a network's weights as the server sends them."""
    shared, _ = Layout.of(network).parts(personal_names(network, config.strategy.personal))
    return shared, shared.pack(network.state_dict())


def ask(
    site_file: Path,
    kind: str,
    config: RunConfig,
    weights: tuple[Layout, Packed] | None = None,
    *,
    number: int = 1,
    split: str = wire.VAL_SPLIT,
    run: str = RUN,
) -> Message:
    """Send a message of a kind (``query.describe``, ``train``, ``evaluate``); returns the reply."""
    from apps import client

    asked: dict[str, object] = {wire.NUMBER: number, wire.RUN: run, wire.SPLIT: split}
    content = RecordDict()
    if weights is not None:
        layout, arrays = weights
        asked[wire.LAYOUT] = layout.digest
        content[wire.WEIGHTS] = ArrayRecord({k: Array(v) for k, v in arrays.items()})
    content[wire.ROUND] = ConfigRecord(asked)
    message = Message(content, dst_node_id=1, message_type=kind)
    context = Context(
        run_id=1,
        node_id=1,
        node_config={"site-config": str(site_file)},
        state=RecordDict(),
        run_config=config.to_flat(),
    )
    return client(message, context)


def shown(reply: Message) -> Mapping[str, object]:
    """Return everything in a reply except its weights and its duration."""
    content = reply.content
    found = {**content.config_records[wire.SITE], **content.metric_records[wire.SUMS]}
    return {key: value for key, value in found.items() if key != wire.SECONDS}
