"""A deployed site's policy: what it allows, sends and records; in one process."""

from __future__ import annotations

import json
import pickle
import re
import sqlite3
import zipfile
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message

from polyclinic.client.ledger.budget import LedgerError
from polyclinic.client.ledger.outgoing import OUTGOING, Sent, read_outgoing, write_down
from polyclinic.client.policy.releases import own_release, release_of_folder
from polyclinic.client.policy.site_policy import (
    OPEN,
    Decline,
    check_hours,
    check_size,
    check_update,
    restrict_to_allowed_tasks,
    suppress_small_groups,
)
from polyclinic.client.site import load, open_site
from polyclinic.configs import wire
from polyclinic.configs.errors import ConfigError
from polyclinic.configs.run import RunConfig
from polyclinic.configs.schema.site import PolicyConfig, read_site_config
from polyclinic.server.app import run
from polyclinic.server.deployment.status import budget_left, last_reports
from polyclinic.server.rounds.errors import RunFailed
from polyclinic.server.runs.history import read_history
from polyclinic.simulation.phantom.writer import write_phantoms
from tests import ROOT
from tests.factories import PRIVATE
from tests.memory_grid import MemoryGrid

Tiny = Callable[..., RunConfig]


class DeployedGrid(MemoryGrid):
    """Two sites with one site.yaml each, passed as SuperNodes pass it."""

    def __init__(self, config: RunConfig, files: list[Path]) -> None:
        from apps import client

        super().__init__(client, config.to_flat(), len(files))
        self.files = files

    def node_config(self, partition: int) -> dict[str, object]:
        return {"site-config": str(self.files[partition])}


@pytest.fixture
def deployed(tiny: Tiny, tmp_path: Path, flower_identity: None):
    """Build a federation of two deployed sites, the first with extra lines in its site.yaml."""
    write_phantoms(tmp_path / "data", sites=2, examples=30, seed=0, size=48, normal_fraction=0.0)

    def make(more: str = "", **changes: object) -> tuple[DeployedGrid, RunConfig]:
        files = []
        for number, extra in ((1, more), (2, "policy: {min-support: 1}\n")):
            file = tmp_path / f"north-{number}.yaml"
            file.write_text(
                f"name: north-{number}\ndata-root: data/site-{number}\nstate: state-{number}\n"
                + (extra or "policy: {min-support: 1}\n")
            )
            files.append(file)
        config = tiny(**{"rounds__count": 1, **changes})
        return DeployedGrid(config, files), config

    return make


def line_of(folder, site: str, split: str = "val"):
    found = [x for x in read_history(folder.history) if (x.site, x.split) == (site, split)]
    return found[-1]


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        ("evaluation: false", r"policy\.evaluation: this site does not allow evaluation"),
        ("min-examples: 1000", r"policy\.min-examples: .*at least 1000 examples, it has \d+"),
        ("min-patients: 1000", r"policy\.min-patients: .*at least 1000 patients, it has \d+"),
        ("max-steps: 1", r"policy\.max-steps: this site runs at most 1 steps per round, .* \d+"),
        ("max-update-mb: 0.001", r"policy\.max-update-mb: this site sends at most 0\.001 MB"),
        (
            "max-update-norm: 0.0001",
            r"policy\.max-update-norm: .* at most 0\.0001, this round's norm is",
        ),
    ],
)
def test_policy_violation_is_declined_with_reason_and_run_continues(
    deployed, tmp_path: Path, policy: str, said: str
) -> None:
    grid, config = deployed(f"policy: {{min-support: 1, {policy}}}\n")
    folder = run(grid, config)
    line = line_of(folder, "north-1")
    (phase,) = line.declined
    assert phase == ("evaluate" if policy.startswith("eval") else "train")
    assert not line.failed
    assert re.search(said, line.declined[phase])
    assert line_of(folder, "north-2").train is not None
    outcomes = [(e["message"], e["outcome"]) for e in read_outgoing(tmp_path / "state-1")]
    assert (phase, "declined") in outcomes


def test_unapproved_release_gets_no_site_description(deployed, tmp_path: Path) -> None:
    grid, config = deployed(f"policy: {{releases: ['{'0' * 64}']}}\n", rounds__min_sites="1")
    folder = run(grid, config)
    environment = json.loads(folder.environment.read_text())
    assert set(environment["sites"]) == {"north-2"}
    (entry,) = read_outgoing(tmp_path / "state-1")
    assert (entry["message"], entry["outcome"]) == (wire.DESCRIBE, "declined")
    assert f"has not approved release {own_release()}" in entry["told"][wire.DECLINED]


def test_approved_release_trains(deployed) -> None:
    grid, config = deployed(f"policy: {{min-support: 1, releases: ['{own_release()}']}}\n")
    assert line_of(run(grid, config), "north-1").train is not None


