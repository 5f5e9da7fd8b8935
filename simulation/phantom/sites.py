"""Phantom sites: the scanner, the patients and the class mix of each simulated hospital."""

from dataclasses import dataclass, replace

import numpy as np

# The last element of a random generator's key, so that no two kinds of draws share a stream. Images
# are keyed (seed, site, index), which NumPy pads with zeros, so none of these constants may be 0.
_PATIENT, _PAIR, _SCANNER, _CASE_MIX = 1, 2, 3, 4

_PATIENTS_PER_BLOCK = 5  # one of these patients has two images
_IMAGES_PER_BLOCK = _PATIENTS_PER_BLOCK + 1
_GOLDEN = 0.6180339887498949

TISSUE_LOSS = 0.5  # attenuation of tissue in dB per mm of depth, both directions together


@dataclass(frozen=True)
class PhantomSite:
    """One simulated hospital: its scanner, the scanner's settings, and its patients.

    Attributes:
        number: number of the site, from 1; part of every random key.
        name: name of the site, also the name of its folder and the prefix of its patient ids.
        height_to_width: aspect ratio of the images.
        field_mm: long side of the images in mm.
        axial_mm: standard deviation of the point spread function along depth, in mm; it determines
            the size of the speckle grain.
        lateral_mm: standard deviation of the point spread function across the beam at the focus,
            in mm.
        focus: depth at which the beam is narrowest, as a share of the image height.
        looks: number of independent speckle patterns that are averaged (spatial compounding).
        smooth_mm: standard deviation of the blur that the scanner applies to the grey image, in mm.
        gain_db: overall gain in dB.
        dynamic_range_db: echo range from black to white in dB; smaller values increase contrast.
        noise_db: electronic noise in dB, before time gain compensation.
        tgc_error_db: error of the time gain compensation at the bottom of the image, in dB.
        density: share of glandular tissue, from 0 (fatty breast) to 1 (dense breast).
        benign_share: share of benign lesions among the patients with a lesion.
        lesion_mm: median long diameter of the lesions, in mm.
        lesion_spread: standard deviation of the logarithm of the diameter.
        volume: number of images of this site per requested image.
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
class Patient:
    """The properties that all images of one patient share."""

    group: str  # id of the patient
    label: str  # "benign", "malignant" or "normal"
    diameter_mm: float  # long diameter of the lesion
    elongation: float  # long diameter divided by short diameter
    contrast_db: float  # echo strength of the lesion relative to glandular tissue
    # Attenuation inside the lesion in dB per mm: more than the tissue's causes a shadow, less
    # causes enhancement.
    lesion_loss: float
    density: float  # share of glandular tissue, 0 to 1


# Four different scanners. phantom_site cycles through them, varies the numbers and sets the volume.
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
# Three volumes and four scanners, so that a site's size does not determine its scanner.
_VOLUMES = (1.0, 0.8, 1.3)


def phantom_site(number: int, seed: int = 0) -> PhantomSite:
    """Create a phantom hospital, determined by its number and the seed.

    Args:
        number: number of the site, from 1.
        seed: seed of the federation, 0 or more.

    Raises:
        ValueError: if a number is out of range.
    """
    if number < 1:
        raise ValueError(f"site number: expected 1 or more, got {number}")
    check_seed(seed)
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


def patient_of(site: PhantomSite, index: int, seed: int, normal_fraction: float) -> Patient:
    """Draw the patient of an example.

    In each block of six consecutive examples, one of five patients has two consecutive examples.

    Args:
        site: the site.
        index: index of the example within the site, from 0.
        seed: seed of the federation, 0 or more.
        normal_fraction: share of patients without a lesion, from 0 to below 1.
    """
    block, place = divmod(index, _IMAGES_PER_BLOCK)
    seen_twice = int(
        np.random.default_rng([seed, site.number, block, _PAIR]).integers(_PATIENTS_PER_BLOCK)
    )
    number = block * _PATIENTS_PER_BLOCK + (place if place <= seen_twice else place - 1)

    # Steps of the golden ratio are spread evenly over [0, 1). A site of ten patients therefore has
    # the class mix of a site of a thousand, which independent draws would not guarantee.
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
        shadows = rng.random() < 0.8  # soft, cellular tumours cause no shadow
        lesion_loss = TISSUE_LOSS + float(rng.uniform(0.6, 1.5) if shadows else rng.uniform(0, 0.3))
    else:
        elongation = float(rng.uniform(1.15, 1.8))
        fluid = rng.random() < 0.25
        contrast = float(rng.uniform(-27, -22) if fluid else rng.uniform(-18, -12))
        lesion_loss = 0.0 if fluid else TISSUE_LOSS - float(rng.uniform(-0.05, 0.35))
    return Patient(
        group=f"{site.name}-p{number:04d}",
        label=label,
        diameter_mm=diameter,
        elongation=elongation,
        contrast_db=contrast,
        lesion_loss=lesion_loss,
        density=density,
    )


def check_seed(seed: int) -> None:
    """Check that a seed is 0 or more.

    Raises:
        ValueError: if it is negative.
    """
    if seed < 0:
        raise ValueError(f"seed: expected 0 or more, got {seed}")
