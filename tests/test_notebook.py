"""lhact.evaluate: what eval.py reports, for a notebook; and the names of `import lhact`."""

import json
import subprocess
import sys

import numpy as np
import pandas
import pytest
from sklearn.metrics import roc_auc_score

import lhact


@pytest.fixture
def folder(write_cache, tmp_path, small_sets, small_head):
    return write_cache(tmp_path / "cache" / "imagenet" / "mine", small_sets, *small_head)


def test_is_what_eval_reports(folder, run_eval):
    evaluated = lhact.evaluate(folder, ["lhact", "maxlogit"], {"lhact.order": 3}, bootstrap=100)
    given = ["--cache-dir", folder.parent.parent, "--name", "mine", "--set", "lhact.order=3"]
    given += ["--methods", "lhact", "maxlogit", "--bootstrap", 100, "--format", "json"]
    printed = json.loads(run_eval(*given)[1])
    assert json.loads(json.dumps(evaluated.result.to_json())) == printed
    frame = evaluated.to_pandas()
    assert isinstance(frame, pandas.DataFrame)
    rows = printed["results"] + printed["baseline"]
    assert frame["fpr95"].tolist() == [row["fpr95"] for row in rows]
    assert frame["dataset"].tolist() == [row["dataset"] for row in rows]


def test_gives_scores_as_arrays_and_shows_itself(folder, small_sets, small_head):
    evaluated = lhact.evaluate(folder, ["maxlogit"])
    weight, bias = small_head
    for name in ("id", "SUN"):
        wanted = (small_sets[name].astype(np.float64) @ weight.T + bias).max(axis=1)
        np.testing.assert_allclose(evaluated.scores["maxlogit"][name], wanted, rtol=1e-5)
    scores = evaluated.scores["maxlogit"]
    labels = [1] * len(scores["id"]) + [0] * len(scores["SUN"])
    auroc = 100 * roc_auc_score(labels, np.concatenate([scores["id"], scores["SUN"]]))
    html = evaluated._repr_html_()
    assert (html[:4], html[-6:]) == ("<div", "</div>")
    assert f">{auroc:.2f}<" in html.replace("<strong>", "").replace("</strong>", "")
    assert "maxlogit" in str(evaluated)


def test_plots(folder):
    evaluated = lhact.evaluate(folder, ["lhact", "energy"])
    pictures = evaluated.plot("scores")
    assert [name for name, _ in pictures] == ["scores-lhact", "scores-energy"]
    assert pictures._repr_html_().count("<svg") == 2
    assert len(evaluated.plot("rectification")) >= 1
    with pytest.raises(ValueError, match=r"a picture must be one of scores, roc, .* got 'pie'"):
        evaluated.plot("pie")


def test_refuses_what_eval_refuses(folder):
    for call, message in (
        (lambda: lhact.evaluate(folder, ["lhakt"]), "did you mean 'lhact'"),
        (lambda: lhact.evaluate(folder / "gone"), "holds no activations"),
        (lambda: lhact.evaluate(folder, device="gpu"), "a device must be"),
        (lambda: lhact.evaluate(folder, bootstrap=5), "resamples"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_importing_the_package_does_nothing():
    code = "import lhact, sys; assert 'torch' not in sys.modules; print(*lhact.__all__)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    names = found.stdout.split()
    assert all(getattr(lhact, name) is not None for name in names)
    with pytest.raises(AttributeError, match="no attribute 'detect'"):
        lhact.detect  # noqa: B018
