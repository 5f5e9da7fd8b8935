"""Physics of a phantom image: tissue, lesions, shadows and the scanner's speckle.

Images follow the physics of an ultrasound scanner: layers of tissue scatter sound, sound is
attenuated on its way down, the scanner adds gain with depth (time gain compensation, TGC), the
point spread function turns scatterers into speckle, and the echo is compressed to grey levels.
Shadows, enhancement and blurred borders result from this model.

An example is determined by (seed, site, index), so it does not depend on the number of examples.
Lengths are in millimetres, echo strengths in decibels relative to average glandular tissue.
"""

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from polyclinic.simulation.phantom.sites import (
    TISSUE_LOSS,
    Patient,
    PhantomSite,
    check_seed,
    patient_of,
)

Plane = NDArray[np.float32]
"""One value per pixel, (H, W), or a broadcastable (H, 1) by depth or (1, W) by lateral position."""

_SMALLEST_SIZE = 32  # pixels; on smaller images the smallest lesions would fall apart
_GLAND_GREY = 0.52  # grey level of average glandular tissue before gain, as a share of white


@dataclass(frozen=True)
class PhantomExample:
    """One image with its annotations.

    Attributes:
        image: (H, W) uint8.
        mask: (H, W) uint8, 255 in the lesion, 0 elsewhere.
        label: "benign", "malignant" or "normal".
        group: id of the patient.
    """

    image: NDArray[np.uint8]
    mask: NDArray[np.uint8]
    label: str
    group: str


@dataclass(frozen=True)
class _Frame:
    """The pixel grid of a site's images at one size."""

    height: int
    width: int
    px_per_mm: float

    @property
    def height_mm(self) -> float:
        return self.height / self.px_per_mm

    @property
    def width_mm(self) -> float:
        return self.width / self.px_per_mm

    @property
    def depth(self) -> Plane:
        """Depth below the probe in mm, (H, 1)."""
        return _middles(self.height, self.px_per_mm)[:, None]

    @property
    def across(self) -> Plane:
        """Distance from the left edge in mm, (1, W)."""
        return _middles(self.width, self.px_per_mm)[None, :]


def draw_example(
    site: PhantomSite, index: int, *, seed: int, size: int, normal_fraction: float = 0.0
) -> PhantomExample:
    """Draw one example of a site.

    Args:
        site: the site, with its scanner and patients.
        index: index of the example within the site, from 0.
        seed: seed of the federation, 0 or more.
        size: long side of the image in pixels, 32 or more.
        normal_fraction: share of patients without a lesion, from 0 to below 1.

    Raises:
        ValueError: if a number is out of range.
    """
    if index < 0:
        raise ValueError(f"index: expected 0 or more, got {index}")
    check_drawing(seed, size, normal_fraction)
    patient = patient_of(site, index, seed, normal_fraction)
    rng = np.random.default_rng([seed, site.number, index])
    frame = _frame(site, size)
    echo, loss = _breast(rng, frame, patient.density)
    echo, loss = _with_other_shadows(rng, frame, echo, loss)
    mask = np.zeros((frame.height, frame.width), np.uint8)
    if patient.label != "normal":
        outline = _outline(rng, frame, patient)
        cv2.fillPoly(mask, [np.rint(outline * frame.px_per_mm - 0.5).astype(np.int32)], 255)
        echo, loss = _with_lesion(rng, frame, patient, outline, mask, echo, loss)
    image = _scan(rng, frame, site, echo, loss)
    return PhantomExample(image, mask, patient.label, patient.group)


def check_drawing(seed: int, size: int, normal_fraction: float) -> None:
    """Check the arguments of ``draw_example``.

    Raises:
        ValueError: if a number is out of range.
    """
    check_seed(seed)
    if size < _SMALLEST_SIZE:
        raise ValueError(f"size: expected {_SMALLEST_SIZE} pixels or more, got {size}")
    if not 0 <= normal_fraction < 1:
        raise ValueError(
            f"normal_fraction: expected at least 0 and less than 1, got {normal_fraction}"
        )


def _frame(site: PhantomSite, size: int) -> _Frame:
    long_side = max(1.0, site.height_to_width)
    return _Frame(
        height=round(size * site.height_to_width / long_side),
        width=round(size / long_side),
        px_per_mm=size / site.field_mm,
    )


