"""LHAct (ACM MM 2023): out-of-distribution detection by rectified activations.

A higher score means more in-distribution.

    from lhact import Detector, load_network
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lhact.detector import Detector
    from lhact.extraction.networks import load_network
    from lhact.from_arrays import FeatureSet, Origin, write_cache
    from lhact.notebook import evaluate
    from lhact.records import Preprocessing

__version__ = "0.5.1"
__all__ = [
    "Detector",
    "FeatureSet",
    "Origin",
    "Preprocessing",
    "evaluate",
    "load_network",
    "write_cache",
]

# Where each name lies. Nothing is imported before it is asked for: torch takes seconds.
_PLACES = {
    "Detector": "lhact.detector",
    "FeatureSet": "lhact.from_arrays",
    "Origin": "lhact.from_arrays",
    "Preprocessing": "lhact.records",
    "evaluate": "lhact.notebook",
    "load_network": "lhact.extraction.networks",
    "write_cache": "lhact.from_arrays",
}


def __getattr__(name: str) -> object:
    if name not in _PLACES:
        raise AttributeError(f"module 'lhact' has no attribute {name!r}")
    return getattr(importlib.import_module(_PLACES[name]), name)
