"""Model cards: they match the run, mark the owner's sections, and contain working code."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from polyclinic.client.data.dataset import normalised
from polyclinic.client.data.images import read_picture
from polyclinic.client.predict import find
from polyclinic.configs.schema.data import DataConfig
from polyclinic.mtl_model.measure import predicted_masks
from polyclinic.mtl_model.saved import open_model, torchscript_deprecated
from polyclinic.server.export.model_card import OWNER
from polyclinic.server.export.snippet import snippet


def card_of(path: Path) -> str:
    return path.with_name(f"{path.name}.md").read_text(encoding="utf-8")


def section(card: str, title: str) -> str:
    return card.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def test_card_has_the_standard_sections_in_order(exported: dict[str, Path]) -> None:
    titles = re.findall(r"^## (.+)$", card_of(exported["torchscript"]), re.MULTILINE)
    assert titles == [
        "Model details",
        "Intended use",
        "Factors",
        "Metrics",
        "Evaluation data",
        "Training data",
        "Quantitative analyses",
        "Ethical considerations",
        "How to use the model",
        "Caveats and recommendations",
        "Approved by",
    ]


def test_card_matches_the_run_and_the_file(exported: dict[str, Path], finished_run: Path) -> None:
    card = card_of(exported["torchscript"])
    environment = json.loads((finished_run / "environment.json").read_text())
    results = json.loads((finished_run / "results.json").read_text())
    for site, about in environment["sites"].items():
        for part, splits in (("Evaluation data", ["test"]), ("Training data", ["train", "val"])):
            for split in splits:
                counts = [
                    *(about[key][split] for key in ("examples", "with_mask", "with_label")),
                    *about["classes"][split],
                ]
                row = f"| {site} | {split} | {' | '.join(map(str, counts))} |"
                assert row in section(card, part)
        assert about["fingerprint"] in section(card, "Training data")
        metrics = results["sites"][site]
        row = f"| {site} | {metrics['images']} | {metrics['lesions']} | {metrics['labelled']} | "
        assert f"{row}{metrics['dice']:.3f} |" in section(card, "Quantitative analyses")
    details = section(card, "Model details")
    assert open_model(exported["torchscript"]).sha256 in details
    assert open_model(finished_run / "best.safetensors").sha256 in details
    assert f"round {results['round']} of 2, the best round by score" in details
    assert "| `model.backbone` | resnet18 |" in details
    assert "not a medical device" in card
    assert "No differential privacy was used" in card
    assert str(finished_run.parent) not in card


def test_card_marks_sections_for_the_owner(exported: dict[str, Path]) -> None:
    card = card_of(exported["torchscript"])
    for title in ("Intended use", "Caveats and recommendations", "Approved by"):
        assert OWNER in section(card, title)


def test_card_of_an_untested_round_says_so(
    cli, exported: dict[str, Path], finished_run: Path, tmp_path: Path
) -> None:
    best = json.loads((finished_run / "results.json").read_text())["round"]
    other = 3 - best
    assert cli("export", finished_run, "--round", other, "--out", "m.safetensors")[0] == 0
    analyses = section(card_of(tmp_path / "m.safetensors"), "Quantitative analyses")
    assert f"Round {other} was not tested" in analyses
    assert "| site-1 |" in analyses
    assert "not tested" not in section(card_of(exported["torchscript"]), "Quantitative analyses")


@pytest.mark.parametrize(
    "kind", [pytest.param("onnx", marks=pytest.mark.long), "torchscript", "safetensors"]
)
def test_card_code_matches_predict(
    exported: dict[str, Path], tmp_path: Path, monkeypatch, capsys, kind: str
) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", card_of(exported[kind]), re.DOTALL)
    monkeypatch.chdir(exported[kind].parent)
    image = Path("image.png")
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70), dtype=np.uint8)
    Image.fromarray(pixels).save(image)
    said: dict[str, object] = {}
    with torchscript_deprecated():  # the warning is meant for users of the code
        exec(compile(code, "card", "exec"), said)
    assert "malignant" in capsys.readouterr().out
    model = open_model(exported[kind])
    picture = read_picture(image, model.metadata.data)
    finding = find(model, picture)
    np.testing.assert_allclose(said["probabilities"], list(finding.probabilities.values()), 1e-4)
    logits, _ = model.logits(normalised(torch.from_numpy(picture.pixels)[None], "image"))
    assert model.metadata.data.normalise == "image"
    wanted = predicted_masks(logits, 1).numpy()
    assert said["masks"].shape == wanted.shape == (1, 1, 32, 32)
    assert 0 < (said["masks"] != ~wanted).sum() >= wanted.size - 3  # up to rounding at 0


@pytest.mark.parametrize(
    "settings",
    [
        {"mask-classes": "mass,vessel"},
        {"mask-classes": "mass,vessel", "mask-kind": "overlapping", "label-kind": "multi-label"},
    ],
)
def test_card_code_postprocessing_matches_sites(settings: dict[str, str], capsys) -> None:
    """The code after the model, for data kinds that the run of the other tests lacks."""
    data = DataConfig.model_validate(settings)
    random = np.random.default_rng(0)
    said = {
        "np": np,
        "mask_logits": random.normal(size=(1, data.mask_channels, 8, 9)),
        "class_logits": random.normal(size=(1, 2)),
    }
    code = snippet(data, "onnx", "m.onnx").partition('{"images": x})')[2]
    exec(compile(code, "card", "exec"), said)
    planes = predicted_masks(torch.from_numpy(said["mask_logits"]), 2).numpy()
    for k in range(2):
        ours = said["masks"] == k + 1 if data.indexed_masks else said["masks"][:, k]
        assert planes[:, k].any()
        assert np.array_equal(ours, planes[:, k])
    logits = torch.from_numpy(said["class_logits"])[0]
    several = data.label_kind == "multi-label"
    shares = torch.sigmoid(logits) if several else torch.softmax(logits, dim=0)
    np.testing.assert_allclose(said["probabilities"], shares)


@pytest.mark.parametrize(
    ("settings", "depth"),
    [
        ({"resize": "stretch", "normalise": "fixed", "channels": 3}, np.uint8),
        ({"channels": 4, "image-width": 48}, np.uint8),
        ({"mask-classes": "mass,vessel", "label-kind": "multi-label"}, np.uint8),
        ({"image-height": 48}, np.uint16),
        ({"channels": 3}, np.uint16),
    ],
)
def test_card_code_preprocessing_matches_sites(
    tmp_path: Path, monkeypatch, settings, depth
) -> None:
    """The code before the model, for settings and images that the run of the other tests lacks."""
    data = DataConfig.model_validate(settings)
    monkeypatch.chdir(tmp_path)
    shape = (50, 71, 4) if depth == np.uint8 else (50, 71)
    pixels = np.random.default_rng(0).integers(0, np.iinfo(depth).max, shape, dtype=depth)
    Image.fromarray(pixels).save("image.png")
    code, run, _ = snippet(data, "onnx", "m.onnx").partition("session = ")
    assert run
    said: dict[str, np.ndarray] = {}
    exec(compile(code, "card", "exec"), said)
    picture = read_picture(Path("image.png"), data)
    expected = normalised(torch.from_numpy(picture.pixels)[None], data.normalise)
    np.testing.assert_allclose(said["x"], expected, rtol=1e-4, atol=1e-5)