def test_site_with_budget_declines_run_without_privacy(deployed, tmp_path: Path) -> None:
    grid, config = deployed(BUDGET.replace("LEAST", "0"), rounds__min_sites="1")
    folder = run(grid, config)
    assert set(json.loads(folder.environment.read_text())["sites"]) == {"north-2"}
    (entry,) = read_outgoing(tmp_path / "state-1")
    assert (entry["message"], entry["outcome"]) == (wire.DESCRIBE, "declined")
    assert "only answers runs with differential privacy" in entry["told"][wire.DECLINED]


BUDGET = """
cohort: {examples: 20, patients: 18}
budget: {epsilon: 50, delta: 0.001, unit: patient}
data: {classes: [benign, malignant], mask-classes: [lesion], val-fraction: 0.3, test-fraction: 0.2}
policy: {min-support: 1, min-noise-multiplier: LEAST}
"""


def test_private_site_sends_declared_counts_and_logs_spending(deployed, tmp_path: Path) -> None:
    grid, config = deployed(BUDGET.replace("LEAST", "1"), **PRIVATE, rounds__min_sites="1")
    folder = run(grid, config)
    sent = [e for e in read_outgoing(tmp_path / "state-1") if e["message"] == wire.TRAIN]
    assert [entry["round"] for entry in sent] == [1, 2]
    assert sent[0]["epsilon_before"] == 0
    assert sent[0]["epsilon_after"] == pytest.approx(sent[1]["epsilon_before"])
    assert sent[1]["epsilon_after"] == pytest.approx(line_of(folder, "north-1").train.epsilon)
    for entry in sent:
        assert set(entry["told"]) == {
            *(wire.NAME, wire.EXAMPLES, wire.WITH_MASK, wire.WITH_LABEL, wire.STEPS),
            *(wire.EPSILON, wire.DELTA, wire.BUDGET, wire.NUMBER, wire.RUN),
        }
        assert [entry["told"][k] for k in (wire.EXAMPLES, wire.WITH_MASK, wire.WITH_LABEL)] == [
            20
        ] * 3
        assert entry["bytes"] > 1000
        assert len(entry["sha256"]) == 64
        assert entry["release"] == own_release()
    _, told = last_reports(folder.path.parent)  # as `polyclinic server status` shows it
    assert told["north-1"].budget == 50
    assert budget_left(told["north-1"]) == pytest.approx(50 - sent[1]["epsilon_after"])


def test_noise_below_policy_minimum_is_declined_before_spending(deployed, tmp_path: Path) -> None:
    grid, config = deployed(BUDGET.replace("LEAST", "3"), **PRIVATE, rounds__min_sites="1")
    with pytest.raises(
        RunFailed, match=r"adds noise of at least 3 times the clipping norm, .* asks for 2"
    ):
        run(grid, config)  # the other site has no budget and takes no part
    assert not (tmp_path / "state-1" / "ledger.db").exists()