def _middles(count: int, px_per_mm: float) -> Plane:
    return np.asarray((np.arange(count) + 0.5) / px_per_mm, np.float32)


def _clouds(rng: np.random.Generator, frame: _Frame, across_mm: float, down_mm: float) -> Plane:
    """Draw smooth noise of mean about 0 and deviation about 1, with features of the given size."""
    rows = max(2, round(frame.height_mm / down_mm) + 1)
    columns = max(2, round(frame.width_mm / across_mm) + 1)
    coarse = rng.standard_normal((rows, columns), np.float32)
    fine = cv2.resize(coarse, (frame.width, frame.height), interpolation=cv2.INTER_CUBIC)
    return np.asarray(1.4 * fine, np.float32)  # 1.4 restores the deviation


def _wave(rng: np.random.Generator, frame: _Frame, length_mm: float) -> Plane:
    """Draw smooth noise along the probe, (1, W), for the course of a tissue border."""
    knots = max(2, round(frame.width_mm / length_mm) + 1)
    coarse = rng.standard_normal((1, knots), np.float32)
    fine = cv2.resize(coarse, (frame.width, 1), interpolation=cv2.INTER_CUBIC)
    return np.asarray(fine, np.float32)


def _below(depth: Plane, border: Plane, soft_mm: float) -> Plane:
    """Return a soft step that is 0 above a border and 1 below it."""
    return np.asarray(np.clip((depth - border) / soft_mm + 0.5, 0, 1), np.float32)


def _membranes(field: Plane, thinness: float) -> Plane:
    """Draw thin lines where smooth noise crosses zero; they branch and close like septa."""
    return np.asarray(np.exp(-np.square(field * thinness)), np.float32)


def _breast(rng: np.random.Generator, frame: _Frame, density: float) -> tuple[Plane, Plane]:
    """Draw healthy tissue: skin, fat with septa, gland with fat lobules, and muscle.

    Returns:
        Echo strength in dB and attenuation in dB per mm, both (H, W).
    """
    depth = frame.depth
    skin_floor = rng.uniform(1.2, 2.0) + 0.15 * _wave(rng, frame, 12)
    gland_top = (
        skin_floor + (9.0 - 6.5 * density) + rng.uniform(-0.8, 0.8) + 1.1 * _wave(rng, frame, 9)
    )
    tilt = rng.uniform(-0.08, 0.08) * (frame.across - frame.width_mm / 2)
    muscle_top = frame.height_mm * rng.uniform(0.76, 0.9) + tilt + 0.7 * _wave(rng, frame, 14)

    fat = -15 + 1.5 * _clouds(rng, frame, 5, 3) + 12 * _membranes(_clouds(rng, frame, 9, 4.5), 5)
    lobules = np.clip(_clouds(rng, frame, 6, 3.5) - 1.6 * density + 0.2, 0, 1)
    ducts = _membranes(_clouds(rng, frame, 7, 2.2), 3)
    gland = 2 * _clouds(rng, frame, 2.5, 1.0) + 2.5 * _clouds(rng, frame, 10, 5) - 2
    gland = gland + 4 * ducts - 12 * lobules
    muscle = -11 + 4 * _clouds(rng, frame, 14, 0.8)

    in_gland = _below(depth, gland_top, 1.2)
    in_muscle = _below(depth, muscle_top, 0.8)
    echo = fat + (gland - fat) * in_gland
    echo = echo + (muscle - echo) * in_muscle
    echo = echo + 7 * np.exp(-np.square((depth - muscle_top) / 0.45))
    in_skin = 1 - _below(depth, skin_floor, 0.5)
    echo = echo + (5 - echo) * in_skin

    loss = TISSUE_LOSS * (0.75 + 0.25 * in_gland + 0.2 * in_muscle)
    return echo, np.asarray(loss, np.float32)


