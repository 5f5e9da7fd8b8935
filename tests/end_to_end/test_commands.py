"""The command line: exit status, messages, and no partial output."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from polyclinic.server.app import run
from polyclinic.simulation.experiments.compare import compare_run
from tests.conftest import rows_of, write_manifest


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--set", "train.batch-sise=3"], "train.batch-sise: unknown key"),
        (["--set", "train.batch-size=0"], "train.batch-size must be at least 1, got 0"),
        (["--set", "train.batch-size"], "expected key=value"),
        (["--rounds", "0"], "rounds.count"),
        (["--config", "none.toml"], "none.toml: no such preset"),
        (["--sites", "north"], "expected a number of phantom sites, got 'north'"),
        (["--data", "nowhere"], "nowhere: expected a folder, found none"),
        (["--set", "phantom.without-masks=site-9"], "site-9"),
        (["--set", "data.classes=benign,malignant,cyst"], "no site has a training image of class"),
        (["--set", "rounds.min-sites=7"], "rounds.min-sites: expected at most 3"),
        (["--set", "train.device=cuda:99"], "train.device: got 'cuda:99', but PyTorch sees"),
        (["--config", "."], "cannot be read: Is a directory"),
        (["--bogus"], "No such option"),
    ],
)
def test_simulate_user_errors_exit_2_and_write_nothing(
    cli, tmp_path: Path, arguments: list[str], said: str
) -> None:
    status, out, err = cli("simulate", *arguments)
    assert status == 2
    assert out == ""
    assert re.search(said, err), err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def twelve() -> list[dict[str, str]]:
    return rows_of(6) + rows_of(6, "malignant")


def without_manifest(folder: Path) -> None:
    (folder / "labels.csv").unlink()


def with_unknown_label(folder: Path) -> None:
    rows = twelve()
    rows[0]["label"] = "cyst"
    write_manifest(folder, rows)


def with_few_images(folder: Path) -> None:
    write_manifest(folder, twelve()[:2])


def with_lost_image(folder: Path) -> None:
    (folder / "images/benign0.png").unlink()


def with_empty_folder(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (without_manifest, "expected labels.csv"),
        (with_empty_folder, "expected labels.csv"),
        (with_unknown_label, "row 2: label: expected benign, malignant (data.classes)"),
        (with_few_images, "2 images of 2 groups are too few to split"),
        (with_lost_image, "row 2: image"),
    ],
)
def test_unusable_data_exit_2_and_say_what_to_fix(
    cli, site_folder, tmp_path: Path, harm, said: str
) -> None:
    folder = site_folder(twelve(), "data/north")
    harm(folder)
    status, out, err = cli(
        "simulate", "--data", folder, "--out", "runs", "--set", "data.on-error=refuse"
    )
    assert (status, out) == (2, "")
    assert said in err
    assert not (tmp_path / "runs").exists()


def test_existing_run_name_exits_2(cli, tmp_path: Path) -> None:
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "config.toml").write_text("")
    status, _, err = cli("simulate", "--set", "run.name=mine", "--out", "runs")
    assert status == 2
    assert "already contains a run" in err


def test_phantom_command_writes_to_the_given_folder(cli, tmp_path: Path) -> None:
    status, out, _ = cli("phantom", "--out", tmp_path / "p", "--sites", 2, "--examples", 10)
    assert status == 0
    assert [path.name for path in sorted((tmp_path / "p").iterdir())] == ["site-1", "site-2"]
    assert f"{tmp_path / 'p' / 'site-1'}: 10 images" in out.replace("\n", "")


def test_phantom_command_does_not_overwrite(cli, tmp_path: Path) -> None:
    assert cli("phantom", "--out", "p", "--sites", 1, "--examples", 10)[0] == 0
    status, _, err = cli("phantom", "--out", "p", "--sites", 2, "--examples", 20)
    assert status == 2
    assert "site-1 already exists" in err


def test_unwritable_run_folder_exits_1_without_traceback(cli, tmp_path) -> None:
    (tmp_path / "runs").write_text("a file")
    status, _, err = cli("simulate", "--out", "runs", "--set", "phantom.examples=10")
    assert status == 1
    assert "runs" in err
    assert "Traceback" not in err


def test_runs_commands_list_and_show_runs(cli, tiny, grid, tmp_path: Path) -> None:
    config = tiny(rounds__count=1)
    run(grid(config), config)
    status, out, _ = cli("runs", "--runs", tmp_path / "runs")
    assert status == 0
    assert "a-run" in out
    assert "completed" in out
    status, out, _ = cli("runs", "--runs", tmp_path / "runs", "--json")
    assert json.loads(out)["runs"][0]["rounds"] == 1
    status, out, _ = cli("runs", "show", "a-run", "--runs", tmp_path / "runs")
    assert status == 0
    for text in ("Round 1 on the validation images", "Round 1 on the held-out test", "site-2"):
        assert text in out
    status, out, _ = cli("runs", "show", tmp_path / "runs" / "a-run", "--json")
    assert len(json.loads(out)["history"]) == 8
    status, _, err = cli("runs", "show", "nothing", "--runs", tmp_path / "runs")
    assert status == 2
    assert "nothing: no such run in" in err
    status, _, err = cli("runs", "--runs", tmp_path / "empty")
    assert status == 2


def test_compare_tests_local_pooled_and_federated_models(
    tiny, grid, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from polyclinic.simulation.local.sites import simulated_sites

    base = tiny(rounds__count=1)
    root, _ = simulated_sites(base.data, base.phantom)
    config = tiny(rounds__count=1, data__root=str(root))
    folder = run(grid(config), config)
    capsys.readouterr()
    assert compare_run(folder.path, as_json=True) == 0
    found = json.loads(capsys.readouterr().out)["models"]
    comparison = {each["model"]: each["sites"] for each in found}
    models = ["site-1 local", "site-2 local", "site-3 local", "all pooled", "federated"]
    assert list(comparison) == models
    tested = {model: list(sites) for model, sites in comparison.items()}
    assert set(map(tuple, tested.values())) == {("site-1", "site-2", "site-3", "pooled")}
    images = {m: [s["images"] for s in sites.values()] for m, sites in comparison.items()}
    assert len(set(map(tuple, images.values()))) == 1  # the same images for every model


def test_comparison_without_validation_images_tests_the_last_round(
    tiny, grid, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import polyclinic.simulation.experiments.compare as module
    from polyclinic.simulation.local.sites import simulated_sites

    base = tiny()
    root, _ = simulated_sites(base.data, base.phantom)
    config = tiny(rounds__count=2, data__root=str(root), data__val_fraction=0.0)
    folder = run(grid(config), config)
    trained: list[dict[str, torch.Tensor]] = []
    tested: list[bool] = []  # whether each evaluation saw the weights of the last training round

    def train_and_record(network, *args, **kwargs):
        result = train_one_round(network, *args, **kwargs)
        trained.append({k: v.clone() for k, v in network.state_dict().items()})
        return result

    def sums_and_record(config, network, examples):
        if len(examples):
            state = network.state_dict()
            tested.append(all(torch.equal(state[k], v) for k, v in trained[-1].items()))
        return sums(config, network, examples)

    train_one_round, sums = module.train_one_round, module._sums
    monkeypatch.setattr(module, "train_one_round", train_and_record)
    monkeypatch.setattr(module, "_sums", sums_and_record)
    assert compare_run(folder.path, as_json=True) == 0
    assert len(trained) == 2 * 4  # two rounds for three sites and the pooled data
    assert tested == [True] * 3 * 4


def test_comparison_of_a_site_that_never_trained_has_no_values(
    tiny, grid, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog
) -> None:
    import polyclinic.simulation.experiments.compare as module
    from polyclinic.simulation.local.sites import simulated_sites

    base = tiny()
    root, _ = simulated_sites(base.data, base.phantom)
    config = tiny(rounds__count=1, data__root=str(root))
    folder = run(grid(config), config)
    found = module.rounds_trained
    monkeypatch.setattr(module, "rounds_trained", lambda h: {**found(h), "site-2": []})
    capsys.readouterr()
    assert compare_run(folder.path, as_json=True) == 0
    found = json.loads(capsys.readouterr().out)["models"]
    row = next(each["sites"] for each in found if each["model"] == "site-2 local")
    assert {values["dice"] for values in row.values()} == {None}
    assert "site-2, local training: no values, because the site trained in no round" in caplog.text


def test_version_is_printed(cli) -> None:
    assert cli("--version")[1].strip() == "0.1.0"


def test_model_info_parts_sum_to_the_totals(cli) -> None:
    wanted = ["--size", "64x96", "--set", "model.preset=light", "--set", "data.channels=3"]
    status, out, _ = cli("model", "info", *wanted, "--json")
    assert status == 0
    counted = json.loads(out)
    assert counted["parameters"] == sum(part["parameters"] for part in counted["parts"])
    assert counted["gmacs"] == pytest.approx(sum(part["gmacs"] for part in counted["parts"]))
    assert counted["state_bytes"] == 4 * counted["parameters"]
    shapes = {part["name"]: part["outputs"] for part in counted["parts"]}
    assert shapes["encoder, transformer"] == [[64, 16, 24], [128, 8, 12], [256, 4, 6], [512, 2, 3]]
    assert shapes["decoder"] == [[1, 64, 96]]
    status, out, _ = cli("model", "info", *wanted)
    assert f"{counted['parameters']:,}" in out
    assert "decoder" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--size", "22x"], "--size: expected pixels as 224 or 256x320, got '22x'"),
        (["--size", "16"], "data.image-height must be at least 32"),
        (["--set", "model.backbone=resnet35"], "timm has no model 'resnet35'; did you mean"),
        (["--set", "model.preset=heavy"], "model.preset must be 'full' or 'light'"),
    ],
)
def test_model_info_with_invalid_settings_exits_2(cli, arguments, said) -> None:
    status, out, err = cli("model", "info", *arguments)
    assert (status, out) == (2, "")
    assert said in err


def test_rounds_trained_counts_rounds_per_site() -> None:
    from polyclinic.server.runs.history import Line
    from polyclinic.server.runs.reports import TrainReport
    from polyclinic.simulation.experiments.compare import rounds_trained

    report = TrainReport(3, 1.0, 0.5, 0.5)
    history = [
        Line(1, "a", "val", train=report),
        Line(1, "b", "val"),
        Line(2, "a", "val", train=report),
        Line(2, "b", "val", train=report),
    ]
    assert rounds_trained(history) == {"a": [1, 2], "b": [2]}


def test_status_commands_do_not_import_torch() -> None:
    """Importing torch would add seconds to each ``polyclinic server status`` and ``runs show``."""
    code = (
        "import sys; import polyclinic as p; p.command_line(); "
        "from polyclinic.server.deployment import status; "
        "from polyclinic.server.runs import history, tables, watch; "
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
