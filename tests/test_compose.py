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


def steps(method):
    return [step.name for step in method.steps]


def entries():
    """Every name that stands alone, once with the defaults for any network and once with the
    published constants."""
    return [
        pytest.param(name, published, id=f"{name}-{published}")
        for name in known_methods()
        for published in (False, True)
    ]


# Names


def test_table6_is_the_papers_order():
    assert expand(["table6"]) == ["msp", "odin", "energy", "bats", "react", "bfact", "lhact"]
    assert list(TABLE6) == expand(["table6"])


def test_names_of_the_contract_are_known():
    contract = "msp odin energy bats react bfact lhact maxlogit gen vra ash-p ash-b ash-s scale "
    contract += "lts dice knn vim residual"
    contract += " mahalanobis rmds nnguide fdbd neco"
    assert set(contract.split()) <= set(known_methods())


def test_all_is_every_entry_once_with_table6_first():
    names = expand(["all"])
    assert names[:7] == list(TABLE6)
    assert sorted(names) == sorted({*RECTIFIERS, *SCORES})


def test_expand_keeps_the_first_mention():
    assert expand(["lhact", "table6", "scale", "lhact"]) == [
        "lhact",
        "msp",
        "odin",
        "energy",
        "bats",
        "react",
        "bfact",
        "scale",
    ]


@pytest.mark.parametrize("name", known_methods())
def test_a_name_alone(name):
    method = parse(name)
    assert method.name == name
    assert steps(method) == ([name, "energy"] if name in RECTIFIERS else [name])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("lhact+msp", ["lhact", "msp"]),
        ("react+lhact", ["react", "lhact", "energy"]),
        ("lhact+react", ["lhact", "react", "energy"]),
        ("bats+react+ash-s+maxlogit", ["bats", "react", "ash-s", "maxlogit"]),
    ],
)
def test_composition_runs_from_left_to_right(name, expected):
    method = parse(name)
    assert method.name == name
    assert steps(method) == expected
    assert [step.name for step in method.rectifiers] == expected[:-1]
    assert method.score.name == expected[-1]


def test_naming_the_default_score_changes_nothing():
    assert steps(parse("lhact+energy")) == steps(parse("lhact"))
    assert parse("lhact+energy").parameters() == parse("lhact").parameters()


@pytest.mark.parametrize(
    "name",
    ["nonsense", "", "+", "lhact+", "+lhact", "lhact++msp", "LHAct", "lhact msp", "lhact+nonsense"],
)
def test_unknown_name(name):
    with pytest.raises(BadMethod) as refusal:
        parse(name)
    assert repr(name) in str(refusal.value)
    assert all(known in str(refusal.value) for known in known_methods())


@pytest.mark.parametrize("name", ["msp+lhact", "energy+energy", "lhact+msp+energy", "knn+"])
def test_score_comes_last_and_once(name):
    with pytest.raises(BadMethod, match="a score comes last and once"):
        parse(name)


# Default parameters


def test_lhacts_defaults():
    """The published constants where they are valid, else percentiles 33.7 and 95.5; order 2."""
    assert parse("lhact", published=True).parameters() == {"low": LOW, "high": HIGH, "order": 2}
    assert parse("lhact").parameters() == {
        "low_percentile": 33.7,
        "high_percentile": 95.5,
        "order": 2,
    }


@pytest.mark.parametrize(
    ("name", "published", "expected"),
    [
        ("react", True, {"high": 1.0}),
        ("react", False, {"high_percentile": 90}),
        ("bfact", False, {"high_percentile": 95, "order": 2}),
        ("vra", True, {"low": 0.5, "high": 1.0}),
        ("bats", True, {"lambda": 1.05}),
        ("ash-p", True, {"percentile": 60}),
        ("ash-b", True, {"percentile": 65}),
        ("ash-s", False, {"percentile": 90}),
        ("scale", False, {"percentile": 85}),
        ("dice", False, {"percentile": 70}),
        ("gen", False, {"gamma": 0.1, "k": 100}),
        ("odin", False, {"temperature": 1000}),
    ],
)
def test_defaults_of_the_specification(name, published, expected):
    """The papers' settings."""
    parameters = parse(name, published).parameters()
    assert {key: parameters[key] for key in expected} == expected
    assert not {"low", "high", "low_percentile", "high_percentile"} & set(parameters) - set(
        expected
    )


