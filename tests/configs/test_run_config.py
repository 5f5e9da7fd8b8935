"""Run settings: defaults, validation, round trips and presets."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from flwr.common.config import flatten_dict
from hypothesis import given
from hypothesis import strategies as st

from polyclinic.configs import VERSION
from polyclinic.configs.errors import ConfigError
from polyclinic.configs.presets import load_run_config, read_override
from polyclinic.configs.run import RunConfig
from polyclinic.configs.schema.model import MODEL_PRESETS, ModelConfig
from polyclinic.server.runs.folder import to_toml
from tests import ROOT

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_pyproject_lists_every_key_with_its_default() -> None:
    assert flatten_dict(PYPROJECT["tool"]["flwr"]["app"]["config"]) == RunConfig().to_flat()


def test_version_is_equal_in_pyproject_and_code() -> None:
    assert PYPROJECT["project"]["version"] == VERSION


@pytest.mark.parametrize("preset", sorted((ROOT / "configs").glob("*.toml")), ids=lambda p: p.stem)
def test_every_preset_is_valid(preset: Path) -> None:
    assert load_run_config(preset) != RunConfig()


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("train.batch-sise", 1, "unknown key; did you mean train.batch-size"),
        ("training.batch-size", 1, "did you mean train.batch-size"),
        ("train.zzzzzz", 1, "known keys of train: train.local-epochs"),
        ("zzz.q", 1, "known sections: central, data, evaluate"),
        ("train.batch-size", 0, r"train.batch-size .*at least 1, got 0"),
        ("train.batch-size", 1.5, r"train.batch-size .*got 1.5"),
        ("train.batch-size", True, "train.batch-size: expected text or a number"),
        ("train.augment", 1, "train.augment: expected true or false"),
        ("train.learning-rate", float("nan"), "train.learning-rate .*finite"),
        ("train.precision", "fp16", "train.precision .*'fp32' or 'bf16', got 'fp16'"),
        ("train.device", "tpu", "train.device"),
        ("rounds.min-sites", "0%", "rounds.min-sites"),
        ("data.classes", "benign", "data.classes: expected at least two"),
        ("data.classes", "a,b,a", "data.classes: expected distinct"),
        ("data.positive", "cyst", r"data.positive: expected one of .*benign,malignant.*'cyst'"),
        ("data.classes", "", "data.classes: expected at least two names, got ''"),
        ("data.mask-classes", "", "data.mask-classes: expected 1 to 255 names, got 0"),
        ("data.mask-classes", "a,b,a", "data.mask-classes: expected distinct names"),
        ("data.mask-kind", "both", "data.mask-kind .*'overlapping'"),
        ("data.label-kind", "multi-label", "loss.classification: expected soft-margin"),
        ("data.channels", 2, "data.channels .*1, 3 or 4"),
        ("data.drop-labels", "benign", "data.drop-labels: benign is also in data.classes"),
        ("data.val-fraction", 0.9, "sum below 1"),
        ("model.depths", "1,2", "model.depths: expected 4 numbers"),
        ("model.depths", "1,2,x,4", "model.depths"),
        ("model.backbone", "ResNet 34", "model.backbone"),
        ("model.stride", 8, "model.stride .*2 or 4"),
        ("model.window", 1, "model.window: expected 0 or at least 2"),
        ("model.mlp-ratio", 0.01, "model.mlp-ratio"),
        ("model.head-stages", "5", "stages from 1 to 4"),
        ("model.dfe-rates", "6", "model.dfe-rates: expected 3"),
        ("loss.class-weights", "1,2,3", "loss.class-weights: expected 2 numbers"),
        ("loss.class-weights", "1..2,3", "loss.class-weights"),
        ("loss.class-weights", 5, "loss.class-weights: expected 2 numbers"),
        ("loss.segmentation", "dice+bce", r"loss.segmentation .*'dice\+ce'"),
        ("loss.label-smoothing", 1.0, "loss.label-smoothing .*less than 1"),
        ("loss.focal-gamma", -1.0, "loss.focal-gamma"),
        ("run.name", "a/b", "run.name"),
        ("run.name", "..", "run.name"),
    ],
)
def test_invalid_setting_is_refused_by_name(key: str, value, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        RunConfig.from_flat({key: value})


def test_image_too_small_for_the_stride_is_refused() -> None:
    small = {"data.image-height": 64, "data.image-width": 32}
    assert RunConfig.from_flat(small).data.image_width == 32
    with pytest.raises(
        ConfigError, match=r"image-width: expected more than 32 with model.stride 4"
    ):
        RunConfig.from_flat({**small, "model.stride": 4})


MULTI_LABEL = {"data.label-kind": "multi-label", "loss.classification": "soft-margin"}


def test_multi_label_run_accepts_a_single_class() -> None:
    one = {**MULTI_LABEL, "data.classes": "benign", "data.positive": "benign"}
    assert RunConfig.from_flat({**one, "loss.class-weights": 2}).loss.class_weights == "2"
    with pytest.raises(ConfigError, match=r"data.classes: expected at least one name"):
        RunConfig.from_flat({**MULTI_LABEL, "data.classes": ""})


@pytest.mark.parametrize("name", ["none", "cyst;scar"])
def test_class_names_reserved_in_multi_label_cells_are_refused(name: str) -> None:
    classes = {"data.classes": f"malignant,{name}"}
    assert RunConfig.from_flat(classes).data.classes[1] == name
    with pytest.raises(ConfigError, match=rf"data.classes: .*got '{name}'"):
        RunConfig.from_flat({**MULTI_LABEL, **classes})


def test_learned_task_weight_of_zero_is_refused() -> None:
    changes = {"loss.weighting": "uncertainty", "loss.classification-weight": 0.0}
    with pytest.raises(ConfigError, match=r"loss.classification-weight: expected more than 0"):
        RunConfig.from_flat(changes)


def test_all_invalid_settings_are_reported_together() -> None:
    with pytest.raises(ConfigError, match=r"(?s)train.batch.*rounds.count"):
        RunConfig.from_flat({"train.batch": 1, "rounds.count": 0})


def test_integer_is_accepted_for_a_float_setting() -> None:
    assert RunConfig.from_flat({"train.learning-rate": 1}).train.learning_rate == 1.0


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "run.seed": st.integers(0, 2**31),
            "data.classes": st.just("benign,malignant,normal"),
            "data.mask-classes": st.sampled_from(["lesion", "mass,vessel"]),
            "data.mask-kind": st.sampled_from(["exclusive", "overlapping"]),
            "data.channels": st.sampled_from([1, 3, 4]),
            "loss.segmentation": st.sampled_from(["dice", "dice+ce", "dice+focal"]),
            "loss.weighting": st.sampled_from(["fixed", "uncertainty"]),
            "model.depths": st.sampled_from(["", "1,2,3,4"]),
            "train.learning-rate": st.floats(1e-6, 1.0),
            "train.augment": st.booleans(),
            "rounds.min-sites": st.sampled_from(["all", "2", "50%"]),
            "data.root": st.text("abc/\"'\\ é", max_size=12),
        },
    )
)
def test_settings_round_trip_through_flat_dict_and_toml(flat) -> None:
    config = RunConfig.from_flat(flat)
    assert RunConfig.from_flat(config.to_flat()) == config
    assert RunConfig.from_flat(flatten_dict(tomllib.loads(to_toml(config)))) == config


def test_numeric_override_is_accepted_for_a_text_setting() -> None:
    overrides = ["rounds.min-sites=2", "model.head-stages=4", "run.name=2024-05-01"]
    config = load_run_config(None, overrides)
    assert config.rounds.min_sites == "2"
    assert config.model.head_stages == (4,)
    assert config.run.name == "2024-05-01"
    assert load_run_config(None, ["run.name=20240501"]).run.name == "20240501"


def test_override_parses_toml_values_and_plain_text() -> None:
    assert read_override("train.batch-size=4") == ("train.batch-size", 4)
    assert read_override("train.augment=false") == ("train.augment", False)
    assert read_override("data.root='/x y'") == ("data.root", "/x y")
    assert read_override("data.root=/x y") == ("data.root", "/x y")
    assert read_override('data.classes=["a", "b"]') == ("data.classes", "a,b")
    with pytest.raises(ConfigError, match="expected key=value"):
        read_override("train.batch-size")


def test_missing_or_invalid_preset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such preset"):
        load_run_config(tmp_path / "none.toml")
    (tmp_path / "broken.toml").write_text("[train\n")
    with pytest.raises(ConfigError, match=r"broken.toml: expected TOML"):
        load_run_config(tmp_path / "broken.toml")


def test_model_preset_changes_only_default_settings() -> None:
    light = RunConfig.from_flat({"model.preset": "light"}).model
    assert (light.backbone, light.stride, light.dfe) == ("resnet18", 4, "none")
    assert light.swin_depth == RunConfig().model.swin_depth
    mine = RunConfig.from_flat({"model.preset": "light", "model.dfe": "sum"}).model
    assert (mine.dfe, mine.stride) == ("sum", 4)
    assert ModelConfig(preset="light", mlp_ratio=3.0).mlp_ratio == 3.0


def test_model_preset_conflicting_with_override_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model.stride, model.dfe: model.preset=light sets"):
        load_run_config(None, ["model.preset=light", "model.dfe=concat", "model.stride=2"])
    mine = load_run_config(None, ["model.preset=light", "model.dfe=sum", "model.stride=4"])
    assert (mine.model.dfe, mine.model.stride) == ("sum", 4)


def test_expanded_preset_round_trips() -> None:
    light = RunConfig.from_flat({"model.preset": "light", "model.stride": 2, "model.dfe": "sum"})
    assert light.model.stride == 4  # 2 is the default, which counts as not given
    assert RunConfig.from_flat(light.to_flat()) == light
    named = {f"model.{key}": value for key, value in MODEL_PRESETS["light"].items()}
    assert RunConfig.from_flat({**named, "model.stride": 2}).model.stride == 2
