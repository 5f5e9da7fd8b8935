"""Private rounds in a federation: spending, replies and declined rounds; in one process."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from flwr.app import Message
from safetensors.torch import load_file

import polyclinic.client.app
import polyclinic.client.privacy.accounting
from polyclinic.client.policy.site_policy import Decline
from polyclinic.client.private_round import mechanism_of
from polyclinic.client.site import PrivacyDeclaration
from polyclinic.client.training.local_round import TrainingError
from polyclinic.configs import wire
from polyclinic.configs.run import RunConfig
from polyclinic.configs.schema.privacy import PrivacyConfig
from polyclinic.configs.schema.site import BudgetConfig
from polyclinic.configs.schema.train import TrainConfig
from polyclinic.server.app import run
from polyclinic.server.export.model_card import _privacy
from polyclinic.server.rounds.errors import RunFailed
from polyclinic.server.runs.history import read_history
from polyclinic.simulation.local.sites import ledger_folder
from polyclinic.simulation.phantom.writer import write_phantoms
from tests.memory_grid import MemoryGrid

PRIVATE = {
    "privacy__mode": "dp-sgd",
    "privacy__noise_multiplier": 1.0,
    "privacy__delta": 1e-3,
    "loss__class_weights": "none",
    "data__split": "independent",
    "data__val_fraction": 0.25,
    "phantom__examples": 40,
    "train__local_steps": 2,
}


@pytest.fixture(autouse=True)
def quick_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use a coarser accounting grid: the bounds stay valid and are a percent larger."""
    monkeypatch.setattr(polyclinic.client.privacy.accounting, "_POINTS", 2**16)


Tiny = Callable[..., RunConfig]
Federate = Callable[..., MemoryGrid]


def trained_lines(folder) -> dict[str, list]:
    """Return the training reports of each site in the order of rounds."""
    lines: dict[str, list] = {}
    for line in read_history(folder.history):
        if line.train is not None:
            lines.setdefault(line.site, []).append(line.train)
    return lines


def test_private_run_reports_epsilon_of_each_site(tiny: Tiny, grid) -> None:
    config = tiny(**PRIVATE)
    folder = run(grid(config), config)
    lines = trained_lines(folder)
    assert set(lines) == {"site-1", "site-2", "site-3"}
    for reports in lines.values():
        first, second = (report.epsilon for report in reports)
        assert 0 < first < second
        assert {report.delta for report in reports} == {1e-3}
        assert {report.loss_segmentation for report in reports} == {None}
    environment = json.loads(folder.environment.read_text())
    for site in environment["sites"].values():
        assert site["fingerprint"] == ""
        assert set(site["classes"]) == {"val", "test"}
    card = _privacy(config, folder, 2)
    assert "all images of one patient" in card
    assert f"| site-1 | {lines['site-1'][1].epsilon:.2f} | 0.001 |" in card
    assert "No differential privacy" not in card


def test_planned_rounds_spend_at_most_target_epsilon(tiny: Tiny, grid) -> None:
    config = tiny(**{**PRIVATE, "privacy__noise_multiplier": 0.0, "privacy__target_epsilon": 4.0})
    for reports in trained_lines(run(grid(config), config)).values():
        assert 3.9 < reports[-1].epsilon <= 4.0


def answers_of(federation: MemoryGrid) -> Callable[[int, Message], Message]:
    kept: list[tuple[int, Message]] = []

    def keep(partition: int, reply: Message) -> Message:
        kept.append((partition, reply))
        return reply

    federation.tamper = keep
    return kept  # type: ignore[return-value]