def test_parameters_with_the_same_name_are_told_apart():
    names = parse("react+bfact").parameters()
    assert names == {"react.high_percentile": 90, "bfact.high_percentile": 95, "order": 2}


def test_parameters_of_a_score_that_is_not_named_show_where_they_are_not_the_defaults():
    """LHAct's parameters are low, high and order."""
    assert "temperature" not in parse("react+lhact").parameters()
    assert parse("energy").parameters() == {"temperature": 1}
    assert (
        apply(parse("react+lhact"), parse_setting("energy.temperature=2")).parameters()[
            "temperature"
        ]
        == 2
    )
    assert (
        apply(parse("lhact"), parse_setting("lhact.temperature=2")).parameters()["temperature"] == 2
    )


# Settings as text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lhact.low=0.25", ("lhact", "low", 0.25)),
        ("react+dice.percentile=70", ("react+dice", "percentile", 70)),
        ("ash-s.percentile=9e1", ("ash-s", "percentile", 90)),
        ("lhact.low=-1", ("lhact", "low", -1)),
        ("lhact.high=inf", ("lhact", "high", math.inf)),
    ],
)
def test_parse_setting(text, expected):
    assert parse_setting(text) == Setting(*expected)


def test_whole_numbers_become_integers():
    assert type(parse_setting("knn.k=50").value) is int
    assert type(parse_setting("lhact.low=0.5").value) is float


@pytest.mark.parametrize(
    "text",
    [
        "",
        "lhact",
        "lhact.low",
        "low=1",
        ".low=1",
        "lhact.=1",
        "=1",
        "lhact.low=",
        "lhact.low=x",
        "lhact.low=nan",
        "lhact.low=1,2",
    ],
)
def test_malformed_setting(text):
    with pytest.raises(BadMethod) as refusal:
        parse_setting(text)
    assert str(refusal.value).startswith("wanted METHOD.PARAMETER=NUMBER")
    assert repr(text) in str(refusal.value)


def test_parse_sweep():
    orders = [Setting("lhact", "order", order) for order in (1, 2, 0.5)]
    assert parse_sweep("lhact.order=1,2,0.5") == orders
    assert parse_sweep("lhact.order=3") == [Setting("lhact", "order", 3)]
    percentile = Setting("lhact", "high", Percentile(95))
    assert parse_sweep("lhact.high_percentile=95") == [percentile]
    assert str(percentile) == "lhact.high_percentile=95"


@pytest.mark.parametrize(
    "text", ["lhact.order", "lhact.order=", "lhact.order=1,,2", "lhact.order=1,", "lhact.order=1,x"]
)
def test_malformed_sweep(text):
    with pytest.raises(BadMethod, match=r"wanted METHOD\.PARAMETER=NUMBER"):
        parse_sweep(text)


# Settings applied


def settings_of(method, *texts):
    for text in texts:
        method = apply(method, parse_setting(text))
    return method.parameters()


def test_setting_of_a_component_wherever_it_is_used():
    assert settings_of(parse("lhact"), "energy.temperature=2")["temperature"] == 2
    assert settings_of(parse("react+lhact+msp"), "lhact.order=3")["order"] == 3
    assert settings_of(parse("scale+dice"), "dice.percentile=50") == {
        "scale.percentile": 85,
        "dice.percentile": 50,
    }


def test_setting_of_one_whole_method():
    assert settings_of(parse("react+dice"), "react+dice.percentile=50")["percentile"] == 50
    assert settings_of(parse("lhact"), "lhact.temperature=5")["temperature"] == 5
    assert apply(parse("dice"), parse_setting("react+dice.percentile=50")) is None


def test_setting_of_another_method_is_no_setting():
    assert apply(parse("react"), parse_setting("lhact.low=1")) is None
    assert apply(parse("lhact+msp"), parse_setting("energy.temperature=2")) is None


