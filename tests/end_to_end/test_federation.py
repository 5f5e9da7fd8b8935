"""A whole run in one process: real messages and apps, without Ray.

tests/end_to_end/test_simulate.py runs the same with Ray.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Array, ConfigRecord, Message, MetricRecord, RecordDict
from safetensors.torch import load_file

from polyclinic.client.data.dataset import load_site
from polyclinic.configs import wire
from polyclinic.configs.errors import ConfigError
from polyclinic.configs.presets import read_run_config
from polyclinic.mtl_model.packing import Layout
from polyclinic.server.app import run
from polyclinic.server.rounds.errors import RunFailed, RunRefused
from polyclinic.server.rounds.federation import sites_needed
from polyclinic.server.runs.checkpoint import load_weights
from polyclinic.server.runs.history import POOLED, read_history
from polyclinic.simulation.local.sites import simulated_sites
from tests.factories import network, trained


def metrics_of(folder, split: str, number: int) -> dict[str, object]:
    return {
        line.site: line.metrics
        for line in read_history(folder.history)
        if line.split == split and line.round == number
    }


def test_run_writes_all_files_of_the_run_folder(tiny, grid) -> None:
    config = tiny()
    folder = run(grid(config), config)
    sites = ["site-1", "site-2", "site-3", POOLED]
    lines = read_history(folder.history)
    assert [(line.round, line.split) for line in lines if line.site == POOLED][:2] == [
        (1, "val"),
        (2, "val"),
    ]
    assert [line.site for line in lines if line.round == 1 and line.split == "val"] == sites
    first = next(line for line in lines if line.site == "site-1")
    assert first.metrics.images > 0
    assert first.train.steps > 0
    assert first.bytes_up > 0
    assert read_run_config(folder.config) == config
    environment = json.loads(folder.environment.read_text())
    assert set(environment["sites"]) == set(sites) - {POOLED}
    assert len(environment["sites"]["site-1"]["fingerprint"]) == 64
    assert environment["versions"]["torch"] == torch.__version__
    outcome = json.loads(folder.outcome.read_text())
    assert outcome["status"] == "completed"
    assert list(folder.path.glob("events.*"))
    results = json.loads(folder.results.read_text())
    assert results["round"] == outcome["best_round"]
    assert set(results["sites"]) == set(sites) - {POOLED}
    events = [json.loads(text)["event"] for text in folder.progress.read_text().splitlines()]
    assert events[0] == "phase"
    assert events[-1] == "end"
    assert not list(folder.path.glob("**/.*"))  # no temporary file is left


def test_pooled_metrics_combine_all_images(tiny, grid) -> None:
    config = tiny(rounds__count=1)
    folder = run(grid(config), config)
    metrics = metrics_of(folder, "val", 1)
    sites = [m for site, m in metrics.items() if site != POOLED]
    pooled = metrics[POOLED]
    assert pooled.images == sum(m.images for m in sites)
    assert pooled.dice == pytest.approx(
        sum(m.dice * m.lesions for m in sites) / sum(m.lesions for m in sites)
    )
    assert pooled.accuracy == pytest.approx(
        sum(m.accuracy * m.labelled for m in sites) / sum(m.labelled for m in sites)
    )


def test_best_round_weights_are_kept_and_tested(tiny, grid) -> None:
    config = tiny(rounds__count=3, rounds__keep_checkpoints=3, evaluate__select_by="dice")
    federation = grid(config)
    evaluated = 0

    def worse_after_round_1(_partition: int, reply: Message) -> Message:
        nonlocal evaluated
        if reply.metadata.message_type == wire.EVALUATE:
            evaluated += 1
            if evaluated > 3:
                reply.content.metric_records[wire.SUMS]["dice"] = [0.0]
        return reply

    federation.tamper = worse_after_round_1
    folder = run(federation, config)
    outcome = json.loads(folder.outcome.read_text())
    assert folder.checkpoints() == [1, 2, 3]
    scores = {
        line.round: line.metrics.dice
        for line in read_history(folder.history)
        if line.site == POOLED and line.split == "val"
    }
    assert scores[1] > scores[2] == scores[3] == 0
    assert outcome["best_round"] == 1
    kept, of_round = load_file(folder.best), load_file(folder.checkpoint(1))
    assert all(torch.equal(kept[name], of_round[name]) for name in of_round)
    sent = federation.sent[-1].content.array_records[wire.WEIGHTS]
    packed = Layout.of(network(config)).pack(kept)
    assert all(np.array_equal(sent[key].numpy(), packed[key]) for key in packed)
    fresh = network(config)
    load_weights(folder.best, fresh)
    state = json.loads(folder.state(3).read_text())
    assert state["layout"] == Layout.of(fresh).digest
    with pytest.raises(ValueError, match=r"outcome.json: expected weights of this run's network"):
        load_weights(folder.outcome, fresh)
    with pytest.raises(ValueError, match=r"best.safetensors: expected weights"):
        load_weights(folder.best, network(tiny(model__dfe="none")))


def test_only_the_last_checkpoints_are_kept(tiny, grid) -> None:
    config = tiny(rounds__count=3, rounds__keep_checkpoints=2)
    assert run(grid(config), config).checkpoints() == [2, 3]


def test_run_weights_are_reproducible_by_seed(tiny, grid) -> None:
    def weights(name: str, seed: int) -> dict[str, torch.Tensor]:
        config = tiny(run__name=name, run__seed=seed)
        return load_file(run(grid(config), config).checkpoint(2))

    first, again, other = weights("a", 5), weights("b", 5), weights("c", 6)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_partially_annotated_sites_take_part(tiny, grid) -> None:
    config = tiny(phantom__without_masks="site-1", phantom__without_labels="site-2")
    folder = run(grid(config), config)
    metrics = metrics_of(folder, "val", 2)
    assert metrics["site-1"].dice is None
    assert metrics["site-1"].lesions == 0
    assert metrics["site-1"].accuracy is not None
    assert metrics["site-2"].accuracy is None
    assert metrics["site-2"].auc is None
    assert metrics["site-2"].dice is not None
    assert metrics[POOLED].labelled == metrics["site-1"].labelled + metrics["site-3"].labelled
    train = {line.site: line.train for line in read_history(folder.history) if line.train}
    assert train["site-1"].loss_segmentation is None
    assert train["site-2"].loss_classification is None


def test_head_is_averaged_only_over_sites_that_trained_it(tiny, grid) -> None:
    """With masks at one site only, the decoder equals that site's bitwise."""
    replies: dict[int, dict[str, np.ndarray]] = {}

    def keep(partition: int, reply: Message) -> Message:
        if reply.has_content() and wire.WEIGHTS in reply.content.array_records:
            record = reply.content.array_records[wire.WEIGHTS]
            replies[partition] = {key: array.numpy() for key, array in record.items()}
        return reply

    config = tiny(rounds__count=1, phantom__without_masks="site-1,site-2")
    federation = grid(config)
    federation.tamper = keep
    folder = run(federation, config)
    fresh = network(config)
    load_weights(folder.checkpoint(1), fresh)
    averaged = Layout.of(fresh).pack(fresh.state_dict())
    assert np.array_equal(averaged["segmentation/float32"], replies[2]["segmentation/float32"])
    assert not np.array_equal(averaged["encoder/float32"], replies[2]["encoder/float32"])


