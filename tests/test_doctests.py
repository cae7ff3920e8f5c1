"""The examples in docstrings are true."""

import doctest
import importlib
import pkgutil

import lhact


def test_examples_in_docstrings_print_what_they_say():
    tried = 0
    for found in pkgutil.walk_packages(lhact.__path__, "lhact."):
        module = importlib.import_module(found.name)
        failures, count = doctest.testmod(module)
        assert failures == 0, found.name
        tried += count
    assert tried >= 6
