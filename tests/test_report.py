"""Claims, figures, the results folder and its page; on files in a checkout of their own."""

import json
import math

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from conftest import CLAIMS_HEADER
from page import write_index

from nbs_lib.report import Claims, bars, label, lines, save, style
from nbs_lib.report.claims import CRITERIA, VERDICTS
from nbs_lib.report.figures import COLOURS

HOLDS, FAILS, CANNOT = VERDICTS
ROWS = """\
faster,paper 5,"Blocks are fast, mostly",here,ms / ms,1.5,>=,1.5,ratio,host,text
bytes,paper 4,Fewer bytes,here,bytes / bytes,,<=,1,ratio,any,text
share,paper 3,A third,here,share,44.3,within_abs,44.3 0.1,%,any,text
same,paper 5,The same,here,ms / ms,,within_rel,-2 0.05,ratio,host,ours
rows,paper 2,Whole rows go,here,whole rows,,true,,,any,text
days,paper 6,Nine days,here,days,9,untestable,,days,servers,text
other,paper 1,Elsewhere,there,x,1,>=,1,x,any,text
"""
FRAMES = {
    "many": [("a", 1.0, "paper"), ("b", 2.0, "paper"), ("a", 3.0, "measured here"), ("b", 1.0, "simulated")],
    "one row": [("a", 1.0, "phone")],
    "NaN": [("a", np.nan, "paper"), ("b", 2.0, "measured here"), ("b", np.nan, "simulated")],
    "only NaN": [("a", np.nan, "paper")],
    "empty": [],
}


@pytest.fixture(autouse=True)
def _claims_and_figures(checkout):
    (checkout / "data" / "paper" / "claims.csv").write_text(CLAIMS_HEADER + ROWS)
    style()
    yield
    plt.close("all")


@pytest.mark.parametrize(
    ("key", "value", "holds"),
    [
        ("faster", 1.5, True),
        ("faster", 1.4999, False),
        ("bytes", 1, True),
        ("bytes", 1.01, False),
        ("share", 44.4, True),  # 44.4 - 44.3 > 0.1 in floating point
        ("share", 44.2, True),
        ("share", 44.41, False),
        ("same", -2.1, True),
        ("same", -1.89, False),
        ("rows", np.True_, True),
        ("rows", False, False),
    ],
)
def test_a_value_is_judged_by_its_criterion(key, value, holds):
    claims = Claims("here")
    assert claims.check(key, value, note="so") == (HOLDS if holds else FAILS)
    row = claims.frame().set_index("id").loc[key]
    assert (row["value"], row["verdict"], row["note"]) == (value, HOLDS if holds else FAILS, "so")


def test_the_frame_has_every_claim_and_the_untestable_answered():
    claims = Claims("here")
    assert claims.unanswered() == ["faster", "bytes", "share", "same", "rows"]
    claims.cannot("faster", "no phone")
    frame = claims.frame().set_index("id")
    assert list(frame.index) == ["faster", "bytes", "share", "same", "rows", "days"]
    assert list(frame.loc["days", ["verdict", "note", "paper_value"]]) == [CANNOT, "needs servers", "9"]
    assert list(frame.loc["faster", ["verdict", "note", "threshold"]]) == [CANNOT, "no phone", "1.5"]
    assert "no phone" in claims.show().to_html() and Claims("nobody").frame().empty
    assert "verdict" in Claims("nobody").show().to_html()


def test_wrong_answers_are_refused():
    claims = Claims("here")
    with pytest.raises(KeyError, match="faster.*Got 'fastre'"):
        claims.check("fastre", 1)
    with pytest.raises(KeyError, match="Got 'other'"):
        claims.cannot("other", "another notebook's")
    for value in (math.nan, math.inf):
        with pytest.raises(ValueError, match="finite.*faster"):
            claims.check("faster", value)
    with pytest.raises(ValueError, match="testable.*days"):
        claims.check("days", 9)


def test_the_committed_claims_can_be_judged(monkeypatch):
    monkeypatch.delenv("NBS_ROOT")
    from nbs_lib import paths

    rows = pd.read_csv(paths.data_dir() / "paper" / "claims.csv", dtype=str, keep_default_na=False)
    assert rows["id"].is_unique and len(rows)
    for notebook in rows["notebook"].unique():
        claims = Claims(notebook)
        for key, row in claims.rows.iterrows():
            if row["criterion"] != "untestable":
                assert row["criterion"] in CRITERIA and claims.check(key, 1.0) in (HOLDS, FAILS)
        assert not claims.unanswered()


def answered():
    claims = Claims("here")
    for key in claims.unanswered():
        claims.check(key, 1.0)
    return claims


