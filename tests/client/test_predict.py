"""Prediction with a finished model: equal for every format, at the images' original size."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from polyclinic.client.data.dataset import Example, load_site, to_batch
from polyclinic.client.data.images import Frame, Picture, read_picture
from polyclinic.client.data.manifest import read_sites
from polyclinic.client.predict import find, images_in, names_of, predict
from polyclinic.configs.model_metadata import ModelFileError, ModelMetadata
from polyclinic.configs.run import RunConfig
from polyclinic.mtl_model.backbone import BackboneError
from polyclinic.mtl_model.measure import predicted_masks
from polyclinic.mtl_model.saved import SavedModel, open_model, open_network


@pytest.fixture
def phantoms(finished_run: Path) -> Path:
    return finished_run.parent.parent / "phantoms" / "site-1" / "images"


def seeing(channels: int, **settings: str) -> SavedModel:
    """Build a stand-in for a trained model: mask k is where the image is brighter than k / 4."""
    flat = {"data.image-height": 64, "data.image-width": 64, "data.normalise": "fixed"}
    config = RunConfig.from_flat({**flat, **settings})

    def logits(x: Tensor) -> tuple[Tensor, Tensor]:
        brightness = x.mean(1, keepdim=True) * 0.25 + 0.5
        steps = torch.arange(channels)[:, None, None] / 4
        return 20 * (brightness - steps - 0.1), torch.tensor([[2.0, -1.0]])

    return SavedModel(ModelMetadata(config, 1, ""), "0" * 64, logits)


def pixels_of(path: Path) -> np.ndarray:
    with Image.open(path) as file:
        return np.asarray(file)


def predictions(folder: Path) -> dict[str, dict]:
    content = json.loads((folder / "predictions.json").read_text(encoding="utf-8"))
    return {Path(entry["image"]).name: entry for entry in content["images"]}


def test_predictions_are_equal_for_every_format_and_the_run(
    cli, exported: dict[str, Path], finished_run: Path, phantoms: Path, tmp_path: Path
) -> None:
    files = {kind: exported[kind] for kind in ("safetensors", "torchscript", "onnx")}
    models = {**files, "run": finished_run, "checkpoint": finished_run / "best.safetensors"}
    for name, model in models.items():
        status, out, err = cli("predict", model, phantoms, "--out", name)
        assert status == 0, err
        assert len(out.splitlines()) == len(list(phantoms.iterdir()))
    expected = predictions(tmp_path / "run")
    assert len(expected) == len(list(phantoms.iterdir())) > 5
    digests = set()
    for name in models:
        content = json.loads((tmp_path / name / "predictions.json").read_text())
        digests.add(content["model"]["weights_sha256"])
        for image, entry in predictions(tmp_path / name).items():
            for label, probability in entry["probabilities"].items():
                assert abs(probability - expected[image]["probabilities"][label]) < 1e-4
            ours, theirs = (
                pixels_of(folder / found["masks"]["lesion"])
                for folder, found in (
                    (tmp_path / name, entry),
                    (tmp_path / "run", expected[image]),
                )
            )
            assert (ours != theirs).sum() <= 3  # pixels with a logit of 0 up to rounding
    assert len(digests) == 1


def test_predictions_match_the_evaluation_at_sites(finished_run: Path, phantoms: Path) -> None:
    """At the network's input size, evaluation and prediction give the same masks."""
    metadata, network = open_network(finished_run / "best.safetensors")
    model = open_model(finished_run / "best.safetensors")
    manifest = read_sites(phantoms.parent.parent)["site-1"]
    examples = load_site(manifest, metadata.data).splits["test"]
    images = torch.from_numpy(examples.images)
    unknown = torch.zeros(len(images), 1)
    batch = Example(images, torch.zeros(len(images), 32, 32, 1), unknown, unknown, unknown)
    x, _ = to_batch(batch, metadata.data.normalise, torch.device("cpu"))
    with torch.no_grad():
        expected = network(x)
    masks = predicted_masks(expected.mask_logits, 1).numpy()
    shares = torch.softmax(expected.class_logits, dim=1)
    for k, pixels in enumerate(examples.images):
        original = Image.fromarray(pixels[..., 0])
        whole = Picture(original, pixels, Frame((32, 32), (slice(0, 32), slice(0, 32))))
        finding = find(model, whole)
        np.testing.assert_array_equal(finding.masks, masks[k])
        torch.testing.assert_close(torch.tensor(list(finding.probabilities.values())), shares[k])


