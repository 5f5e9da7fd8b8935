"""Handle the three kinds of messages that a site receives: describe, train and evaluate.

Each handler unpacks the message, calls the functions that do the work and packs the reply. It
checks the site's policy (``client.policy.site_policy``) at each step and declines what the policy
forbids. Errors that the site's setup or data cause are answered with a refusal. In both cases the
server logs the reason under the site's name. A deployed site records every reply in its outgoing
log before sending it (``client.ledger.outgoing``). Any other exception is a bug: it propagates, and
Flower reports the site as failed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path

import flwr
import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from polyclinic.client.data.dataset import SiteData
from polyclinic.client.data.manifest import DataError
from polyclinic.client.data.split_key import SplitKeyError
from polyclinic.client.ledger.budget import LedgerError
from polyclinic.client.ledger.outgoing import write_down
from polyclinic.client.messages import (
    ProtocolError,
    Request,
    declined,
    describe_reply,
    evaluate_reply,
    read_request,
    read_run,
    read_settings,
    refusal,
    sent,
    train_reply,
)
from polyclinic.client.policy.releases import own_release
from polyclinic.client.policy.site_policy import (
    UNNAMED,
    Decline,
    check_evaluation,
    check_hours,
    check_private_site,
    check_release,
    check_size,
    check_steps,
    check_update,
    redact_reason,
    redact_sums,
    suppress_small_groups,
)
from polyclinic.client.site import (
    SITE_CONFIG,
    BudgetReport,
    PhantomRoot,
    PrivacyDeclaration,
    Site,
    load,
    memory_folder,
    open_site,
    privacy_declaration,
)
from polyclinic.client.training.device import DeviceError, find_device
from polyclinic.client.training.evaluate import EvaluationError, evaluate
from polyclinic.client.training.local_round import Proximal, Round, TrainingError, train_one_round
from polyclinic.client.training.personal_state import SiteMemory
from polyclinic.configs import VERSION, wire
from polyclinic.configs.errors import ConfigError
from polyclinic.configs.run import RunConfig
from polyclinic.configs.schema.data import DataConfig
from polyclinic.configs.schema.loss import LossConfig
from polyclinic.configs.schema.model import ModelConfig
from polyclinic.mtl_model.backbone import BackboneError
from polyclinic.mtl_model.distance import DistanceError, check_distances
from polyclinic.mtl_model.network import MultiTaskUNet, network_of
from polyclinic.mtl_model.packing import Layout
from polyclinic.mtl_model.personal import personal_names

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Simulated:
    """Folders for simulated sites, injected because ``client`` must not import ``simulation``."""

    phantom_root: PhantomRoot  # generates phantom data and returns its folder
    ledgers: Callable[[], Path]  # folder of the privacy ledgers, one per run and site
    memories: Callable[[], Path]  # folder of the state that sites keep between rounds


def client_app(simulated: Simulated) -> ClientApp:
    """Build the Flower client app that runs at every site."""
    app = ClientApp()

    @app.query("describe")
    def describe(message: Message, context: Context) -> Message:
        return _answer(_describe, message, context, simulated)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return _answer(_train, message, context, simulated)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return _answer(_evaluate, message, context, simulated)

    return app


@dataclass(frozen=True)
class RequestContext:
    """A request with the run's configuration and the site's data."""

    message: Message
    run: str  # identity of the run, 32 hexadecimal digits
    config: RunConfig
    site: Site
    data: SiteData
    privacy_declaration: PrivacyDeclaration | None  # None: the run uses no differential privacy
    memories: Path  # folder of the state that the site keeps between rounds, per run


@dataclass(frozen=True)
class Response:
    """A reply and its effect on the site's privacy budget."""

    reply: Message
    spending: BudgetReport | None = None  # None: no budget was spent


Handler = Callable[[RequestContext], Response]

REASONS = (
    BackboneError,  # this site's version of timm lacks the network
    ConfigError,
    DeviceError,
    DistanceError,
    EvaluationError,
    LedgerError,
    ProtocolError,
    TrainingError,
)
REASONS_OF_FILES = (DataError, OSError, SplitKeyError)  # their messages contain file paths


def _answer(handle: Handler, message: Message, context: Context, simulated: Simulated) -> Message:
    try:
        run = read_run(message)
        config = RunConfig.from_flat({**context.run_config, **read_settings(message)})
    except (ConfigError, ProtocolError) as error:
        return refusal(message, str(error))
    try:
        site = open_site(context.node_config, config, simulated.phantom_root)
    except (ConfigError, *REASONS_OF_FILES) as error:  # the site's policy is unknown
        log.warning("refused %s: %s", message.metadata.message_type, error)
        reason = UNNAMED if SITE_CONFIG in context.node_config else str(error)
        return refusal(message, reason)
    response = _respond(handle, message, run, config, site, simulated)
    if site.config is not None:
        record = sent(message, response.reply, run, own_release(), response.spending)
        write_down(site.config.state, record)
    return response.reply