def test_round_sends_three_weight_arrays_per_message(tiny, grid) -> None:
    config = tiny(rounds__count=1)
    federation = grid(config)
    run(federation, config)
    with_weights = [m for m in federation.sent if wire.WEIGHTS in m.content.array_records]
    assert len(with_weights) == 3 * 3  # train, evaluate on val, evaluate on test
    assert all(len(m.content.array_records[wire.WEIGHTS]) == 3 for m in with_weights)
    assert all(0 < m.metadata.ttl <= config.rounds.deadline_s for m in federation.sent)


def lost(partition: int, reply: Message) -> Message | None:
    return None if partition == 1 and trained(reply) else reply


def not_finite(partition: int, reply: Message) -> Message:
    if partition == 1 and trained(reply):
        record = reply.content.array_records[wire.WEIGHTS]
        array = record["encoder/float32"].numpy().copy()
        array[7] = np.nan
        record["encoder/float32"] = Array(array)
    return reply


def other_shape(partition: int, reply: Message) -> Message:
    if partition == 1 and trained(reply):
        reply.content.array_records[wire.WEIGHTS]["encoder/float32"] = Array(np.zeros(3, "f4"))
    return reply


def foreign_bytes(partition: int, reply: Message) -> Message:
    if partition == 1 and trained(reply):
        record = reply.content.array_records[wire.WEIGHTS]
        record["encoder/float32"] = Array("float32", (3,), "pickle", b"xx")
    return reply


def cut_bytes(partition: int, reply: Message) -> Message:
    if partition == 1 and trained(reply):
        record = reply.content.array_records[wire.WEIGHTS]
        whole = record["encoder/float32"]
        record["encoder/float32"] = Array(whole.dtype, whole.shape, whole.stype, whole.data[:50])
    return reply


