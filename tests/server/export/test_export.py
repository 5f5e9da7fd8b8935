"""Exporting a run's model: equal to the network, or refused."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from polyclinic.configs import VERSION
from polyclinic.configs.model_metadata import KEYS, ModelFileError, ModelMetadata
from polyclinic.configs.run import RunConfig
from polyclinic.mtl_model.network import network_of
from polyclinic.mtl_model.packing import Layout
from polyclinic.mtl_model.saved import open_model, open_network
from polyclinic.server.export.export import Exported, compare, export_model, trial_images
from polyclinic.server.runs.checkpoint import ServerState, save_round
from polyclinic.server.runs.folder import RunFolder
from tests import ROOT

# Together these cover every network option that changes the exported graph.
CHEAP = {
    "no attention": {
        "model.swin-depth": 0,
        "model.block-order": "parallel",
        "model.norm": "batch",
        "model.upsample": "bilinear",
        "model.dfe": "concat",
        "model.stride": 4,
        "data.image-height": 64,
        "data.image-width": 64,
        "data.mask-classes": "mass,vessel",
        "data.mask-kind": "overlapping",
        "data.label-kind": "multi-label",
        "loss.classification": "soft-margin",
        "loss.weighting": "uncertainty",
    },
}
DEAR = {
    "published": {
        "model.token-mixing": "published",
        "model.block-order": "parallel",
        "data.image-height": 64,
        "data.image-width": 48,
    },
    "softmax": {
        "model.dfe": "none",
        "model.swin-depth": 2,
        "data.mask-classes": "mass,vessel,nerve",
        "data.channels": 3,
    },
    "window": {"model.window": 3, "model.swin-depth": 2, "data.image-width": 64},
    **{
        name: {"model.backbone": name, "model.width": 0, "model.depths": "", "model.swin-depth": 0}
        for name in ("efficientnet_lite0", "tf_efficientnet_lite0", "convnext_atto")
    },
}


def checkpoint_of(config: RunConfig, folder: Path) -> Path:
    """Save random weights as a run's first round."""
    network = network_of(config.model, config.data, config.loss, seed=0)
    layout, run = Layout.of(network), RunFolder(folder)
    (folder / "checkpoints").mkdir()
    save_round(run, config, layout, "0" * 32, ServerState(1, layout.pack(network.state_dict())))
    return run.checkpoint(1)


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata())


@pytest.fixture
def rewritten(exported: dict[str, Path], tmp_path: Path) -> Callable[..., Path]:
    """Copy the safetensors export with changed metadata; None removes an entry."""

    def make(**changes: str | None) -> Path:
        metadata: dict[str, str | None] = dict(metadata_of(exported["safetensors"]))
        metadata.update({key.replace("_", "-"): text for key, text in changes.items()})
        path = tmp_path / "changed.safetensors"
        kept = {key: text for key, text in metadata.items() if text is not None}
        save_file(load_file(exported["safetensors"]), path, kept)
        return path

    return make


def agrees(result: Exported) -> bool:
    return all(parity.relative < 1e-5 and parity.largest > 0.1 for parity in result.parity)


@pytest.mark.parametrize("options", [*CHEAP, *DEAR])
def test_every_network_option_exports_as_torchscript(tiny, tmp_path, options: str) -> None:
    config = tiny(**{k.replace(".", "__"): v for k, v in {**CHEAP, **DEAR}[options].items()})
    checkpoint = checkpoint_of(config, tmp_path)
    out = tmp_path / "model.pt"
    assert agrees(export_model(checkpoint, "a-run", "torchscript", out, 1e-4))


@pytest.mark.parametrize(
    "options", [*CHEAP, *(pytest.param(name, marks=pytest.mark.long) for name in DEAR)]
)
def test_every_network_option_exports_as_onnx(tiny, tmp_path: Path, options: str) -> None:
    """Takes up to a minute each; CI tests the cheapest, ``exported``, and all as TorchScript."""
    config = tiny(**{k.replace(".", "__"): v for k, v in {**CHEAP, **DEAR}[options].items()})
    checkpoint = checkpoint_of(config, tmp_path)
    assert agrees(export_model(checkpoint, "a-run", "onnx", tmp_path / "model.onnx", 1e-4))


