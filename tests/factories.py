"""Settings, networks, files and messages shared by several test modules."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import sqlite3
import ssl
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Message
from flwr.common.constant import TIMESTAMP_HEADER
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message
from torch import Tensor, nn

from polyclinic.client.data.dataset import Examples
from polyclinic.configs import VERSION, wire
from polyclinic.configs.diagnostics.network import ABOUT
from polyclinic.configs.run import RunConfig
from polyclinic.configs.schema.data import DataConfig
from polyclinic.configs.schema.federation import FederationConfig
from polyclinic.configs.schema.loss import LossConfig
from polyclinic.configs.schema.model import ModelConfig
from polyclinic.mtl_model.losses import Targets, multi_task_loss
from polyclinic.mtl_model.network import MultiTaskUNet, Prediction, build_model, network_of

PROJECT = f'[project]\nname = "polyclinic"\nversion = "{VERSION}"\n'


def packed(
    files: Mapping[str, str | bytes], date: tuple[int, ...] = (2026, 1, 1, 0, 0, 0)
) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as fab:
        for name, text in files.items():
            fab.writestr(zipfile.ZipInfo(name, date), text)
    return buffer.getvalue()


def app(**changed: str) -> dict[str, str]:
    files = {
        "pyproject.toml": PROJECT,
        "apps.py": "a = 1\n",
        "client/policy/site_policy.py": "check()\n",
    }
    return files | {name.replace("__", "/") + ".py": text for name, text in changed.items()}


def head_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.head")


@contextlib.contextmanager
def database(path: Path) -> Iterator[sqlite3.Connection]:
    """Open a ledger as a plain SQLite database."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as opened:
        yield opened


@contextlib.contextmanager
def without_triggers(path: Path) -> Iterator[sqlite3.Connection]:
    with database(path) as opened:
        names = [
            row[0]
            for row in opened.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'")
        ]
        for name in names:
            opened.execute(f"DROP TRIGGER {name}")
        yield opened


def rewrite(path: Path, texts: list[str]) -> None:
    """Rewrite all entries with valid hashes, as an attacker who knows this program could."""
    before = "0" * 64
    with without_triggers(path) as opened:
        opened.execute("DELETE FROM entries")
        for number, text in enumerate(texts, 1):
            before = hashlib.sha256(f"{before}\n{text}".encode()).hexdigest()
            opened.execute("INSERT INTO entries VALUES (?, ?, ?)", (number, text, before))


def texts_of(path: Path) -> list[str]:
    with database(path) as opened:
        return [row[0] for row in opened.execute("SELECT content FROM entries ORDER BY number")]


def network(config: RunConfig) -> MultiTaskUNet:
    return network_of(config.model, config.data, config.loss, seed=0)


def trained(reply: Message) -> bool:
    return reply.has_content() and wire.WEIGHTS in reply.content.array_records


def signed(key: ec.EllipticCurvePrivateKey, at: datetime | None = None) -> dict[str, bytes]:
    """Sign a site's request headers as Flower's SuperNode does."""
    timestamp = (at or datetime.now(UTC)).isoformat()
    public = public_key_to_bytes(key.public_key())
    return {
        FLEET_HTTP_PUBLIC_KEY_HEADER: base64.b64encode(public),
        TIMESTAMP_HEADER: timestamp.encode(),
        FLEET_HTTP_SIGNATURE_HEADER: base64.b64encode(sign_message(key, timestamp.encode())),
    }


def send(connection: ssl.SSLSocket, data: bytes) -> None:
    """Send what the other end accepts before it closes."""
    with suppress(ConnectionError, ssl.SSLError):
        connection.sendall(data)


def read_all(connection: ssl.SSLSocket) -> bytes:
    """Read until the other end closes; a timeout is an error."""
    read = b""
    with suppress(ConnectionError, ssl.SSLError):
        while part := connection.recv(65536):
            read += part
    return read


ABOUT_REQUEST = f"GET {ABOUT} HTTP/1.1\r\nHost: x\r\n\r\n".encode()