def test_save_writes_one_set_and_replaces_it_whole(checkout):
    table = pd.DataFrame({"ms": [1.5, np.nan]})
    figure, other = plt.figure(), plt.figure()
    folder = save(
        "here",
        "quick",
        figures={"main": figure, "detail": other},
        tables={"times": table, "extra": table},
        claims=answered(),
        parameters={"runs": 3},
        seed=7,
    )
    assert folder == checkout / "results" / "quick" / "here"
    (folder / "executed.ipynb").write_text("{}")
    names = {"figure.png", "figure.svg", "figure_detail.png", "figure_detail.svg", "table.csv", "table_extra.csv"}
    assert {file.name for file in folder.iterdir()} == names | {"claims.csv", "run.json", "executed.ipynb"}
    pd.testing.assert_frame_equal(pd.read_csv(folder / "table.csv"), table)
    run = json.loads((folder / "run.json").read_text())
    assert (run["parameters"], run["seed"], run["device"], run["profile"]) == ({"runs": 3}, 7, "host", "quick")
    assert run["figures"] == {"main": "figure", "detail": "figure_detail"} and "numpy" in run["versions"]
    assert {"utc", "commit", "cpu"} <= set(run)
    save("here", "quick", tables={"times": table}, claims=answered())
    assert {file.name for file in folder.iterdir()} == {"table.csv", "claims.csv", "run.json", "executed.ipynb"}


def test_save_refuses_unanswered_or_foreign_claims_before_writing(checkout):
    claims = answered()
    claims.answers["share"] = (None, "", "")
    with pytest.raises(ValueError, match="share"):
        save("here", "quick", claims=claims)
    with pytest.raises(ValueError, match="Expected every claim of there"):
        save("there", "quick", claims=answered())
    with pytest.raises(ValueError, match="faster"):
        save("here", "quick")
    with pytest.raises(ValueError, match="Expected names"):
        save("nobody", "quick", tables={"a/b": pd.DataFrame()})
    assert not (checkout / "results").exists()


@pytest.mark.parametrize("by", [None, "kind"])
@pytest.mark.parametrize("rows", FRAMES.values(), ids=FRAMES)
@pytest.mark.parametrize("draw", [bars, lines])
def test_any_frame_draws_and_names_its_provenance(draw, rows, by):
    frame = pd.DataFrame(rows, columns=["x", "ms", "provenance"]).astype({"ms": float}).assign(kind="ours")
    ax = draw(frame, "x", "ms", by=by, ax=plt.figure().add_subplot())
    ax.figure.canvas.draw()
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("x", "ms")
    if rows:
        shown = {text.get_text().removeprefix("ours, ") for text in ax.get_legend().get_texts()}
        assert shown == set(frame["provenance"])


def test_a_provenance_keeps_its_colour_whatever_else_is_drawn():
    frame = pd.DataFrame({"x": [1, 2], "ms": [1.0, 2.0], "provenance": ["measured here", "measured here"]})
    alone = lines(frame, "x", "ms", ax=plt.figure().add_subplot())
    both = pd.concat([frame.assign(provenance="paper"), frame])
    together = lines(both, "x", "ms", ax=plt.figure().add_subplot())

    def colours(ax):
        drawn = zip(*ax.get_legend_handles_labels(), strict=True)
        return {name: plt.matplotlib.colors.to_hex(handle.get_color()) for handle, name in drawn}

    assert colours(alone)["measured here"] == colours(together)["measured here"] == COLOURS["measured here"]


def test_rows_are_labelled_by_where_they_were_taken():
    rows = pd.DataFrame({"device": ["host", "simulated:phone", "galaxy-s20"]})
    assert list(label(rows)["provenance"]) == ["measured here", "simulated", "phone"]
    assert list(label(rows, cached=True)["provenance"]) == ["cached", "simulated", "phone"]
    assert list(label(rows[:0])["provenance"]) == []


def test_unlabelled_or_invented_provenance_is_refused():
    frame = pd.DataFrame({"x": [1], "ms": [1.0], "provenance": ["guessed"]})
    with pytest.raises(ValueError, match="paper.*Got \\['guessed'\\]"):
        bars(frame, "x", "ms")
    with pytest.raises(ValueError, match="provenance"):
        lines(frame.drop(columns="provenance"), "x", "ms")


def test_the_page_shows_figures_tables_claims_and_failures(checkout):
    table = pd.DataFrame({"layer": ["<conv>"] * 50, "ms": [1 / 3] * 50})
    save("here", "quick", figures={"a": plt.figure()}, tables={"t": table, "none": pd.DataFrame()}, claims=answered())
    results = checkout / "results" / "quick"
    (results / "broken").mkdir()
    (results / "broken" / "run.json").write_text('{"status": ')
    (results / "failed").mkdir()
    (results / "failed" / "run.json").write_text('{"status": "failed", "error": "KeyError: <x>"}')
    page = write_index(results).read_text()
    assert 'src="here/figure.png"' in page and 'href="here/table.csv"' in page
    assert page.count("&lt;conv&gt;") == 20 and "0.3333" in page
    assert "KeyError: &lt;x&gt;" in page and "unreadable" in page
    assert "Blocks are fast, mostly" in page and "needs servers" in page and "http" not in page
    assert all(f'color: {colour}">{verdict}' in page for verdict, colour in VERDICTS.items())
