"""The report from compare.json and run.json: what it says, that it says it of any data, and that
nothing in the data can act in it.
"""

import base64
import hashlib
import html
import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from comparisons import METHODS, RUN, comparison, kept_budget
from forgetless.cli import main
from forgetless.files.compare_json import ImportanceFile
from forgetless.files.schema import from_json
from forgetless.report import numbers, sequence_tables, tables
from forgetless.report.budget import budget_table
from forgetless.report.budget_figures import control, trade_off
from forgetless.report.cards import extended
from forgetless.report.contents import completed, load_contents
from forgetless.report.frontier_figures import equal_learning, frontier
from forgetless.report.importance_figure import heat_map
from forgetless.report.markdown import markdown
from forgetless.report.page import as_json, page, project_links
from forgetless.report.palette import ACCENT, DARK, HUES, LIGHT, NEUTRAL, looks
from forgetless.report.summary import headlines, hidden_at_first
from forgetless.report.training_figures import movement_figure, training_curves

HOSTILE = (
    "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'`{{7*7}}|_x_ <!-- "
    "\u2028 =cmd()"
)


class Reader(HTMLParser):
    """The tags with their attributes, and the text between them, as a browser reads them."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self._inside = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._inside = tag

    def handle_data(self, data):
        if self._inside not in ("script", "style"):
            self.text.append(data)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "compare.json").write_text(json.dumps(comparison()))
    return tmp_path


def tables_of(text):
    """The tables of a markdown text, as lists of lines."""
    return [table.splitlines() for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)]


def same_cells(table):
    return len({len(re.findall(r"(?<!\\)\|", row)) for row in table}) == 1


def words(text):
    return " ".join(" ".join(Reader(text).text).split())


def test_report_writes_one_page_beside_the_comparison_and_prints_its_path(folder, capsys):
    assert main(["report", str(folder)]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "report.html")
    shown = words((folder / "report.html").read_text())
    assert "less forgetting with hold than with plain LoRA" in shown and "beyond the noise" in shown
    assert "The paper's preset never learns 95 % of what plain LoRA does." in shown
    assert "not reached" in shown and "reached by 2 of 3" in shown
    assert "out of memory, needed 3.1 GiB" in shown.replace("out of memory , ", "out of memory, ")
    assert (
        "Vitamin D, which the skin makes in sunlight." in shown
        and "kronecker:16" in shown
        and "torch" in shown
    )


def test_a_report_needs_no_torch(folder):
    code = f"""