def test_trial_images_cover_several_batches_and_sizes(exported: dict[str, Path]) -> None:
    shapes = [images.shape for images in trial_images(open_model(exported["onnx"]).metadata)]
    assert {shape[0] for shape in shapes} == {1, 2, 3}
    assert any(shape[2] != shape[3] and shape[2] % 16 and shape[3] % 16 for shape in shapes)
    assert any(shape[2] > 32 for shape in shapes)
    assert any(shape[3] < 32 for shape in shapes)


@pytest.mark.parametrize("kind", ["safetensors", "torchscript", "onnx"])
def test_exported_file_has_metadata_and_no_local_path(
    exported: dict[str, Path], finished_run: Path, kind: str
) -> None:
    content = exported[kind].read_bytes()
    for path in (str(ROOT), str(finished_run.parent), str(Path(torch.__file__).parent)):
        assert path.encode() not in content
    metadata = open_model(exported[kind]).metadata
    assert (metadata.run, metadata.version) == ("a-run", VERSION)
    assert metadata.weights_sha256 == open_model(finished_run / "best.safetensors").sha256
    assert metadata.round == json.loads((finished_run / "outcome.json").read_text())["best_round"]
    assert metadata.data.classes == ("benign", "malignant")
    assert metadata.data.root == ""


def test_onnx_metadata_describes_inputs_and_outputs(exported: dict[str, Path]) -> None:
    model = onnx.load(exported["onnx"])
    entries = {entry.key: entry.value for entry in model.metadata_props}
    assert tuple(entries) == KEYS
    axes = [d.dim_param or d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]
    assert axes == ["batch", 1, "height", "width"]
    assert [output.name for output in model.graph.output] == ["mask_logits", "class_logits"]
    outputs = json.loads(entries["outputs"])
    assert outputs["class_logits"]["channels"] == ["benign", "malignant"]
    assert "softmax" in outputs["class_logits"]["activation"]
    assert "sigmoid" in outputs["mask_logits"]["activation"]
    assert "keep the aspect ratio" in " ".join(json.loads(entries["preprocessing"])["steps"])


def test_metadata_keys_are_documented() -> None:
    text = (ROOT / "docs/export.md").read_text(encoding="utf-8")
    for key in KEYS:
        assert f"| `{key}` |" in text


def test_export_with_differing_outputs_is_not_kept(cli, finished_run: Path, tmp_path: Path) -> None:
    status, out, err = cli("export", finished_run, "--out", "m.pt", "--tolerance", "0")
    assert (status, out) == (1, "")
    assert "differ from the network's" in err
    assert "mask_logits" in err
    assert list(tmp_path.iterdir()) == []


def test_nan_outputs_fail_the_parity_check(exported: dict[str, Path]) -> None:
    metadata, network = open_network(exported["safetensors"])
    inputs = trial_images(metadata)[:2]
    mute = torch.full((1, 1, 32, 32), float("nan"))
    found = compare(network, lambda x: (mute.expand(len(x), -1, -1, -1), torch.zeros(1, 2)), inputs)
    assert not found[0].relative <= 1e9
    assert 0.01 < found[1].relative < 10


def test_kept_rounds_can_be_exported(cli, finished_run: Path, tmp_path: Path) -> None:
    for number in (1, 2):
        status, out, err = cli(
            *("export", "a-run", "--runs", finished_run.parent, "--round", number),
            *("--out", f"{number}.safetensors", "--card", f"{number}.md", "--json"),
        )
        assert status == 0, err
        said = json.loads(out)
        assert said["round"] == number
        assert said["sha256"] == open_model(tmp_path / f"{number}.safetensors").sha256
        assert said["parity"]["mask_logits"]["absolute"] == 0
        checkpoint = load_file(RunFolder(finished_run).checkpoint(number))
        assert all(
            torch.equal(tensor, checkpoint[name])
            for name, tensor in load_file(tmp_path / f"{number}.safetensors").items()
        )
        assert (tmp_path / f"{number}.md").is_file()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--out", "m.onnx", "--round", "9"], "expected a round with a kept checkpoint (1, 2;"),
        (["--out", "m.onnx", "--format", "torchscript"], "expected a file ending in .pt"),
        (["--out", "m.onnx", "--format", "caffe"], "expected one of safetensors, onnx"),
        (["--out", "m.bin"], "expected a file ending in .safetensors, .onnx, .pt"),
        (["--out", "there.onnx"], "there.onnx already exists"),
        (["--out", "new.onnx", "--card", "there.onnx"], "there.onnx already exists"),
    ],
)
def test_export_user_errors_exit_2(
    cli, finished_run: Path, tmp_path: Path, arguments: list[str], said: str
) -> None:
    (tmp_path / "there.onnx").write_text("")
    status, out, err = cli("export", finished_run, *arguments)
    assert (status, out) == (2, "")
    assert said in err
    assert [path.name for path in tmp_path.iterdir()] == ["there.onnx"]