def no_counts(partition: int, reply: Message) -> Message:
    if partition == 1 and trained(reply):
        reply.content.metric_records[wire.SUMS][wire.EXAMPLES] = -4
    return reply


def too_many(partition: int, reply: Message) -> Message:
    if partition == 1 and trained(reply):
        reply.content.metric_records[wire.SUMS][wire.EXAMPLES] = 1_000_000
    return reply


def too_long(partition: int, reply: Message) -> Message:
    if partition == 1 and trained(reply):
        reply.content.metric_records[wire.SUMS][wire.STEPS] = 4000
    return reply


def far_away(partition: int, reply: Message) -> Message:
    if partition == 1 and trained(reply):
        record = reply.content.array_records[wire.WEIGHTS]
        record["encoder/float32"] = Array(record["encoder/float32"].numpy() + np.float32(3))
    return reply


def of_another_round(partition: int, reply: Message) -> Message:
    if partition == 1 and trained(reply):
        reply.content.config_records[wire.SITE][wire.NUMBER] = 7
    return reply


def of_another_run(partition: int, reply: Message) -> Message:
    if partition == 1 and trained(reply):
        reply.content.config_records[wire.SITE][wire.RUN] = "another"
    return reply


def of_another_site(partition: int, reply: Message) -> Message:
    if partition == 1 and trained(reply):
        reply.content.config_records[wire.SITE][wire.NAME] = "site-1"
    return reply


def empty(partition: int, reply: Message) -> Message:
    if partition == 1 and trained(reply):
        reply.content = RecordDict({"other": ConfigRecord({"a": 1})})
    return reply


@pytest.mark.parametrize(
    ("harm", "outcome", "said"),
    [
        (lost, "late", "no answer in 2 s"),
        (not_finite, "refused", r"encoder/float32: expected finite values, got 1 of"),
        (other_shape, "refused", r"float32: expected \d+ values of float32, got shape \(3,\)"),
        (foreign_bytes, "refused", "weights: "),
        (cut_bytes, "refused", "weights: "),
        (
            no_counts,
            "refused",
            "examples: expected an integer of at least 0 .*got -4",
        ),
        (too_many, "refused", r"about the \d+ training images .* described, got 1000000"),
        (too_long, "refused", r"expected about \d steps from \d+ images, got 4000"),
        (far_away, "refused", r"update: expected a norm of at most .*10 times .*, got"),
        (empty, "refused", "expected records site and sums, got other"),
        (of_another_round, "refused", "number: expected 1, got 7"),
        (of_another_run, "refused", "run: expected '[0-9a-f]{32}', got 'another'"),
        (of_another_site, "refused", "name: expected 'site-2', got 'site-1'"),
    ],
)
def test_invalid_reply_is_reported_and_others_are_averaged(
    tiny, grid, harm, outcome: str, said: str
) -> None:
    config = tiny(rounds__count=1, rounds__min_sites="2", rounds__deadline_s=2)
    federation = grid(config)
    federation.tamper = harm
    folder = run(federation, config)
    lines = {line.site: line for line in read_history(folder.history) if line.split == "val"}
    assert re.search(said, getattr(lines["site-2"], outcome)["train"])
    assert lines["site-2"].lost.keys() == {"train"}
    assert lines["site-2"].asked == ("train", "evaluate")
    assert lines["site-2"].train is None
    assert lines["site-1"].train is not None
    assert np.isfinite(load_file(folder.checkpoint(1))["head.out.bias"].numpy()).all()
    if outcome != "late":
        return
    strict = tiny(run__name="strict", rounds__count=1, rounds__deadline_s=2)
    federation = grid(strict)
    federation.tamper = harm
    with pytest.raises(RunFailed, match=f"2 of 3 sites answered, 3 are needed.*site-2: .*{said}"):
        run(federation, strict)


def test_failed_run_records_reason_and_keeps_checkpoints(tiny, grid) -> None:
    config = tiny(rounds__count=3, rounds__deadline_s=2)
    federation = grid(config)
    rounds = 0

    def vanish_in_round_2(partition: int, reply: Message) -> Message | None:
        nonlocal rounds
        rounds += partition == 0 and trained(reply)
        return None if partition == 2 and rounds == 2 else reply

    federation.tamper = vanish_in_round_2
    with pytest.raises(RunFailed, match="round 2, train"):
        run(federation, config)
    folder = Path(config.run.output_dir) / config.run.name
    outcome = json.loads((folder / "outcome.json").read_text())
    assert outcome["status"] == "failed"
    assert "site-3: no answer in 2 s" in outcome["reason"]
    assert (folder / "checkpoints" / "round-0001.safetensors").exists()