@pytest.mark.parametrize("resize", ["pad", "stretch"])
@pytest.mark.parametrize("size", [(90, 200), (200, 90), (64, 64), (31, 40)])
def test_predicted_mask_aligns_with_the_original_image(
    tmp_path: Path, resize: str, size: tuple[int, int]
) -> None:
    """A bright rectangle is found in place after any resizing."""
    pixels = np.zeros(size, np.uint8)
    h, w = size
    pixels[h // 5 : h // 2, w // 4 : w // 2] = 255
    Image.fromarray(pixels).save(tmp_path / "image.png")
    model = seeing(1, **{"data.resize": resize, "data.mask-classes": "lesion"})
    picture = read_picture(tmp_path / "image.png", model.metadata.data)
    (mask,) = find(model, picture).masks
    bright = pixels > 0
    assert mask.shape == size
    assert (mask & bright).sum() / (mask | bright).sum() > 0.7
    rows, columns = np.nonzero(mask)
    assert abs(rows.mean() - np.nonzero(bright)[0].mean()) < 0.02 * h + 0.5
    assert abs(columns.mean() - np.nonzero(bright)[1].mean()) < 0.02 * w + 0.5


def shades(path: Path) -> Path:
    """Write an image of four stripes: black, and three brighter levels."""
    stripes = np.repeat(np.array([0, 80, 150, 250], np.uint8), 16)
    Image.fromarray(np.tile(stripes, (64, 1))).save(path)
    return path


def test_overlapping_classes_write_one_mask_file_per_class(tmp_path: Path) -> None:
    model = seeing(2, **{"data.mask-classes": "dim,a/b", "data.mask-kind": "overlapping"})
    (outcome,) = predict(model, [shades(tmp_path / "i.png")], tmp_path / "out", overlay=True)
    assert outcome.entry["masks"] == {"dim": "masks/dim/i.png", "a/b": "masks/class-2/i.png"}
    dim, bright = (pixels_of(tmp_path / "out" / f) for f in outcome.entry["masks"].values())
    assert set(np.unique(dim)) == {0, 255}
    assert 0 < bright.mean() < dim.mean()
    assert outcome.entry["area"]["dim"] == pytest.approx((dim > 0).mean())
    drawn = pixels_of(tmp_path / "out" / outcome.entry["overlay"])
    assert drawn.shape == (64, 64, 3)
    assert (drawn.max(axis=2) != drawn.min(axis=2)).any()


def test_exclusive_classes_write_one_index_mask(tmp_path: Path) -> None:
    model = seeing(3, **{"data.mask-classes": "dim,bright"})
    by_brightness = model.logits

    def exclusive(x: Tensor) -> tuple[Tensor, Tensor]:
        masks, classes = by_brightness(x)
        return torch.stack([-masks[:, 1], masks[:, 1], 2 * masks[:, 2]], dim=1), classes

    model = SavedModel(model.metadata, model.sha256, exclusive)
    (outcome,) = predict(model, [shades(tmp_path / "i.png")], tmp_path / "out", overlay=False)
    assert set(outcome.entry["masks"].values()) == {"masks/i.png"}
    assert set(np.unique(pixels_of(tmp_path / "out/masks/i.png"))) == {0, 1, 2}
    assert outcome.entry["classes"] == ["benign"]
    assert sum(outcome.entry["probabilities"].values()) == pytest.approx(1)


def test_multi_label_probabilities_are_independent(tmp_path: Path) -> None:
    model = seeing(1, **{"data.label-kind": "multi-label", "loss.classification": "soft-margin"})
    picture = read_picture(shades(tmp_path / "i.png"), model.metadata.data)
    finding = find(model, picture)
    assert finding.classes == ("benign",)
    assert list(finding.probabilities.values()) == pytest.approx([0.8808, 0.2689], abs=1e-4)


def test_unreadable_images_are_reported_and_others_predicted(
    cli, exported: dict[str, Path], phantoms: Path, tmp_path: Path
) -> None:
    good = sorted(phantoms.iterdir())[0]
    (tmp_path / "bad.png").write_bytes(good.read_bytes()[:200])
    status, out, err = cli(
        *("predict", exported["safetensors"], "bad.png", good, "gone.png"),
        *("--out", "there", "--json", "--overlay"),
    )
    assert status == 1
    assert "image bad.png: cannot be decoded" in err
    assert "image gone.png: no such file" in err
    assert "2 of 3 images could not be processed" in err
    content = json.loads(out)
    assert [entry["image"] for entry in content["images"]] == [str(good)]
    assert [entry["image"] for entry in content["failed"]] == ["bad.png", "gone.png"]
    size = pixels_of(good).shape
    for file in (*content["images"][0]["masks"].values(), content["images"][0]["overlay"]):
        assert pixels_of(tmp_path / "there" / file).shape[:2] == size
    assert content["model"]["sha256"] == open_model(exported["safetensors"]).sha256


def test_images_with_equal_names_get_distinct_outputs(tmp_path: Path) -> None:
    images = [Path("a/1.png"), Path("b/1.png"), Path("b/1.jpg"), Path("b/1-2.png"), Path("c/2.png")]
    names = names_of(images)
    assert names == ["1", "1-2", "1-3", "1-2-2", "2"]
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        shades(tmp_path / folder / "x.PNG")
    (tmp_path / "a" / "notes.txt").write_text("")
    found = images_in([tmp_path / "a" / "x.PNG", tmp_path])
    assert found == [tmp_path / "a" / "x.PNG", tmp_path / "b" / "x.PNG"]
    done = list(predict(seeing(1), found, tmp_path / "out", overlay=False))
    assert len({str(outcome.entry["masks"]) for outcome in done}) == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nothing", "."], "nothing: expected a model file or a run"),
        (["MODEL", "empty"], "empty: expected images"),
        (["MODEL", ".", "--out", "taken"], "taken already contains predictions.json"),
        (
            ["image.txt", "image.txt"],
            "image.txt: expected a file ending in .safetensors, .onnx, .pt",
        ),
    ],
)
def test_predict_user_errors_exit_2(
    cli, exported: dict[str, Path], tmp_path: Path, arguments: list[str], said: str
) -> None:
    for folder in ("empty", "taken"):
        (tmp_path / folder).mkdir()
    (tmp_path / "taken" / "predictions.json").write_text("{}")
    (tmp_path / "image.txt").write_text("")
    given = [str(exported["safetensors"]) if a == "MODEL" else a for a in arguments]
    status, out, err = cli("predict", *(["--out", "new"] if "--out" not in given else []), *given)
    assert (status, out) == (2, "")
    assert said in err
    assert not (tmp_path / "new").exists()


def test_non_finite_prediction_is_reported_and_not_written(tmp_path: Path) -> None:
    model = seeing(1)
    broken = replace(model, logits=lambda x: (model.logits(x)[0], torch.tensor([[math.nan, 0.0]])))
    Image.fromarray(np.full((20, 30), 90, np.uint8)).save(tmp_path / "grey.png")
    (outcome,) = predict(broken, [tmp_path / "grey.png"], tmp_path / "out", overlay=False)
    assert outcome.entry is None
    assert "grey.png: expected finite logits" in outcome.reason
    assert not (tmp_path / "out").exists()


def test_model_file_with_unavailable_backbone_is_refused(
    exported: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: object, **__: object) -> None:
        raise BackboneError("model.backbone: timm 0.9 has no resnet18")

    monkeypatch.setattr("polyclinic.mtl_model.saved.network_of", missing)
    with pytest.raises(ModelFileError, match=r"model.safetensors: its network cannot .*timm 0.9"):
        open_network(exported["safetensors"])