def test_export_of_a_missing_run_exits_2(cli) -> None:
    status, _, err = cli("export", "nothing", "--out", "m.onnx")
    assert status == 2
    assert "nothing: no such run in" in err


def test_export_of_a_changed_checkpoint_is_refused(cli, finished_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(finished_run, folder)
    shutil.copy(RunFolder(folder).checkpoint(1), RunFolder(folder).checkpoint(2))
    status, _, err = cli("export", folder, "--round", "2", "--out", "m.safetensors")
    assert status == 2
    assert "round-0002.safetensors: expected sha256" in err


def test_export_without_a_best_round_lists_kept_rounds(cli, finished_run, tmp_path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(finished_run, folder)
    (folder / "best.safetensors").unlink()
    status, _, err = cli("export", folder, "--out", "m.safetensors")
    assert status == 2
    assert "has no best round; use --round (kept: 1, 2)" in err


def test_missing_onnx_error_names_the_extra(
    cli, finished_run: Path, exported: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = exported["onnx"]  # exported before its packages are hidden
    there = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name.startswith("onnx") else there(name, *rest),
    )
    for command in (
        ("export", finished_run, "--out", "m.onnx"),
        ("predict", model, finished_run.parent.parent / "phantoms", "--out", "there"),
    ):
        status, _, err = cli(*command)
        assert status == 2
        assert "onnxruntime" in err
        assert "pip install 'polyclinic[export]'" in err


def test_incompatible_model_metadata_is_refused(rewritten) -> None:
    config = json.loads(metadata_of(rewritten())["config"])
    open_model(rewritten())
    for changes, said in (
        ({"layout": "0" * 64}, "builds a different network from these settings"),
        ({"config": json.dumps({**config, "model.wings": 2})}, "model.wings: unknown key"),
        ({"config": json.dumps({**config, "data.clahe": True})}, "data.clahe: unknown key"),
        ({"config": json.dumps({**config, "model.width": 32})}, "network from these settings"),
        ({"config": "[]"}, "expected a table"),
        ({"config": "{"}, "not compatible with"),
        ({"config": None}, "its metadata has no entry 'config'"),
        ({"passport": "2", "polyclinic_version": "9.0"}, "written by polyclinic 9.0, .*version 1"),
    ):
        with pytest.raises(ModelFileError, match=said) as refusal:
            open_model(rewritten(**changes))
        assert "changed.safetensors" in str(refusal.value)


def test_metadata_for_a_graph_ignores_unknown_network_settings(exported) -> None:
    metadata = metadata_of(exported["safetensors"])
    config = json.loads(metadata["config"])
    later = {**metadata, "config": json.dumps({**config, "model.wings": 2})}
    assert ModelMetadata.from_metadata(later, network=False).data.image_height == 32
    with pytest.raises(ModelFileError, match=r"model\.wings: unknown key"):
        ModelMetadata.from_metadata(later, network=True)


@pytest.mark.parametrize("suffix", [".safetensors", ".onnx", ".pt"])
@pytest.mark.parametrize("content", [b"", b"no model", b"\x00" * 64])
def test_invalid_model_file_is_refused(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"bad{suffix}"
    path.write_bytes(content)
    with pytest.raises(ModelFileError, match=rf"bad\{suffix}: expected an? .*file"):
        open_model(path)


def test_foreign_models_are_refused(tmp_path: Path, exported: dict[str, Path]) -> None:
    model = onnx.load(exported["onnx"])
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "stranger.onnx")
    save_file({"weight": torch.zeros(2)}, tmp_path / "stranger.safetensors")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "stranger.pt")
    for suffix, said in (
        (".onnx", "its metadata has no entry"),
        (".safetensors", "its metadata has no entry"),
        (".pt", "expected a TorchScript file"),  # pickles are never opened
    ):
        with pytest.raises(ModelFileError, match=said):
            open_model(tmp_path / f"stranger{suffix}")