import sys
from forgetless.cli import main
assert main(["report", {str(folder)!r}]) == 0
assert main(["report", {str(folder)!r}, "--format", "markdown"]) == 0
assert not {{"torch", "transformers", "peft", "numpy"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_page_names_no_other_place_and_its_policy_lets_its_own_scripts_alone_run():
    text = page(completed(comparison()))
    tags = Reader(text).tags
    places = [
        value
        for _, attrs in tags
        for name, value in attrs.items()
        if name in ("src", "href", "action")
    ]
    ours = {address for _, address in project_links()}
    assert places and all(place.startswith(("#", "data:")) or place in ours for place in places)
    assert not [name for _, attrs in tags for name in attrs if name.startswith("on")]
    policy = next(
        attrs["content"]
        for tag, attrs in tags
        if tag == "meta" and attrs.get("http-equiv") == "Content-Security-Policy"
    )
    assert (
        policy.startswith("default-src 'none'")
        and "connect-src" not in policy
        and "unsafe-eval" not in policy
    )
    scripts = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    assert len(scripts) == 2
    for script in scripts:
        assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() in policy
    assert "script-src 'sha256-" in policy and "'unsafe-inline'" not in policy.split("style-src")[0]


KEEP = {
    "plain",
    "hold",
    "recorded",
    "other",
    "done",
    "test",
    "reached",
    "not reached",
    "base",
}  # words that mean something to the report
CHOSEN = {*METHODS, "medmcqa", "sciq", "wiki", "news"} - KEEP  # keys that data chooses


def hostile(data):
    """The same data with every text replaced by one that breaks out of whatever does not escape it;
    equal texts stay equal.
    """
    if isinstance(data, dict):
        return {
            hostile(key) if key in CHOSEN else key: hostile(value) for key, value in data.items()
        }
    if isinstance(data, list):
        return [hostile(value) for value in data]
    return f"{data} {HOSTILE}" if isinstance(data, str) and data not in KEEP else data


def test_no_text_of_data_or_models_can_act_in_the_page():
    made = comparison()
    broken = hostile(
        {**made, "created": None, "environment": {**made["environment"], "commit": "x"}}
    )
    safe, attacked = Reader(page(completed(made))), Reader(page(completed(broken)))
    count = lambda reader: {
        tag: sum(t == tag for t, _ in reader.tags)
        for tag in ("script", "img", "style", "iframe", "a", "link", "form", "input")
    }
    assert count(attacked) == count(safe)
    assert not [name for _, attrs in attacked.tags for name in attrs if name.startswith("on")]
    assert (
        "onerror=alert(2)>" in " ".join(attacked.text)
        and "49" not in " ".join(attacked.text).split("{{")[1][:8]
    )
    data = re.search(
        r'<script type="application/json" id="data">(.*?)</script>',
        page(completed(broken)),
        re.DOTALL,
    ).group(1)
    assert "<" not in data and "\u2028" not in data and "alert(1)" in data
    drawn = [view["figure"] for views in json.loads(data)["figures"].values() for view in views]
    seen = json.dumps([texts(figure) for figure in drawn])
    assert (
        "<img" not in seen and "<script" not in seen and "&lt;/script" in seen
    )  # charts.js reads <b> and <br>


def texts(value, key=""):
    """Every text of a figure that is shown: not the names by which page.js finds methods."""
    if isinstance(value, dict):
        return [
            texts(inner, name)
            for name, inner in value.items()
            if name not in ("meta", "order") and not (name == "name" and "showarrow" in value)
        ]
    return [texts(inner, key) for inner in value] if isinstance(value, list) else value


@pytest.mark.parametrize("text", ["</script>", "<!--<script>", "\u2028\u2029", "&lt;"])
def test_json_for_scripts_reads_back_as_it_was_and_opens_no_tag(text):
    made = as_json({text: [text, 1.5, None]})
    assert json.loads(made) == {text: [text, 1.5, None]} and not set("<>&\u2028\u2029") & set(made)


def test_the_headline_is_the_least_forgetting_at_equal_learning_and_says_how_sure_it_is():
    made = comparison()
    first = headlines(completed(made), "wiki")[0]
    rows = {
        row["method"]: row
        for row in made["equal_learning"]["medmcqa"]["wiki"]
        if row["share"] == 0.95
    }
    assert (
        first.number == f"{rows['plain']['forgetting'] / rows['hold']['forgetting']:.1f}×"
        and first.noise == "beyond the noise"
    )
    made["differences"] = [{**row, "beyond_noise": False} for row in made["differences"]]
    assert headlines(completed(made), "wiki")[0].noise == "within the noise"
    made["differences"] = []
    assert headlines(completed(made), "wiki")[0].noise == "noise not measured"


def test_the_headline_does_not_flatter_forgetless():
    made = comparison()
    for row in made["equal_learning"]["medmcqa"]["wiki"]:
        if row["method"] == "hold":
            row["forgetting"] = 0.9
    assert "less forgetting with KL, two sequences" in headlines(completed(made), "wiki")[0].phrase
    for row in made["equal_learning"]["medmcqa"]["wiki"]:
        if row["method"] == "plain":
            row["forgetting"] = 0.0001
    assert "nothing here forgets less" in headlines(completed(made), "wiki")[0].phrase
    made["equal_learning"]["medmcqa"]["wiki"] = [
        row for row in made["equal_learning"]["medmcqa"]["wiki"] if row["method"] == "paper"
    ]
    assert [headline.place for headline in headlines(completed(made), "wiki")] == [
        "sciq, measured on wiki"
    ]


def test_what_was_not_measured_is_a_dash_and_never_a_zero():
    assert [numbers.nats(value) for value in (None, float("nan"), True, "7")] == [
        numbers.MISSING
    ] * 4
    assert (
        numbers.nats(0.0561, 0.002) == "0.056 ± 0.002"
        and numbers.nats(0.00212, 0.0001) == "0.0021 ± 0.0001"
        and numbers.nats(-1e-5) == "0.0000"
        and numbers.accuracy(0.845, 0.004) == "84.5 % ± 0.4 %"
    )
    assert (numbers.byte_size(1_513_768), numbers.duration(125), numbers.duration(None)) == (
        "1.44 MiB",
        "2 min 5 s",
        numbers.MISSING,
    )
    made = completed(comparison())
    found = tables.runs(made)
    titles = [column.title for column in found.columns]
    failed = next(row for row in found.rows if "out of memory" in row[titles.index("status")].shown)
    assert (
        failed[titles.index("learning")].shown == numbers.MISSING
        and failed[titles.index("learning")].value is None
    )
    assert 'title="not measured" class="missing"' in page(made)


def test_the_table_is_by_forgetting_with_those_that_do_not_get_there_last():
    found = tables.methods(completed(comparison()), "medmcqa", "wiki")
    assert [column.title for column in found.columns][:4] == [
        "method",
        "forgetting at 95 %",
        "forgetting at 80 %",
        "forgetting at 50 %",
    ]
    assert [row[0].shown for row in found.rows[:2]] == ["hold", "KL, two sequences"]
    assert found.rows[1][1].shown.endswith("(reached by 2 of 3)") and {
        row[1].shown for row in found.rows[-3:]
    } == {"not reached"}


def test_a_method_that_has_not_run_or_not_finished_is_not_said_to_fail():
    made = comparison()
    made["runs"] = [run for run in made["runs"] if run["method"] != "ewc-lora"]
    for run in made["runs"]:
        if run["method"] == "paper":
            run.update(status="failed", points=[])
    made = completed(made)
    found = {row[0].shown: row[1].shown for row in tables.methods(made, "medmcqa", "wiki").rows}
    assert "EWC-LoRA" not in found and found["paper preset"] == "no finished run"
    bars = {
        trace["meta"]: trace["hovertext"][0]
        for trace in equal_learning(made, looks(made.methods), "medmcqa", "wiki", 0.95)["traces"]
    }
    assert "ewc-lora" not in bars and "no finished run" in bars["paper"]


def test_figures_say_what_a_point_is_and_what_was_not_reached():
    made = completed(comparison())
    look = looks(made.methods)
    drawn = frontier(made, look, "medmcqa", "wiki")
    held = next(
        trace
        for trace in drawn["traces"]
        if trace["meta"] == "hold" and trace["mode"] == "lines+markers"
    )
    assert (
        "learning_rate" not in held["hovertext"][0]
        and "learning rate 0.004, strength 10" in held["hovertext"][0]
        and "3 seeds" in held["hovertext"][0]
    )
    assert len(held["x"]) == 4 and held["error_y"]["array"] == [0.006] * 4
    assert [note["text"] for note in drawn["layout"]["annotations"]] == [
        "50 % of plain's learning",
        "80 % of plain's learning",
        "95 % of plain's learning",
    ]
    plain = next(
        trace
        for trace in drawn["traces"]
        if trace["meta"] == "plain" and trace["mode"] == "lines+markers"
    )
    assert (
        len(plain["x"]) == 4
        and plain["x"] == sorted(plain["x"])
        and plain["y"] == sorted(plain["y"])
    )  # its own frontier, though forgetless betters it
    bars = equal_learning(made, look, "medmcqa", "wiki", 0.95)
    notes = {note["name"]: note["text"] for note in bars["layout"]["annotations"]}
    assert (
        notes["paper"] == "not reached"
        and "reached by 2 of 3" in notes["kl"]
        and set(notes) == {method.name for method in made.methods}
    )
    assert (
        frontier(made, look, "medmcqa", "no such text") is None
        and equal_learning(made, look, "medmcqa", "wiki", 0.7) is None
    )


def test_the_heat_map_has_a_cell_per_layer_and_kind_and_no_number_where_nothing_was_recorded():
    weights = [
        {"name": "a", "layer": 0, "kind": "q", "norm": 10.0, "coefficient": 2.0},
        {"name": "b", "layer": 1, "kind": "v", "norm": 0.1, "coefficient": 0.5},
        {"name": "head", "layer": None, "kind": "v", "norm": 3.0, "coefficient": None},
        {"name": "b2", "layer": 1, "kind": "v", "norm": 0.0},
    ]
    drawn = heat_map(from_json({"name": "file", "weights": weights}, ImportanceFile, "file"))
    assert drawn["traces"][0]["y"] == ["0", "1", "outside"] and drawn["traces"][0]["x"] == [
        "q",
        "v",
    ]
    assert drawn["traces"][0]["z"][0] == [1.0, None] and drawn["traces"][0]["z"][1] == [
        None,
        pytest.approx(-1.0),
    ]
    assert drawn["traces"][1]["x"] == [2.0, 0.5, None]
    assert heat_map(ImportanceFile("empty")) is None


def test_methods_look_the_same_in_every_figure_and_are_told_apart_without_colour():
    many = completed(comparison(many=True))
    look = looks(many.methods)
    assert (
        len({(one.light, one.symbol, one.dash) for one in look.values()}) == len(many.methods) > 20
    )
    by_hue = {}
    for one in look.values():
        by_hue.setdefault(one.light, []).append((one.symbol, one.dash))
    assert all(len(set(shapes)) == len(shapes) for shapes in by_hue.values())
    text = page(many)
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL).group(1))["figures"]
    for views in data.values():
        for trace in (
            trace
            for view in views
            for trace in view["figure"]["traces"]
            if trace["meta"] is not None
        ):
            colour = (trace.get("line") or trace["marker"])["color"]
            assert colour == f"{look[trace['meta']].light}|{look[trace['meta']].dark}"


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def test_many_methods_are_drawn_by_their_places_with_plain_and_ours_always():
    many = completed(comparison(many=True))
    shown = {method.name for method in many.methods} - set(hidden_at_first(many, "wiki"))
    assert len(shown) == 9 and {"plain", "hold", "paper"} <= shown
    others = [
        row
        for row in many.equal_learning["sciq"]["wiki"]
        if row.level == 0.95 and row.method not in ("plain", "hold", "paper")
    ]
    best = [
        row.method
        for row in sorted(
            (row for row in others if row.forgetting is not None),
            key=lambda row: row.forgetting,
        )
    ]
    assert {best[0], best[1]} <= shown and best[-1] not in shown
    assert hidden_at_first(completed(comparison()), "wiki") == []


