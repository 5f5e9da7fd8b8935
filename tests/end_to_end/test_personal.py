"""Personal layers: stored at the sites across rounds and restarts, and never sent."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Message
from PIL import Image
from safetensors.numpy import load_file
from torch import nn

from polyclinic.client.training.personal_state import SiteMemory
from polyclinic.configs import wire
from polyclinic.mtl_model.network import network_of
from polyclinic.mtl_model.packing import Layout, Packed
from polyclinic.mtl_model.personal import personal_names
from polyclinic.server.app import run
from polyclinic.server.runs.history import read_history


def network(config):
    return network_of(config.model, config.data, config.loss, seed=config.run.seed)


def test_personal_names_selects_norms_and_heads(tiny) -> None:
    model = network(tiny(model__norm="batch", loss__weighting="uncertainty"))
    state = set(model.state_dict())
    norms = personal_names(model, "norms")
    owners = {name.rsplit(".", 1)[0] for name in norms}
    kinds = {type(model.get_submodule(owner)) for owner in owners}
    assert kinds
    assert all(
        issubclass(kind, nn.GroupNorm | nn.LayerNorm | nn.modules.batchnorm._BatchNorm)
        for kind in kinds
    )
    assert {n for n in state if "running_mean" in n or "num_batches" in n} <= norms
    heads = personal_names(model, "heads")
    assert {name.split(".")[0] for name in heads} == {"decoder", "dfe", "head", "uncertainty"}
    assert {n for n in state if n.startswith("encoder.")} == state - heads
    assert personal_names(model, "none") == frozenset()


@pytest.mark.parametrize("kind", ["norms", "heads"])
def test_personal_layers_are_never_sent_and_train_at_each_site(tiny, grid, kind: str) -> None:
    config = tiny(strategy__personal=kind, rounds__count=3, train__learning_rate=0.01)
    federation = grid(config)
    sent: list[Packed] = []

    def keep(_partition: int, reply: Message) -> Message:
        if wire.WEIGHTS in reply.content.array_records:
            record = reply.content.array_records[wire.WEIGHTS]
            sent.append({key: array.numpy() for key, array in record.items()})
            assert wire.INITIAL not in reply.content.array_records
        return reply

    federation.tamper = keep
    folder = run(federation, config)
    fresh = network(config)
    shared, personal = Layout.of(fresh).parts(personal_names(fresh, config.strategy.personal))
    assert all({k: a.size for k, a in s.items()} == sizes(shared) for s in sent)
    memory = Path(federation_memory()) / folder.identity
    kept = {site.name: load_file(site / "round-0003.safetensors") for site in memory.iterdir()}
    assert set(kept) == {"site-1", "site-2", "site-3"}
    initial = personal.pack(fresh.state_dict())
    for key in initial:
        own = [arrays[key] for arrays in kept.values()]
        assert not np.array_equal(own[0], own[1])
        assert not np.array_equal(own[0], initial[key])
    # at the server they keep their initial values
    saved = load_file(folder.checkpoint(3))
    state = fresh.state_dict()
    assert all(np.array_equal(saved[e.name], state[e.name].numpy()) for e in personal.entries)
    assert not all(np.array_equal(saved[e.name], state[e.name].numpy()) for e in shared.entries)
    loss = [
        np.mean(
            [
                x.train.loss_segmentation
                for x in read_history(folder.history)
                if x.train and x.round == n
            ]
        )
        for n in (1, 3)
    ]
    assert loss[1] < loss[0]


def sizes(layout: Layout) -> dict[str, int]:
    return {key: sum(e.size for e in entries) for key, entries in layout.by_key.items()}


def federation_memory() -> str:
    from polyclinic.simulation.local.sites import memory_folder

    return str(memory_folder())


LAYOUT = Layout.of(nn.ModuleDict({"encoder": nn.Linear(2, 1)}))


def arrays(value: float) -> Packed:
    return {"encoder/float32": np.full(3, value, np.float32)}


def test_site_memory_recalls_latest_round_and_prunes_old_ones(tmp_path: Path) -> None:
    memory = SiteMemory(tmp_path / "run" / "site", LAYOUT)
    assert memory.recall(9) is None
    for number in range(1, 8):
        memory.keep(number, arrays(number), best=2)
    assert sorted(p.name for p in memory.folder.iterdir()) == [
        f"round-000{n}.safetensors" for n in (2, 5, 6, 7)
    ]
    assert memory.recall(7)["encoder/float32"][0] == 7
    assert memory.recall(6)["encoder/float32"][0] == 6
    assert memory.recall(4)["encoder/float32"][0] == 2
    memory.keep(6, arrays(60), best=2)  # the server was set back before round 7
    assert memory.recall(9)["encoder/float32"][0] == 60


def test_damaged_or_foreign_site_memory_is_skipped(tmp_path: Path, caplog) -> None:
    memory = SiteMemory(tmp_path, LAYOUT)
    for number in (1, 2, 3):
        memory.keep(number, arrays(number), best=0)
    third = tmp_path / "round-0003.safetensors"
    content = bytearray(third.read_bytes())
    content[-1] ^= 64
    third.write_bytes(content)
    (tmp_path / "round-0002.safetensors").write_bytes(b"cut")
    with caplog.at_level(logging.WARNING):
        assert memory.recall(3)["encoder/float32"][0] == 1
    assert "round-0003" in caplog.text
    assert "round-0002" in caplog.text
    other = SiteMemory(tmp_path, Layout.of(nn.ModuleDict({"encoder": nn.Linear(4, 1)})))
    assert other.recall(3) is None


def test_site_that_cannot_save_personal_layers_fails_with_reason(tiny, grid, monkeypatch) -> None:
    config = tiny(strategy__personal="norms", rounds__count=1, rounds__min_sites="1")

    def full(self, number: int, arrays: Packed, best: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(SiteMemory, "keep", full)
    from polyclinic.server.rounds.errors import RunFailed

    with pytest.raises(RunFailed, match=r"site-1: .*No space left on device"):
        run(grid(config), config)


def test_model_with_personal_layers_cannot_be_exported_or_used(
    tiny, grid, cli, tmp_path: Path
) -> None:
    config = tiny(strategy__personal="norms", rounds__count=1)
    folder = run(grid(config), config)
    image = tmp_path / "image.png"
    Image.new("L", (40, 40), 99).save(image)
    for words in (
        ("export", folder.path, "--out", tmp_path / "model.pt"),
        ("predict", folder.path, image, "--out", tmp_path / "out"),
    ):
        status, _, err = cli(*words)
        assert status == 2
        assert "its norms stayed at the sites (strategy.personal)" in " ".join(err.split())
    assert not (tmp_path / "model.pt").exists()
