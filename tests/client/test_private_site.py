"""A private site reveals nothing to a coordinator that only changes run settings.

Ports of two attacks that recovered membership and class of every training patient with epsilon 0
spent: asking with ``privacy.mode`` off, and choosing which patients are the validation images.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from polyclinic.client.data.manifest import Manifest, Row
from polyclinic.client.data.split_key import SPLIT_KEY, split_key
from polyclinic.client.data.splits import split_rows
from polyclinic.client.ledger.outgoing import read_outgoing
from polyclinic.configs import wire
from polyclinic.configs.errors import ConfigError
from polyclinic.configs.schema.data import DataConfig
from polyclinic.configs.schema.site import read_site_config
from tests import ROOT
from tests.site_messages import (
    BUDGET,
    COHORT,
    SITE_DATA,
    Person,
    ask,
    network_weights,
    packed,
    people,
    private_config,
    run_config,
    shown,
    write_images,
)

KEY = "5a" * 32
KINDS = (wire.DESCRIBE, wire.TRAIN, wire.EVALUATE)
Write = Callable[..., Path]
pytestmark = pytest.mark.usefixtures("flower_identity")


@pytest.fixture
def write_site(tmp_path: Path) -> Write:
    """Write a private site's folder with a known split key and return its site.yaml."""

    def write(name: str, persons: list[Person], **changes: object) -> Path:
        folder = tmp_path / name
        write_images(folder / "data", persons)
        (folder / "state").mkdir()
        (folder / "state" / SPLIT_KEY).write_text(KEY)
        content: dict[str, object] = {
            "name": "north",
            "data-root": "data",
            "state": "state",
            "cohort": COHORT,
            "budget": BUDGET,
            "data": SITE_DATA,
            **changes,
        }
        file = folder / "site.yaml"
        file.write_text(yaml.safe_dump({k: v for k, v in content.items() if v is not None}))
        return file

    return write


def places(
    groups: list[str], key: bytes | None = bytes.fromhex(KEY), seed: int = 0
) -> dict[str, str]:
    """Return the split of each patient, by a key or by the public hash of a seed."""
    rows = [Row(i + 2, Path(f"{i}.png"), None, None, g, None) for i, g in enumerate(groups)]
    manifest = Manifest("north", Path("labels.csv"), tuple(rows))
    splits = split_rows(manifest, rows, DataConfig(split="independent", split_seed=seed), key)
    return {row.group: name for name, members in splits.items() for row in members}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("section", ["budget", "cohort"])
def test_private_site_with_privacy_off_declines_every_message(
    write_site: Write, kind: str, section: str
) -> None:
    file = write_site("site", people(60), **({"budget": None} if section == "cohort" else {}))
    config = run_config()
    weights = None if kind == wire.DESCRIBE else network_weights(config)[:2]
    reply = ask(file, kind, config, weights)
    assert set(shown(reply)) <= {wire.DECLINED, wire.NUMBER, wire.RUN}
    reason = str(shown(reply)[wire.DECLINED])
    assert reason.startswith(f"{section}: this site only answers runs with differential privacy")
    (entry,) = read_outgoing(file.parent / "state")
    assert (entry["message"], entry["outcome"]) == (kind, "declined")


def test_site_without_cohort_or_budget_answers_runs_without_privacy(write_site: Write) -> None:
    """Control: the same messages to a site without privacy protection."""
    file = write_site("site", people(60), budget=None, cohort=None, data=None)
    told = shown(ask(file, wire.DESCRIBE, run_config()))
    assert len(str(told[wire.FINGERPRINT])) == 64
    assert told[f"{wire.TRAIN_SPLIT}.{wire.CLASSES}"] != [0, 0]