def _respond(
    handle: Handler,
    message: Message,
    run: str,
    config: RunConfig,
    site: Site,
    simulated: Simulated,
) -> Response:
    kind = message.metadata.message_type
    try:
        check_release(site.policy, own_release())
        if site.config is not None:
            check_private_site(site.config, config)
        data = load(site, config.data)
        private = config.privacy.mode != "off"
        declared = privacy_declaration(site, data, run, simulated.ledgers()) if private else None
        memories = memory_folder(site, simulated.memories())
        return handle(RequestContext(message, run, config, site, data, declared, memories))
    except Decline as error:
        log.warning("declined %s: %s", kind, error)
        return Response(declined(message, str(error)))
    except REASONS_OF_FILES as error:
        log.warning("refused %s: %s", kind, error)
        return Response(refusal(message, redact_reason(site.policy, str(error))))
    except REASONS as error:
        log.warning("refused %s: %s", kind, error)
        return Response(refusal(message, str(error)))


def _describe(context: RequestContext) -> Response:
    device = find_device(context.config.train.device)
    if context.config.evaluate.hd95:
        check_distances()
    for row in context.data.skipped:
        log.warning("skipped: %s", row)
    versions = {"polyclinic": VERSION, "flwr": flwr.__version__, "torch": torch.__version__}
    versions["release"] = own_release()[:12]
    policy, declared = context.site.policy, context.privacy_declaration
    return Response(
        describe_reply(context.message, context.data, policy, str(device), versions, declared)
    )


def _train(context: RequestContext) -> Response:
    config, policy, declared = context.config, context.site.policy, context.privacy_declaration
    examples = context.data.splits[wire.TRAIN_SPLIT]
    check_hours(policy, datetime.now())
    if declared is None:
        check_size(policy, len(examples), len(set(examples.group.tolist())))
        check_steps(policy, config.train.steps(len(examples)))
    else:  # a decision based on the true counts would reveal them
        check_size(policy, declared.examples, declared.patients)
    network = _received(context, 1)
    request, model = network.request, network.model
    if not 1 <= request.number <= config.rounds.count:
        raise ProtocolError(
            f"{wire.NUMBER}: expected a round from 1 to {config.rounds.count}, got {request.number}"
        )
    where = Round(request.number, config.rounds.count, config.run.seed, context.data.site)
    device = find_device(config.train.device)
    proximal = Proximal(config.strategy.mu, frozenset(e.name for e in network.personal.entries))
    spending = None
    if declared is None:
        result = train_one_round(
            model,
            examples,
            where,
            data=config.data,
            train=config.train,
            loss=config.loss,
            device=device,
            proximal=proximal,
        )
    else:
        from polyclinic.client.private_round import (
            train_within_budget,  # Opacus takes a second to import
        )

        result, spending = train_within_budget(
            model, examples, where, declared, config, policy, device, proximal
        )
    state = model.state_dict()
    weights, own = network.shared.pack(state), network.personal.pack(state)
    try:
        network.shared.check(weights)
        network.personal.check(own)
    except ValueError as error:
        raise TrainingError(f"round {request.number}: trained weights: {error}") from None
    check_update(policy, request.weights, weights)
    if own:
        network.memory.keep(request.number, own, request.best)
    reply = train_reply(context.message, context.data, weights, result, declared, spending)
    return Response(reply, spending)


def _evaluate(context: RequestContext) -> Response:
    started = time.perf_counter()
    config, policy = context.config, context.site.policy
    check_evaluation(policy)
    check_hours(policy, datetime.now())
    network = _received(context, 0)
    request, model = network.request, network.model
    if request.split not in (wire.VAL_SPLIT, wire.TEST_SPLIT):
        raise ProtocolError(
            f"{wire.SPLIT}: expected {wire.VAL_SPLIT} or {wire.TEST_SPLIT}, got {request.split!r}"
        )
    examples, withheld = suppress_small_groups(
        policy, context.data.splits[request.split], config.data
    )
    sums = evaluate(
        model,
        examples,
        data=config.data,
        batch_size=config.evaluate.batch_size,
        precision=config.train.precision,
        device=find_device(config.train.device),
        hd95=config.evaluate.hd95,
    )
    seconds = time.perf_counter() - started
    redacted = redact_sums(policy, sums)
    return Response(evaluate_reply(context.message, context.data, redacted, withheld, seconds))


@dataclass(frozen=True)
class LoadedModel:
    """The configured network, loaded with the received weights and the site's personal layers."""

    model: MultiTaskUNet
    request: Request
    shared: Layout  # weights that are sent
    personal: Layout  # weights that stay at the site; empty without personal layers
    memory: SiteMemory


def _received(context: RequestContext, back: int) -> LoadedModel:
    """Load a message's weights into the network.

    Args:
        back: how many rounds before the message's round the personal layers date from. Training
            starts from the layers of the previous round (1), also when a round is repeated;
            evaluation uses the layers of its own round (0).
    """
    config = context.config
    model = _network(config.model, config.data, config.loss)
    names = personal_names(model, config.strategy.personal)
    shared, personal = Layout.of(model).parts(names)
    request = read_request(context.message, shared, personal)
    memory = SiteMemory(context.memories / context.run / context.data.site, personal)
    own = memory.recall(request.number - back) if names else None
    state = shared.unpack(request.weights) | personal.unpack(own or request.initial)
    model.load_state_dict(state)
    return LoadedModel(model, request, shared, personal, memory)


@lru_cache(maxsize=1)
def _network(model: ModelConfig, data: DataConfig, loss: LossConfig) -> MultiTaskUNet:
    """Build the network once per process; every message replaces its weights."""
    return network_of(model, data, loss, seed=0)
