"""A model card: what an exported model is, filled in from its run; the rest is left to its owner.

Sections after Mitchell et al., "Model Cards for Model Reporting", 2019. Nothing stands here that
the run folder and the exported file do not say.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from polyclinic.configs import wire
from polyclinic.configs.passport import outputs, preprocessing
from polyclinic.configs.presets import read_run_config
from polyclinic.configs.run import RunConfig
from polyclinic.mtl_model.metrics import Metrics
from polyclinic.mtl_model.sums import BINS
from polyclinic.server.export.export import Exported
from polyclinic.server.export.snippet import snippet
from polyclinic.server.runs.central_releases import read_releases
from polyclinic.server.runs.folder import RunFolder
from polyclinic.server.runs.history import POOLED, read_history
from polyclinic.server.runs.tables import class_tables, metrics_table

OWNER = "**To be filled in by the model's owner:**"


@dataclass(frozen=True)
class Evaluated:
    """What is known of the exported round's values."""

    split: str
    metrics: dict[str, Metrics]  # by site, then POOLED
    failed: dict[str, str]  # sites without values, and why


def model_card(folder: RunFolder, exported: Exported) -> str:
    """Write the card of an exported model, as Markdown."""
    config = read_run_config(folder.config)
    environment = _json(folder.environment.read_text(encoding="utf-8"))
    sites = dict(environment.get("sites", {}))
    number = exported.passport.round
    evaluated = _evaluated(folder, number)
    classes = config.data.classes
    parts = [
        "---\nlibrary_name: polyclinic\npipeline_tag: image-segmentation\ntags:\n"
        "- medical-imaging\n- federated-learning\n- segmentation\n- classification\n---",
        f"# {folder.name}, round {number}",
        "This model is not a medical device. It has not been assessed or approved for diagnosis, "
        "treatment or any other clinical use.",
        "## Model details",
        _details(folder, config, exported, environment),
        "### Architecture",
        "A multi-task UNet after arXiv 2412.00351: an encoder of convolutions beside windowed "
        "attention, shared by a decoder that outlines and a head that classifies.",
        _settings(config, "model"),
        "## Intended use",
        f"{OWNER} intended use, intended users, and uses out of scope.",
        "## Factors",
        f"Values are given for each site ({', '.join(sites)}) and for all together; with several "
        "classes also by class. Other groups (age, sex, scanner) are not known to the run.",
        f"{OWNER} groups and conditions that matter for the intended use.",
        "## Metrics",
        _metrics_text(config),
        "## Evaluation data",
        "Images that each site held out, divided by group (patient) where groups were given; none "
        "of them trained the model or chose the round.",
        counts_table(sites, (wire.TEST_SPLIT,), classes),
        "## Training data",
        _origin(config),
        counts_table(sites, (wire.TRAIN_SPLIT, wire.VAL_SPLIT), classes),
        _left_out(sites),
        "### Training procedure",
        _procedure(config, number),
        *(_settings(config, section) for section in _sections_of_training(config)),
        "## Quantitative analyses",
        *_analyses(config, evaluated, number),
        "## Ethical considerations",
        _privacy(config, folder, number),
        "## How to use it",
        _usage(config, exported),
        "## Caveats and recommendations",
        "### Limitations",
        f"{OWNER} known limitations, and populations or devices that the data do not cover.",
        "## Approved by",
        f"{OWNER} name, role, date.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _json(text: str) -> dict[str, Any]:
    return dict(json.loads(text))


def _details(
    folder: RunFolder, config: RunConfig, exported: Exported, environment: Mapping[str, Any]
) -> str:
    passport = exported.passport
    outcome = _json(folder.outcome.read_text("utf-8")) if folder.outcome.is_file() else {}
    how = f"round {passport.round} of {config.rounds.count}"
    if outcome.get("best-round") == passport.round:
        how += f", the best by {config.evaluate.select_by} on the validation images"
    versions = ", ".join(f"{k} {v}" for k, v in environment.get("versions", {}).items())
    rows = {
        "run": f"{folder.name}, started {environment.get('started', 'at an unknown time')}, "
        f"{outcome.get('status', 'not ended')}",
        "chosen": how,
        "file": f"{exported.path.name} ({exported.format}, {exported.bytes:,} bytes)",
        "sha256 of the file": f"`{exported.sha256}`",
        "sha256 of the run's checkpoint": f"`{passport.weights_sha256}`",
        "network layout": f"`{passport.layout}`",
        "parameters": f"{exported.parameters:,}",
        "mask classes": f"{', '.join(config.data.mask_classes)} ({config.data.mask_kind})",
        "image classes": f"{', '.join(config.data.classes)} ({config.data.label_kind})",
        "trained with": versions,
        "difference from the network": "; ".join(map(str, exported.parity))
        + f"; over {len(exported.inputs)} inputs",
    }
    return _table(("", ""), rows.items()) + f"\n\n{OWNER} licence, contact."


def _settings(config: RunConfig, section: str) -> str:
    """One section of the run's settings."""
    rows = [
        (f"`{key}`", str(value) if value != "" else "-")
        for key, value in config.to_flat().items()
        # a path of the coordinator's machine, or a name
        if key.startswith(f"{section}.") and not (key == "model.pretrained" and "/" in str(value))
    ]
    return _table(("setting", "value"), rows)


def _sections_of_training(config: RunConfig) -> tuple[str, ...]:
    central = () if config.central.mode == "off" else ("central",)
    return ("strategy", "train", "loss", *central)


def _metrics_text(config: RunConfig) -> str:
    kind = (
        "Accuracy counts images whose classes are all right."
        if config.data.label_kind == "multi-label"
        else "Balanced accuracy is the mean sensitivity of the classes."
    )
    distance = (
        " HD95: 95th percentile of the distances between the outlines, in pixels of the resized "
        "image, mean over the images where both were drawn: one where the model drew nothing does "
        "not count."
    )
    return (
        "Dice and IoU: means over the images that show a mask class (with several classes, the "
        "mean of the classes' means); pooled Dice: one over all their pixels. False pos.: of the "
        "images without the class, the share in which it was drawn. Sensitivity, specificity and "
        f"AUC: {config.data.positive} against the rest. {kind} n counts images; a dash is a value "
        f"that is not defined for lack of images. AUC comes from histograms of {BINS} bins."
        f"{distance if config.evaluate.hd95 else ''}"
    )


def counts_table(
    sites: Mapping[str, Mapping[str, Any]], splits: Sequence[str], classes: Sequence[str]
) -> str:
    """Images of each site by split, with what is annotated."""
    rows = [
        (
            site,
            split,
            *(str(about[key][split]) for key in ("examples", "with_mask", "with_label")),
            *map(str, about["classes"].get(split, ["not told"] * len(classes))),
        )
        for site, about in sites.items()
        for split in splits
    ]
    return _table(("site", "split", "images", "with mask", "with label", *classes), rows)


def _origin(config: RunConfig) -> str:
    text = (
        f"Images as each site has them, brought to {config.data.image_height} rows by "
        f"{config.data.image_width} columns, {config.data.channels} channel(s)."
    )
    if not config.data.root:
        text += (
            " `data.root` was empty: sites that were simulated drew phantoms, synthetic images "
            "that show no patient; deployed sites used their own."
        )
    return text


def _left_out(sites: Mapping[str, Mapping[str, Any]]) -> str:
    counts = ", ".join(f"{site} {len(about['skipped'])}" for site, about in sites.items())
    prints = [(site, f"`{about['fingerprint']}`") for site, about in sites.items()]
    return f"Rows that could not be used and were left out: {counts}.\n\n" + _table(
        ("site", "sha256 of its images, masks and labels as read"), prints
    )


def _procedure(config: RunConfig, number: int) -> str:
    return (
        f"Federated: the model is that of round {number} of {config.rounds.count}. In each round "
        f"the sites (at least: {config.rounds.min_sites}, `rounds.min-sites`) trained it on their "
        "own images, and the server averaged their weights task by task "
        f"({config.strategy.name}){_how_central(config)}. Seed {config.run.seed}."
    )


def _how_central(config: RunConfig) -> str:
    if config.central.mode == "off":
        return ""
    return ", each site counting alike, its update clipped, and noise on the average"


def _evaluated(folder: RunFolder, number: int) -> Evaluated | None:
    """The test results if they are of this round's model, else what validation said of it."""
    if folder.results.is_file():
        results = _json(folder.results.read_text(encoding="utf-8"))
        if results["round"] == number:
            values = {**results["sites"], POOLED: results[POOLED]}
            metrics = {site: Metrics.from_json(content) for site, content in values.items()}
            return Evaluated(wire.TEST_SPLIT, metrics, dict(results["failed"]))
    lines = [
        line
        for line in read_history(folder.history)
        if line.round == number and line.split == wire.VAL_SPLIT
    ]
    metrics = {line.site: line.metrics for line in lines if line.metrics}
    failed = {line.site: line.lost["evaluate"] for line in lines if "evaluate" in line.lost}
    return Evaluated(wire.VAL_SPLIT, metrics, failed) if metrics else None


def _analyses(config: RunConfig, evaluated: Evaluated | None, number: int) -> Iterable[str]:
    if evaluated is None:
        yield f"The run has no values of round {number}."
        return
    if evaluated.split == wire.TEST_SPLIT:
        yield "On the held-out test images:"
    else:
        yield (
            f"On the **validation** images, by which the best round was chosen. Round {number} was "
            "not tested on the held-out test images."
        )
    yield markdown(metrics_table("", evaluated.metrics, config.data.positive))
    for table in class_tables(evaluated.metrics, config.data):
        yield f"{table.title}:"
        yield markdown(table)
    for site in evaluated.failed:
        yield f"No values of {site}, which gave none."


def _privacy(config: RunConfig, folder: RunFolder, number: int) -> str:
    parts = [_privacy_of_sites(config, folder, number)]
    if config.central.mode != "off":
        parts.append(_central_privacy(folder))
    elif config.privacy.mode == "off":
        parts.append(
            "No differential privacy was used: weights can reveal something of the images that "
            "they were trained on, and this file is such weights."
        )
    return "\n\n".join(parts)


def _central_privacy(folder: RunFolder) -> str:
    # all rounds, also where this model is an earlier one's: the best was chosen among them, and
    # every site was sent each
    releases = read_releases(folder.central)
    rows = [
        (
            str(len(releases)),
            str(last.sites),
            f"{last.noise_multiplier:g}",
            f"{last.epsilon:.2f}",
            f"{last.delta:g}",
        )
        for last in releases[-1:]
    ]
    return "\n\n".join(
        (
            "The consortium's **central differential privacy** has another unit, a whole site: the "
            "server clipped each site's update and put noise on the average, and whether a site's "
            "updates were among those averaged or not changes the probability of any averaged "
            "models of the run by a factor of e^(central epsilon) at most, but for a probability "
            "of delta. That holds against whoever sees averaged models, not against the server; it "
            "is no statement of how much a single patient is protected, and does not cover the "
            "values above, which are exact. All rounds of this run together, and no other run:",
            _table(
                ("averages", "sites", "noise multiplier", "central epsilon (site)", "delta"), rows
            ),
        )
    )


def _privacy_of_sites(config: RunConfig, folder: RunFolder, number: int) -> str:
    if config.privacy.mode == "off":
        return _WITHOUT_PRIVACY
    spent = {
        line.site: (line.train.epsilon, line.train.delta)
        for line in read_history(folder.history)
        if line.train and line.train.epsilon is not None and line.round <= number
    }  # the last of each site, up to this model's round
    unit = {"example": "one image", "patient": "all images of one patient"}[config.privacy.unit]
    rows = [(site, f"{epsilon:.2f}", f"{delta:g}") for site, (epsilon, delta) in spent.items()]
    return "\n\n".join(
        (
            "Images, masks and labels stayed at the sites, and each site trained with differential "
            f"privacy (DP-SGD): whether {unit} was among a site's training images or not changes "
            "the probability of any weights that left it by a factor of e^epsilon at most, but for "
            "a probability of delta. Validation and test images are not covered: sums over them "
            "left without noise. As each site's ledger counts, all rounds and earlier runs on the "
            "same patients included:",
            _table(("site", f"epsilon ({config.privacy.unit})", "delta"), rows),
        )
    )


_WITHOUT_PRIVACY = (
    "Images, masks and labels stayed at the sites. What left each site: its weights after each "
    "local round, counts of images by split and class, losses, and sums over its validation "
    "and test images, all **without noise**. The server saw each site's weights before it averaged "
    "them."
)


def _usage(config: RunConfig, exported: Exported) -> str:
    about, said = preprocessing(config.data), outputs(config.data)
    steps = "\n".join(f"{i}. {step}" for i, step in enumerate(about["steps"], start=1))
    rows = [
        (
            f"`{name}`",
            f"({', '.join(map(str, out['shape']))})",
            ", ".join(out["channels"]),
            out["activation"],
            out["decide"],
        )
        for name, out in said.items()
    ]
    command = f"polyclinic predict {exported.path.name} IMAGES --out predictions --overlay"
    return "\n\n".join(
        (
            f"```\n{command}\n```",
            "In a program of one's own:",
            f"```python\n{snippet(config.data, exported.format, exported.path.name)}```",
            f"Preprocessing:\n\n{steps}",
            _table(("output", "shape", "channels", "activation", "decision"), rows),
            "The file's metadata say the same. An ONNX file is a graph and a TorchScript file a "
            "program, and both are run: only open those you trust, and compare the sha256 above.",
        )
    )


def markdown(table: Table) -> str:
    """A table that was made for a terminal, as Markdown."""
    columns = [list(column.cells) for column in table.columns]
    rows = [tuple(map(str, row)) for row in zip(*columns, strict=True)]
    return _table([str(column.header) for column in table.columns], rows)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    escaped = ([cell.replace("|", "\\|") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped)
