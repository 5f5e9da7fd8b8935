"""Error messages for wrong settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from polyclinic.configs.errors import ConfigError
from polyclinic.configs.messages import ALIASES, RENAMED
from polyclinic.configs.presets import find_preset, load_run_config, preset_names
from polyclinic.configs.run import RunConfig
from polyclinic.configs.schema.base import known_keys
from polyclinic.configs.schema.site import SiteConfig, read_site_config


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("rounds.count", 0, "rounds.count must be at least 1, got 0"),
        ("rounds.count", 1.5, "rounds.count must be a whole number, got 1.5"),
        ("data.val-fraction", 1.0, "data.val-fraction must be less than 1, got 1.0"),
        ("train.learning-rate", "fast", "train.learning-rate must be a number, got 'fast'"),
        ("train.precision", "fp8", "train.precision must be 'auto', 'fp32' or 'bf16', got 'fp8'"),
        (
            "run.name",
            "../x",
            "run.name must consist of letters, digits, '.', '_' and '-', with a letter or digit "
            "first, got '../x'",
        ),
        ("train.lr", 0.1, "train.lr: unknown key; did you mean train.learning-rate?"),
        ("train.batchsize", 4, "train.batchsize: unknown key; did you mean train.batch-size?"),
        (
            "rounds.set-aside-after",
            2,
            "rounds.set-aside-after has been renamed: use rounds.suspend-after",
        ),
    ],
)
def test_wrong_setting_message_names_key_demand_and_value(
    key: str, value: float | str, message: str
) -> None:
    with pytest.raises(ConfigError) as found:
        RunConfig.from_flat({key: value})
    assert str(found.value) == message


@pytest.mark.parametrize("key", ["train.zebra", "train.q", "zebra"])
def test_unknown_key_unlike_any_other_suggests_nothing(key: str) -> None:
    with pytest.raises(ConfigError) as found:
        RunConfig.from_flat({key: 1})
    assert "unknown key; known" in str(found.value)
    assert "did you mean" not in str(found.value)


def test_renamed_keys_and_aliases_point_to_existing_keys() -> None:
    known = {*RunConfig().to_flat(), *known_keys(SiteConfig)}
    assert set(RENAMED.values()) <= known
    assert set(ALIASES.values()) <= known
    assert not {*RENAMED, *ALIASES} & known


def test_site_file_with_a_renamed_key_is_refused_with_the_new_name(tmp_path: Path) -> None:
    file = tmp_path / "site.yaml"
    file.write_text("name: a\ndata-root: d\npolicy: {least-support: 5, most-steps: 3}\n")
    with pytest.raises(ConfigError) as found:
        read_site_config(file)
    assert "policy.least-support has been renamed: use policy.min-support" in str(found.value)
    assert "policy.most-steps has been renamed: use policy.max-steps" in str(found.value)


@pytest.mark.parametrize("name", preset_names())
def test_packaged_preset_is_found_by_name_from_any_folder(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_run_config(Path(name)) == load_run_config(find_preset(Path(name)))


def test_missing_preset_lists_the_packaged_ones() -> None:
    with pytest.raises(ConfigError, match=r"demoo: no such preset; .* breast-ultrasound, .*demo"):
        load_run_config(Path("demoo"))
