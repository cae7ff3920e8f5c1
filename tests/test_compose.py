"""Method names and settings: what they mean, in which order, and what each refusal says."""

import math

import pytest

from lhact.methods.compose import (
    TABLE6,
    BadMethod,
    Setting,
    apply,
    expand,
    known_methods,
    parse,
    parse_setting,
    parse_sweep,
    variants,
)
from lhact.methods.entries import Percentile
from lhact.methods.rectify import RECTIFIERS
from lhact.methods.scores import SCORES

LOW, HIGH = 0.21940805315971373, 1.3520756840705868
# Once with the defaults for any network and once with the published constants.
every_method = pytest.mark.parametrize(
    ("name", "published"), [(name, here) for name in known_methods() for here in (False, True)]
)


def settings_of(method, *texts):
    for text in texts:
        method = apply(method, parse_setting(text))
    return method.parameters()


def versions(names, settings=(), sweeps=(), published=False):
    settings, sweeps = map(parse_setting, settings), map(parse_sweep, sweeps)
    methods = variants(names.split(), [*settings], [*sweeps], published)
    return [(method.name, method.parameters()) for method in methods]


# Names


def test_groups_of_names():
    papers_order = ["msp", "odin", "energy", "bats", "react", "bfact", "lhact"]
    assert expand(["table6"]) == list(TABLE6) == papers_order
    names = expand(["all"])
    assert names[:7] == papers_order
    assert sorted(names) == sorted({*RECTIFIERS, *SCORES})
    # Each where it is named first.
    found = expand(["lhact", "table6", "scale", "lhact"])
    assert found == ["lhact", *papers_order[:-1], "scale"]


@pytest.mark.parametrize(
    ("name", "rectifiers", "score"),
    [
        *((name, [name], "energy") for name in RECTIFIERS),
        *((name, [], name) for name in SCORES),
        ("lhact+msp", ["lhact"], "msp"),
        ("react+lhact", ["react", "lhact"], "energy"),
        ("lhact+react", ["lhact", "react"], "energy"),
        ("bats+react+ash-s+maxlogit", ["bats", "react", "ash-s"], "maxlogit"),
    ],
)
def test_a_method_runs_from_left_to_right(name, rectifiers, score):
    method = parse(name)
    assert method.name == name
    assert [step.name for step in method.rectifiers] == rectifiers
    assert method.score.name == score
    assert [step.name for step in method.steps] == [*rectifiers, score]


def test_naming_the_default_score_changes_nothing():
    assert parse("lhact+energy") == parse("lhact")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        *((name, "") for name in ("nonsense", "", "+", "lhact+", "+lhact", "lhact++msp")),
        *((name, "") for name in ("LHAct", "lhact msp", "lhact+nonsense")),
        *((name, "a score comes last and once") for name in ("msp+lhact", "energy+energy")),
        *((name, "a score comes last and once") for name in ("lhact+msp+energy", "knn+")),
        # What others call them, and slips.
        ("ebo", "did you mean 'energy'"),
        ("mls", "did you mean 'maxlogit'"),
        ("mds", "did you mean 'mahalanobis'"),
        ("react95", "did you mean 'react'"),
        ("MSP", "did you mean 'msp'"),
        ("vimm", "did you mean 'vim'"),
    ],
)
def test_names_that_are_none(name, words):
    with pytest.raises(BadMethod) as refusal:
        parse(name)
    assert str(refusal.value).startswith(f"unknown method {name!r}; {words}")
    assert all(known in str(refusal.value) for known in known_methods())


# Parameters as they are shown; test_methods_alike.py has the papers' settings


@pytest.mark.parametrize(
    ("name", "published", "expected"),
    [
        ("lhact", True, {"low": LOW, "high": HIGH, "order": 2}),
        ("lhact", False, {"low_percentile": 33.7, "high_percentile": 95.5, "order": 2}),
        ("bfact", True, {"high": HIGH, "order": 2}),
        ("bats", True, {"lambda": 1.05}),
        ("gen", True, {"gamma": 0.1, "k": 100}),
        # What two steps have is told apart.
        (
            "react+bfact",
            False,
            {"react.high_percentile": 90, "bfact.high_percentile": 95, "order": 2},
        ),
        # Those of a score that is not named are shown where they are not the defaults.
        ("react+lhact", True, {"react.high": 1, "low": LOW, "lhact.high": HIGH, "order": 2}),
        ("energy", False, {"temperature": 1}),
        # A parameter that is left to the paper's rule has no value yet.
        ("vim", False, {}),
    ],
)
def test_parameters(name, published, expected):
    assert parse(name, published).parameters() == expected