def test_site_with_another_network_is_refused(tiny, grid) -> None:
    config = tiny(rounds__count=1)
    federation = grid(config)
    federation.run_config = {**config.to_flat(), "model.dfe": "none"}
    with pytest.raises(RunFailed, match=r"the server's network differs from this site's"):
        run(federation, config)


def test_exception_at_a_site_is_reported_as_its_failure(tiny, grid, monkeypatch) -> None:
    config = tiny(rounds__count=1)

    def broken(*_args: object, **_kwargs: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("polyclinic.client.app.train_one_round", broken)
    with pytest.raises(RunFailed, match=r"site-1: failed: RuntimeError.*out of memory"):
        run(grid(config), config)


def test_unusable_data_refuse_the_run_before_training(tiny, grid, tmp_path: Path) -> None:
    config = tiny(data__root=str(tmp_path / "nowhere"))
    federation = grid(config)
    with pytest.raises(RunRefused, match=r"nowhere: expected a folder, found none"):
        run(federation, config)
    assert {m.metadata.message_type for m in federation.sent} == {wire.DESCRIBE}


def test_unavailable_site_is_reported_and_others_continue(tiny, grid) -> None:
    config = tiny(rounds__count=1, rounds__min_sites="50%")
    federation = grid(config)

    def without_data(partition: int, reply: Message) -> Message:
        if partition == 1 and reply.metadata.message_type == wire.DESCRIBE:
            about = ConfigRecord({wire.REFUSAL: "the disk is on fire"})
            reply.content = RecordDict({wire.SITE: about, wire.SUMS: MetricRecord()})
        return reply

    federation.tamper = without_data
    folder = run(federation, config)
    events = [json.loads(text) for text in folder.progress.read_text().splitlines()]
    (sites,) = (event for event in events if event["event"] == "sites")
    assert list(sites["sites"]) == ["site-1", "site-3"]
    assert list(sites["failed"].values()) == ["the disk is on fire"]
    assert {line.site for line in read_history(folder.history)} == {"site-1", "site-3", POOLED}


def test_more_data_sites_than_supernodes_are_refused(
    tiny, grid, site_folder, tmp_path: Path
) -> None:
    from tests.conftest import rows_of

    for name in ("a", "b", "c"):
        site_folder(rows_of(6) + rows_of(6, "malignant"), f"sites/{name}")
    config = tiny(data__root=str(tmp_path / "sites"))
    with pytest.raises(RunRefused, match=r"has 3 sites \(a, b, c\), but 2 .*num-supernodes=3"):
        run(grid(config, sites=2), config)


def test_class_without_training_images_refuses_the_run(tiny, grid) -> None:
    config = tiny(data__classes="benign,malignant,cyst")
    with pytest.raises(RunRefused, match="no site has a training image of class 'cyst'"):
        run(grid(config), config)


def test_existing_run_is_not_overwritten(tiny, grid) -> None:
    config = tiny(rounds__count=1)
    run(grid(config), config)
    with pytest.raises(ConfigError, match=r"run.name: .*a-run already contains a run"):
        run(grid(config), config)


def test_federation_without_sites_ends_after_the_wait(tiny, grid) -> None:
    config = tiny(rounds__wait_for_sites_s=0.5)
    with pytest.raises(RunRefused, match=r"0 sites are connected, 1 are needed.*after 0.5 s"):
        run(grid(config, sites=0), config)


@pytest.mark.parametrize(
    ("min_sites", "sites", "needed"), [("all", 5, 5), ("2", 5, 2), ("50%", 5, 3), ("1%", 3, 1)]
)
def test_min_sites_accepts_all_a_number_or_a_percentage(
    min_sites: str, sites: int, needed: int
) -> None:
    assert sites_needed(min_sites, sites) == needed


def test_batch_norm_can_be_federated_without_averaging_its_counters(tiny, grid) -> None:
    config = tiny(model__norm="batch", rounds__count=1)
    folder = run(grid(config), config)
    state = load_file(folder.checkpoint(1))
    counters = {n: t for n, t in state.items() if n.endswith("num_batches_tracked")}
    assert counters
    assert {t.dtype for t in counters.values()} == {torch.int64}


def test_phantoms_in_the_cache_are_read_as_any_site_folder(tiny) -> None:
    config = tiny()
    root, manifests = simulated_sites(config.data, config.phantom)
    assert list(manifests) == ["site-1", "site-2", "site-3"]
    site = load_site(manifests["site-2"], config.data)
    assert not site.skipped
    assert simulated_sites(config.data, config.phantom)[0] == root