def test_private_replies_do_not_depend_on_training_images(tiny: Tiny, grid, tmp_path: Path) -> None:
    """Compares two federations that differ in one patient's training image at the first site."""
    from PIL import Image

    def told(root: Path) -> list[dict]:
        config = tiny(**PRIVATE, data__root=str(root), run__name=root.name)
        federation = grid(config, 2)
        kept = answers_of(federation)
        run(federation, config)
        return [
            {
                "about": {
                    key: value
                    for key, value in reply.content.config_records[wire.SITE].items()
                    if key != wire.RUN  # random
                },
                "sums": {
                    k: v
                    for k, v in reply.content.metric_records[wire.SUMS].items()
                    if k != wire.SECONDS
                },
            }
            for partition, reply in kept
            if partition == 0 and reply.metadata.message_type in (wire.DESCRIBE, wire.TRAIN)
        ]

    for name in ("one", "other"):
        write_phantoms(tmp_path / name, sites=2, examples=24, seed=0, size=48, normal_fraction=0.0)
    config = tiny(**PRIVATE, data__root=str(tmp_path / "one"))
    train = set(_training_images(tmp_path / "one" / "site-1", config))
    images = tmp_path / "other" / "site-1" / "images"
    changed = next(path for path in sorted(images.iterdir()) if path.name in train)
    with Image.open(changed) as before:
        size = before.size
    Image.new("L", size, 77).save(changed)
    table = changed.parent.parent / "labels.csv"
    rows = table.read_text().splitlines()
    at = next(i for i, row in enumerate(rows) if changed.name in row)
    flipped = {"benign": "malignant", "malignant": "benign"}
    label = next(word for word in flipped if word in rows[at])
    rows[at] = rows[at].replace(label, flipped[label])
    table.write_text("\n".join(rows) + "\n")
    one, other = told(tmp_path / "one"), told(tmp_path / "other")
    assert one == other
    assert len(one) == 3  # a description and two rounds


def _training_images(folder: Path, config: RunConfig) -> list[str]:
    from polyclinic.client.data.manifest import read_site
    from polyclinic.client.data.splits import split_rows

    manifest = read_site(folder, folder.name)
    return [row.image.name for row in split_rows(manifest, manifest.rows, config.data)["train"]]


@pytest.fixture
def budgets(monkeypatch: pytest.MonkeyPatch) -> dict[str, BudgetConfig]:
    """Give simulated sites budgets as if their site.yaml named them; by site name."""
    given: dict[str, BudgetConfig] = {}
    declared = polyclinic.client.app.privacy_declaration

    def privacy_declaration(*arguments: object) -> PrivacyDeclaration:
        found = declared(*arguments)
        return replace(found, budget=given.get(found.cohort))

    monkeypatch.setattr(polyclinic.client.app, "privacy_declaration", privacy_declaration)
    return given


def test_site_with_spent_budget_declines_and_others_continue(tiny: Tiny, grid, budgets) -> None:
    config = tiny(**PRIVATE, rounds__count=3)
    alone = trained_lines(run(grid(config), config))["site-2"]
    cap = (alone[0].epsilon + alone[1].epsilon) / 2  # enough for one round
    budgets["site-2"] = BudgetConfig(epsilon=cap, delta=1e-3, unit="patient")
    again = tiny(**PRIVATE, rounds__count=3, run__name="again")
    folder = run(grid(again), again)
    lines = {(x.round, x.site): x for x in read_history(folder.history) if x.split == "val"}
    for number in (2, 3):
        line = lines[number, "site-2"]
        assert line.train is None
        assert f"{cap:.4g}" in line.declined["train"]
        assert not line.failed
        assert line.metrics is not None  # evaluation spends nothing
        assert lines[number, "site-1"].train is not None
    assert lines[1, "site-2"].train.epsilon <= cap
    assert json.loads(folder.outcome.read_text())["status"] == "completed"


def test_run_fails_with_reasons_when_all_sites_decline(tiny: Tiny, grid, budgets) -> None:
    for site in ("site-1", "site-2", "site-3"):
        budgets[site] = BudgetConfig(epsilon=0.01, delta=1e-3, unit="patient")
    config = tiny(**PRIVATE)
    with pytest.raises(RunFailed, match=r"0 of 3 sites answered and 3 declined.*site-1: .*0\.01"):
        run(grid(config), config)


def test_site_with_patient_budget_declines_example_unit(tiny: Tiny, grid, budgets) -> None:
    budgets["site-1"] = BudgetConfig(epsilon=50.0, delta=1e-3, unit="patient")
    config = tiny(**PRIVATE, privacy__unit="example", rounds__count=1)
    folder = run(grid(config), config)
    (line,) = (
        line
        for line in read_history(folder.history)
        if (line.site, line.split) == ("site-1", "val")
    )
    assert "protects patients" in line.declined["train"]