# Settings as text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lhact.low=0.25", ("lhact", "low", 0.25)),
        ("react+dice.percentile=70", ("react+dice", "percentile", 70)),
        ("ash-s.percentile=9e1", ("ash-s", "percentile", 90)),
        ("lhact.low=-1", ("lhact", "low", -1)),
        ("lhact.high=inf", ("lhact", "high", math.inf)),
        ("lhact.high_percentile=95", ("lhact", "high", Percentile(95))),
    ],
)
def test_parse_setting(text, expected):
    found = parse_setting(text)
    assert found == Setting(*expected)
    assert type(found.value) is type(expected[2]), "whole numbers become integers"


def test_parse_sweep():
    orders = [Setting("lhact", "order", order) for order in (1, 2, 0.5)]
    assert parse_sweep("lhact.order=1,2,0.5") == orders
    assert list(map(str, orders)) == ["lhact.order=1", "lhact.order=2", "lhact.order=0.5"]
    (percentile,) = parse_sweep("lhact.high_percentile=95")
    assert str(percentile) == "lhact.high_percentile=95"


@pytest.mark.parametrize(
    "text",
    [
        *("", "lhact", "lhact.low", "low=1", ".low=1", "lhact.=1", "=1"),
        *("lhact.low=", "lhact.low=x", "lhact.low=nan", "lhact.low=1,", "lhact.low=1,,2"),
    ],
)
def test_malformed_settings(text):
    for function in (parse_setting, parse_sweep):
        with pytest.raises(BadMethod, match=r"^wanted METHOD\.PARAMETER=NUMBER, .*, got "):
            function(text)


# Settings applied


@pytest.mark.parametrize(
    ("name", "texts", "changed"),
    [
        # Of a step, wherever it is used.
        ("lhact", ["energy.temperature=2"], {"temperature": 2}),
        ("react+lhact+msp", ["lhact.order=3"], {"order": 3}),
        ("scale+dice", ["dice.percentile=50"], {"scale.percentile": 85, "dice.percentile": 50}),
        ("vim", ["vim.dim=5"], {"dim": 5}),
        # Of one whole method.
        ("react+dice", ["react+dice.percentile=50"], {"percentile": 50}),
        ("lhact", ["lhact.temperature=5"], {"temperature": 5}),
        # A threshold and its percentile replace each other, and the last one counts.
        ("lhact", ["lhact.low=0.1"], {"low": 0.1}),
        ("lhact", ["lhact.low=0.1", "lhact.low_percentile=20"], {"low_percentile": 20}),
    ],
)
def test_a_setting_changes_that_parameter_alone(name, texts, changed):
    before = parse(name).parameters()
    gone = {key.removesuffix("_percentile") for key in changed}
    kept = {key: v for key, v in before.items() if key.removesuffix("_percentile") not in gone}
    assert settings_of(parse(name), *texts) == {**kept, **changed}
    assert parse(name).parameters() == before, "the registry is changed"


def test_a_percentile_replaces_a_published_constant():
    published = parse("lhact", published=True)
    found = settings_of(published, "lhact.high_percentile=80")
    assert found == {"low": LOW, "high_percentile": 80, "order": 2}
    assert settings_of(published, "lhact.high=2") == {"low": LOW, "high": 2, "order": 2}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("dice", "react+dice.percentile=50"),
        ("react", "lhact.low=1"),
        ("lhact+msp", "energy.temperature=2"),
    ],
)
def test_setting_of_another_method_is_no_setting(name, text):
    assert apply(parse(name), parse_setting(text)) is None


@every_method
def test_every_parameter_can_be_set(name, published):
    method = parse(name, published)
    before = method.parameters()
    for key, value in before.items():
        default = parse_setting(f"{name}.{key}={value!r}")
        assert apply(method, default) == method, default
        assert value != 3
        assert settings_of(method, f"{name}.{key}=3") == {**before, key: 3}
    assert method.parameters() == before


