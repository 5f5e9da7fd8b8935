"""The multi-task UNet: segmentation and classification with a shared encoder.

Paper: arXiv 2412.00351. The default norm is group norm (published: batch norm), so that examples
do not influence each other and the statistics of one site do not leak to another.
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
    """The network's output for a batch; None for a task that was not requested."""

    mask_logits: Tensor | None  # (B, M, H, W), or (B, M + 1, H, W) with the background first
    class_logits: Tensor | None  # (B, K)
    log_variances: Tensor | None = None  # (B, 2), only in training with learned task weights


class MultiTaskUNet(nn.Module):
    """Multi-task network for segmentation and classification of images.

    Args:
        encoder: the shared encoder.
        dfe: the enhancement module of each encoder map.
        decoder: computes mask logits from the enhanced maps.
        head: computes class logits from the encoder maps.
        uncertainty: the learned weights of the tasks' losses; None if they are not learned.

    Shapes:
        in:  (B, in_channels, H, W), float, normalised as configured by ``data.normalise``. Any H
             and W: images are padded with 0 to multiples of the encoder's stride, masks cropped.
        out: ``Prediction``, logits of any sign
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
        """Turn activation checkpointing in the encoder on or off.

        Checkpointing recomputes activations in the backward pass: it needs less memory and more
        time, and gives the same results. It cannot be combined with per-example gradients, because
        their hooks would be called twice per layer.
        """
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
    """Build a network with random weights from its configuration.

    Args:
        config: the model settings.
        size: height and width of the images, in pixels. They determine the attention window (the
            deepest map's side unless configured) and the largest useful dilation. The network
            accepts images of other sizes too.
        in_channels: channels of the images.
        image_classes: K.
        mask_channels: mask logits per pixel: M, or M + 1 for a softmax over exclusive classes.
        uncertainty: the learned weights of the tasks' losses; None if they are not learned.
        seed: seed of the initial weights, which leaves the global random state unchanged. None
            draws from the global random state.

    Raises:
        BackboneError: if the configured backbone cannot be used.
    """
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        return _build(config, size, in_channels, image_classes, mask_channels, uncertainty)


def network_of(model: ModelConfig, data: DataConfig, loss: LossConfig, seed: int) -> MultiTaskUNet:
    """Build the network for the settings of a run.

    Args:
        model: the model settings.
        data: determines image size, channels and classes.
        loss: determines whether the tasks' weights are learned.
        seed: seed of the initial weights.

    Raises:
        BackboneError: if the configured backbone cannot be used.
    """
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