def test_deployed_site_sends_file_names_only_if_allowed(
    deployed, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    image = next((tmp_path / "data" / "site-1" / "images").iterdir())
    image.write_bytes(b"no image")
    for names, policy in (
        (False, "min-support: 1"),
        (True, "min-support: 1, name-files: true"),
    ):
        grid, config = deployed(f"policy: {{{policy}}}\n", run__name=f"names-{names}")
        folder = run(grid, config)
        (told,) = json.loads(folder.environment.read_text())["sites"]["north-1"]["skipped"]
        assert (image.name in told) is names
    assert image.name in caplog.text  # the site's own log always names the file


def test_unusable_data_are_refused_without_revealing_values(deployed, tmp_path: Path) -> None:
    table = tmp_path / "data" / "site-1" / "labels.csv"
    table.write_text(table.read_text().replace("malignant", "smith-john"))
    grid, config = deployed("policy: {min-support: 1}\n", rounds__min_sites="1")
    run(grid, config)
    (entry,) = read_outgoing(tmp_path / "state-1")
    assert entry["outcome"] == "refused"
    assert "smith" not in json.dumps(entry)
    assert "see the site's log for the reason" in entry["told"][wire.REFUSAL]


def test_groups_below_min_support_are_withheld_and_reported(deployed, tmp_path: Path) -> None:
    grid, config = deployed("policy: {min-support: 1000}\n")
    folder = run(grid, config)
    results = json.loads(folder.results.read_text())
    assert results["sites"]["north-1"]["dice"] is None
    assert results["sites"]["north-1"]["auc"] is None
    assert results["sites"]["north-2"]["dice"] is not None
    assert any("fewer than 1000" in words for words in results["withheld"]["north-1"])
    classes = json.loads(folder.environment.read_text())["sites"]["north-1"]["classes"]
    assert {n for counts in classes.values() for n in counts} == {0}


def test_metrics_outside_the_policy_are_not_sent(deployed) -> None:
    grid, config = deployed("policy: {min-support: 1, metrics: [segmentation, scores]}\n")
    results = json.loads(run(grid, config).results.read_text())["sites"]
    assert results["north-1"]["dice"] is not None
    assert results["north-1"]["accuracy"] is None
    grid, config = deployed(
        "policy: {min-support: 1, metrics: [classification]}\n", run__name="another"
    )
    results = json.loads(run(grid, config).results.read_text())["sites"]
    assert results["north-1"]["accuracy"] is not None
    assert results["north-1"]["auc"] is results["north-1"]["dice"] is None


def data_of(tiny: Tiny, tmp_path: Path):
    write_phantoms(tmp_path / "d", sites=1, examples=40, seed=0, size=48, normal_fraction=0.3)
    config = tiny(data__root=str(tmp_path / "d"), data__classes="benign,malignant,normal")
    site = open_site({"partition-id": 0, "num-partitions": 1}, config, lambda *_: tmp_path)
    return load(site, config.data), config


def test_suppress_small_groups_removes_rare_classes(tiny: Tiny, tmp_path: Path) -> None:
    data, config = data_of(tiny, tmp_path)
    examples = data.splits["train"]
    counts = dict(zip(config.data.classes, examples.class_counts().tolist(), strict=True))
    least = sorted(counts.values())[0] + 1
    left, words = suppress_small_groups(PolicyConfig(min_support=least), examples, config.data)
    rare = [name for name, n in counts.items() if n < least]
    after = dict(zip(config.data.classes, left.class_counts().tolist(), strict=True))
    assert rare
    assert all(after[name] == 0 for name in rare)
    assert all(after[name] == counts[name] for name in counts if name not in rare)
    assert all(any(name in sentence for sentence in words) for name in rare)
    whole, nothing = suppress_small_groups(OPEN, examples, config.data)
    assert (whole.has_label == examples.has_label).all()
    assert not nothing


def test_disallowed_task_is_treated_as_unannotated(tiny: Tiny, tmp_path: Path) -> None:
    data, _ = data_of(tiny, tmp_path)
    assert data.splits["train"].tasks == ("segmentation", "classification")
    left = restrict_to_allowed_tasks(PolicyConfig(tasks=("classification",)), data)
    assert {examples.tasks for examples in left.splits.values()} == {("classification",)}
    assert restrict_to_allowed_tasks(PolicyConfig(), data) is data


@pytest.mark.parametrize(
    ("hours", "open_at", "closed_at"),
    [("20:00-06:00", (0, 5, 20, 23), (6, 12, 19)), ("08:00-17:30", (8, 12, 17), (0, 7, 18))],
)
def test_check_hours_supports_ranges_across_midnight(
    hours: str, open_at: tuple[int, ...], closed_at: tuple[int, ...]
) -> None:
    policy = PolicyConfig(hours=hours)
    for hour in open_at:
        check_hours(policy, datetime(2026, 11, 24, hour, 0))
    for hour in closed_at:
        with pytest.raises(Decline, match=rf"hours are {hours}, it is now {hour:02}:00"):
            check_hours(policy, datetime(2026, 11, 24, hour, 0))


def test_check_update_uses_joint_norm_of_all_weights() -> None:
    before = {"encoder/float32": np.zeros(4, np.float32), "count/int64": np.zeros(1, np.int64)}
    after = {"encoder/float32": np.full(4, 1.5, np.float32), "count/int64": np.array([10**6])}
    check_update(PolicyConfig(max_update_norm=3.0), before, after)
    with pytest.raises(Decline, match=r"norm of at most 2\.99, this round's norm is 3"):
        check_update(PolicyConfig(max_update_norm=2.99), before, after)
    with pytest.raises(Decline, match="min-patients"):
        check_size(PolicyConfig(min_patients=3), 10, 2)


def test_weights_are_never_unpickled(deployed, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self):
            return Path.touch, (tmp_path / "sprung",)

    grid, config = deployed(rounds__min_sites="1")
    answer = grid._answer

    def spoiled(partition: int, message: Message) -> Message:
        if message.metadata.message_type == wire.TRAIN and partition == 0:
            arrays = message.content.array_records[wire.WEIGHTS]
            with (tmp_path / "trap.npy").open("wb") as file:
                np.save(file, np.array([Trap()], dtype=object), allow_pickle=True)
            assert b"sprung" in (tmp_path / "trap.npy").read_bytes()
            name = next(iter(arrays))
            data = (tmp_path / "trap.npy").read_bytes()
            message.content[wire.WEIGHTS] = ArrayRecord(
                {**arrays, name: Array("object", (1,), "numpy.ndarray", data)}
            )
        return answer(partition, message)

    grid._answer = spoiled
    folder = run(grid, config)
    assert "weights from the server" in line_of(folder, "north-1").failed["train"]
    assert not (tmp_path / "sprung").exists()
    with pytest.raises(AttributeError):  # negative control: unpickling triggers the trap
        pickle.loads(pickle.dumps(Trap())).nothing  # noqa: B018
    assert (tmp_path / "sprung").exists()


def test_reply_that_cannot_be_logged_is_not_sent(deployed, tmp_path: Path) -> None:
    grid, config = deployed(rounds__min_sites="1")
    (tmp_path / "state-1").mkdir()
    (tmp_path / "state-1" / OUTGOING).write_text("no ledger")
    folder = run(grid, config)
    assert set(json.loads(folder.environment.read_text())["sites"]) == {"north-2"}


def test_outgoing_command_lists_replies_and_detects_tampering(
    deployed, tmp_path: Path, cli
) -> None:
    grid, config = deployed()
    run(grid, config)
    file = tmp_path / "north-1.yaml"
    status, out, _ = cli("site", "outgoing", file)
    assert status == 0
    assert "4 of 4 replies" in out  # description, training, validation, test
    assert all(word in out for word in ("query.describe", "train", "evaluate", "answered"))
    status, out, _ = cli("site", "outgoing", file, "--json", "--last", "1")
    assert status == 0
    assert json.loads(out)["told"]["images"]
    with sqlite3.connect(tmp_path / "state-1" / OUTGOING) as database:
        database.execute("DROP TRIGGER entries_stay")
        database.execute("UPDATE entries SET content = replace(content, 'answered', 'declined')")
    status, _, err = cli("site", "outgoing", file)
    assert status == 1
    assert "entry 1 was changed" in err


def test_release_digest_is_equal_for_bundle_and_checkout(tmp_path: Path, cli) -> None:
    """Packed by hand like ``flwr build``, which tests/end_to_end/test_bundle.py runs itself."""
    fab = tmp_path / "app.fab"
    with zipfile.ZipFile(fab, "w") as packed:
        for room in ("client", "configs", "mtl_model", "server", "simulation"):
            for path in (ROOT / room).rglob("*"):
                if path.suffix in (".py", ".toml"):
                    packed.write(path, path.relative_to(ROOT).as_posix())
        for name in ("LICENSE", "apps.py", "polyclinic.py"):
            packed.write(ROOT / name, name)
        written_anew = "# by Flower\n" + (ROOT / "pyproject.toml").read_text()
        packed.writestr("pyproject.toml", written_anew)
        packed.writestr(".info/CONTENT", "sizes of all files")
    assert cli("site", "release", fab)[1].strip() == own_release() == release_of_folder(ROOT)
    with zipfile.ZipFile(fab, "a") as packed:
        packed.writestr("backdoor.py", "import os")
    assert cli("site", "release", fab)[1].strip() != own_release()
    (tmp_path / "not.fab").write_text("no")
    status, _, said = cli("site", "release", tmp_path / "not.fab")
    assert status == 2
    assert "expected a packed app" in said
    with pytest.raises(ConfigError, match="expected a checkout or an unpacked app, found no"):
        release_of_folder(tmp_path)


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        ("hours: evening", r"policy\.hours: expected two different times, .*, got 'evening'"),
        ("hours: '08:00-08:00'", "expected two different times"),
        ("releases: [abc]", r"policy\.releases: expected sha256 digests .* got 'abc'"),
        ("tasks: []", "policy.tasks"),
        ("max-stepz: 3", "policy.max-stepz"),
    ],
)
def test_invalid_policy_settings_are_refused(tmp_path: Path, policy: str, said: str) -> None:
    file = tmp_path / "site.yaml"
    file.write_text(f"name: a\ndata-root: .\npolicy:\n  {policy}\n")
    with pytest.raises(ConfigError, match=said):
        read_site_config(file)


def test_outgoing_log_appends_replies_in_order(tmp_path: Path) -> None:
    sent = Sent("train", "answered", "1", 1, "r", {"steps": 3}, {"encoder/float32": b"123"})
    write_down(tmp_path, sent)
    write_down(tmp_path, replace(sent, round=2, arrays={}))
    first, second = read_outgoing(tmp_path)
    assert (first["round"], first["bytes"], first["told"]) == (1, 3, {"steps": 3})
    assert (second["round"], second["bytes"], second["sha256"]) == (2, 0, None)
    (tmp_path / "a-file").write_text("")
    with pytest.raises(LedgerError, match="Not a directory"):
        write_down(tmp_path / "a-file" / "state", sent)
