"""Phantom hospitals: synthetic breast ultrasound with masks, labels and patients.

Why: a federation can be tried, tested and measured with nobody's images, and with sites that differ
the way hospitals do (scanner, settings, population). A picture is made the way a scanner makes one:
layers of tissue scatter, sound is lost on its way down, the scanner adds gain with depth (TGC), the
point spread function turns scatterers into speckle, and the echo is compressed to grey levels. So
shadows, enhancement and blurred borders are consequences, not paint.

What it is not: anatomy or a benchmark. The classes are cleaner than in a clinic, and a figure
reached on phantoms says that the machinery works, nothing about patients.

Everything follows from (seed, site, index), so example i is the same whatever the number of
examples. Lengths are in millimetres, echo strengths in decibels relative to average gland.
"""

import csv
import os
import secrets
import shutil
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

Plane = NDArray[np.float32]
"""One value per pixel, (H, W); or (H, 1) by depth, (1, W) by lateral position, to be broadcast."""

COLUMNS = ("image", "mask", "label", "group")

# Last word of a generator's key, so that no two draws share a stream. Views of a patient are keyed
# (seed, site, index), which numpy pads with zeros: hence none of these is 0.
_PATIENT, _PAIR, _SCANNER, _CASE_MIX = 1, 2, 3, 4

_PATIENTS_PER_BLOCK = 5  # one of them is seen twice
_IMAGES_PER_BLOCK = _PATIENTS_PER_BLOCK + 1
_GOLDEN = 0.6180339887498949

_SMALLEST_SIZE = 32  # px; below this the smallest lesions fall apart
_GLAND_GREY = 0.52  # of white: where average gland lands before gain
_TISSUE_LOSS = 0.5  # dB per mm of depth, there and back


@dataclass(frozen=True)
class PhantomSite:
    """One simulated hospital: its scanner, how it is set, and its patients.

    Attributes:
        number: from 1; part of every random key.
        name: also the folder's name and the start of every patient's id.
        height_to_width: of the pictures.
        field_mm: long side of the pictures.
        axial_mm: standard deviation of the point spread function along depth; sets the grain.
        lateral_mm: the same across the beam, at the focus.
        focus: depth at which the beam is narrowest, as a share of the picture's height.
        looks: independent speckle patterns averaged (spatial compounding); more is smoother.
        smooth_mm: standard deviation of the blur that the scanner applies to the grey picture.
        gain_db: overall gain; brightens.
        dynamic_range_db: echo range shown from black to white; less is harder contrast.
        noise_db: electronic noise, before the gain with depth lifts it.
        tgc_error_db: what the gain with depth adds too much (or too little) at the bottom.
        density: share of glandular tissue, 0 a fatty breast, 1 a dense one.
        benign_share: of the patients with a lesion.
        lesion_mm: median long diameter.
        lesion_spread: standard deviation of the logarithm of the diameter.
        volume: images here for each image asked for.
    """

    number: int
    name: str
    height_to_width: float
    field_mm: float
    axial_mm: float
    lateral_mm: float
    focus: float
    looks: int
    smooth_mm: float
    gain_db: float
    dynamic_range_db: float
    noise_db: float
    tgc_error_db: float
    density: float
    benign_share: float
    lesion_mm: float
    lesion_spread: float
    volume: float


@dataclass(frozen=True)
class PhantomExample:
    """One picture with all that is known about it.

    Attributes:
        image: (H, W) uint8.
        mask: (H, W) uint8, 255 in the lesion, 0 elsewhere.
        label: "benign", "malignant" or "normal".
        group: the patient.
    """

    image: NDArray[np.uint8]
    mask: NDArray[np.uint8]
    label: str
    group: str


@dataclass(frozen=True)
class _Patient:
    """What all views of one patient share."""

    group: str
    label: str
    diameter_mm: float
    elongation: float  # long diameter over short
    contrast_db: float  # of the lesion against glandular tissue
    lesion_loss: (
        float  # dB per mm inside the lesion; above the tissue's a shadow, below it enhancement
    )
    density: float


@dataclass(frozen=True)
class _Frame:
    """The pixel grid of one site at one size."""

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
        """(H, 1) mm below the probe."""
        return _middles(self.height, self.px_per_mm)[:, None]

    @property
    def across(self) -> Plane:
        """(1, W) mm from the left edge."""
        return _middles(self.width, self.px_per_mm)[None, :]


