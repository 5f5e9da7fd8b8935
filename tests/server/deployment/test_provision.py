"""Kits: contents, file modes, renewal, and repeated provisioning."""

from __future__ import annotations

import ssl
import stat
from datetime import timedelta
from pathlib import Path

import pytest
import yaml

import polyclinic.server.deployment.authority
from polyclinic.client.node.keys import make_key
from polyclinic.configs import VERSION
from polyclinic.configs.errors import ConfigError
from polyclinic.configs.schema.federation import read_federation
from polyclinic.configs.schema.site import read_site_config
from polyclinic.configs.security.credentials import (
    key_of,
    name_of,
    now_utc,
    public_line,
    read_certificate,
    read_private_key,
    vouched_for,
)
from polyclinic.server.deployment.provision import expiries, provision, soon
from polyclinic.server.deployment.registry import Registry
from tests.factories import federation


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_kit_contains_required_files_and_no_other_key(tmp_path: Path) -> None:
    provision(federation(), tmp_path)
    found = contents(tmp_path)
    keys = {name for name, content in found.items() if b"PRIVATE KEY" in content}
    assert keys == {
        "authority/ca.key",
        "server/server.key",
        "sites/site-a/site.key",
        "sites/site-b/site.key",
    }
    assert len({found[name] for name in keys}) == 4
    for name in keys:
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600, name
    for site in ("site-a", "site-b"):
        kit = tmp_path / "sites" / site
        assert {p.name for p in kit.iterdir()} == {
            *(".env", "README.md", "ca.crt", "compose.yml", "compose.gpu.yml"),
            *("site.crt", "site.key", "site.yaml", "polyclinic-site.service"),
        }
        config = read_site_config(kit / "site.yaml")
        assert (config.name, config.server.address, config.server.port) == (
            *(site, "fl.example.org"),
            9092,
        )
        certificate = read_certificate(config.server.certificate)
        key = read_private_key(config.server.key)
        assert name_of(certificate) == site
        assert public_line(key.public_key()) == public_line(key_of(certificate))
        assert vouched_for(certificate, read_certificate(config.server.ca))
        assert f"Site {site}" in (kit / "README.md").read_text()
        assert "@" not in (kit / "site.yaml").read_text()
        assert f"POLYCLINIC_VERSION={VERSION}\n" in (kit / ".env").read_text()


def test_second_provision_changes_nothing(tmp_path: Path) -> None:
    assert [c.what for c in provision(federation(), tmp_path)] == [
        *("authority", "server", "site-a", "site-b")
    ]
    before = contents(tmp_path)
    assert provision(federation(), tmp_path) == []
    assert contents(tmp_path) == before


def test_adding_renewing_and_removing_leave_other_sites_unchanged(tmp_path: Path) -> None:
    provision(federation(), tmp_path)
    (tmp_path / "sites" / "site-a" / "site.yaml").write_text("name: site-a\ndata-root: filled/in\n")
    before = contents(tmp_path)
    changes = provision(federation("site-a", "site-b", "site-c"), tmp_path, renew=["site-b"])
    assert [(c.what, c.did.split(";")[0]) for c in changes] == [
        *(("site-b", "renewed"), ("site-c", "added"))
    ]
    after = contents(tmp_path)
    moved = {name for name in before if before[name] != after.get(name)}
    assert moved == {
        *("server/federation.yaml", "server/sites/site-b.crt"),
        *("sites/site-b/site.crt", "sites/site-b/site.key"),
    }
    registry = Registry(tmp_path / "server")
    assert {s.name for s in registry.sites().values()} == {"site-a", "site-b", "site-c"}
    (change,) = provision(federation("site-b", "site-c"), tmp_path)
    assert (change.what, change.did.split(";")[0]) == ("site-a", "removed")
    assert not (tmp_path / "server" / "sites" / "site-a.crt").exists()
    assert (next((tmp_path / "removed").iterdir()) / "site.yaml").read_text().endswith("in\n")