UPGRADE = ABOUT_REQUEST[:-2] + (
    b"Connection: Upgrade\r\nUpgrade: %s\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)


ENDLESS_HEAD = ABOUT_REQUEST[:-2] + b"X: "


PRIVATE = {
    "privacy__mode": "dp-sgd",
    "privacy__noise_multiplier": 2.0,
    "privacy__delta": 1e-3,
    "loss__class_weights": "none",
    "data__split": "independent",
    "data__val_fraction": 0.3,
    "train__local_steps": 2,
    "rounds__count": 2,
}


def batch() -> tuple[Prediction, Targets]:
    generator = torch.Generator().manual_seed(0)
    prediction = Prediction(
        torch.randn(4, 1, 8, 8, generator=generator), torch.randn(4, 3, generator=generator)
    )
    masks = (torch.rand(4, 1, 8, 8, generator=generator) > 0.5).float()
    known = torch.tensor([[True], [False], [True], [False]])
    labels = torch.eye(3)[[2, 0, 0, 0]]
    return prediction, Targets(masks, known, labels, torch.tensor([True, True, False, False]))


SMALL = {
    "backbone": "resnet18",
    "width": 16,
    "depths": (1, 1, 1, 1),
    "head_channels": 8,
    "drop_path": 0.0,
}


WHOLE = {"width": 0, "depths": ()}  # timm's own width and depths


VARIANTS = [
    {},
    {"block_order": "parallel"},
    {"dfe": "sum"},
    {"dfe": "none"},
    {"dfe_rates": (1, 2, 3)},
    {"upsample": "bilinear"},
    {"head_stages": (1, 2, 3, 4)},
    {"window": 3},
    {"swin_depth": 0},
    {"swin_depth": 3, "drop_path": 0.2},
    {"token_mixing": "published"},
    {"depths": ()},
    {"stride": 4},
    {"backbone": "resnet50", "block_order": "parallel"},
    {"preset": "light", "mlp_ratio": 2.0, "stride": 4, "dfe": "none"},
    {"backbone": "efficientnet_lite0", **WHOLE},
    {"backbone": "tf_efficientnet_lite0", **WHOLE},
    {"backbone": "convnext_atto", **WHOLE},
]


def without_chance(variants: list[dict]) -> list:
    """Return variants without drop path as parameters; the two slowest are marked long."""
    slow = ("resnet50", "convnext_atto")
    return [
        pytest.param(v, id=str(v), marks=[pytest.mark.long] if v.get("backbone") in slow else [])
        for v in variants
        if "drop_path" not in v
    ]


def small(size: tuple[int, int] = (64, 64), mask_maps: int = 1, **changes: object) -> MultiTaskUNet:
    config = ModelConfig(**{**SMALL, **changes})
    return build_model(
        config, size=size, in_channels=1, image_classes=2, mask_channels=mask_maps, seed=0
    )


def some_targets(batch: int, size: tuple[int, int] = (64, 64)) -> Targets:
    generator = torch.Generator().manual_seed(1)
    masks = (torch.rand(batch, 1, *size, generator=generator) > 0.7).float()
    known = torch.ones(batch, dtype=torch.bool)
    return Targets(masks, known[:, None], torch.eye(2)[torch.arange(batch) % 2], known)


def losses_of(model: nn.Module, images: Tensor, targets: Targets) -> Tensor:
    return multi_task_loss(model(images), targets, LossConfig()).total


def federation(*names: str, **changes: object) -> FederationConfig:
    sites = [{"name": name} for name in names or ("site-a", "site-b")]
    server_ = {"address": "fl.example.org", "port": 9092}
    return FederationConfig.model_validate(
        {"name": "consortium", "server": server_, "sites": sites, **changes}
    )


DATA = DataConfig(image_height=32, image_width=32)


CPU = torch.device("cpu")


def some(n: int = 12, masks: bool = True, labels: bool = True) -> Examples:
    """Make examples with bright rectangles, tall for class 1 and wide for class 0."""
    rng = np.random.default_rng(0)
    mask = np.zeros((n, 32, 32, 1), np.uint8)
    label = np.arange(n) % 2
    for i in range(n):
        height, width = (16, 6) if label[i] else (6, 16)
        top, left = rng.integers(2, 12, 2)
        mask[i, top : top + height, left : left + width] = 1
    images = rng.integers(0, 60, (n, 32, 32, 1)) + 150 * mask
    return Examples(
        images.astype(np.uint8),
        mask * np.uint8(masks),
        np.full((n, 1), masks),
        np.eye(2, dtype=np.uint8)[label] * np.uint8(labels),
        np.full(n, labels),
        np.array([f"patient {i // 2}" for i in range(n)]),
    )


def changed_parts(model: MultiTaskUNet) -> set[str]:
    before = small(size=(32, 32)).state_dict()
    return {
        name.partition(".")[0]
        for name, tensor in model.state_dict().items()
        if not torch.equal(tensor, before[name])
    }


def same(a: MultiTaskUNet, b: MultiTaskUNet) -> bool:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)