# Four unlike scanners; phantom_site takes them in turn, jitters the numbers and sets the volume.
_SCANNERS = (
    PhantomSite(
        number=1, name="mid-range", height_to_width=0.86, field_mm=41.0,
        axial_mm=0.17, lateral_mm=0.34, focus=0.45, looks=2, smooth_mm=0.12,
        gain_db=0.0, dynamic_range_db=56.0, noise_db=-58.0, tgc_error_db=0.0,
        density=0.50, benign_share=0.60, lesion_mm=13.5, lesion_spread=0.22, volume=1.0,
    ),
    PhantomSite(
        number=2, name="old and coarse", height_to_width=1.0, field_mm=44.0,
        axial_mm=0.27, lateral_mm=0.70, focus=0.35, looks=1, smooth_mm=0.10,
        gain_db=-1.0, dynamic_range_db=50.0, noise_db=-46.0, tgc_error_db=-4.0,
        density=0.35, benign_share=0.45, lesion_mm=16.0, lesion_spread=0.20, volume=1.0,
    ),
    PhantomSite(
        number=3, name="new and smooth", height_to_width=0.76, field_mm=40.0,
        axial_mm=0.15, lateral_mm=0.24, focus=0.50, looks=3, smooth_mm=0.14,
        gain_db=4.0, dynamic_range_db=68.0, noise_db=-66.0, tgc_error_db=3.0,
        density=0.70, benign_share=0.55, lesion_mm=12.5, lesion_spread=0.20, volume=1.0,
    ),
    PhantomSite(
        number=4, name="portable", height_to_width=1.16, field_mm=46.0,
        axial_mm=0.22, lateral_mm=0.45, focus=0.30, looks=1, smooth_mm=0.34,
        gain_db=2.0, dynamic_range_db=60.0, noise_db=-48.0, tgc_error_db=5.0,
        density=0.45, benign_share=0.50, lesion_mm=15.0, lesion_spread=0.25, volume=1.0,
    ),
)  # fmt: skip
# Three against four scanners, so that a site's size and its scanner are not one thing.
_VOLUMES = (1.0, 0.8, 1.3)


def phantom_site(number: int, seed: int = 0) -> PhantomSite:
    """The hospital of that number; the same number and seed are always the same hospital."""
    if number < 1:
        raise ValueError(f"site number: expected 1 or more, got {number}")
    _check_seed(seed)
    rng = np.random.default_rng([seed, number, 0, _SCANNER])
    scanner = _SCANNERS[(number - 1) % len(_SCANNERS)]

    def near(value: float, share: float) -> float:
        return float(value * (1 + share * rng.uniform(-1, 1)))

    return replace(
        scanner,
        number=number,
        name=f"site-{number}",
        height_to_width=near(scanner.height_to_width, 0.02),
        field_mm=near(scanner.field_mm, 0.03),
        axial_mm=near(scanner.axial_mm, 0.1),
        lateral_mm=near(scanner.lateral_mm, 0.1),
        gain_db=scanner.gain_db + float(rng.uniform(-1, 1)),
        dynamic_range_db=near(scanner.dynamic_range_db, 0.04),
        tgc_error_db=scanner.tgc_error_db + float(rng.uniform(-1, 1)),
        density=near(scanner.density, 0.1),
        benign_share=near(scanner.benign_share, 0.05),
        lesion_mm=near(scanner.lesion_mm, 0.04),
        volume=near(_VOLUMES[(number - 1) % len(_VOLUMES)], 0.05),
    )


def draw_example(
    site: PhantomSite, index: int, *, seed: int, size: int, normal_fraction: float = 0.0
) -> PhantomExample:
    """Draw one picture of a site.

    Args:
        site: whose scanner and patients.
        index: which of the site's pictures, from 0.
        seed: of the whole federation.
        size: long side in pixels.
        normal_fraction: share of patients without a lesion.
    """
    if index < 0:
        raise ValueError(f"index: expected 0 or more, got {index}")
    _check_drawing(seed, size, normal_fraction)
    patient = _patient_of(site, index, seed, normal_fraction)
    rng = np.random.default_rng([seed, site.number, index])
    frame = _frame(site, size)
    echo, loss = _breast(rng, frame, patient.density)
    echo, loss = _with_bystanders(rng, frame, echo, loss)
    mask = np.zeros((frame.height, frame.width), np.uint8)
    if patient.label != "normal":
        outline = _outline(rng, frame, patient)
        cv2.fillPoly(mask, [np.rint(outline * frame.px_per_mm - 0.5).astype(np.int32)], 255)
        echo, loss = _with_lesion(rng, frame, patient, outline, mask, echo, loss)
    image = _scan(rng, frame, site, echo, loss)
    return PhantomExample(image, mask, patient.label, patient.group)


