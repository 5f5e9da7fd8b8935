"""Generate Python code that uses an exported file without Polyclinic, for one model's settings."""

from __future__ import annotations

from polyclinic.configs.schema.data import DataConfig
from polyclinic.mtl_model.saved import Format

_RUN: dict[Format, tuple[str, str]] = {
    "onnx": (
        "import onnxruntime\n",
        """\
session = onnxruntime.InferenceSession({file!r})
mask_logits, class_logits = session.run(["mask_logits", "class_logits"], {{"images": x}})
""",
    ),
    "torchscript": (
        "import torch\n",
        """\
model = torch.jit.load({file!r})
with torch.inference_mode():
    mask_logits, class_logits = (logits.numpy() for logits in model(torch.from_numpy(x)))
""",
    ),
    "safetensors": (
        "import torch\n",
        """\
from pathlib import Path  # a safetensors file has only weights: Polyclinic provides the network

from polyclinic.mtl_model.saved import open_model

model = open_model(Path({file!r}))
mask_logits, class_logits = (y.numpy() for y in model.logits(torch.from_numpy(x)))
""",
    ),
}
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # Pillow's modes by number of channels


def snippet(data: DataConfig, kind: Format, file: str) -> str:
    """Generate code that predicts ``masks`` and ``probabilities`` of ``image.png``.

    Args:
        data: settings of the model's images and classes.
        kind: format of the exported file.
        file: name of the exported file.
    """
    imports, run = _RUN[kind]
    return "\n".join(
        (
            f"import numpy as np\n{imports}from PIL import Image\n",
            _to_array(data),
            run.format(file=file),
            _decisions(data),
        )
    )


def _to_array(data: DataConfig) -> str:
    h, w, mode = data.image_height, data.image_width, _MODES[data.channels]
    resized = "band.resize(size, Image.Resampling.BILINEAR)"
    lines = [
        'image = Image.open("image.png")',
        'if image.mode.startswith("I;16"):  # keep the upper 8 bits',
        "    image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))",
        f'image = image.convert("{mode}")',
        f"size = ({w}, {h})",
    ]
    if data.resize == "pad":
        lines += [
            f"scale = min({h} / image.height, {w} / image.width)",
            "size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))",
        ]
    lines += [
        f'small = Image.merge("{mode}", [{resized} for band in image.split()])',
        f'frame = Image.new("{mode}", ({w}, {h}))',
        f"frame.paste(small, (({w} - size[0]) // 2, ({h} - size[1]) // 2))",
        f"x = np.asarray(frame, np.float32).reshape(1, {h}, {w}, {data.channels})"
        ".transpose(0, 3, 1, 2)",
        "x = (x - x.mean()) / (x.std() + 1)"
        if data.normalise == "image"
        else "x = (x / 255 - 0.5) / 0.25",
        "x = np.ascontiguousarray(x)",
    ]
    return "\n".join(lines) + "\n"


def _decisions(data: DataConfig) -> str:
    masks = (
        "masks = mask_logits.argmax(axis=1)  # (1, height, width): 0 background, then "
        + ", ".join(data.mask_classes)
        if data.indexed_masks
        else "masks = mask_logits > 0  # (1, classes, height, width): "
        + ", ".join(data.mask_classes)
    )
    if data.label_kind == "multi-label":
        shares = ["probabilities = 1 / (1 + np.exp(-class_logits[0]))"]
    else:
        shares = [
            "powers = np.exp(class_logits[0] - class_logits[0].max())",
            "probabilities = powers / powers.sum()",
        ]
    return (
        "\n".join([masks, *shares, f"print(dict(zip({list(data.classes)!r}, probabilities)))"])
        + "\n"
    )
