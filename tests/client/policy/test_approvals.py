"""Approved releases: reading a release, showing its changes, and recording approvals."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519

from polyclinic.client.policy.approvals import Approvals, changes
from polyclinic.configs import VERSION
from polyclinic.configs.errors import ConfigError
from polyclinic.configs.security.release import check_signature, open_release
from polyclinic.configs.security.release import sign as sign_release
from tests.factories import PROJECT, app, packed


@pytest.fixture
def site_file(tmp_path: Path) -> Path:
    path = tmp_path / "site.yaml"
    path.write_text("name: a\ndata-root: data\n")
    return path


def test_digest_covers_every_file_and_not_packing_time() -> None:
    release = open_release(packed(app()))
    again = open_release(packed(dict(reversed(app().items())), (2026, 2, 2, 2, 2, 2)))
    assert again.digest == release.digest
    for other in (
        app(client__policy__site_policy="pass\n"),  # changed
        app(sitecustomize="pass\n"),  # one more file
        {k: v for k, v in app().items() if k != "client/policy/site_policy.py"},
        {**app(), "pyproject.toml": PROJECT + "[tool.flwr.app.components]\n"},
    ):
        assert open_release(packed(other)).digest != release.digest


@pytest.mark.parametrize(
    "name",
    ["../x.py", "/x.py", "client/../apps.py", "./apps.py", "client//gate.py", "a\\b.py", "Apps.py"],
)
def test_release_with_ambiguous_file_names_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="expected plain and distinct file names"):
        open_release(packed({**app(), name: "evil"}))


def test_invalid_release_archives_are_refused() -> None:
    twice = io.BytesIO(packed(app()))
    with zipfile.ZipFile(twice, "a") as fab, pytest.warns(UserWarning, match="Duplicate name"):
        fab.writestr("apps.py", "evil")
    with pytest.raises(ConfigError, match=r"distinct file names in a packed app, got 'apps.py'"):
        open_release(twice.getvalue())
    for content in (b"", b"no zip", packed({"apps.py": ""}), packed({"pyproject.toml": "x"})):
        with pytest.raises(ConfigError, match="expected a packed app"):
            open_release(content)
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as fab:
        fab.writestr("pyproject.toml", b"#" * 101_000_000)
    with pytest.raises(ConfigError, match="below 100 MB unpacked"):
        open_release(bomb.getvalue())


def test_approve_and_withdraw_update_the_approved_releases(tmp_path: Path) -> None:
    approvals = Approvals(tmp_path)
    assert approvals.approved() == {}
    assert approvals.latest() is None
    first = approvals.approve(packed(app()))
    second = approvals.approve(packed(app(apps="a = 2\n")))
    assert list(Approvals(tmp_path).approved()) == [first.digest, second.digest]
    latest = approvals.latest()
    assert latest is not None
    assert latest.digest == second.digest
    assert approvals.withdraw(second.digest[:12]).digest == second.digest
    assert list(approvals.approved()) == [first.digest]
    with pytest.raises(ConfigError, match="expected the digest of an approved release"):
        approvals.withdraw(second.digest)
    with pytest.raises(ConfigError, match="expected the digest of an approved release"):
        approvals.withdraw(first.digest[:7])
    assert [d.action for d in approvals.decisions()] == ["approved", "approved", "withdrawn"]
    assert approvals.decisions()[0].by


def test_damaged_decisions_file_allows_no_release(tmp_path: Path) -> None:
    approvals = Approvals(tmp_path)
    approvals.approve(packed(app()))
    approvals.log.write_text(approvals.log.read_text()[:-20])
    with pytest.raises(ConfigError, match=r"is damaged .* no release is allowed"):
        approvals.approved()


def test_changes_lists_new_changed_and_removed_files() -> None:
    before = open_release(packed({**app(), "old.py": "", ".info/CONTENT": "1"}))
    after = open_release(
        packed({**app(client__policy__site_policy="pass\n"), "new.py": "x\n", ".info/CONTENT": "2"})
    )
    found = {change.name: change for change in changes(before, after)}
    assert {name: change.kind for name, change in found.items()} == {
        "client/policy/site_policy.py": "changed",
        "new.py": "new",
        "old.py": "gone",
    }
    assert {"-check()", "+pass"} <= set(found["client/policy/site_policy.py"].lines)


def test_difference_escapes_control_characters() -> None:
    """Codes that move the cursor or reverse the writing direction are escaped."""
    evil = "x = 1\x1b[2K\x1b[1A  # nothing\n\u202eadmin = True\n"
    (change,) = changes(open_release(packed(app())), open_release(packed(app(apps=evil))))
    assert all(line.isprintable() for line in change.lines)
    assert r"+x = 1\x1b[2K\x1b[1A  # nothing" in change.lines
    assert r"+\u202eadmin = True" in change.lines
    binary = {**app(), "client/policy/site_policy.py": b"# coding: latin-1\n\xe9 = 1\n"}
    (change,) = changes(open_release(packed(app())), open_release(packed(binary)))
    assert change.lines == ("24 bytes of binary content",)


def test_damaged_and_encrypted_archives_are_refused() -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as fab:
        fab.writestr("pyproject.toml", PROJECT * 50)
    content = bytearray(buffer.getvalue())
    content[60:90] = b"\xff" * 30  # inside the compressed bytes
    with pytest.raises(ConfigError, match="expected a packed app"):
        open_release(bytes(content))
    content = bytearray(packed(app()))
    for signature, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):  # the encryption flag
        content[content.index(signature) + at] |= 1
    with pytest.raises(ConfigError, match="expected a packed app"):
        open_release(bytes(content))
    with pytest.raises(ConfigError, match="expected a packed app"):
        open_release(packed({"pyproject.toml": "project = []\n"}))


def test_approve_command_shows_changes_asks_and_records(site_file: Path, cli, monkeypatch) -> None:
    fab, changed = Path("one.fab"), Path("two.fab")
    fab.write_bytes(packed(app()))
    changed.write_bytes(packed(app(client__policy__site_policy="pass\n")))
    status, out, _ = cli("site", "approve", site_file, fab, "--yes")
    digest = open_release(fab.read_bytes()).digest
    assert status == 0
    assert f"release {digest}, version {VERSION}, 3 files" in out
    assert f"approved: {digest}" in out
    monkeypatch.setattr("typer.confirm", lambda text: False)
    status, out, _ = cli("site", "approve", site_file, changed)
    assert status == 1
    assert f"compared with approved release {digest[:12]}, version {VERSION}:" in out
    assert "changed  client/policy/site_policy.py" in out
    assert "    -check()" in out
    _, out, _ = cli("site", "approve", site_file)
    assert [line.split()[0] for line in out.splitlines()] == [digest]
    assert "it is already approved" in cli("site", "approve", site_file, fab)[1]
    assert cli("site", "approve", site_file, "--withdraw", digest)[0] == 0
    assert cli("site", "approve", site_file)[1] == ""
    status, _, err = cli("site", "approve", site_file, "missing.fab")
    assert status == 2
    assert "missing.fab: cannot be read" in err


@pytest.fixture
def signer(tmp_path: Path) -> Callable[[str], tuple[Path, str]]:
    def make(name: str) -> tuple[Path, str]:
        key = ed25519.Ed25519PrivateKey.generate()
        path = tmp_path / name
        path.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.OpenSSH,
                serialization.NoEncryption(),
            )
        )
        public = key.public_key().public_bytes(
            serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
        )
        return path, public.decode()

    return make


def test_site_with_a_signer_approves_only_signed_releases(site_file: Path, cli, signer) -> None:
    private, public = signer("signer")
    other, _ = signer("other")
    site_file.write_text(site_file.read_text() + f"release-signer: {json.dumps(public)}\n")
    Path("one.fab").write_bytes(packed(app()))
    status, _, err = cli("site", "approve", site_file, "one.fab", "--yes")
    assert status == 2
    assert "one.fab.sig: expected the release's signature" in err
    cli("server", "sign", "one.fab", "--key", other)
    status, _, err = cli("site", "approve", site_file, "one.fab", "--yes")
    assert status == 2
    assert "expected a signature of this site's release-signer" in err
    cli("server", "sign", "one.fab", "--key", private)
    status, out, _ = cli("site", "approve", site_file, "one.fab", "--yes")
    assert status == 0
    assert "signed by this site's release-signer" in out
    Path("two.fab").write_bytes(packed(app(apps="a = 3\n")))
    Path("two.fab.sig").write_text(Path("one.fab.sig").read_text())
    assert cli("site", "approve", site_file, "two.fab", "--yes")[0] == 2


def test_invalid_keys_and_signatures_are_refused(tmp_path: Path, signer) -> None:
    release = open_release(packed(app()))
    private, public = signer("signer")
    signature = sign_release(release, private)
    check_signature(release, signature, public)
    with pytest.raises(ConfigError, match="expected a signature of this site"):
        check_signature(release, "no base64!", public)
    with pytest.raises(ConfigError, match="release-signer: expected an Ed25519 public key"):
        check_signature(release, signature, "rubbish")
    with pytest.raises(ConfigError, match="expected an Ed25519 private key"):
        sign_release(release, tmp_path / "missing")