def test_private_site_replies_do_not_depend_on_a_training_patient(write_site: Write) -> None:
    """Only an accounted round may depend on the training patients."""
    persons = people(60)
    placed = places([person.group for person in persons])
    left_out = next(p for p in persons if placed[p.group] == wire.TRAIN_SPLIT)
    files = [
        write_site("with", persons),
        write_site("without", [p for p in persons if p is not left_out]),
    ]
    off, on = run_config(), private_config()
    weights = network_weights(on)[:2]
    for kind, config in ((k, c) for k in KINDS for c in (off, on)):
        if kind == wire.TRAIN and config is on:
            continue  # the release that the budget pays for
        for split in (wire.VAL_SPLIT, wire.TEST_SPLIT):
            sent = None if kind == wire.DESCRIBE else weights
            first, second = (shown(ask(file, kind, config, sent, split=split)) for file in files)
            assert first == second
    assert all(not (file.parent / "state" / "ledger.db").exists() for file in files)


ATTACKS: dict[str, dict[str, object]] = {
    "data.split-seed": {"data__split_seed": 7},
    "data.val-fraction": {"data__val_fraction": 0.3},
    "data.test-fraction": {"data__test_fraction": 0.0},
    "data.classes": {"data__classes": "malignant,benign"},
    "data.drop-labels": {"data__drop_labels": "normal"},
    "data.mask-classes": {"data__mask_classes": "tumour"},
    "data.mask-kind": {"data__mask_kind": "overlapping"},
    "data.label-kind": {
        "data__label_kind": "multi-label",
        "loss__classification": "soft-margin",
    },
    "data.on-error": {"data__on_error": "refuse"},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("setting", ATTACKS)
def test_run_setting_that_moves_patients_is_declined_by_name(
    write_site: Write, setting: str, kind: str
) -> None:
    file = write_site("site", people(60))
    config = private_config(**ATTACKS[setting])
    weights = None if kind == wire.DESCRIBE else network_weights(config)[:2]
    reason = str(shown(ask(file, kind, config, weights))[wire.DECLINED])
    assert reason.startswith(f"{setting}: this site allows ")
    assert ";" not in reason  # only the setting that differs


def test_stratified_split_is_refused_for_a_private_run() -> None:
    with pytest.raises(ConfigError, match=r"data\.split"):
        private_config(data__split="stratified")


def public_place(seed: int, group: str) -> float:
    """Return a patient's position in 0 to 1 by the public hash of simulated sites."""
    text = f"{seed}\0north\0{group}"
    return int(hashlib.sha256(text.encode()).hexdigest(), 16) / 16**64


def test_split_attack_gives_equal_replies_for_member_and_non_member(write_site: Write) -> None:
    """For each candidate, use a seed and a fraction that made them the only validation patient."""
    candidates = [f"P{i:03d}" for i in range(24)]
    members = [Person(g, "benign" if i % 3 else "malignant") for i, g in enumerate(candidates)]
    whole = write_site("whole", members)
    for number, group in enumerate(candidates[:4]):
        lacking = write_site(f"lacking-{number}", [p for p in members if p.group != group])
        seed = next(
            s for s in range(10_000) if min(candidates, key=lambda g: public_place(s, g)) == group
        )
        first, second = sorted(public_place(seed, g) for g in candidates)[:2]
        chosen = {"data__split_seed": seed, "data__val_fraction": (first + second) / 2}
        by_class = {
            "data__classes": "benign,other",
            "data__positive": "other",
            "data__drop_labels": "malignant",
        }
        for changes in ({}, by_class):
            config = private_config(data__test_fraction=0.0, **chosen, **changes)
            found, absent = (shown(ask(f, wire.DESCRIBE, config)) for f in (whole, lacking))
            assert found == absent
            assert "data.split-seed: this site allows 0" in str(found[wire.DECLINED])
            weights = network_weights(config)[:2]
            assert shown(ask(whole, wire.EVALUATE, config, weights)) == shown(
                ask(lacking, wire.EVALUATE, config, weights)
            )


def test_keyed_split_ignores_the_seed_and_differs_by_key() -> None:
    groups = [f"P{i}" for i in range(2000)]
    ours = places(groups, b"a" * 32)
    assert ours == places(groups, b"a" * 32, seed=5)
    assert ours != places(groups, b"b" * 32)
    assert ours != places(groups, None)
    shares = [list(ours.values()).count(name) / 2000 for name in wire.SPLITS]
    assert shares == pytest.approx([0.65, 0.15, 0.2], abs=0.03)


def test_keyed_split_keeps_rows_that_name_their_split() -> None:
    rows = [
        Row(i + 2, Path(f"{i}.png"), None, None, f"P{i}", wire.TEST_SPLIT if i < 30 else None)
        for i in range(60)
    ]
    manifest = Manifest("north", Path("labels.csv"), tuple(rows))
    found = split_rows(manifest, rows, DataConfig(split="independent"), b"a" * 32)
    assert set(rows[:30]) <= set(found[wire.TEST_SPLIT])


def test_simulated_split_matches_golden_values() -> None:
    """Golden values of the first release, so that results of simulations stay comparable."""
    rows = [
        Row(i + 2, Path(f"{i}.png"), None, ("benign", "malignant")[i % 2], f"P{i}", None)
        for i in range(40)
    ]
    manifest = Manifest("north", Path("labels.csv"), tuple(rows))
    found = {}
    for split in ("stratified", "independent"):
        splits = split_rows(manifest, rows, DataConfig(split=split, split_seed=3))
        letters = {row.group: name[:2] for name, members in splits.items() for row in members}
        found[split] = hashlib.sha256(" ".join(letters[r.group] for r in rows).encode()).hexdigest()
    assert found == GOLDEN


GOLDEN = {
    "stratified": "0ff95dd60c899362e11e954d3a73b001420600868236f3f34468685399c70b20",
    "independent": "e1a6c11b33b1d849c02e45d5517d5033d41ef2a0fa6f35367470c29abe60eb41",
}


def test_split_key_is_created_once_and_is_readable_by_the_site_only(tmp_path: Path) -> None:
    state = tmp_path / "state"
    key = split_key(state)
    assert len(key) == 32
    assert split_key(state) == key
    assert stat.S_IMODE((state / SPLIT_KEY).stat().st_mode) == 0o600
    assert [path.name for path in state.iterdir()] == [SPLIT_KEY]
    assert split_key(tmp_path / "another") != key


def test_split_key_created_by_several_processes_at_once_is_one(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        keys = pool.map(split_key, [tmp_path / "state"] * 16)
    assert len(set(keys)) == 1
    assert [path.name for path in (tmp_path / "state").iterdir()] == [SPLIT_KEY]


@pytest.mark.parametrize("content", ["", "5a" * 16, "x" * 64, "5a" * 33])
def test_split_key_that_is_damaged_is_refused_and_kept(tmp_path: Path, content: str) -> None:
    (tmp_path / SPLIT_KEY).write_text(content)
    with pytest.raises(ConfigError, match=r"expected 64 hexadecimal digits.*backup"):
        split_key(tmp_path)
    assert (tmp_path / SPLIT_KEY).read_text() == content


def test_private_site_with_a_damaged_key_refuses_without_a_path(write_site: Write) -> None:
    file = write_site("site", people(60))
    (file.parent / "state" / SPLIT_KEY).write_text("rubbish")
    reason = str(shown(ask(file, wire.DESCRIBE, private_config()))[wire.REFUSAL])
    assert str(file.parent) not in reason


@pytest.mark.parametrize("section", ["budget", "cohort"])
def test_site_file_without_its_own_split_says_what_to_add(write_site: Write, section: str) -> None:
    file = write_site(
        "site", people(4), data=None, **({"budget": None} if section == "cohort" else {})
    )
    with pytest.raises(ConfigError) as error:
        read_site_config(file)
    changes = (ROOT / "CHANGELOG.md").read_text()
    for key in ("classes", "mask-classes", "val-fraction", "test-fraction", "drop-labels"):
        assert key in str(error.value)
        assert f"`{key}`" in changes


def test_weights_of_the_test_network_fit_the_site() -> None:
    """Control of the attacks above: their weights fit the site's network."""
    config = private_config()
    layout, _, network = network_weights(config)
    assert packed(config, network)[0].digest == layout.digest