def test_a_threshold_and_its_percentile_replace_each_other():
    """The last one counts, and the other threshold is left alone."""
    base = {"order": 2}
    assert settings_of(parse("lhact"), "lhact.low=0.1") == {
        "low": 0.1,
        "high_percentile": 95.5,
        **base,
    }
    assert settings_of(parse("lhact"), "lhact.low=0.1", "lhact.low_percentile=20") == {
        "low_percentile": 20,
        "high_percentile": 95.5,
        **base,
    }
    assert settings_of(parse("lhact", published=True), "lhact.high_percentile=80") == {
        "low": LOW,
        "high_percentile": 80,
        **base,
    }
    assert settings_of(parse("lhact", published=True), "lhact.high=2") == {
        "low": LOW,
        "high": 2,
        **base,
    }


def test_applying_leaves_method_and_registry_as_they_were():
    method, before = parse("lhact"), dict(RECTIFIERS["lhact"].parameters)
    apply(method, parse_setting("lhact.order=7"))
    assert method.parameters()["order"] == 2
    assert parse("lhact").parameters()["order"] == 2
    assert RECTIFIERS["lhact"].parameters == before


@pytest.mark.parametrize(("name", "published"), entries())
def test_every_parameter_takes_its_own_default(name, published):
    method = parse(name, published)
    for key, value in method.parameters().items():
        setting = parse_setting(f"{name}.{key}={value!r}")
        assert apply(method, setting) == method, setting


@pytest.mark.parametrize(("name", "published"), entries())
def test_every_parameter_can_be_set(name, published):
    method = parse(name, published)
    for key in method.parameters():
        before = method.parameters()
        after = apply(method, parse_setting(f"{name}.{key}=3")).parameters()
        assert after == {**before, key: 3}
        assert after != before


@pytest.mark.parametrize(("name", "published"), entries())
def test_unknown_parameter_lists_the_known_ones(name, published):
    method = parse(name, published)
    with pytest.raises(BadMethod) as refusal:
        apply(method, Setting(name, "nonsense", 1))
    known = [key.rstrip("_") for step in method.steps for key in step.parameters] or ["none"]
    assert str(refusal.value).startswith(f"{name} has no parameter 'nonsense'; it has: ")
    assert all(key in str(refusal.value) for key in known)


def test_unknown_parameter_names_both_spellings_of_a_threshold():
    with pytest.raises(
        BadMethod, match="it has: low, low_percentile, high, high_percentile, order"
    ):
        apply(parse("lhact"), Setting("lhact", "cutoff", 1))


def test_parameter_that_could_mean_two_steps():
    with pytest.raises(
        BadMethod, match=r"react\+bfact\.high could mean react\.high or bfact\.high; name the one"
    ):
        apply(parse("react+bfact"), parse_setting("react+bfact.high=1"))


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("lhact.low_percentile=-0.1", "between 0 and 100, got -0.1"),
        ("lhact.high_percentile=100.5", "between 0 and 100, got 100.5"),
        ("ash-s.percentile=101", "between 0 and 100"),
        ("dice.percentile=-1", "between 0 and 100"),
        ("knn.k=0", "a whole number from 1 on, got 0"),
        ("knn.k=1.5", "a whole number from 1 on"),
        ("gen.k=-3", "a whole number from 1 on"),
        ("knn.k=inf", "a whole number from 1 on"),
        ("vim.dim=0", "a whole number from 1 on"),
        ("neco.dim=2.5", "a whole number from 1 on"),
        ("nnguide.bank=0.5", "a whole number from 1 on"),
        ("vim.dim=-1", "a whole number from 1 on"),
        ("lhact.order=0", "a number above 0, got 0"),
        ("bfact.order=-2", "a number above 0"),
        ("energy.temperature=0", "a number above 0"),
        ("odin.temperature=inf", "a number above 0"),
        ("bats.lambda=inf", "a number above 0"),
        ("gen.gamma=-inf", "a number above 0"),
    ],
)
def test_value_that_a_parameter_cannot_take(text, wanted):
    with pytest.raises(BadMethod) as refusal:
        apply(parse(text.partition(".")[0]), parse_setting(text))
    assert f"{text.partition('=')[0]} must be " in str(refusal.value)
    assert wanted in str(refusal.value)


@pytest.mark.parametrize(
    "text",
    [
        "lhact.low_percentile=0",
        "lhact.high_percentile=100",
        "knn.k=1",
        "lhact.order=0.5",
        "lhact.low=0",
    ],
)
def test_value_at_the_border_is_taken(text):
    setting = parse_setting(text)
    assert apply(parse(setting.target), setting).parameters()[setting.spelled] == setting.number


