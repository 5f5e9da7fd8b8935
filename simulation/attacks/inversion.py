"""What one step on one image gives away of it, and what is left of that under DP-SGD.

Gradient inversion: look for the picture whose gradient points where the seen one does (Zhu et al.,
"Deep Leakage from Gradients", NeurIPS 2019), by the cosine between the two, signs of the steps and
total variation as the only prior (Geiping et al., "Inverting Gradients: How easy is it to break
privacy in federated learning?", NeurIPS 2020). The step is the one that sites take
(``train_one_round``, ``train_one_round_privately``), of one image alone, which is the easiest for
the attacker, who knows the weights before it, the settings, the image's mask and its label.

The network is a whole one of the project's, small: its convolutional path is a ConvNeXt, since of a
ResNet, with the kinks of its ReLU, the picture came back less clearly in as many iterations. The
picture is a phantom. That this attack fails is no proof that all do; the proof is the noise, and
``simulation.attacks.audit`` looks for faults in it.
"""

from __future__ import annotations

import copy
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, cast

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import default_collate

from polyclinic.client.data.dataset import ExampleDataset, Examples, to_batch
from polyclinic.client.privacy.dp_sgd import Mechanism, train_one_round_privately
from polyclinic.client.training.local_round import Round, train_one_round
from polyclinic.configs.errors import ConfigError
from polyclinic.configs.schema.data import DataConfig
from polyclinic.configs.schema.loss import LossConfig
from polyclinic.configs.schema.model import ModelConfig
from polyclinic.configs.schema.privacy import PrivacyConfig
from polyclinic.configs.schema.train import TrainConfig
from polyclinic.mtl_model.attention import RelativePositionBias
from polyclinic.mtl_model.losses import multi_task_loss
from polyclinic.mtl_model.network import MultiTaskUNet, build_model
from polyclinic.simulation.phantom.writer import draw_example, phantom_site

SIDE = 32  # of the picture, pixels
DRAWN = 96  # that it is drawn at before it is made smaller
ITERATIONS = 150
SMOOTHNESS = 1e-2  # weight of total variation beside the cosine
ENLARGED, GAP, BELOW = 3, 8, 16  # of the figure: times, pixels between pictures, pixels for words

NETWORK = ModelConfig(
    backbone="test_convnext",
    stride=4,
    swin_depth=1,
    head_channels=8,
    mlp_ratio=1.0,
    drop_path=0.0,
    dfe="none",
)
DATA = DataConfig(image_height=SIDE, image_width=SIDE)
LOSS = LossConfig(class_weights="none")
TRAIN = TrainConfig(augment=False, batch_size=1, local_steps=1, weight_decay=0.0, precision="fp32")
WHERE = Round(1, 1, 0, "inversion")  # the whole learning rate
CPU = torch.device("cpu")

Picture = NDArray[np.uint8]
Sight = Literal["gradient", "weights"]


@dataclass(frozen=True)
class Case:
    """A step to be seen by the attacker.

    Attributes:
        sight: the gradient that the step was made of, or what really leaves a site: the weights
            after it, which show of AdamW's first step little more than each gradient's sign.
        noise_multiplier: of DP-SGD; None for a step without privacy.
    """

    says: str
    sight: Sight
    noise_multiplier: float | None = None


PLAIN = Case("without privacy", "gradient")
FROM_WEIGHTS = Case("from weights", "weights")
CLIPPED = Case("clipped alone", "gradient", 0.0)


def with_noise(noise_multiplier: float) -> Case:
    return Case(f"noise {noise_multiplier:g}", "gradient", noise_multiplier)


@dataclass(frozen=True)
class Inversion:
    """What came back. Brightness and contrast, which the network never sees, are the original's."""

    case: Case
    picture: Picture  # (H, W)
    correlation: float  # of the pixels with the original's
    psnr: float  # dB


