"""Draw the figure of the README: one federated round, and a predicted mask.

The lower half shows phantom images (synthetic ultrasound) of patients that the demo did not train
on, with the outline of the true mask and the outline that the given model predicts:

    polyclinic simulate --config configs/demo.toml --name demo
    python docs/images/make_figure.py runs/demo/best.safetensors --out docs/images/round.png
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from polyclinic.simulation.phantom.physics import PhantomExample, draw_example
from polyclinic.simulation.phantom.sites import phantom_site

SITES = (1, 2, 3)  # the demo's three hospitals
UNSEEN = 1000  # an index far beyond the 200 or so images per site of configs/demo.toml
SEED = 0  # of the demo's phantoms
SIZE = 96  # px, long side of a phantom image, as in the demo

WIDTH, HEIGHT = 900, 590
SCALE = 2  # everything is drawn at twice the size and reduced, for smooth lines
INK, GREY = (32, 36, 44), (110, 116, 128)
SERVER_FILL, SITE_FILL = (226, 236, 250), (233, 245, 233)
TRUE, PREDICTED = (64, 200, 90), (255, 140, 0)  # RGB

Mask = NDArray[np.bool_]


def predict_masks(model: Path, examples: list[PhantomExample]) -> list[Mask]:
    """Predict one mask per example with ``polyclinic predict``."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "images").mkdir()
        for number, example in enumerate(examples):
            Image.fromarray(example.image).save(folder / "images" / f"{number}.png")
        program = Path(sys.executable).with_name("polyclinic")
        command = [program, "predict", model, folder / "images", "--out", folder / "out"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return [
            np.asarray(Image.open(folder / "out" / "masks" / f"{number}.png")) > 0
            for number in range(len(examples))
        ]


def dice(true: Mask, predicted: Mask) -> float:
    """Compute the Dice coefficient of two masks, at least one of which is not empty."""
    return float(2 * (true & predicted).sum() / (true.sum() + predicted.sum()))


class Canvas:
    """A picture that is drawn at ``SCALE`` times its final size; coordinates are final pixels."""

    def __init__(self) -> None:
        self.image = Image.new("RGB", (WIDTH * SCALE, HEIGHT * SCALE), "white")
        self.draw = ImageDraw.Draw(self.image)

    def text(
        self,
        at: tuple[float, float],
        text: str,
        *,
        size: int = 15,
        colour: tuple[int, int, int] = INK,
        anchor: str = "la",
    ) -> None:
        """Write one line of text; ``anchor`` is Pillow's."""
        font = ImageFont.load_default(size * SCALE)
        place = (at[0] * SCALE, at[1] * SCALE)
        self.draw.text(place, text, fill=colour, font=font, anchor=anchor)

    def box(self, left: int, top: int, width: int, height: int, fill: tuple[int, int, int]) -> None:
        """Draw a rectangle with rounded corners."""
        corners = [v * SCALE for v in (left, top, left + width, top + height)]
        self.draw.rounded_rectangle(corners, 8 * SCALE, fill=fill, outline=INK, width=SCALE)

    def arrow(self, start: int, end: int, y: int, label: str) -> None:
        """Draw a horizontal arrow with a label above it."""
        sign = 1 if end > start else -1
        self.draw.line([v * SCALE for v in (start, y, end - sign * 8, y)], INK, 2 * SCALE)
        head = [(end, y), (end - sign * 12, y - 6), (end - sign * 12, y + 6)]
        self.draw.polygon([(a * SCALE, b * SCALE) for a, b in head], INK)
        self.text(((start + end) / 2, y - 6), label, size=14, anchor="ms")

    def picture(self, left: int, top: int, size: int, image: Image.Image) -> None:
        """Paste a square picture."""
        large = image.resize((size * SCALE, size * SCALE), Image.Resampling.NEAREST)
        self.image.paste(large, (left * SCALE, top * SCALE))

    def save(self, path: Path) -> None:
        """Reduce the picture to its final size and write it as PNG."""
        final = self.image.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)
        final.quantize(128).save(path, optimize=True)


