"""Write tests/golden.json, the outputs of tiny networks: `python -m tests.make_golden`.

Weights and images are sine waves instead of random numbers, so that the outputs change only with
the network and not with a random generator.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from polyclinic.mtl_model.network import MultiTaskUNet
from tests.factories import small

GOLDEN = Path(__file__).with_name("golden.json")
MEMBERS: dict[str, dict[str, object]] = {
    "default": {},
    "published": {"norm": "batch", "token_mixing": "published"},
    "parallel": {"block_order": "parallel", "dfe": "sum", "upsample": "bilinear", "window": 2},
    "bare": {"dfe": "none", "swin_depth": 0, "stride": 4},
}


def waved(model: MultiTaskUNet) -> MultiTaskUNet:
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            wave = torch.sin(torch.arange(parameter.numel(), dtype=torch.float64) * 0.7 + i)
            fan = max(parameter[0].numel(), 1) if parameter.dim() > 1 else 1
            start = 1.0 if parameter.dim() == 1 else 0.0  # scales and shifts are around 1
            parameter.copy_((start + wave / fan**0.5).view(parameter.shape))
    return model


def answers(changes: dict[str, object]) -> dict[str, list[float]]:
    model = waved(small(size=(32, 32), **changes)).double().eval()
    images = torch.sin(torch.arange(2 * 40 * 33, dtype=torch.float64) * 0.01).view(2, 1, 40, 33)
    with torch.no_grad():
        prediction = model(images)
    masks = prediction.mask_logits
    return {
        "mask": masks[:, 0, ::13, ::11].flatten().tolist(),
        "mean and deviation": [masks.mean().item(), masks.std().item()],
        "class": prediction.class_logits.flatten().tolist(),
    }


if __name__ == "__main__":
    found = {name: answers(changes) for name, changes in MEMBERS.items()}
    GOLDEN.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
