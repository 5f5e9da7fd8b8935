"""Write the model card of an exported model from its run.

The sections follow Mitchell et al., "Model Cards for Model Reporting", 2019. All information is
from the run folder and the exported file. The model's owner fills in the rest.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from polyclinic.configs import wire
from polyclinic.configs.model_metadata import outputs, preprocessing
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
    """Evaluation results of the exported round."""

    split: str  # the test split, or else the validation split
    metrics: dict[str, Metrics]  # metrics of each site, then of all together (POOLED)
    failed: dict[str, str]  # reasons of the sites without results


def model_card(folder: RunFolder, exported: Exported) -> str:
    """Return the model card of an exported model as Markdown.

    Args:
        folder: folder of the run.
        exported: the exported file.
    """
    config = read_run_config(folder.config)
    environment = _json(folder.environment.read_text(encoding="utf-8"))
    sites = dict(environment.get("sites", {}))
    number = exported.metadata.round
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
        "A multi-task UNet based on arXiv 2412.00351. The encoder combines convolutions with "
        "windowed attention. A segmentation decoder and a classification head share it.",
        _settings(config, "model"),
        "## Intended use",
        f"{OWNER} intended use, intended users, and uses out of scope.",
        "## Factors",
        f"Results are reported for each site ({', '.join(sites)}) and for all sites together, and "
        "per class if there are several. The run has no information on other groups (age, sex, "
        "scanner).",
        f"{OWNER} groups and conditions that are relevant for the intended use.",
        "## Metrics",
        _metrics_text(config),
        "## Evaluation data",
        "Images that each site held out, split by group (patient) if groups were given. None of "
        "them was used to train the model or to select the round.",
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
        "## How to use the model",
        _usage(config, exported),
        "## Caveats and recommendations",
        "### Limitations",
        f"{OWNER} known limitations, and populations or devices that the data does not cover.",
        "## Approved by",
        f"{OWNER} name, role, date.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _json(text: str) -> dict[str, Any]:
    return dict(json.loads(text))


def _details(
    folder: RunFolder, config: RunConfig, exported: Exported, environment: Mapping[str, Any]
) -> str:
    metadata = exported.metadata
    outcome = folder.read_outcome()
    best = outcome.get("best_round", outcome.get("best-round"))  # earlier versions wrote best-round
    how = f"round {metadata.round} of {config.rounds.count}"
    if best == metadata.round:
        how += f", the best round by {config.evaluate.select_by} on the validation images"
    versions = ", ".join(f"{k} {v}" for k, v in environment.get("versions", {}).items())
    rows = {
        "run": f"{folder.name}, started {environment.get('started', 'at an unknown time')}, "
        f"{outcome.get('status', 'not finished')}",
        "selected round": how,
        "file": f"{exported.path.name} ({exported.format}, {exported.bytes:,} bytes)",
        "sha256 of the file": f"`{exported.sha256}`",
        "sha256 of the run's checkpoint": f"`{metadata.weights_sha256}`",
        "network layout": f"`{metadata.layout}`",
        "parameters": f"{exported.parameters:,}",
        "mask classes": f"{', '.join(config.data.mask_classes)} ({config.data.mask_kind})",
        "image classes": f"{', '.join(config.data.classes)} ({config.data.label_kind})",
        "trained with": versions,
        "difference from the network": "; ".join(map(str, exported.parity))
        + f"; over {len(exported.inputs)} inputs",
    }
    return _table(("", ""), rows.items()) + f"\n\n{OWNER} licence, contact."


def _settings(config: RunConfig, section: str) -> str:
    """Return a table of one section of the run's settings."""
    rows = [
        (f"`{key}`", str(value) if value != "" else "-")
        for key, value in config.to_flat().items()
        # paths on the coordinator's machine are left out
        if key.startswith(f"{section}.") and not (key == "model.pretrained" and "/" in str(value))
    ]
    return _table(("setting", "value"), rows)


def _sections_of_training(config: RunConfig) -> tuple[str, ...]:
    central = () if config.central.mode == "off" else ("central",)
    return ("strategy", "train", "loss", *central)


def _metrics_text(config: RunConfig) -> str:
    kind = (
        "Accuracy: share of images with all classes correct."
        if config.data.label_kind == "multi-label"
        else "Balanced accuracy: mean sensitivity of the classes."
    )
    distance = (
        " HD95: 95th percentile of the distances between the outlines, in pixels of the resized "
        "image. It is the mean over images in which both the annotation and the prediction have "
        "an outline; images with an empty prediction do not count."
    )
    return (
        "Dice and IoU: means over the images that show a mask class (with several classes, the "
        "mean of the classes' means). Pooled Dice: computed over all pixels of these images "
        "together. False pos.: share of the images without the class in which the model predicted "
        f"it. Sensitivity, specificity and AUC: {config.data.positive} against all other classes. "
        f"{kind} n: number of images. A dash means that there were not enough images to define the "
        f"value. AUC is computed from histograms of {BINS} bins."
        f"{distance if config.evaluate.hd95 else ''}"
    )


def counts_table(
    sites: Mapping[str, Mapping[str, Any]], splits: Sequence[str], classes: Sequence[str]
) -> str:
    """Return a Markdown table of each site's images per split, annotation and class."""
    rows = [
        (
            site,
            split,
            *(str(about[key][split]) for key in ("examples", "with_mask", "with_label")),
            *map(str, about["classes"].get(split, ["not reported"] * len(classes))),
        )
        for site, about in sites.items()
        for split in splits
    ]
    return _table(("site", "split", "images", "with mask", "with label", *classes), rows)