def standing_of(examples: int = 1000, patients: int = 400) -> PrivacyDeclaration:
    return PrivacyDeclaration("1", "a", examples, patients, Path("unused"), None)


def test_mechanism_follows_from_declared_counts() -> None:
    train = TrainConfig(batch_size=50)
    given = PrivacyConfig(mode="dp-sgd", noise_multiplier=0.8, unit="patient", clip_norm=2.0)
    mechanism = mechanism_of(train, given, 10, standing_of())
    assert (mechanism.sample_rate, mechanism.steps, mechanism.units) == (0.05, 20, 400)
    assert (mechanism.noise_multiplier, mechanism.clip_norm) == (0.8, 2.0)
    assert mechanism.expected_units == 20.0
    of_small = mechanism_of(
        train, PrivacyConfig(mode="dp-sgd", target_epsilon=3.0), 10, standing_of(200, 80)
    )
    of_large = mechanism_of(
        train, PrivacyConfig(mode="dp-sgd", target_epsilon=3.0), 10, standing_of()
    )
    assert of_small.noise_multiplier > of_large.noise_multiplier > 0


def test_run_delta_does_not_override_budget_delta(tiny: Tiny, grid, budgets) -> None:
    for site in ("site-1", "site-2", "site-3"):
        budgets[site] = BudgetConfig(epsilon=50.0, delta=1e-3, unit="patient")
    for delta in (1e-6, 1e-2):
        config = tiny(
            **{**PRIVATE, "privacy__delta": delta}, rounds__count=1, run__name=f"delta-{delta:g}"
        )
        for (report,) in trained_lines(run(grid(config), config)).values():
            assert report.delta == 1e-3


def test_failed_round_stays_spent(tiny: Tiny, grid, monkeypatch) -> None:
    import polyclinic.client.private_round

    def broken(*_: object, **__: object) -> None:
        raise TrainingError("the disk is full of sand")

    config = tiny(**PRIVATE, rounds__count=1, rounds__min_sites="2")
    train = polyclinic.client.private_round.train_one_round_privately
    calls = iter([broken, train, train])
    monkeypatch.setattr(
        polyclinic.client.private_round,
        "train_one_round_privately",
        lambda *a, **k: next(calls)(*a, **k),
    )
    folder = run(grid(config), config)
    ledgers = sorted(ledger_folder().rglob("site-1/ledger.db"))
    assert ledgers
    assert load_file(folder.best)


def test_unreachable_target_epsilon_is_declined() -> None:
    impossible = PrivacyConfig(mode="dp-sgd", target_epsilon=1e-9)
    with pytest.raises(Decline, match=r"privacy.target-epsilon: .*1e-09"):
        mechanism_of(TrainConfig(local_epochs=1000), impossible, 10**6, standing_of())


def test_resumed_run_continues_spending(tiny: Tiny, grid) -> None:
    """A lost round stays spent at the sites that had trained it."""

    class Killed(BaseException):
        pass

    def killed(_partition: int, reply: Message) -> Message:
        about = reply.content.config_records[wire.SITE]
        if about.get(wire.NUMBER) == 2 and reply.metadata.message_type == wire.TRAIN:
            raise Killed
        return reply

    config = tiny(**PRIVATE, rounds__count=2)
    federation = grid(config)
    federation.tamper = killed  # by then only the first site has trained
    with pytest.raises(Killed):
        run(federation, config)
    flat = {"run.resume": "a-run", "run.output-dir": config.run.output_dir}
    resumed = RunConfig.from_flat(flat)
    lines = {
        (line.site, line.round): line.train.epsilon
        for line in read_history(run(grid(resumed), resumed).history)
        if line.train
    }
    whole = tiny(**PRIVATE, run__name="whole", rounds__count=3)
    expected = {
        (line.site, line.round): line.train.epsilon
        for line in read_history(run(grid(whole), whole).history)
        if line.train
    }
    assert lines["site-3", 2] == pytest.approx(expected["site-3", 2])
    assert lines["site-1", 2] == pytest.approx(expected["site-1", 3])
