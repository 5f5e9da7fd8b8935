"""Resuming an interrupted run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Message
from safetensors.numpy import load_file

from polyclinic.configs import wire
from polyclinic.configs.errors import ConfigError
from polyclinic.configs.files import write_json
from polyclinic.configs.presets import read_run_config
from polyclinic.configs.run import RunConfig
from polyclinic.server.app import run
from polyclinic.server.rounds.errors import RunFailed, RunRefused
from polyclinic.server.runs.folder import RunFolder
from polyclinic.server.runs.history import POOLED, read_history


class Killed(BaseException):
    """Stands for a signal that ends the process at once."""


def killed_in(federation, number: int, kind: str) -> None:
    """Make a federation's server die in a round at the first reply of a kind."""

    def tamper(_partition: int, reply: Message) -> Message:
        about = reply.content.config_records[wire.SITE] if reply.has_content() else {}
        if about.get(wire.NUMBER) == number and reply.metadata.message_type == kind:
            raise Killed
        return reply

    federation.tamper = tamper


def interrupted(tiny, grid, number: int, kind: str, **changes: object) -> RunConfig:
    config = tiny(**changes)
    federation = grid(config)
    killed_in(federation, number, kind)
    with pytest.raises(Killed):
        run(federation, config)
    (Path(config.run.output_dir) / "a-run" / "outcome.json").unlink()  # as after kill -9
    return config


def weights(folder: RunFolder, number: int) -> dict[str, np.ndarray]:
    return load_file(folder.checkpoint(number))


def same(one: RunFolder, other: RunFolder, number: int) -> bool:
    a, b = weights(one, number), weights(other, number)
    return all(np.array_equal(a[name], b[name]) for name in a)


MODES = {
    "plain": {},
    "optimiser": {"strategy.name": "fedadam", "strategy.server-learning-rate": 0.001},
    "momentum": {"strategy.name": "fedavgm", "strategy.server-momentum": 0.5},
    "drawn": {"rounds.fraction": 0.5, "rounds.min-sites": "1"},
    "personal norms": {"strategy.personal": "norms"},
    "personal heads": {"strategy.personal": "heads"},
}


IN_CI = {
    ("plain", wire.TRAIN),
    ("optimiser", wire.EVALUATE),
    ("drawn", wire.EVALUATE),
    ("personal heads", wire.TRAIN),
}


@pytest.mark.parametrize(
    ("mode", "number", "kind"),
    [
        pytest.param(
            *(mode, number, kind), marks=() if (mode, kind) in IN_CI else (pytest.mark.long,)
        )
        for mode in MODES
        for number, kind in ((2, wire.TRAIN), (3, wire.EVALUATE))
    ],
)
def test_resumed_run_matches_an_uninterrupted_run(
    tiny, grid, mode: str, number: int, kind: str
) -> None:
    changes = {key.replace(".", "__").replace("-", "_"): v for key, v in MODES[mode].items()}
    changes |= {"rounds__count": 3, "rounds__keep_checkpoints": 3}
    whole_config = tiny(run__name="whole", **changes)
    whole = run(grid(whole_config), whole_config)
    interrupted(tiny, grid, number, kind, **changes)
    resumed = tiny(run__name="", run__resume="a-run")
    # as Flower passes it: the release's defaults and the settings given with -c
    federation = grid(RunConfig.from_flat({"run.resume": "a-run"}))
    folder = run(federation, resumed_from_defaults(resumed))
    assert same(whole, folder, 3)
    lines = [(x.round, x.site, x.split) for x in read_history(folder.history)]
    assert lines == [(x.round, x.site, x.split) for x in read_history(whole.history)]
    results = [json.loads(f.results.read_text()) for f in (whole, folder)]
    assert results[0] == results[1]
    assert json.loads(folder.outcome.read_text())["rounds"] == 3
    assert read_run_config(folder.config).run.resume == ""


def resumed_from_defaults(config: RunConfig) -> RunConfig:
    flat = {"run.resume": config.run.resume, "run.output-dir": config.run.output_dir}
    return RunConfig.from_flat(flat)


def resume(tiny, grid, **changes: object) -> RunFolder:
    config = tiny(run__name="", run__resume="a-run")
    given = {**resumed_from_defaults(config).to_flat(), **changes}
    return run(grid(RunConfig.from_flat(given)), RunConfig.from_flat(given))