def draw_round(canvas: Canvas) -> None:
    """Draw the coordinator, the sites and what they exchange in one round."""
    canvas.text((24, 18), "One round", size=20)
    canvas.box(24, 54, 250, 206, SERVER_FILL)
    canvas.text((149, 66), "Coordinator", size=18, anchor="ma")
    lines = (
        "Average the weights by task:",
        "encoder: training images",
        "decoder: images with a mask",
        "classifier: images with a label",
        "",
        "Add the sums, print a table,",
        "save a checkpoint",
    )
    for number, line in enumerate(lines):
        canvas.text((40, 98 + 21 * number), line, size=14)
    for shift in (16, 8, 0):  # three sites, one behind the other
        canvas.box(614 + shift, 54 + shift, 246, 190, SITE_FILL)
    canvas.text((737, 66), "Site (one of several)", size=18, anchor="ma")
    lines = (
        "Images, masks and labels stay here",
        "",
        "Train on local training images",
        "",
        "Evaluate on local validation",
        "images",
    )
    for number, line in enumerate(lines):
        canvas.text((630, 98 + 21 * number), line, size=14)
    canvas.arrow(282, 606, 96, "1. global weights: train")
    canvas.arrow(606, 282, 142, "2. trained weights and counts")
    canvas.arrow(282, 606, 188, "3. averaged weights: evaluate")
    canvas.arrow(606, 282, 234, "4. sums of the metrics")


def outlined(
    example: PhantomExample, masks: list[tuple[Mask, tuple[int, int, int]]]
) -> Image.Image:
    """Return the image, enlarged, with one outline per mask and black bars around it."""
    factor = 6
    height, width = example.image.shape
    large = cv2.resize(
        example.image, (width * factor, height * factor), interpolation=cv2.INTER_CUBIC
    )
    coloured = cv2.cvtColor(large, cv2.COLOR_GRAY2RGB)
    for mask, colour in masks:
        shape = cv2.resize(
            mask.astype(np.uint8), large.shape[::-1], interpolation=cv2.INTER_NEAREST
        )
        contours, _ = cv2.findContours(shape, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(coloured, contours, -1, colour, 5)
    side = SIZE * factor
    framed = Image.new("RGB", (side, side))
    framed.paste(
        Image.fromarray(coloured),
        ((side - coloured.shape[1]) // 2, (side - coloured.shape[0]) // 2),
    )
    return framed


def draw_predictions(canvas: Canvas, examples: list[PhantomExample], predicted: list[Mask]) -> None:
    """Draw one phantom per site: the image, then the same image with both outlines."""
    canvas.text((24, 296), "Predicted masks on phantom images", size=20)
    canvas.text((876, 300), "true mask", size=15, colour=TRUE, anchor="ra")
    canvas.text((796, 300), "predicted mask", size=15, colour=PREDICTED, anchor="ra")
    size, gap = 136, 4
    for number, (example, mask) in enumerate(zip(examples, predicted, strict=True)):
        left = 24 + number * 288
        true = example.mask > 0
        plain = outlined(example, [])
        both = outlined(example, [(true, TRUE), (mask, PREDICTED)])
        canvas.picture(left, 334, size, plain)
        canvas.picture(left + size + gap, 334, size, both)
        canvas.text(
            (left, 334 + size + 10),
            f"site-{SITES[number]}, {example.label}: Dice {dice(true, mask):.2f}",
            size=15,
        )
    canvas.text(
        (24, HEIGHT - 66),
        "Synthetic ultrasound of patients that no site trained on; one image per site, not chosen",
        size=14,
        colour=GREY,
    )
    canvas.text(
        (24, HEIGHT - 44),
        "by result. Model: the best round of configs/demo.toml. This says nothing about patients.",
        size=14,
        colour=GREY,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the figure of the README.")
    parser.add_argument("model", type=Path, help="model file of a run of configs/demo.toml")
    parser.add_argument("--out", type=Path, required=True, help="PNG file to write")
    arguments = parser.parse_args()
    examples = [
        draw_example(phantom_site(number, SEED), UNSEEN, seed=SEED, size=SIZE) for number in SITES
    ]
    canvas = Canvas()
    draw_round(canvas)
    draw_predictions(canvas, examples, predict_masks(arguments.model, examples))
    canvas.save(arguments.out)


if __name__ == "__main__":
    main()