def _with_other_shadows(
    rng: np.random.Generator, frame: _Frame, echo: Plane, loss: Plane
) -> tuple[Plane, Plane]:
    """Add shadows without a lesion: ligaments, ribs, lost contact at the end of the probe."""
    depth, across = frame.depth, frame.across
    for _ in range(rng.integers(0, 3)):
        top = rng.uniform(0.12, 0.6) * frame.height_mm
        centre = rng.uniform(0.05, 0.95) * frame.width_mm
        half_width, strength = rng.uniform(0.6, 1.8), rng.uniform(4, 11)
        sideways = np.square((across - centre) / half_width)
        spot = np.exp(-np.square((depth - top) / 0.5) - np.square(sideways))
        echo = echo + 7 * spot
        loss = loss + strength * spot  # the spot is about 1 mm deep, so dB per mm equals dB
    if rng.random() < 0.3:
        top = rng.uniform(0.84, 0.93) * frame.height_mm
        centre = rng.uniform(0, 1) * frame.width_mm
        arch = top + np.square(across - centre) / 14
        near = np.abs(across - centre) < rng.uniform(3.5, 5.5)
        echo = echo + 16 * np.exp(-np.square((depth - arch) / 0.6)) * near
        loss = loss + 25 * np.exp(-np.square((depth - arch - 1.1) / 0.5)) * near
    if rng.random() < 0.25:
        reach = rng.uniform(1.5, 4.5)
        from_end = across if rng.random() < 0.5 else frame.width_mm - across
        loss = loss + 9 * np.exp(-np.square(from_end / reach)) * (depth < 1)
    return echo, loss


def _outline(rng: np.random.Generator, frame: _Frame, patient: Patient) -> NDArray[np.float64]:
    """Draw the lesion's border as (N, 2) points (across, depth) in mm, inside the image."""
    angle = np.linspace(0, 2 * np.pi, 240, endpoint=False)
    radius = np.ones_like(angle)
    long_half = patient.diameter_mm / 2 * rng.uniform(0.95, 1.05)
    short_half = long_half / patient.elongation
    if patient.label == "malignant":
        half_across, half_down = short_half, long_half
        turn = np.deg2rad(rng.uniform(-20, 20))
        for waves in range(2, 7):
            height = rng.uniform(0.02, 0.2) / waves
            radius += height * np.cos(waves * angle + rng.uniform(0, 2 * np.pi))
        for at in rng.uniform(0, 2 * np.pi, rng.integers(6, 12)):
            away = np.angle(np.exp(1j * (angle - at)))
            radius += rng.uniform(0.12, 0.34) * np.exp(-np.abs(away) / rng.uniform(0.06, 0.14))
        radius /= np.sqrt(np.mean(radius**2))  # the irregular border must not change the area
    else:
        half_across, half_down = long_half, short_half
        turn = np.deg2rad(rng.uniform(-14, 14))
        radius += rng.uniform(0, 0.05) * np.cos(2 * angle + rng.uniform(0, 2 * np.pi))
        lobes = rng.uniform(0.04, 0.1) if rng.random() < 0.2 else rng.uniform(0, 0.04)
        radius += lobes * np.cos(3 * angle + rng.uniform(0, 2 * np.pi))
    across, down = half_across * radius * np.cos(angle), half_down * radius * np.sin(angle)
    points = np.stack(
        [across * np.cos(turn) - down * np.sin(turn), across * np.sin(turn) + down * np.cos(turn)],
        axis=1,
    )
    low, high = points.min(axis=0), points.max(axis=0)
    centre = np.array(
        [rng.uniform(0.25, 0.75) * frame.width_mm, rng.uniform(0.3, 0.68) * frame.height_mm]
    )
    nearest = np.array([1.0, 2.5]) - low  # mm kept free at the side and for the skin
    farthest = np.array([frame.width_mm - 1.0, frame.height_mm - 2.0]) - high
    return np.asarray(points + np.maximum(nearest, np.minimum(centre, farthest)), np.float64)