# Variants


def given(methods):
    return [(method.name, method.parameters()) for method in methods]


def test_variants_without_settings():
    assert given(variants(["react", "table6"], [], [], True)) == [
        (name, parse(name, True).parameters())
        for name in ("react", "msp", "odin", "energy", "bats", "bfact", "lhact")
    ]


def test_a_setting_reaches_every_method_with_that_step():
    methods = variants(
        ["lhact", "react", "lhact+msp", "msp"], [parse_setting("lhact.order=4")], [], False
    )
    assert [method.parameters().get("order") for method in methods] == [4, None, 4, None]


def test_a_sweep_is_the_full_grid_the_last_one_running_fastest():
    sweeps = [
        parse_sweep("lhact.high_percentile=90,95,99"),
        parse_sweep("lhact.low_percentile=10,20"),
    ]
    methods = variants(["msp", "lhact"], [parse_setting("lhact.order=3")], sweeps, True)
    assert [method.name for method in methods] == ["msp"] + ["lhact"] * 6
    values = [method.parameters() for method in methods[1:]]
    assert [(value["high_percentile"], value["low_percentile"]) for value in values] == [
        (90, 10),
        (90, 20),
        (95, 10),
        (95, 20),
        (99, 10),
        (99, 20),
    ]
    assert all(
        value["order"] == 3 and "low" not in value and "high" not in value for value in values
    )


def test_sweeps_of_two_methods_do_not_multiply():
    sweeps = [parse_sweep("react.high=1,2"), parse_sweep("lhact.order=1,2,3")]
    methods = variants(["react", "lhact", "react+lhact"], [], sweeps, False)
    assert [method.name for method in methods] == ["react"] * 2 + ["lhact"] * 3 + [
        "react+lhact"
    ] * 6


@pytest.mark.parametrize(
    ("settings", "sweeps", "named"),
    [
        (["vra.low=1"], [], "vra.low=1"),
        ([], ["vra.low=1,2"], "vra.low=1"),
        (["lhact.low=0.1", "energy.temperature=2", "knn.k=5"], [], "knn.k=5"),
        (["react+lhact.low=1"], [], "react+lhact.low=1"),
    ],
)
def test_setting_about_none_of_the_methods(settings, sweeps, named):
    with pytest.raises(BadMethod) as refusal:
        variants(
            ["lhact", "msp"],
            list(map(parse_setting, settings)),
            list(map(parse_sweep, sweeps)),
            False,
        )
    assert str(refusal.value) == f"{named} is about none of the methods asked for: lhact, msp"


def test_variants_refuse_unknown_names_parameters_and_values():
    with pytest.raises(BadMethod, match="unknown method 'nonsense'"):
        variants(["lhact", "nonsense"], [], [], False)
    with pytest.raises(BadMethod, match="lhact has no parameter 'k'"):
        variants(["lhact"], [parse_setting("lhact.k=1")], [], False)
    with pytest.raises(BadMethod, match=r"lhact\.order must be"):
        variants(["lhact"], [], [parse_sweep("lhact.order=1,0")], False)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("ebo", "energy"),
        ("mls", "maxlogit"),
        ("mds", "mahalanobis"),
        ("react95", "react"),
        ("MSP", "msp"),
        ("vimm", "vim"),
    ],
)
def test_names_of_peers_and_slips_get_a_hint(name, meant):
    with pytest.raises(BadMethod, match=f"did you mean '{meant}'"):
        parse(name)


def test_a_parameter_that_is_left_to_the_papers_rule_shows_no_value():
    assert parse("vim").parameters() == {}
    assert settings_of(parse("vim"), "vim.dim=5") == {"dim": 5}


def test_one_threshold_for_both_ends_is_taken():
    settings = [parse_setting("lhact.low=1"), parse_setting("lhact.high=1")]
    (method,) = variants(["lhact"], settings, [], False)
    assert method.parameters() == {"low": 1, "high": 1, "order": 2}


def test_low_above_high_is_refused_before_anything_is_read():
    with pytest.raises(BadMethod, match=r"lhact: low 2 lies above high 1"):
        variants(
            ["lhact"], [parse_setting("lhact.low=2"), parse_setting("lhact.high=1")], [], False
        )
