"""The published numbers against the papers, typed in a second time."""

import pytest

from lhact.published import DATASETS, ROWS, lookup

TABLE6 = """
msp    54.99/87.74 70.83/80.86 73.99/79.76 68.00/79.61 66.95/81.99
odin   47.66/89.66 60.15/84.59 67.89/81.78 50.23/85.62 56.48/85.41
energy 55.72/89.95 59.26/85.89 64.92/82.86 53.72/85.99 58.41/86.17
bats   24.98/95.51 25.68/94.27 37.34/91.11 32.62/93.47 30.16/93.59
react  19.99/96.31 29.60/93.42 39.70/90.95 41.42/91.62 32.68/93.08
bfact  20.69/96.20 21.02/95.24 30.33/92.62 54.20/87.78 31.56/92.96
lhact  11.07/97.86 16.87/96.18 25.68/93.87 33.79/93.78 21.85/95.42
"""
REACT_ITSELF = "react 20.38/96.22 24.20/94.20 33.85/91.58 47.30/89.80 31.43/92.95"
COLUMNS = ("iNaturalist", "SUN", "Places", "Textures", "average")


def typed(line):
    method, *cells = line.split()
    return method, {
        column: tuple(map(float, cell.split("/")))
        for column, cell in zip(COLUMNS, cells, strict=True)
    }


def test_rows_are_those_of_the_papers():
    rows = [(row.method, row.values) for row in ROWS]
    assert rows == [*map(typed, TABLE6.strip().splitlines()), typed(REACT_ITSELF)]
    *table6, own = [row.source for row in ROWS]
    assert all("LHAct" in source and "Table 6" in source for source in table6)
    assert "NeurIPS 2021" in own
    # Whose numbers the table repeats.
    borrowed = {row.method for row in ROWS if "ReAct's own" in row.source}
    assert borrowed == {"msp", "odin", "energy"}
    assert COLUMNS[:-1] == DATASETS


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.method}, {row.source}")
@pytest.mark.parametrize("metric", [0, 1], ids=["fpr95", "auroc"])
def test_averages_follow_from_the_four_columns(row, metric):
    """Each column is rounded to 0.01, and so is the average: 0.01 at most between them."""
    mean = sum(row.values[name][metric] for name in DATASETS) / 4
    assert row.values["average"][metric] == pytest.approx(mean, abs=0.01)


def test_lookup_is_table6():
    for method, values in map(typed, TABLE6.strip().splitlines()):
        for column, pair in values.items():
            found = lookup(method, column)
            assert (found.fpr95, found.auroc) == pair
            assert "Table 6" in found.source
    for method, dataset in (("scale", "SUN"), ("lhact", "OpenImages"), ("lhact+msp", "SUN")):
        assert lookup(method, dataset) is None