def test_run_killed_before_first_checkpoint_restarts(tiny, grid) -> None:
    config = tiny(run__name="whole", rounds__count=1)
    whole = run(grid(config), config)
    interrupted(tiny, grid, 1, wire.EVALUATE, rounds__count=1)
    assert same(whole, resume(tiny, grid), 1)


def test_completed_run_resumes_only_with_more_rounds(tiny, grid) -> None:
    config = tiny(rounds__count=1)
    run(grid(config), config)
    with pytest.raises(ConfigError, match=r"completed its 1 rounds; set a larger rounds.count"):
        resume(tiny, grid)
    folder = resume(tiny, grid, **{"rounds.count": 2})
    assert folder.checkpoints() == [1, 2]
    assert read_run_config(folder.config).rounds.count == 2
    splits = [(line.round, line.split) for line in read_history(folder.history)]
    assert len([1 for _, split in splits if split == "test"]) == 4
    assert splits[:8] == [(1, "val")] * 4 + [(2, "val")] * 4


@pytest.mark.parametrize(
    "harm",
    [
        *("changed weights", "cut state", "foreign"),
        *(
            pytest.param(h, marks=pytest.mark.long)
            for h in ("cut weights", "no weights", "changed state")
        ),
    ],
)
def test_damaged_checkpoint_is_reported_and_previous_one_is_used(
    tiny, grid, caplog, harm: str
) -> None:
    config = interrupted(tiny, grid, 3, wire.TRAIN, rounds__count=3)
    folder = RunFolder.of("a-run", config.run.output_dir)
    before = weights(folder, 2)
    saved, state = folder.checkpoint(2), folder.state(2)
    content = bytearray(saved.read_bytes())
    if harm == "cut weights":
        saved.write_bytes(content[: len(content) // 2])
    elif harm == "changed weights":
        content[-5] ^= 1
        saved.write_bytes(content)
    elif harm == "no weights":
        saved.unlink()
    elif harm == "changed state":
        state.write_text(state.read_text().replace('"failures": 0', '"failures": 1', 1))
    elif harm == "cut state":
        state.write_text(state.read_text()[:40])
    else:
        other = tiny(run__name="other", rounds__count=2)
        foreign = run(grid(other), other)
        state.write_bytes(foreign.state(2).read_bytes())
        saved.write_bytes(foreign.checkpoint(2).read_bytes())
    resume(tiny, grid)
    assert "checkpoint of round 2 cannot be used" in caplog.text
    assert "resuming after round 1 of 3" in caplog.text
    assert folder.checkpoints() == [2, 3]
    again = weights(folder, 2)
    assert all(np.array_equal(again[name], before[name]) for name in before)


def test_run_without_valid_checkpoint_is_refused(tiny, grid) -> None:
    interrupted(tiny, grid, 2, wire.TRAIN, rounds__count=2)
    folder = RunFolder.of("a-run", tiny().run.output_dir)
    folder.checkpoint(1).write_bytes(b"")
    with pytest.raises(RunRefused, match=r"none of the checkpoints .*state-0001.json: round-0001"):
        resume(tiny, grid)
    assert json.loads(folder.outcome.read_text())["status"] == "refused"


def test_best_round_weights_outlive_checkpoint_pruning(tiny, grid) -> None:
    """The best round's file is kept as long as a kept state refers to it."""
    config = tiny(rounds__count=4, rounds__keep_checkpoints=1, evaluate__select_by="dice")
    federation = grid(config)
    evaluated = 0

    def worse_after_round_1(_partition: int, reply: Message) -> Message:
        nonlocal evaluated
        about = reply.content.config_records[wire.SITE]
        if reply.metadata.message_type == wire.EVALUATE:
            evaluated += 1
            if evaluated > 3:
                reply.content.metric_records[wire.SUMS]["dice"] = [0.0]
        if about.get(wire.NUMBER) == 4 and reply.metadata.message_type == wire.TRAIN:
            raise Killed
        return reply

    federation.tamper = worse_after_round_1
    with pytest.raises(Killed):
        run(federation, config)
    folder = RunFolder.of("a-run", config.run.output_dir)
    assert folder.checkpoints() == [3]
    assert folder.saved_weights() == [1, 3]
    best = folder.best.read_bytes()
    folder.best.write_bytes(folder.checkpoint(3).read_bytes())  # as a crash may leave it
    resume(tiny, grid)
    outcome = json.loads(folder.outcome.read_text())
    if outcome["best_round"] == 1:
        assert folder.best.read_bytes() == best
    assert outcome["best_round"] in (1, 4)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"model.dfe": "none"},
            r"model.dfe: expected 'sum', the value of the stored run, got 'none'",
        ),
        ({"strategy.name": "krum"}, "strategy.name: expected 'fedavg'"),
        ({"run.resume": "nowhere"}, "nowhere: no such run under"),
    ],
)
def test_resume_with_conflicting_settings_is_refused(tiny, grid, changes: dict, said: str) -> None:
    interrupted(tiny, grid, 2, wire.TRAIN)
    with pytest.raises(ConfigError, match=said):
        resume(tiny, grid, **changes)


