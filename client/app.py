"""What a site does with each kind of message: unpack, call, pack.

A reason that the site or its data give is answered as a refusal, which the server reports by the
site's name. Anything else that goes wrong is a fault of ours: it is raised, and Flower tells the
server that the site failed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import lru_cache

import flwr
import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from client.dataset import SiteData
from client.device import DeviceError, find_device
from client.evaluate import EvaluationError, evaluate
from client.manifest import DataError
from client.records import (
    ProtocolError,
    Request,
    describe_reply,
    evaluate_reply,
    read_request,
    refusal,
    train_reply,
)
from client.site import PhantomRoot, open_site
from client.train import Round, TrainingError, train_one_round
from configs import VERSION, wire
from configs.run import ConfigError, DataConfig, LossConfig, ModelConfig, RunConfig
from mtl_model.backbone import BackboneError
from mtl_model.distance import DistanceError, check_distances
from mtl_model.network import MultiTaskUNet, network_of
from mtl_model.packing import Layout

log = logging.getLogger(__name__)


def client_app(phantom_root: PhantomRoot) -> ClientApp:
    """Make the app that Flower starts at every site.

    Args:
        phantom_root: what writes phantom hospitals; a room above this one provides it.
    """
    app = ClientApp()

    @app.query("describe")
    def describe(message: Message, context: Context) -> Message:
        return _answer(_describe, message, context, phantom_root)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return _answer(_train, message, context, phantom_root)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return _answer(_evaluate, message, context, phantom_root)

    return app


Handler = Callable[[Message, RunConfig, SiteData], Message]

REASONS = (
    BackboneError,  # this site's timm has another list of networks
    ConfigError,
    DataError,
    DeviceError,
    DistanceError,
    EvaluationError,
    OSError,  # the site's disk or files
    ProtocolError,
    TrainingError,
)


def _answer(
    handle: Handler, message: Message, context: Context, phantom_root: PhantomRoot
) -> Message:
    try:
        config = RunConfig.from_flat(context.run_config)
        site = open_site(context.node_config, config, phantom_root)
        return handle(message, config, site)
    except REASONS as error:
        log.warning("refused %s: %s", message.metadata.message_type, error)
        return refusal(message, str(error))


def _describe(message: Message, config: RunConfig, site: SiteData) -> Message:
    device = find_device(config.train.device)
    if config.evaluate.hd95:
        check_distances()
    versions = {"polyclinic": VERSION, "flwr": flwr.__version__, "torch": torch.__version__}
    return describe_reply(message, site, str(device), versions)


def _train(message: Message, config: RunConfig, site: SiteData) -> Message:
    model, layout, request = _received(message, config)
    where = Round(request.number, config.rounds.count, config.run.seed, site.site)
    result = train_one_round(
        model,
        site.splits[wire.TRAIN_SPLIT],
        where,
        data=config.data,
        train=config.train,
        loss=config.loss,
        device=find_device(config.train.device),
    )
    weights = layout.pack(model.state_dict())
    try:
        layout.check(weights)
    except ValueError as error:
        raise TrainingError(f"round {request.number}: trained weights: {error}") from None
    return train_reply(message, site, weights, result)


def _evaluate(message: Message, config: RunConfig, site: SiteData) -> Message:
    started = time.perf_counter()
    model, _, request = _received(message, config)
    if request.split not in (wire.VAL_SPLIT, wire.TEST_SPLIT):
        raise ProtocolError(
            f"{wire.SPLIT}: expected {wire.VAL_SPLIT} or {wire.TEST_SPLIT}, got {request.split!r}"
        )
    sums = evaluate(
        model,
        site.splits[request.split],
        data=config.data,
        batch_size=config.evaluate.batch_size,
        precision=config.train.precision,
        device=find_device(config.train.device),
        hd95=config.evaluate.hd95,
    )
    return evaluate_reply(message, site, sums, time.perf_counter() - started)


def _received(message: Message, config: RunConfig) -> tuple[MultiTaskUNet, Layout, Request]:
    """The network of the config, holding the weights that came."""
    model = _network(config.model, config.data, config.loss)
    layout = Layout.of(model)
    request = read_request(message, layout)
    model.load_state_dict(layout.unpack(request.weights))
    return model, layout, request


@lru_cache(maxsize=1)
def _network(model: ModelConfig, data: DataConfig, loss: LossConfig) -> MultiTaskUNet:
    """Built once a process: its weights are replaced by every message."""
    return network_of(model, data, loss, seed=0)
