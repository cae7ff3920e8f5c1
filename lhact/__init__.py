"""LHAct (ACM MM 2023): out-of-distribution detection by rectified activations.

A higher score means more in-distribution.
"""

__version__ = "0.3.0"