def picture_of(seed: int) -> Examples:
    """One phantom with its mask and label."""
    drawn = draw_example(phantom_site(1, seed), 0, seed=seed, size=DRAWN)
    image, mask = (
        np.asarray(cv2.resize(plane, (SIDE, SIDE), interpolation=cv2.INTER_AREA), np.uint8)
        for plane in (drawn.image, drawn.mask)
    )
    return Examples(
        image[None, ..., None],
        (mask > 127).astype(np.uint8)[None, ..., None],
        np.array([[True]]),
        np.array([[name == drawn.label for name in DATA.classes]], np.uint8),
        np.array([True]),
        np.array([drawn.group]),
    )


def network() -> MultiTaskUNet:
    return build_model(NETWORK, size=(SIDE, SIDE), in_channels=1, image_classes=2, seed=0)


def invert(example: Examples, case: Case, seed: int, iterations: int, words: Console) -> Inversion:
    """Take a step on the example, look at it, and find a picture that would have given it."""
    before = network()
    seen = _step(copy.deepcopy(before), example, case, seed)
    found = attack(before, seen, case.sight, example, seed, iterations, words)
    original = example.images[0, ..., 0]
    picture = _as_bright_as(found, original)
    error = np.square(picture.astype(np.float64) - original).mean()
    return Inversion(
        case,
        picture,
        float(np.corrcoef(picture.ravel(), original.ravel())[0, 1]),
        float(10 * np.log10(255**2 / error)),
    )


def _step(model: MultiTaskUNet, example: Examples, case: Case, seed: int) -> list[Tensor]:
    """Take the step as a site would; return what is seen of it, by parameter."""
    parameters = list(model.parameters())
    before = [p.detach().clone() for p in parameters]
    gradients: list[Tensor] = []

    def after_step(*_: object) -> None:
        gradients.extend(cast(Tensor, p.grad).clone() for p in parameters)

    handle = register_optimizer_step_post_hook(after_step)
    try:
        if case.noise_multiplier is None:
            train_one_round(model, example, WHERE, data=DATA, train=TRAIN, loss=LOSS, device=CPU)
        else:
            train_one_round_privately(
                model,
                example,
                WHERE,
                mechanism=Mechanism(
                    case.noise_multiplier, sample_rate=1.0, steps=1, units=1, clip_norm=1.0
                ),
                data=DATA,
                train=TRAIN,
                loss=LOSS,
                privacy=PrivacyConfig(mode="dp-sgd", clip_norm=1.0),
                device=CPU,
                random=np.random.default_rng([seed, 1]),
            )
    finally:
        handle.remove()
    if case.sight == "gradient":
        return gradients
    return [
        (old - new.detach()) / TRAIN.learning_rate
        for old, new in zip(before, parameters, strict=True)
    ]


def attack(
    model: MultiTaskUNet,
    seen: Sequence[Tensor],
    sight: Sight,
    example: Examples,
    seed: int,
    iterations: int,
    words: Console,
) -> NDArray[np.float64]:
    """Find a picture whose gradient is like the one seen: (H, W), of mean 0 and deviation 1.

    Args:
        model: with the weights before the step.
        seen: of each parameter.
        example: of which the mask and the label alone are read.
        seed: of the noise that the search starts from.
    """
    model = copy.deepcopy(model).train()
    for module in model.modules():
        if isinstance(module, RelativePositionBias):  # its own backward pass has no derivative
            module.requires_grad_(False)
    known = [p for p in model.parameters() if p.requires_grad]
    target = _flat([s for s, p in zip(seen, model.parameters(), strict=True) if p.requires_grad])
    blank = replace(example, images=np.zeros_like(example.images))
    images, targets = to_batch(default_collate([ExampleDataset(blank)[0]]), DATA.normalise, CPU)
    # nearly grey: the first steps then make the picture, and have little noise to undo
    picture = 0.1 * torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    picture.requires_grad_()
    optimizer = torch.optim.Adam([picture], lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations, eta_min=1e-3)
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
        for _ in track(range(iterations), "inverting", console=words, transient=True):
            x = _standardised(picture)
            loss = multi_task_loss(model(x), targets, LOSS).total.sum()
            gradient = _flat(torch.autograd.grad(loss, known, create_graph=True))
            if sight == "weights":
                gradient = _soft_signs(gradient)
            unlike = 1 - F.cosine_similarity(gradient, target, dim=0)
            (slope,) = torch.autograd.grad(unlike + SMOOTHNESS * _variation(x), picture)
            picture.grad = slope.sign()
            optimizer.step()
            schedule.step()
    return _standardised(picture.detach())[0, 0].double().numpy()


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def _standardised(x: Tensor) -> Tensor:
    """As every image comes to the network (data.normalise image), which the attacker knows."""
    return (x - x.mean()) / (x.std() + 1e-6)