def test_locked_run_cannot_be_resumed_by_another_process(tiny, grid) -> None:
    interrupted(tiny, grid, 2, wire.TRAIN)
    folder = RunFolder.of("a-run", tiny().run.output_dir)
    with folder.locked(), pytest.raises(ConfigError, match="another process is executing this run"):
        resume(tiny, grid)
    resume(tiny, grid)


def test_run_stopped_by_a_full_disk_can_be_resumed(tiny, grid, monkeypatch) -> None:
    import polyclinic.server.runs.checkpoint as checkpoint

    config = tiny(run__name="whole", rounds__count=2)
    whole = run(grid(config), config)
    write = checkpoint.write_atomically

    def full(path: Path, content: bytes) -> None:
        if path.name == "round-0002.safetensors":
            raise OSError(28, "No space left on device")
        write(path, content)

    config = tiny(rounds__count=2)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_atomically", full)
        with pytest.raises(RunFailed, match=r"round 2 could not be saved .*No space left"):
            run(grid(config), config)
    folder = RunFolder.of("a-run", config.run.output_dir)
    assert folder.checkpoints() == [1]
    assert same(whole, resume(tiny, grid), 2)


def test_patience_stops_the_run(tiny, grid) -> None:
    config = tiny(rounds__count=9, rounds__patience=2, evaluate__select_by="dice")
    federation = grid(config)

    def without_dice(_partition: int, reply: Message) -> Message:
        if reply.metadata.message_type == wire.EVALUATE:
            reply.content.metric_records[wire.SUMS]["dice"] = [0.0]
        return reply

    federation.tamper = without_dice
    folder = run(federation, config)
    outcome = json.loads(folder.outcome.read_text())
    assert (outcome["status"], outcome["rounds"], outcome["best_round"]) == ("completed", 3, 1)
    assert "rounds.patience" in outcome["reason"]
    assert {x.round for x in read_history(folder.history) if x.site == POOLED} == {1, 2, 3}


def test_truncated_history_line_is_removed_on_resume(tiny, grid) -> None:
    interrupted(tiny, grid, 2, wire.TRAIN)
    folder = RunFolder.of("a-run", tiny().run.output_dir)
    for path in (folder.history, folder.progress):
        with path.open("a") as file:
            file.write('{"round": 2, "si')
    resume(tiny, grid)
    assert [json.loads(x)["round"] for x in folder.history.read_text().splitlines()][:8] == (
        [1] * 4 + [2] * 4
    )
    assert json.loads(folder.progress.read_text().splitlines()[-1])["event"] == "end"


def test_resume_keeps_old_environment_and_reports_changed_data(tiny, grid, caplog) -> None:
    interrupted(tiny, grid, 2, wire.TRAIN)
    folder = RunFolder.of("a-run", tiny().run.output_dir)
    before = json.loads(folder.environment.read_text())
    before["sites"]["site-2"]["fingerprint"] = "0" * 64
    write_json(folder.environment, before)
    resume(tiny, grid)
    after = json.loads(folder.environment.read_text())
    assert after["before"] == [before]
    assert set(after["sites"]) == {"site-1", "site-2", "site-3"}
    assert "site site-2: its data have changed since the run started" in caplog.text
    assert "site site-1: its data have changed" not in caplog.text


def test_run_folder_of_an_earlier_version_is_refused(tiny, grid) -> None:
    config = tiny(rounds__count=1)
    run(grid(config), config).identity_file.unlink()
    with pytest.raises(ConfigError, match=r"was written by an earlier version, without a run.json"):
        resume(tiny, grid)
