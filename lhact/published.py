"""Published numbers as data, each with its source.

All rows are FPR95/AUROC in percent with ID as the positive class, on torchvision's ResNet-50 with
IMAGENET1K_V1 weights. Only numbers that were seen in their source stand here.
"""

from dataclasses import dataclass

from lhact.records import Perturbation

TABLE6 = "LHAct, Yuan et al., ACM MM 2023, Table 6"
TABLE6_FROM_REACT = TABLE6 + " (ReAct's own numbers)"
REACT = "ReAct, Sun et al., NeurIPS 2021"

DATASETS = ("iNaturalist", "SUN", "Places", "Textures")

# What ODIN's published row was measured with, in ReAct's code.
ODIN_PERTURBATION = Perturbation(temperature=1000.0, epsilon=0.005)


@dataclass(frozen=True)
class Row:
    """values: dataset (or `average`) -> (FPR95, AUROC)."""

    method: str
    source: str
    values: dict[str, tuple[float, float]]


@dataclass(frozen=True)
class Numbers:
    """FPR95 and AUROC in percent, as published in the source."""

    fpr95: float
    auroc: float
    source: str


def _row(method: str, source: str, *pairs: tuple[float, float]) -> Row:
    return Row(method, source, dict(zip((*DATASETS, "average"), pairs, strict=True)))


# One line for each row, in the order of DATASETS and `average`. The first row of a method is the
# one that results are compared with.
# fmt: off
ROWS = [
    _row("msp", TABLE6_FROM_REACT,
         (54.99, 87.74), (70.83, 80.86), (73.99, 79.76), (68.00, 79.61), (66.95, 81.99)),
    _row("odin", TABLE6_FROM_REACT,
         (47.66, 89.66), (60.15, 84.59), (67.89, 81.78), (50.23, 85.62), (56.48, 85.41)),
    _row("energy", TABLE6_FROM_REACT,
         (55.72, 89.95), (59.26, 85.89), (64.92, 82.86), (53.72, 85.99), (58.41, 86.17)),
    _row("bats", TABLE6,
         (24.98, 95.51), (25.68, 94.27), (37.34, 91.11), (32.62, 93.47), (30.16, 93.59)),
    _row("react", TABLE6,
         (19.99, 96.31), (29.60, 93.42), (39.70, 90.95), (41.42, 91.62), (32.68, 93.08)),
    _row("bfact", TABLE6,
         (20.69, 96.20), (21.02, 95.24), (30.33, 92.62), (54.20, 87.78), (31.56, 92.96)),
    _row("lhact", TABLE6,
         (11.07, 97.86), (16.87, 96.18), (25.68, 93.87), (33.79, 93.78), (21.85, 95.42)),
    _row("react", REACT,
         (20.38, 96.22), (24.20, 94.20), (33.85, 91.58), (47.30, 89.80), (31.43, 92.95)),
]
# fmt: on


def lookup(method: str, dataset: str) -> Numbers | None:
    """The numbers of the first row of that method; None if there is none."""
    for row in ROWS:
        if row.method == method and dataset in row.values:
            return Numbers(*row.values[dataset], row.source)
    return None