def test_site_with_its_own_key_keeps_it(tmp_path: Path) -> None:
    private, line = make_key(tmp_path / "at-the-site")
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    members = [{"name": "site-a"}, {"name": "own", "public-key": line}]
    config = federation(sites=members)
    provision(config, tmp_path / "kits")
    kit = tmp_path / "kits" / "sites" / "own"
    assert not (kit / "site.key").exists()
    assert public_line(key_of(read_certificate(kit / "site.crt"))) == line
    assert provision(config, tmp_path / "kits") == []
    with pytest.raises(ConfigError, match="exists already and is not overwritten"):
        make_key(tmp_path / "at-the-site")


def test_server_certificate_covers_all_its_names(tmp_path: Path) -> None:
    server_ = {"address": "fl.example.org", "also": ["10.0.0.7", "fl.internal"]}
    provision(federation(server=server_), tmp_path)
    names = polyclinic.server.deployment.authority.names_in(
        read_certificate(tmp_path / "server" / "server.crt")
    )
    assert set(names) == {*("fl.example.org", "10.0.0.7", "fl.internal"), "localhost", "127.0.0.1"}
    context = ssl.create_default_context(cafile=str(tmp_path / "server" / "ca.crt"))
    assert context.verify_mode is ssl.CERT_REQUIRED
    (change,) = provision(federation(), tmp_path)
    assert change.did.startswith("renewed for fl.example.org, localhost, 127.0.0.1")


def test_certificates_command_warns_a_month_before_expiry(tmp_path: Path, cli, monkeypatch) -> None:
    provision(federation(), tmp_path / "kits")
    status, out, _ = cli("server", "certificates", tmp_path / "kits")
    assert status == 0
    assert out.count("OK") == 4
    later = now_utc() + timedelta(days=340)
    monkeypatch.setattr("polyclinic.server.deployment.provision.now_utc", lambda: later)
    assert [each.what for each in expiries(tmp_path / "kits") if soon(each)] == [
        *("server", "site-a", "site-b")
    ]
    status, out, _ = cli("server", "certificates", tmp_path / "kits")
    assert status == 1
    assert out.count("renew") == 3
    gone = now_utc() + timedelta(days=400)
    monkeypatch.setattr("polyclinic.server.deployment.provision.now_utc", lambda: gone)
    _, out, _ = cli("server", "certificates", tmp_path / "kits")
    assert out.count("EXPIRED") == 3


def test_registry_ignores_certificates_of_another_authority(tmp_path: Path, caplog) -> None:
    provision(federation(), tmp_path / "ours")
    provision(federation(name="others"), tmp_path / "theirs")
    stranger = tmp_path / "theirs" / "server" / "sites" / "site-a.crt"
    folder = tmp_path / "ours" / "server" / "sites"
    (folder / "stranger.crt").write_bytes(stranger.read_bytes())
    (folder / "half.crt").write_bytes(b"-----BEGIN")
    registry = Registry(folder.parent)
    assert {site.name for site in registry.sites().values()} == {"site-a", "site-b"}
    assert "stranger.crt: ignored, it is not signed by this federation's authority" in caplog.text
    assert "half.crt: expected a certificate" in caplog.text


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sites": []}, "sites must not be empty"),
        ({"sites": [{"name": "a"}, {"name": "A"}]}, "expected distinct names, got a twice"),
        ({"sites": [{"name": "Server"}]}, "expected names other than authority, pooled, server"),
        ({"sites": [{"name": "a", "public-key": "ssh-rsa AAAA"}]}, "starting with ecdsa-sha2"),
        ({"sites": [{"name": "a/b"}]}, r"sites\[1\].name"),
        ({"server": {"address": "fl.example.org", "port": 0}}, "server.port"),
        ({"colour": "blue"}, "colour"),
    ],
)
def test_invalid_federation_file_is_refused(tmp_path: Path, changes: dict, said: str) -> None:
    content = {"name": "c", "server": {"address": "a"}, "sites": [{"name": "a"}], **changes}
    path = tmp_path / "federation.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError, match=said):
        read_federation(path)


def test_kits_of_another_federation_are_not_changed(tmp_path: Path) -> None:
    provision(federation(), tmp_path)
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match="got those of consortium; use another --out"):
        provision(federation(name="others"), tmp_path)
    with pytest.raises(ConfigError, match="--renew: expected sites of the federation, got nobody"):
        provision(federation(), tmp_path, renew=["nobody"])
    assert contents(tmp_path) == before
