"""Gradient inversion: reconstruct a training image from one step, with and without DP-SGD.

The attack searches for an image with a gradient in the same direction as the observed one (Zhu et
al., "Deep Leakage from Gradients", NeurIPS 2019), using cosine similarity, sign-based steps and
total variation as the only prior (Geiping et al., "Inverting Gradients: How easy is it to break
privacy in federated learning?", NeurIPS 2020). The step is the one that sites perform
(``train_one_round``, ``train_one_round_privately``), on a single image, which is the easiest case
for the attacker. The attacker knows the initial weights, the settings, the image's mask and its
label.

The network is a small version of the project's network with a ConvNeXt as its convolutional path;
with a ResNet and its non-smooth ReLU, the same number of iterations reconstructs the image less
clearly. The image is a phantom. That this attack fails does not prove that every attack fails;
privacy rests on the noise, which ``simulation.attacks.audit`` checks for errors.
"""

from __future__ import annotations

import copy
import math
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
from polyclinic.configs.output import messages, print_json, print_table
from polyclinic.configs.schema.data import DataConfig
from polyclinic.configs.schema.loss import LossConfig
from polyclinic.configs.schema.model import ModelConfig
from polyclinic.configs.schema.privacy import PrivacyConfig
from polyclinic.configs.schema.train import TrainConfig
from polyclinic.mtl_model.attention import RelativePositionBias
from polyclinic.mtl_model.losses import multi_task_loss
from polyclinic.mtl_model.network import MultiTaskUNet, build_model
from polyclinic.simulation.phantom.physics import draw_example
from polyclinic.simulation.phantom.sites import phantom_site

SIDE = 32  # side of the image in pixels
DRAWN = 96  # side in pixels at which the phantom is drawn before it is downscaled
ITERATIONS = 150
SMOOTHNESS = 1e-2  # weight of total variation relative to the cosine distance
# Layout of the figure: enlargement, pixels between images, pixels for the caption below an image.
ENLARGED, GAP, BELOW = 3, 8, 16

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
WHERE = Round(1, 1, 0, "inversion")  # the first round, with the full learning rate
CPU = torch.device("cpu")

Picture = NDArray[np.uint8]
Sight = Literal["gradient", "weights"]


@dataclass(frozen=True)
class Case:
    """A step that the attacker observes.

    Attributes:
        says: description in the table and the figure.
        sight: what the attacker observes: ``gradient`` for the gradient of the step, or ``weights``
            for the weights after it, which is what leaves a site. AdamW's first step reveals
            little more than the sign of each gradient.
        noise_multiplier: noise multiplier of DP-SGD; 0 for clipping without noise, None for a step
            without privacy.
    """

    says: str
    sight: Sight
    noise_multiplier: float | None = None


PLAIN = Case("without privacy", "gradient")
FROM_WEIGHTS = Case("from weights", "weights")
CLIPPED = Case("clipping only", "gradient", 0.0)


def with_noise(noise_multiplier: float) -> Case:
    """Make a case of DP-SGD with the given noise multiplier."""
    return Case(f"noise {noise_multiplier:g}", "gradient", noise_multiplier)


@dataclass(frozen=True)
class Inversion:
    """The result of an attack.

    Brightness and contrast are set to the original's, because normalisation removes them from the
    network's input.
    """

    case: Case
    picture: Picture  # (H, W) uint8, the reconstructed image
    correlation: float  # correlation of the pixels with the original's, -1 to 1
    psnr: float  # peak signal-to-noise ratio in dB


def picture_of(seed: int) -> Examples:
    """Draw one phantom with its mask and label."""
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
    """Build the attacked network, with the same initial weights at every call."""
    return build_model(NETWORK, size=(SIDE, SIDE), in_channels=1, image_classes=2, seed=0)


def invert(example: Examples, case: Case, seed: int, iterations: int, words: Console) -> Inversion:
    """Take a step on the example and reconstruct the image from what is observed.

    Args:
        example: one image with its mask and label.
        case: what the attacker observes.
        seed: seed of the noise and of the search.
        iterations: number of search steps.
        words: console for progress.
    """
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
    """Take the step as a site would and return what the attacker observes, per parameter."""
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
    """Search for an image with a gradient similar to the observed one.

    Args:
        model: the network with the weights before the step.
        seen: the observation for each parameter.
        sight: what was observed, see ``Case``.
        example: the example; only its mask and label are used.
        seed: seed of the noise that the search starts from.
        iterations: number of search steps.
        words: console for progress.

    Returns:
        The image, (H, W), with mean 0 and standard deviation 1.
    """
    model = copy.deepcopy(model).train()
    for module in model.modules():
        if isinstance(module, RelativePositionBias):  # its own backward pass has no derivative
            module.requires_grad_(False)
    known = [p for p in model.parameters() if p.requires_grad]
    target = _flat([s for s, p in zip(seen, model.parameters(), strict=True) if p.requires_grad])
    blank = replace(example, images=np.zeros_like(example.images))
    images, targets = to_batch(default_collate([ExampleDataset(blank)[0]]), DATA.normalise, CPU)
    # Start with little noise, so that the first steps have little of it to remove.
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
    """Normalise an image as the network's input is (data.normalise image)."""
    return (x - x.mean()) / (x.std() + 1e-6)


def _soft_signs(gradient: Tensor) -> Tensor:
    """Approximate AdamW's first step, the sign of the gradient, by a differentiable function."""
    return torch.tanh(2 * gradient / gradient.abs().mean().detach())


def _variation(x: Tensor) -> Tensor:
    """Compute total variation: the mean absolute difference of neighbouring pixels."""
    return x.diff(dim=-1).abs().mean() + x.diff(dim=-2).abs().mean()


def _as_bright_as(found: NDArray[np.float64], original: Picture) -> Picture:
    grey = found * original.std() + original.mean()
    return np.asarray(np.rint(grey.clip(0, 255)), np.uint8)


def figure(example: Examples, inversions: Sequence[Inversion]) -> Image.Image:
    """Draw the original and the reconstructions next to each other, with a caption below each."""
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
    """Attack the step of every case and print the similarity of the reconstructions.

    Args:
        out: PNG file for a figure of the reconstructions; None for no figure.
        noise: noise multipliers of DP-SGD, separated by commas.
        seed: seed of the phantom, the noise and the search.
        as_json: True to print the results as JSON, False to print a table.

    Raises:
        ConfigError: if a noise multiplier is not a number above 0, or ``out`` is not a PNG file.
    """
    cases = (PLAIN, FROM_WEIGHTS, CLIPPED, *map(with_noise, _numbers(noise)))
    if out is not None and out.suffix != ".png":
        raise ConfigError(f"--out: expected a file name ending in .png, got {out.name}")
    # One thread is as fast for such a small network and gives bit-identical results in every run.
    torch.set_num_threads(1)
    words = messages()
    example = picture_of(seed)
    inversions = [invert(example, case, seed, ITERATIONS, words) for case in cases]
    if as_json:
        rows = [asdict(i.case) | {"correlation": i.correlation, "psnr": i.psnr} for i in inversions]
        print_json({"rows": rows})
    else:
        print_table(table(inversions))
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
        raise ConfigError(f"--noise: expected numbers above 0 separated by commas, got {text!r}")
    return numbers


def table(inversions: Sequence[Inversion]) -> Table:
    """Format the results as a table."""
    laid = Table(
        title="Reconstruction of an image from one step",
        title_justify="left",
        caption=(
            "correlation: of the reconstruction with the original; 1 is identical, 0 is unrelated"
        ),
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