def write_site(
    folder: Path,
    site: PhantomSite,
    *,
    examples: int,
    seed: int,
    size: int,
    normal_fraction: float = 0.0,
    masks: bool = True,
    labels: bool = True,
) -> None:
    """Write a site's pictures, masks and labels.csv; the folder appears complete or not at all.

    A folder that holds labels.csv is left alone, whatever it was written with: to change a setting,
    write to another folder. Several processes may write the same site at once; one of them wins.

    Raises:
        OSError: the disk is full, the folder cannot be written, or it holds something else.
    """
    _check_drawing(seed, size, normal_fraction)
    if examples < 1:
        raise ValueError(f"examples: expected 1 or more, got {examples}")
    if _is_written(folder):
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Not tempfile.mkdtemp: its mode 0700 would follow the folder to its place and shut out others.
    unfinished = folder.parent / f".{folder.name}-{os.getpid()}-{secrets.token_hex(4)}"
    unfinished.mkdir()
    try:
        (unfinished / "images").mkdir()
        if masks:
            (unfinished / "masks").mkdir()
        rows: list[tuple[str, str, str, str]] = []
        for index in range(examples):
            example = draw_example(
                site, index, seed=seed, size=size, normal_fraction=normal_fraction
            )
            image_name = f"images/{index:04d}.png"
            mask_name = f"masks/{index:04d}.png" if masks else ""
            _write_png(unfinished / image_name, example.image)
            if masks:
                _write_png(unfinished / mask_name, example.mask)
            rows.append((image_name, mask_name, example.label if labels else "", example.group))
        # Last, so that an unfinished folder that outlives a killed process is not taken for a site.
        with (unfinished / "labels.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(COLUMNS)
            writer.writerows(rows)
        try:
            os.rename(unfinished, folder)
        except OSError:
            if not _is_written(folder):
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def write_phantoms(
    root: Path,
    *,
    sites: int,
    examples: int,
    seed: int,
    size: int = 128,
    normal_fraction: float = 0.0,
    without_masks: Collection[str] = (),
    without_labels: Collection[str] = (),
) -> None:
    """Write root/site-1, root/site-2, and so on.

    Args:
        root: made if missing; sites that it holds already are left alone (see `write_site`).
        sites: how many.
        examples: about how many pictures a site has; hospitals differ (`PhantomSite.volume`).
        seed: of the whole federation: its scanners and its patients.
        size: long side of the pictures in pixels.
        normal_fraction: share of patients without a lesion.
        without_masks: names of sites that outline no lesion.
        without_labels: names of sites that make no diagnosis.
    """
    if sites < 1:
        raise ValueError(f"sites: expected 1 or more, got {sites}")
    if examples < 1:
        raise ValueError(f"examples: expected 1 or more, got {examples}")
    _check_drawing(seed, size, normal_fraction)
    hospitals = [phantom_site(number, seed) for number in range(1, sites + 1)]
    names = [hospital.name for hospital in hospitals]
    for option, wanted in (("without_masks", without_masks), ("without_labels", without_labels)):
        unknown = [name for name in wanted if name not in names]
        if unknown:
            raise ValueError(
                f"{option}: expected names among {', '.join(names)}, got {', '.join(unknown)}"
            )
    for hospital in hospitals:
        write_site(
            root / hospital.name,
            hospital,
            examples=max(1, round(examples * hospital.volume)),
            seed=seed,
            size=size,
            normal_fraction=normal_fraction,
            masks=hospital.name not in without_masks,
            labels=hospital.name not in without_labels,
        )


def _check_seed(seed: int) -> None:
    if seed < 0:
        raise ValueError(f"seed: expected 0 or more, got {seed}")


def _check_drawing(seed: int, size: int, normal_fraction: float) -> None:
    _check_seed(seed)
    if size < _SMALLEST_SIZE:
        raise ValueError(f"size: expected {_SMALLEST_SIZE} pixels or more, got {size}")
    if not 0 <= normal_fraction < 1:
        raise ValueError(
            f"normal_fraction: expected at least 0 and less than 1, got {normal_fraction}"
        )


def _is_written(folder: Path) -> bool:
    return (folder / "labels.csv").is_file()


def _write_png(path: Path, picture: NDArray[np.uint8]) -> None:
    # Not cv2.imwrite: it answers a full disk with False.
    encoded, data = cv2.imencode(".png", picture)
    if not encoded:
        raise OSError(f"{path}: expected a picture that encodes as PNG, got shape {picture.shape}")
    path.write_bytes(data.tobytes())


def _patient_of(site: PhantomSite, index: int, seed: int, normal_fraction: float) -> _Patient:
    """Whose picture this is: in each block of six pictures one patient of five has two in a row."""
    block, place = divmod(index, _IMAGES_PER_BLOCK)
    seen_twice = int(
        np.random.default_rng([seed, site.number, block, _PAIR]).integers(_PATIENTS_PER_BLOCK)
    )
    number = block * _PATIENTS_PER_BLOCK + (place if place <= seen_twice else place - 1)

    # Steps of the golden ratio spread evenly over [0, 1): a site of ten patients has the class mix
    # of a site of a thousand, and both classes, which independent draws would not promise.
    start = np.random.default_rng([seed, site.number, 0, _CASE_MIX]).random()
    quantile = (start + number * _GOLDEN) % 1.0
    if quantile < normal_fraction:
        label = "normal"
    elif quantile < normal_fraction + (1 - normal_fraction) * site.benign_share:
        label = "benign"
    else:
        label = "malignant"

    rng = np.random.default_rng([seed, site.number, number, _PATIENT])
    density = float(np.clip(rng.normal(site.density, 0.15), 0.1, 0.9))
    spread = float(
        np.clip(
            rng.normal(0, site.lesion_spread), -1.5 * site.lesion_spread, 2 * site.lesion_spread
        )
    )
    diameter = site.lesion_mm * float(np.exp(spread))
    if label == "malignant":
        elongation = float(rng.uniform(1.0, 1.5))
        contrast = float(rng.uniform(-19, -12))
        shadows = rng.random() < 0.8  # soft, cellular tumours let sound through
        lesion_loss = _TISSUE_LOSS + float(
            rng.uniform(0.6, 1.5) if shadows else rng.uniform(0, 0.3)
        )
    else:
        elongation = float(rng.uniform(1.15, 1.8))
        fluid = rng.random() < 0.25
        contrast = float(rng.uniform(-27, -22) if fluid else rng.uniform(-18, -12))
        lesion_loss = 0.0 if fluid else _TISSUE_LOSS - float(rng.uniform(-0.05, 0.35))
    return _Patient(
        group=f"{site.name}-p{number:04d}",
        label=label,
        diameter_mm=diameter,
        elongation=elongation,
        contrast_db=contrast,
        lesion_loss=lesion_loss,
        density=density,
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
    """Smooth noise with mean about 0 and deviation about 1, and features of the given size."""
    rows = max(2, round(frame.height_mm / down_mm) + 1)
    columns = max(2, round(frame.width_mm / across_mm) + 1)
    coarse = rng.standard_normal((rows, columns), np.float32)
    fine = cv2.resize(coarse, (frame.width, frame.height), interpolation=cv2.INTER_CUBIC)
    return np.asarray(1.4 * fine, np.float32)  # interpolation takes deviation away


def _wave(rng: np.random.Generator, frame: _Frame, length_mm: float) -> Plane:
    """(1, W) smooth noise along the probe, for the course of a tissue border."""
    knots = max(2, round(frame.width_mm / length_mm) + 1)
    coarse = rng.standard_normal((1, knots), np.float32)
    fine = cv2.resize(coarse, (frame.width, 1), interpolation=cv2.INTER_CUBIC)
    return np.asarray(fine, np.float32)


def _below(depth: Plane, border: Plane, soft_mm: float) -> Plane:
    """0 above a border, 1 below it."""
    return np.asarray(np.clip((depth - border) / soft_mm + 0.5, 0, 1), np.float32)


def _membranes(field: Plane, thinness: float) -> Plane:
    """Thin lines where smooth noise passes zero: they branch and close like septa do."""
    return np.asarray(np.exp(-np.square(field * thinness)), np.float32)


def _breast(rng: np.random.Generator, frame: _Frame, density: float) -> tuple[Plane, Plane]:
    """Healthy tissue: skin, fat with septa, gland with fat lobules, muscle.

    Returns:
        Echo strength in dB, and the sound lost there in dB per mm, both (H, W).
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

    loss = _TISSUE_LOSS * (0.75 + 0.25 * in_gland + 0.2 * in_muscle)
    return echo, np.asarray(loss, np.float32)


def _with_bystanders(
    rng: np.random.Generator, frame: _Frame, echo: Plane, loss: Plane
) -> tuple[Plane, Plane]:
    """Shadows that no lesion throws: ligaments, ribs, lost contact at the probe's end."""
    depth, across = frame.depth, frame.across
    for _ in range(rng.integers(0, 3)):
        top = rng.uniform(0.12, 0.6) * frame.height_mm
        centre = rng.uniform(0.05, 0.95) * frame.width_mm
        half_width, strength = rng.uniform(0.6, 1.8), rng.uniform(4, 11)
        sideways = np.square((across - centre) / half_width)
        spot = np.exp(-np.square((depth - top) / 0.5) - np.square(sideways))
        echo = echo + 7 * spot
        loss = loss + strength * spot  # the spot is about 1 mm deep: dB per mm is dB
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


def _outline(rng: np.random.Generator, frame: _Frame, patient: _Patient) -> NDArray[np.float64]:
    """The lesion's border as (N, 2) points (across, depth) in mm, inside the picture."""
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
        radius /= np.sqrt(np.mean(radius**2))  # irregular, not larger
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
    nearest = np.array([1.0, 2.5]) - low  # mm kept free at the sides, and for the skin
    farthest = np.array([frame.width_mm - 1.0, frame.height_mm - 2.0]) - high
    return np.asarray(points + np.maximum(nearest, np.minimum(centre, farthest)), np.float64)


def _with_lesion(
    rng: np.random.Generator,
    frame: _Frame,
    patient: _Patient,
    outline: NDArray[np.float64],
    mask: NDArray[np.uint8],
    echo: Plane,
    loss: Plane,
) -> tuple[Plane, Plane]:
    """Lay a lesion into the tissue: darker inside, with its class's border and loss of sound."""
    outside = cv2.distanceTransform(255 - mask, cv2.DIST_L2, 5)
    inside = cv2.distanceTransform(mask, cv2.DIST_L2, 5)
    # mm from the border, negative inside
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
        # A curved smooth edge bends the beam aside: a thin shadow below each flank.
        for flank in (outline[:, 0].argmin(), outline[:, 0].argmax()):
            across, down = outline[flank].tolist()
            away = np.square((frame.across - across) / 0.5)
            away = away + np.square((frame.depth - down - 0.5) / 0.6)
            loss = loss + rng.uniform(2, 5) * np.exp(-away)
    return echo, loss


def _scan(
    rng: np.random.Generator, frame: _Frame, site: PhantomSite, echo: Plane, loss: Plane
) -> NDArray[np.uint8]:
    """What the scanner shows of tissue with that echo strength (dB) and loss (dB per mm)."""
    depth = frame.depth
    down = depth / frame.height_mm  # 0 at the probe, 1 at the bottom
    path_db = np.cumsum(loss, axis=0, dtype=np.float32) / frame.px_per_mm
    # A beam is wider than a pixel, so shadows have soft flanks.
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

    # No two examinations have quite the same knobs; each turn is about 1 dB.
    gain_turn, slope_turn, bow_turn = rng.standard_normal(3).tolist()
    tgc_db = 0.95 * _TISSUE_LOSS * depth + (site.tgc_error_db + slope_turn) * down
    tgc_db = tgc_db + bow_turn * np.sin(2 * np.pi * down)
    shown_db = 10 * np.log10(power + 1e-12) + tgc_db + site.gain_db + gain_turn
    grey = np.asarray(255 * (_GLAND_GREY + shown_db / site.dynamic_range_db), np.float32)
    smooth = max(0.1, site.smooth_mm * frame.px_per_mm)
    grey = np.asarray(cv2.GaussianBlur(grey, (0, 0), sigmaX=smooth))
    return np.asarray(np.rint(np.clip(grey, 0, 255)), np.uint8)


def _beam(scatter: Plane, axial: float, lateral: float) -> Plane:
    """Blur by the point spread function (deviations in pixels) without changing the mean power."""
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