def _with_lesion(
    rng: np.random.Generator,
    frame: _Frame,
    patient: Patient,
    outline: NDArray[np.float64],
    mask: NDArray[np.uint8],
    echo: Plane,
    loss: Plane,
) -> tuple[Plane, Plane]:
    """Add a lesion to the tissue, with the border and attenuation of its class."""
    outside = cv2.distanceTransform(255 - mask, cv2.DIST_L2, 5)
    inside = cv2.distanceTransform(mask, cv2.DIST_L2, 5)
    # Distance from the border in mm, negative inside.
    outward = np.asarray((outside - inside) / frame.px_per_mm, np.float32)
    if patient.label == "malignant":
        soft_mm = 1.3
        interior = patient.contrast_db + 2.5 * _clouds(rng, frame, 2.5, 2.0)
        halo = np.clip(1 + 0.6 * _clouds(rng, frame, 4, 4), 0, 2)
        echo = echo + 5.5 * halo * np.exp(-np.square((outward - 1.4) / 1.5))
    else:
        soft_mm = 0.35
        interior = patient.contrast_db + 0.8 * _clouds(rng, frame, 3, 2)
        echo = echo + rng.uniform(5, 9) * np.exp(-np.square((outward - 0.35) / 0.45))
    filled = 1 / (1 + np.exp(np.clip(outward * (4 / soft_mm), -30, 30)))
    echo = echo + (interior - echo) * filled
    loss = loss + (patient.lesion_loss - loss) * filled
    if patient.label == "benign" and rng.random() < 0.5:
        # A smooth curved edge refracts the beam, which leaves a thin shadow below each flank.
        for flank in (outline[:, 0].argmin(), outline[:, 0].argmax()):
            across, down = outline[flank].tolist()
            away = np.square((frame.across - across) / 0.5)
            away = away + np.square((frame.depth - down - 0.5) / 0.6)
            loss = loss + rng.uniform(2, 5) * np.exp(-away)
    return echo, loss


def _scan(
    rng: np.random.Generator, frame: _Frame, site: PhantomSite, echo: Plane, loss: Plane
) -> NDArray[np.uint8]:
    """Simulate the scanner's image of tissue with given echo strength (dB) and loss (dB per mm)."""
    depth = frame.depth
    down = depth / frame.height_mm  # 0 at the probe, 1 at the bottom
    path_db = np.cumsum(loss, axis=0, dtype=np.float32) / frame.px_per_mm
    # A beam is wider than a pixel, so shadows have soft edges.
    path_db = np.asarray(
        cv2.GaussianBlur(path_db, (0, 0), sigmaX=0.5 * frame.px_per_mm, sigmaY=0.1)
    )
    amplitude = np.asarray(10 ** ((echo - path_db) / 20), np.float32)

    axial, lateral = site.axial_mm * frame.px_per_mm, site.lateral_mm * frame.px_per_mm
    off_focus = np.clip(np.abs(down - site.focus) / 0.6, 0, 1)
    power = np.zeros_like(amplitude)
    for _ in range(site.looks):
        for _quadrature in range(2):
            scatter = amplitude * rng.standard_normal(amplitude.shape, np.float32)
            sharp = _beam(scatter, axial, lateral)
            wide = _beam(scatter, axial, 1.8 * lateral)
            power += np.square(sharp + (wide - sharp) * off_focus)
    noise = 10 ** (site.noise_db / 10) * rng.standard_exponential(amplitude.shape, np.float32)
    power = power / (2 * site.looks) + noise

    # The scanner's settings vary between examinations, each by about 1 dB.
    gain_turn, slope_turn, bow_turn = rng.standard_normal(3).tolist()
    tgc_db = 0.95 * TISSUE_LOSS * depth + (site.tgc_error_db + slope_turn) * down
    tgc_db = tgc_db + bow_turn * np.sin(2 * np.pi * down)
    shown_db = 10 * np.log10(power + 1e-12) + tgc_db + site.gain_db + gain_turn
    grey = np.asarray(255 * (_GLAND_GREY + shown_db / site.dynamic_range_db), np.float32)
    smooth = max(0.1, site.smooth_mm * frame.px_per_mm)
    grey = np.asarray(cv2.GaussianBlur(grey, (0, 0), sigmaX=smooth))
    return np.asarray(np.rint(np.clip(grey, 0, 255)), np.uint8)


def _beam(scatter: Plane, axial: float, lateral: float) -> Plane:
    """Blur by the point spread function (deviations in pixels) and preserve the mean power."""
    width = max(3, 2 * round(3 * lateral) + 1)
    height = max(3, 2 * round(3 * axial) + 1)
    across = cv2.getGaussianKernel(width, lateral, cv2.CV_32F)
    down = cv2.getGaussianKernel(height, axial, cv2.CV_32F)
    blurred = cv2.sepFilter2D(
        scatter,
        cv2.CV_32F,
        across / np.linalg.norm(across),
        down / np.linalg.norm(down),
        borderType=cv2.BORDER_REFLECT,
    )
    return np.asarray(blurred, np.float32)