@every_method
def test_unknown_parameter_lists_the_known_ones(name, published):
    method = parse(name, published)
    with pytest.raises(BadMethod) as refusal:
        apply(method, Setting(name, "nonsense", 1))
    known = [key.rstrip("_") for step in method.steps for key in step.parameters] or ["none"]
    assert str(refusal.value).startswith(f"{name} has no parameter 'nonsense'; it has: ")
    assert all(key in str(refusal.value) for key in known)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("lhact", "lhact.k=1", "it has: low, low_percentile, high, high_percentile, order"),
        (
            "react+bfact",
            "react+bfact.high=1",
            "react+bfact.high could mean react.high or bfact.high; name the one",
        ),
    ],
)
def test_a_parameter_that_is_none_or_two(name, text, message):
    with pytest.raises(BadMethod) as refusal:
        settings_of(parse(name), text)
    assert message in str(refusal.value)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("lhact.low_percentile=-0.1", "between 0 and 100, got -0.1"),
        ("lhact.high_percentile=100.5", "between 0 and 100, got 100.5"),
        ("ash-s.percentile=101", "between 0 and 100, got 101"),
        ("dice.percentile=-1", "between 0 and 100, got -1"),
        *((f"knn.k={k}", f"a whole number from 1 on, got {k}") for k in (0, 1.5, -3, math.inf)),
        *((f"{name}=0.5", "a whole number from 1 on") for name in ("vim.dim", "nnguide.bank")),
        *((f"{name}=0", "a number above 0, got 0") for name in ("lhact.order", "bfact.order")),
        *((f"energy.temperature={t}", "a number above 0") for t in (0, -1, math.inf, -math.inf)),
        ("bats.lambda=inf", "a number above 0, got inf"),
        ("gen.gamma=-inf", "a number above 0, got -inf"),
    ],
)
def test_value_that_a_parameter_cannot_take(text, wanted):
    name, _, _ = text.partition("=")
    with pytest.raises(BadMethod) as refusal:
        apply(parse(name.partition(".")[0]), parse_setting(text))
    assert f"{name} must be {wanted}" in str(refusal.value)


@pytest.mark.parametrize(
    "text",
    [
        *("lhact.low_percentile=0", "lhact.high_percentile=100", "knn.k=1"),
        *("lhact.order=0.5", "lhact.low=0"),
    ],
)
def test_value_at_the_border_is_taken(text):
    setting = parse_setting(text)
    assert apply(parse(setting.target), setting).parameters()[setting.spelled] == setting.number


# Variants


def test_variants_without_settings():
    names = ("react", "msp", "odin", "energy", "bats", "bfact", "lhact")
    wanted = [(name, parse(name, True).parameters()) for name in names]
    assert versions("react table6", published=True) == wanted
    # One method by two names, or by a value given twice.
    assert len(versions("lhact lhact+energy", sweeps=["lhact.order=2,2"])) == 1


def test_a_setting_reaches_every_method_with_that_step():
    found = versions("lhact react lhact+msp msp", ["lhact.order=4"])
    assert [parameters.get("order") for _, parameters in found] == [4, None, 4, None]


def test_a_sweep_is_the_full_grid_the_last_one_running_fastest():
    sweeps = ["lhact.high_percentile=90,95,99", "lhact.low_percentile=10,20"]
    first, *others = versions("msp lhact", ["lhact.order=3"], sweeps, published=True)
    assert first == ("msp", {})
    assert others == [
        ("lhact", {"low_percentile": low, "high_percentile": high, "order": 3})
        for high in (90, 95, 99)
        for low in (10, 20)
    ]


def test_sweeps_of_two_methods_do_not_multiply():
    found = versions("react lhact react+lhact", sweeps=["react.high=1,2", "lhact.order=1,2,3"])
    names = [name for name, _ in found]
    assert names == ["react"] * 2 + ["lhact"] * 3 + ["react+lhact"] * 6


@pytest.mark.parametrize(
    ("settings", "sweeps", "message"),
    [
        (["vra.low=1"], [], "vra.low=1 is about none of the methods asked for: lhact, msp"),
        ([], ["vra.low=1,2"], "vra.low=1 is about none of the methods asked for: lhact, msp"),
        (["lhact.low=0.1", "energy.temperature=2", "knn.k=5"], [], "knn.k=5 is about none of"),
        (["react+lhact.low=1"], [], "react+lhact.low=1 is about none of the methods"),
        (["lhact.k=1"], [], "lhact has no parameter 'k'"),
        ([], ["lhact.order=1,0"], "lhact.order must be"),
        (["lhact.order=1"], ["lhact.order=1,2"], "lhact.order is given twice; give one value, or"),
        (["lhact.low=2", "lhact.high=1"], [], "lhact: low 2 lies above high 1"),
    ],
)
def test_variants_that_cannot_be(settings, sweeps, message):
    with pytest.raises(BadMethod) as refusal:
        versions("lhact msp", settings, sweeps)
    assert str(refusal.value).startswith(message)


def test_one_threshold_for_both_ends_is_taken():
    found = versions("lhact", ["lhact.low=1", "lhact.high=1"])
    assert found == [("lhact", {"low": 1, "high": 1, "order": 2})]