@pytest.mark.parametrize("pair", [ACCENT, NEUTRAL, *HUES])
def test_every_colour_stands_out_from_the_ground_of_its_theme(pair):
    for colour, ground in zip(pair, (LIGHT, DARK), strict=True):
        light, dark = sorted((luminance(colour), luminance(ground)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 3


def test_markdown_has_summary_table_and_settings(folder, capsys):
    assert main(["report", str(folder), "--format", "markdown"]) == 0
    text = capsys.readouterr().out
    assert (
        text.startswith("## Which method forgets least?\n")
        and "× less forgetting with hold than with plain LoRA** (medmcqa, measured on wiki)" in text
    )
    assert (
        "| method | forgetting at 95 % | forgetting at 80 % |" in text
        and "\n| hold | 0.0" in text
        and "| not reached |" in text
    )
    assert (
        "* L2 to the base" not in text
        and (
            "* l2 on medmcqa, learning rate 0.004, strength 10: out of memory (needed 3.1 GiB, "
            "2.0 GiB were free)"
        )
        in text
    )
    assert "* seeds: validation: 0; test: 1, 2, 3" in text and "torch 2.13.0" in text
    assert all(same_cells(found) for found in tables_of(text))


def test_markdown_shows_hostile_text_as_text():
    text = markdown(completed(hostile(comparison())))
    assert not re.search(r"(?<!\\)<(?!/?(details|summary)>)", text) and r"{{7\*7}}" in text
    assert len(tables_of(text)) > 2 and all(same_cells(found) for found in tables_of(text))


def test_a_single_run_says_what_was_learned_and_lost(tmp_path, capsys):
    (tmp_path / "run.json").write_text(json.dumps(RUN))
    assert main(["report", str(tmp_path), "--title", "Herbs"]) == 0
    text = (tmp_path / "report.html").read_text()
    shown = words(text)
    assert (
        "Herbs" in shown
        and "1.100 nats per token learned" in shown
        and "0.056 nats per token forgotten" in shown
    )
    assert (
        "sciq acc 25.0 % 37.5 %" in shown
        and 'data-figure="curves"' in text
        and 'data-figure="movement"' in text
        and 'data-figure="frontier"' not in text
    )
    assert "learning_rate: 0.001" in shown and "Every run" not in shown
    capsys.readouterr()
    assert main(["report", str(tmp_path), "--format", "markdown"]) == 0
    assert (
        "* On wiki-test the loss rose by 0.056 ± 0.002 nats per token."
        in capsys.readouterr().out.replace("\\", "")
    )


def test_a_run_without_held_out_text_says_that_nothing_was_measured(tmp_path):
    empty = {"general": None, "domain": None, "tasks": {}}
    run = {
        **RUN,
        "before": empty,
        "after": empty,
        "forgetting": None,
        "learning": None,
        "log": [],
        "moved": None,
    }
    (tmp_path / "run.json").write_text(json.dumps(run))
    assert main(["report", str(tmp_path)]) == 0
    shown = words((tmp_path / "report.html").read_text())
    assert (
        "What was learned was not measured" in shown
        and "What was forgotten was not measured" in shown
    )


def test_an_unfinished_comparison_says_so_and_needs_no_result_yet(tmp_path):
    made = comparison()
    bare = {
        **made,
        "runs": [],
        "frontier": {},
        "equal_learning": {},
        "differences": [],
        "verdict": [],
        "noise": {},
        "importance": [],
        "samples": [],
    }
    (tmp_path / "compare.json").write_text(
        json.dumps({**bare, "progress": {"done": 3, "of": 48, "failed": 1, "seconds": 9.0}})
    )
    assert main(["report", str(tmp_path)]) == 0
    assert "Not finished: 3 of 48 runs are done, 1 failed" in words(
        (tmp_path / "report.html").read_text()
    )
    assert "##" in markdown(load_contents(tmp_path))


def test_a_budget_shows_what_was_kept_what_others_buy_and_what_the_controller_did(tmp_path):
    run = {
        **RUN,
        "configuration": {**RUN["configuration"], "budget": "1%"},
        "verdict": "met",
        "budget": kept_budget(),
    }
    (tmp_path / "run.json").write_text(json.dumps(run))
    made = load_contents(tmp_path)
    assert any(
        "173 documents that nothing was chosen on the loss rose by 0.0003 to 0.0063" in sentence
        for sentence in made.verdict
    )
    rows = [[cell.shown for cell in row] for row in budget_table(made.budget).rows]
    times = f"update {numbers.TIMES}"
    assert rows == [
        ["0.5%", "0.0050", f"{times} 0.4", "0.139", ""],
        ["1%", "0.0100", f"{times} 0.7", "0.184 ± 0.008", "this one"],
        ["5%", "0.0488", "all of the update", "0.139", ""],
    ]
    trade, looked = trade_off(made.budget), control(made.budget)
    assert [trace["name"] for trace in trade["traces"]] == [
        "shrunk along importance",
        "scaled",
    ] and trade["layout"]["shapes"][0]["x0"] == 0.00995
    assert trade["traces"][1]["x"][0] == 0.012 and trade["traces"][1]["error_x"]["array"][
        0
    ] == pytest.approx(0.004)
    rise, probe, strength = looked["traces"]
    assert (
        rise["y"][0] == pytest.approx(0.03 / 0.00995)
        and probe["x"] == [10, 20, 30, 40, 50, 60]
        and strength["x"][0] == 10
    )  # 0 has no place on a log scale
    assert "The budget" in words(page(made)) and "| 1% | 0.0100 |" in markdown(made)
    bare = {**kept_budget(), "curve": [], "trajectory": [], "others": None, "check": None}
    (tmp_path / "run.json").write_text(json.dumps({**run, "budget": bare}))
    assert len(
        budget_table(load_contents(tmp_path).budget).rows
    ) == 1 and "The budget of 1%: met." in words(page(load_contents(tmp_path)))


def test_sequences_show_the_matrix_and_its_transfers():
    made = completed(
        {
            **comparison(),
            "sequences": [
                {
                    "name": "ab",
                    "method": "hold",
                    "seed": 1,
                    "domains": ["medmcqa", "sciq"],
                    "matrix": [[5.2, 4.9], [4.1, 4.7], [4.2, 4.0]],
                    "accuracy": None,
                    "general": {"wiki": [0.03, 0.05]},
                    "average": 4.1,
                    "backward_transfer": -0.1,
                    "forward_transfer": 0.2,
                }
            ],
        }
    )
    _, found = sequence_tables.sequences(made)[0]
    assert [[cell.shown for cell in row] for row in found.rows] == [
        ["base model", "5.200", "4.900", "0.000"],
        ["medmcqa", "4.100", "4.700", "0.030"],
        ["sciq", "4.200", "4.000", "0.050"],
    ]
    assert "backward transfer -0.100" in words(page(made))


def test_several_methods_of_a_sequence_are_summed_up_the_lowest_loss_first():
    one = {
        "name": "ab",
        "domains": ["a", "b"],
        "matrix": [[5.2, 4.9], [4.1, 4.7], [4.2, 4.0]],
        "general": {"wiki": [0.03, 0.05]},
        "forward_transfer": None,
    }
    scored = {"average": 0.5, "backward_transfer": -0.25, "forward_transfer": None}
    found = [
        {**one, "method": "plain", "seed": 1, "average": 4.5, "backward_transfer": -0.4},
        {
            **one,
            "method": "hold",
            "seed": 1,
            "average": 4.0,
            "backward_transfer": -0.1,
            "accuracy_transfer": scored,
        },
        {
            **one,
            "method": "hold",
            "seed": 2,
            "average": 4.2,
            "backward_transfer": -0.2,
            "accuracy_transfer": scored,
        },
        {
            **one,
            "method": "hold",
            "seed": 3,
            "average": None,
            "backward_transfer": None,
            "error": "broken",
        },
    ]
    made = completed({**comparison(), "sequences": found})
    [(name, table)] = sequence_tables.sequence_summary(made)
    titles = [
        "method",
        "average loss",
        "backward transfer",
        "general rise, wiki",
        "average accuracy",
        "backward transfer of accuracy",
        "seeds",
    ]
    assert name == "ab" and [column.title for column in table.columns] == titles
    assert [[cell.shown for cell in row] for row in table.rows] == [
        [
            "hold",
            "4.100 ± 0.100",
            "-0.150 ± 0.050",
            "0.050 ± 0.000",
            "50.0 % ± 0.0 %",
            "-25.0 % ± 0.0 %",
            "2",
        ],
        ["plain LoRA", "4.500", "-0.400", "0.050", numbers.MISSING, numbers.MISSING, "1"],
    ]
    assert "every method at the end" in words(page(made)) and "4.100 ± 0.100" in markdown(made)
    assert (
        sequence_tables.sequence_summary(completed({**comparison(), "sequences": found[:1]})) == []
    )


def test_a_sequence_with_rows_of_other_lengths_is_shown_as_far_as_it_goes():
    odd = {
        "name": "ab",
        "method": "hold",
        "domains": ["a", "b"],
        "matrix": [[5.2], [4.1, 4.0, 3.0], []],
        "accuracy": [[0.5]],
        "general": {"wiki": [0.1]},
    }
    _, found = sequence_tables.sequences(completed({**comparison(), "sequences": [odd]}))[0]
    assert [row[1].shown for row in found.rows] == ["5.200", "4.100", numbers.MISSING] and page(
        completed({**comparison(), "sequences": [odd]})
    )


@pytest.mark.parametrize(
    ("files", "words", "status", "expected"),
    [
        ({}, [], 1, "holds no compare.json and no run.json"),
        ({"compare.json": '{"format": 7}'}, [], 1, "expected format 1, found 7"),
        ({"compare.json": "{"}, [], 1, "expected a JSON file"),
        ({"run.json": '{"a": 1}'}, [], 1, "expected a run of forgetless tune or eval"),
        ({}, ["--format", "htm"], 2, "did you mean 'html'"),
    ],
)
def test_what_cannot_be_reported_is_said(tmp_path, capsys, files, words, status, expected):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    assert main(["report", str(tmp_path), *words]) == status
    assert expected in capsys.readouterr().err
    assert not list(tmp_path.glob("*.html"))


def test_a_missing_folder_is_said(tmp_path, capsys):
    assert main(["report"]) == 2 and "missing DIR" in capsys.readouterr().err
    assert (
        main(["report", str(tmp_path / "none")]) == 1
        and "does not exist" in capsys.readouterr().err
    )


def test_pages_are_small_enough_to_be_sent(folder, capsys):
    """The page of a comparison of 21 methods has less than the 1.5 MB that a mail takes easily."""
    assert len(page(completed(comparison())).encode()) < 1_000_000
    assert len(page(completed(comparison(many=True))).encode()) < 1_500_000
    assert (
        main(["report", str(folder), "--format", "markdown", "--out", str(folder / "report.md")])
        == 0
    )
    assert html.unescape((folder / "report.md").read_text()).startswith("## Which method")


def test_the_experiment_is_shown_as_it_was_written(folder):
    """compare.json holds the text of the file."""
    found = comparison()
    found["experiment"], found["settings"] = (
        "title: Methods\nmodel:\n  model: some/model\n",
        {"max_steps": 77},
    )
    (folder / "compare.json").write_text(json.dumps(found))
    shown = page(load_contents(folder))
    assert "title: Methods\nmodel:\n  model: some/model" in html.unescape(
        shown
    ) and "77 steps" in words(shown)


def test_a_method_that_was_validated_but_not_tested_has_no_finished_run(folder):
    found = comparison()
    for row in (
        row for rows in found["equal_learning"].values() for each in rows.values() for row in each
    ):
        row["part"] = "test"
        if row["method"] == "hold":
            row |= {"forgetting": None, "status": "not reached"}
    for one in found["runs"]:
        one["part"] = "validation" if one["method"] == "hold" else "test"
    made = tables.methods(completed(found), "sciq", "wiki")
    row = next(row for row in made.rows if row[0].mark == "hold")
    assert row[1].shown == "no finished run"


def test_plain_fine_tuning_may_have_another_name(folder):
    renamed = json.loads(json.dumps(comparison()).replace('"plain"', '"lora"'))
    made = completed({**renamed, "reference": "lora"})
    assert (
        all("not measured at" not in h.detail for h in headlines(made, "wiki"))
        and looks(made.methods, "lora")["lora"].light == NEUTRAL[0]
    )


def test_markdown_shows_every_general_text_and_the_noise(folder):
    found = completed(comparison())
    said = markdown(found)
    for other in [text.name for text in found.texts][1:]:
        assert f"The same on {other}" in said
    assert all(f"noise, {domain}" in said for domain in found.noise)


def test_importance_of_other_units_is_drawn_on_one_scale(folder):
    found = comparison()
    for one in found["runs"]:
        if one.get("moved") and one["method"] == "hold":
            one["moved"] = [{**row, "importance": 1000 * row["importance"]} for row in one["moved"]]
    drawn = [
        movement_figure(made, looks(made.methods), "sciq")
        for made in (completed(comparison()), completed(found))
    ]
    x = [
        next(trace["x"] for trace in figure["traces"] if trace["meta"] == "hold")
        for figure in drawn
    ]
    assert x[0] == pytest.approx(x[1])


PLAIN_RUN = {
    **RUN,
    "method": [],
    "learning": {"nats": 1.25, "standard_error": 0.01},
    "forgetting": {"nats": 0.4, "standard_error": 0.01},
}


def run_folder(path, run):
    path.mkdir()
    (path / "run.json").write_text(json.dumps(run))
    return path


def test_a_run_is_shown_against_plain_with_what_both_say(tmp_path, capsys):
    run, plain = run_folder(tmp_path / "run", RUN), run_folder(tmp_path / "plain", PLAIN_RUN)
    asked = {"prompt": "Name a herb.", "before": "Mint.", "messages": [{"role": "system"}]}
    for name, said in (("run", "Sage."), ("plain", "Ans. B. Sage")):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({**asked, "after": said}) + "\n")
    pairs = f"{tmp_path / 'run.jsonl'},{tmp_path / 'plain.jsonl'}"
    words_given = ["--against-plain", str(plain), "--conversations", pairs]
    assert main(["report", str(run), *words_given]) == 0
    shown = words((run / "report.html").read_text())
    assert "88 % of what plain fine-tuning learned 1.100 ± 0.010 of 1.250 ± 0.010" in shown
    assert "14 % of what plain fine-tuning lost 0.056 ± 0.002 of 0.400 ± 0.010" in shown
    assert "before Mint. after plain Ans. B. Sage after this run Sage." in shown
    capsys.readouterr()
    assert main(["report", str(plain), "--against-plain", str(run)]) == 1
    assert "expected a run of tune --method plain, found 'hold'" in capsys.readouterr().err
    other = {**PLAIN_RUN, "after": {**RUN["after"], "domain": None}}
    (plain / "run.json").write_text(json.dumps(other))
    assert main(["report", str(run), "--against-plain", str(plain)]) == 1
    assert "was measured on other held-out rows" in capsys.readouterr().err


def test_a_run_starts_with_its_budget_and_behaviours_in_words(tmp_path):
    judged = {"prompts": 50, "low": -0.4, "high": -0.2, "before": 0.9, "after": 0.6}
    same = {**judged, "low": -0.1, "high": 0.1}
    run = {
        **RUN,
        "verdict": "met",
        "budget": kept_budget(),
        "behaviours": [
            {"name": "json", "counts": "parse as JSON", "better": "higher", **same},
            {"name": "ends", "counts": "end by themselves", "better": "higher", **judged},
        ],
    }
    made = load_contents(run_folder(tmp_path / "run", run))
    said = [f"{each.number} {each.phrase}" for each in headlines(made, None)]
    assert said[-1] == "met the budget of 1%"
    assert "end by themselves: 90.0 % of answers before, 60.0 % after (worse)." in made.verdict
    assert made.verdict[-1] == "The other 1 behaviours did not change beyond the noise."


def test_one_logged_point_is_a_mark_and_one_seed_has_no_whiskers(tmp_path):
    run = run_folder(tmp_path / "run", {**RUN, "log": RUN["log"][:1]})
    made = load_contents(run)
    drawn = training_curves(made, looks(made.methods), "herbs-test")
    assert {trace["mode"] for trace in drawn["traces"]} == {"markers"}
    alone = comparison()
    for methods in alone["frontier"]["sciq"].values():
        for each in methods.values():
            each["points"] = [{**point, "seeds": 1} for point in each["points"]]
    for rows in alone["equal_learning"]["sciq"].values():
        for row in rows:
            row["seeds"] = 1
    made = completed(alone)
    look = looks(made.methods)
    bars = equal_learning(made, look, "sciq", "wiki", 0.5)["traces"]
    lines = [t for t in frontier(made, look, "sciq", "wiki")["traces"] if "error_x" in t]
    assert lines and not any(t["error_x"]["array"][0] for t in [*bars, *lines])


def test_a_card_asks_for_nothing_and_keeps_what_people_wrote():
    template = (
        "---\nlibrary_name: peft\n---\n\n# Model Card for Model ID\n\n<!-- Provide a summary. -->\n"
        "\n## Model Details\n\n- **License:** [More Information Needed]\n"
        "- **Shared by:** the herbalists\n\n## Uses\n\n### Direct Use\n\n"
        "[More Information Needed]\n"
        "\n## Environmental Impact\n\nCarbon emissions can be estimated using it.\n\n### Framework "
        "versions\n\n- PEFT 0.21.2\n"
    )
    card = extended(template, {"tags": ["forgetless"], "base_model": "a/herbs-1B"}, "## Kept\n")
    assert "[More Information Needed]" not in card and "<!-- Provide" not in card
    assert "# herbs-1B, fine-tuned\n\n<!-- forgetless -->\n## Kept" in card
    assert "## Model Details\n\n- **Shared by:** the herbalists" in card
    assert "## Uses" not in card and "### Framework versions\n\n- PEFT 0.21.2" in card
    mine = "# Mine\n\n## Uses\n\nCarbon emissions can be estimated using it.\n"
    assert "can be estimated" in extended(mine, {"tags": ["forgetless"]}, "## Kept\n")
