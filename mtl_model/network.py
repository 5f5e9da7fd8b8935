"""The multi-task UNet: one shared encoder, a mask and an image class.

Paper: arXiv 2412.00351. Group norm is the default here (published: batch norm), so that no
example sees another and one site's statistics do not leak into another's.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyclinic.configs.schema.data import DataConfig
from polyclinic.configs.schema.loss import LossConfig
from polyclinic.configs.schema.model import ModelConfig
from polyclinic.mtl_model.backbone import STAGES, build_conv_path
from polyclinic.mtl_model.blocks import norm_layer
from polyclinic.mtl_model.decoder import Decoder
from polyclinic.mtl_model.dfe import build_dfe
from polyclinic.mtl_model.encoder import ResFormer
from polyclinic.mtl_model.head import MultiScaleHead
from polyclinic.mtl_model.tasks import TASKS, Task
from polyclinic.mtl_model.uncertainty import Uncertainty


class Prediction(NamedTuple):
    """What the network says of a batch; None for a task that was not asked for."""

    mask_logits: Tensor | None  # (B, M, H, W), or M + 1 maps, the first of background
    class_logits: Tensor | None  # (B, K)
    log_variances: Tensor | None = None  # (B, 2), where a network in training weighs its losses


class MultiTaskUNet(nn.Module):
    """Segment and classify.

    Shapes:
        in:  (B, in_channels, H, W), any H and W: padded to multiples of the encoder's stride and
             cropped back
        out: Prediction
    """

    def __init__(
        self,
        encoder: ResFormer,
        dfe: nn.ModuleList,
        decoder: Decoder,
        head: MultiScaleHead,
        uncertainty: Uncertainty | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.dfe = dfe
        self.decoder = decoder
        self.head = head
        self.uncertainty = uncertainty

    def set_grad_checkpointing(self, enable: bool) -> None:
        """Let the encoder compute activations again in the backward pass instead of keeping them:
        less memory for some time, and the same numbers. Not for per-example gradients, whose
        hooks would hear each layer twice."""
        self.encoder.set_grad_checkpointing(enable)

    def forward(self, images: Tensor, tasks: tuple[Task, ...] = TASKS) -> Prediction:
        h, w = images.shape[-2:]
        right, below = -w % self.encoder.stride, -h % self.encoder.stride
        maps = self.encoder(F.pad(images, (0, right, 0, below)) if right or below else images)
        masks = classes = None
        if "segmentation" in tasks:
            enhanced = [dfe(m) for dfe, m in zip(self.dfe, maps, strict=True)]
            masks = self.decoder(enhanced)[..., :h, :w]
        if "classification" in tasks:
            classes = self.head(maps)
        learned = self.uncertainty if self.training else None
        return Prediction(masks, classes, learned(images) if learned is not None else None)


def build_model(
    config: ModelConfig,
    *,
    size: tuple[int, int],
    in_channels: int,
    image_classes: int,
    mask_channels: int = 1,
    uncertainty: Uncertainty | None = None,
    seed: int | None = None,
) -> MultiTaskUNet:
    """Build the network of a config.

    Args:
        size: height and width of the images it is built for, in pixels: they set the attention
            window (the deepest map's side unless given) and the largest useful dilation. Other
            sizes work.
        mask_channels: maps of mask logits: M, or M + 1 where a softmax tells classes apart.
        uncertainty: the tasks' weights, if they are to be learned.
        seed: of the initial weights; the caller's random state is left as it was. None draws
            from the caller's random state.
    """
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        return _build(config, size, in_channels, image_classes, mask_channels, uncertainty)


def network_of(model: ModelConfig, data: DataConfig, loss: LossConfig, seed: int) -> MultiTaskUNet:
    """Build the network that a run's settings ask for: as ``build_model``, for the run's images."""
    learned = loss.weighting == "uncertainty"
    return build_model(
        model,
        size=(data.image_height, data.image_width),
        in_channels=data.channels,
        image_classes=len(data.classes),
        mask_channels=data.mask_channels,
        uncertainty=Uncertainty(1.0, loss.classification_weight) if learned else None,
        seed=seed,
    )


def _build(
    config: ModelConfig,
    size: tuple[int, int],
    in_channels: int,
    image_classes: int,
    mask_channels: int,
    uncertainty: Uncertainty | None,
) -> MultiTaskUNet:
    norm = norm_layer(config.norm)
    cnn = build_conv_path(
        config.backbone,
        in_channels,
        config.stride,
        norm if config.norm == "group" else None,
        config.width,
        config.depths,
    )
    deepest = cnn.stride * 2 ** (STAGES - 1)
    side = -(-min(size) // deepest) * deepest
    encoder = ResFormer(
        cnn,
        in_channels,
        config.swin_depth,
        config.head_channels,
        config.window or side // deepest,
        side,
        config.mlp_ratio,
        config.drop_path,
        config.block_order,
        config.token_mixing,
    )
    dfe = nn.ModuleList(
        build_dfe(config.dfe, channels, config.dfe_rates, side // (cnn.stride * 2**k), norm)
        for k, channels in enumerate(cnn.channels)
    )
    decoder = Decoder(cnn.channels, cnn.stride, mask_channels, config.upsample, norm)
    head = MultiScaleHead(cnn.channels, config.head_stages, config.head_width, image_classes, norm)
    return MultiTaskUNet(encoder, dfe, decoder, head, uncertainty)