def _soft_signs(gradient: Tensor) -> Tensor:
    """AdamW's first step, smooth enough to be followed: its signs have no slope."""
    return torch.tanh(2 * gradient / gradient.abs().mean().detach())


def _variation(x: Tensor) -> Tensor:
    """Total variation: what neighbouring pixels differ by, on average."""
    return x.diff(dim=-1).abs().mean() + x.diff(dim=-2).abs().mean()


def _as_bright_as(found: NDArray[np.float64], original: Picture) -> Picture:
    grey = found * original.std() + original.mean()
    return np.asarray(np.rint(grey.clip(0, 255)), np.uint8)


def figure(example: Examples, inversions: Sequence[Inversion]) -> Image.Image:
    """The original and what came back, side by side, with a word below each."""
    shown = [("original", example.images[0, ..., 0])]
    shown += [(inversion.case.says, inversion.picture) for inversion in inversions]
    side = SIDE * ENLARGED
    sheet = Image.new("L", (len(shown) * (side + GAP) - GAP, side + BELOW), 255)
    draw = ImageDraw.Draw(sheet)
    for k, (says, picture) in enumerate(shown):
        left = k * (side + GAP)
        tile = Image.fromarray(picture).resize((side, side), Image.Resampling.NEAREST)
        sheet.paste(tile, (left, 0))
        draw.text((left, side + 2), says, fill=0)
    return sheet


def run_inversion(out: Path | None, noise: str, seed: int, as_json: bool) -> None:
    """Invert every case's step and print how near the picture came; draw them if told where.

    Args:
        noise: noise multipliers of DP-SGD, with commas.

    Raises:
        ConfigError: if a noise multiplier is no number above 0, or the figure's name is not that
            of a PNG.
    """
    cases = (PLAIN, FROM_WEIGHTS, CLIPPED, *map(with_noise, _numbers(noise)))
    if out is not None and out.suffix != ".png":
        raise ConfigError(f"--out: expected a name that ends in .png, got {out.name}")
    torch.set_num_threads(1)  # as fast for so small a network, and the same bits in every run
    words = Console(stderr=True, markup=False, highlight=False)
    example = picture_of(seed)
    inversions = [invert(example, case, seed, ITERATIONS, words) for case in cases]
    if as_json:
        rows = [asdict(i.case) | {"correlation": i.correlation, "psnr": i.psnr} for i in inversions]
        sys.stdout.write(json.dumps(rows, indent=2) + "\n")
    else:
        Console(markup=False, highlight=False).print(table(inversions))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        figure(example, inversions).save(out, optimize=True)
        words.print(f"{out}: the original and {len(inversions)} inversions", soft_wrap=True)


def _numbers(text: str) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or not all(0 < number < math.inf for number in numbers):
        raise ConfigError(f"--noise: expected numbers above 0 with commas, got {text!r}")
    return numbers


def table(inversions: Sequence[Inversion]) -> Table:
    """Lay out how near the pictures came."""
    laid = Table(
        title="one step on one image, and the picture found from it",
        title_justify="left",
        caption="correlation of the pixels with the original's: 1 is the picture, 0 is nothing",
        caption_justify="left",
    )
    laid.add_column("step")
    laid.add_column("seen")
    laid.add_column("correlation", justify="right")
    laid.add_column("PSNR, dB", justify="right")
    for inversion in inversions:
        laid.add_row(
            inversion.case.says,
            inversion.case.sight,
            f"{inversion.correlation:.2f}",
            f"{inversion.psnr:.1f}",
        )
    return laid
