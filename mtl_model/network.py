"""The multi-task UNet: one shared encoder, a mask and an image class.

Paper: arXiv 2412.00351. Group norm is the default here (published: batch norm), so that no
example sees another and one site's statistics do not leak into another's.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.run import DataConfig, ModelConfig
from mtl_model.blocks import norm_layer
from mtl_model.decoder import Decoder
from mtl_model.dfe import build_dfe
from mtl_model.encoder import ResFormer
from mtl_model.head import MultiScaleHead
from mtl_model.tasks import TASKS, Task

STRIDE = 16  # side of an image over side of its deepest map


class Prediction(NamedTuple):
    """What the network says of a batch; None for a task that was not asked for."""

    mask_logits: Tensor | None  # (B, M, H, W)
    class_logits: Tensor | None  # (B, K)


class MultiTaskUNet(nn.Module):
    """Segment and classify.

    Shapes:
        in:  (B, in_channels, H, W), any H and W: padded to multiples of 16 and cropped back
        out: Prediction
    """

    def __init__(
        self, encoder: ResFormer, dfe: nn.ModuleList, decoder: Decoder, head: MultiScaleHead
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.dfe = dfe
        self.decoder = decoder
        self.head = head

    def forward(self, images: Tensor, tasks: tuple[Task, ...] = TASKS) -> Prediction:
        h, w = images.shape[-2:]
        x = F.pad(images, (0, -w % STRIDE, 0, -h % STRIDE))
        maps = self.encoder(x)
        masks = classes = None
        if "segmentation" in tasks:
            enhanced = [dfe(m) for dfe, m in zip(self.dfe, maps, strict=True)]
            masks = self.decoder(enhanced)[..., :h, :w]
        if "classification" in tasks:
            classes = self.head(maps)
        return Prediction(masks, classes)


def build_model(
    config: ModelConfig,
    *,
    size: tuple[int, int],
    in_channels: int,
    image_classes: int,
    mask_classes: int = 1,
    seed: int | None = None,
) -> MultiTaskUNet:
    """Build the network of a config.

    Args:
        size: height and width of the images it is built for, in pixels: they set the attention
            window (side // 16 unless given) and the largest useful dilation. Other sizes work.
        seed: of the initial weights; the caller's random state is left as it was. None draws
            from the caller's random state.
    """
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        return _build(config, size, in_channels, image_classes, mask_classes)


def network_of(model: ModelConfig, data: DataConfig, seed: int) -> MultiTaskUNet:
    """Build the network that a run's settings ask for: as ``build_model``, for the run's images."""
    return build_model(
        model,
        size=(data.image_height, data.image_width),
        in_channels=data.channels,
        image_classes=len(data.classes),
        seed=seed,
    )


def _build(
    config: ModelConfig,
    size: tuple[int, int],
    in_channels: int,
    image_classes: int,
    mask_classes: int,
) -> MultiTaskUNet:
    norm = norm_layer(config.norm)
    side = -(-min(size) // STRIDE) * STRIDE
    encoder = ResFormer(
        in_channels,
        config.backbone,
        config.width,
        config.depths,
        config.swin_depth,
        config.head_channels,
        config.window or side // STRIDE,
        side,
        config.mlp_ratio,
        config.drop_path,
        config.block_order,
        norm,
    )
    dfe = nn.ModuleList(
        build_dfe(config.dfe, channels, config.dfe_rates, side // 2 ** (k + 1), norm)
        for k, channels in enumerate(encoder.channels)
    )
    decoder = Decoder(encoder.channels, mask_classes, config.upsample, norm)
    head = MultiScaleHead(
        encoder.channels, config.head_stages, config.head_width, image_classes, norm
    )
    return MultiTaskUNet(encoder, dfe, decoder, head)
