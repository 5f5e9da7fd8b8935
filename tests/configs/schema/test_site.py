"""Reading site.yaml."""

from __future__ import annotations

from pathlib import Path

import pytest

from polyclinic.configs.errors import ConfigError
from polyclinic.configs.schema.site import read_site_config


def test_site_file_resolves_data_root_relative_to_itself(tmp_path: Path) -> None:
    (tmp_path / "site.yaml").write_text("name: north\ndata-root: images\n")
    config = read_site_config(tmp_path / "site.yaml")
    assert config.name == "north"
    assert config.data_root == tmp_path / "images"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name: north\n", "data-root"),
        ("name: a b\ndata-root: x\n", "name"),
        ("name: north\ndata-root: x\nsecret: 1\n", "secret"),
        ("- a\n", "expected keys name and data-root"),
        ("a: [\n", "expected YAML"),
    ],
)
def test_invalid_site_file_is_refused_by_key(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "site.yaml").write_text(text)
    with pytest.raises(ConfigError, match=said):
        read_site_config(tmp_path / "site.yaml")


def test_missing_site_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such site file"):
        read_site_config(tmp_path / "site.yaml")