def _origin(config: RunConfig) -> str:
    text = (
        f"Images of the sites, resized to {config.data.image_height} rows by "
        f"{config.data.image_width} columns, {config.data.channels} channel(s)."
    )
    if not config.data.root:
        text += (
            " `data.root` was empty: simulated sites used phantoms (synthetic images of no "
            "patient), deployed sites used their own images."
        )
    return text


def _left_out(sites: Mapping[str, Mapping[str, Any]]) -> str:
    counts = ", ".join(f"{site} {len(about['skipped'])}" for site, about in sites.items())
    prints = [(site, f"`{about['fingerprint']}`") for site, about in sites.items()]
    return f"Rows that were left out because they could not be used: {counts}.\n\n" + _table(
        ("site", "sha256 of its images, masks and labels as read"), prints
    )


def _procedure(config: RunConfig, number: int) -> str:
    return (
        f"Federated training: the model is from round {number} of {config.rounds.count}. In each "
        f"round the sites (at least: {config.rounds.min_sites}, `rounds.min-sites`) trained it on "
        "their own images, and the server averaged their weights per task "
        f"({config.strategy.name}){_how_central(config)}. Seed: {config.run.seed}."
    )


def _how_central(config: RunConfig) -> str:
    if config.central.mode == "off":
        return ""
    return ", with equal weights of the sites, clipped updates, and noise on the average"


def _evaluated(folder: RunFolder, number: int) -> Evaluated | None:
    """Read the test results if they are of this round, otherwise its validation results."""
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
        yield f"The run has no evaluation results of round {number}."
        return
    if evaluated.split == wire.TEST_SPLIT:
        yield "On the held-out test images:"
    else:
        yield (
            "On the **validation** images, which also selected the best round. Round "
            f"{number} was not tested on the held-out test images."
        )
    yield markdown(metrics_table("", evaluated.metrics, config.data.positive))
    for table in class_tables(evaluated.metrics, config.data):
        yield f"{table.title}:"
        yield markdown(table)
    for site in evaluated.failed:
        yield f"Site {site} returned no results."


def _privacy(config: RunConfig, folder: RunFolder, number: int) -> str:
    parts = [_privacy_of_sites(config, folder, number)]
    if config.central.mode != "off":
        parts.append(_central_privacy(folder))
    elif config.privacy.mode == "off":
        parts.append(
            "No differential privacy was used. The weights in this file can reveal information "
            "about the images that they were trained on."
        )
    return "\n\n".join(parts)


def _central_privacy(folder: RunFolder) -> str:
    # All rounds count, even if this model is from an earlier one: the best round was selected among
    # all of them, and every site received each average.
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
            "**Central differential privacy** protects each site as one unit. The server clipped "
            "each site's update and added noise to the average. Including or excluding the updates "
            "of one site changes the probability of any averaged models of the run by a factor of "
            "at most e^(central epsilon), except with probability delta. This guarantee holds "
            "against anyone who sees averaged models, but not against the server. It does not "
            "state how well a single patient is protected, and it does not cover the results "
            "above, which are exact. The table covers all rounds of this run, and no other run:",
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
    }  # the last report of each site up to this model's round
    unit = {"example": "one image", "patient": "all images of one patient"}[config.privacy.unit]
    rows = [(site, f"{epsilon:.2f}", f"{delta:g}") for site, (epsilon, delta) in spent.items()]
    return "\n\n".join(
        (
            "Images, masks and labels stayed at the sites, and each site trained with differential "
            f"privacy (DP-SGD). Including or excluding {unit} in a site's training data changes "
            "the probability of any weights that the site sent by a factor of at most e^epsilon, "
            "except with probability delta. Validation and test images are not covered: the sites "
            "sent sums over them without noise. The values below are from each site's ledger and "
            "include all rounds and earlier runs on the same patients:",
            _table(("site", f"epsilon ({config.privacy.unit})", "delta"), rows),
        )
    )


_WITHOUT_PRIVACY = (
    "Images, masks and labels stayed at the sites. Each site sent its weights after each round, "
    "counts of images per split and class, losses, and sums over its validation and test images, "
    "all **without noise**. The server saw each site's weights before it averaged them."
)


def _usage(config: RunConfig, exported: Exported) -> str:
    about, results = preprocessing(config.data), outputs(config.data)
    steps = "\n".join(f"{i}. {step}" for i, step in enumerate(about["steps"], start=1))
    rows = [
        (
            f"`{name}`",
            f"({', '.join(map(str, out['shape']))})",
            ", ".join(out["channels"]),
            out["activation"],
            out["decide"],
        )
        for name, out in results.items()
    ]
    command = f"polyclinic predict {exported.path.name} IMAGES --out predictions --overlay"
    return "\n\n".join(
        (
            f"```\n{command}\n```",
            "In your own program:",
            f"```python\n{snippet(config.data, exported.format, exported.path.name)}```",
            f"Preprocessing:\n\n{steps}",
            _table(("output", "shape", "channels", "activation", "decision"), rows),
            "The file's metadata contain the same information. ONNX and TorchScript files are "
            "executed when they are used: only open files that you trust, and compare the sha256 "
            "above.",
        )
    )


def markdown(table: Table) -> str:
    """Convert a table for the terminal to Markdown."""
    columns = [list(column.cells) for column in table.columns]
    rows = [tuple(map(str, row)) for row in zip(*columns, strict=True)]
    return _table([str(column.header) for column in table.columns], rows)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    escaped = ([cell.replace("|", "\\|") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped)
