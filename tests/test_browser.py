"""The report in a real browser: opens from disk without a request or a complaint, toggles, sorts,
copies, and fits every width in both themes.
"""

import csv
import io
import json

import pytest

import browser
from comparisons import RUN, comparison, kept_budget
from forgetless.report.contents import completed, load_contents
from forgetless.report.page import write_report

pytestmark = pytest.mark.skipif(
    browser.find() is None,
    reason=(
        f"needs Chromium: none of {', '.join(browser.NAMES)} on PATH, and no FORGETLESS_CHROMIUM"
    ),
)
WIDTHS = {"desktop": (1200, 900, False), "phone": (375, 800, True)}


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        home = tmp_path_factory.mktemp("home")
        patch.setenv("HOME", str(home))
        made = browser.Browser(home / "profile")
        yield made
        made.close()


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    return write_report(completed(comparison()), tmp_path_factory.mktemp("report") / "report.html")


@pytest.fixture(scope="module")
def opened(chromium, page_file):
    chromium.system_theme("light")
    chromium.size(1200, 900)
    chromium.open(page_file)
    return chromium


@pytest.fixture
def page(opened):
    """The comparison's page, light, with everything shown and every choice at its first value."""
    opened.problems.clear()
    opened.run(
        "document.querySelector('[data-every=show]').click(); document.querySelectorAll('.choose "
        "button:first-of-type').forEach(one => one.click())"
    )
    return opened


def quiet(page):
    """No complaint, and no request but for the file itself and pictures that are part of it."""
    asked = [url for url in page.requests if not url.startswith("data:")]
    return not page.problems and len(asked) == 1 and asked[0].startswith("file:")


def click(page, selector):
    page.run(f"document.querySelector({json.dumps(selector)}).click()")
    page.run("new Promise(done => requestAnimationFrame(() => setTimeout(done, 150)))")


def test_it_opens_from_disk_without_a_request_or_a_complaint(page):
    assert quiet(page), (page.problems, page.requests)
    drawn = page.run(
        "[...document.querySelectorAll('.figure')].map(one => "
        "one.querySelectorAll('svg.chart').length)"
    )
    assert len(drawn) == 5 and all(drawn)
    assert (
        page.run("fetch('https://example.org').then(() => 'answered', () => 'refused')")
        == "refused"
    )


def test_a_toggle_hides_a_method_in_every_figure(page):
    shown = (
        "name => [...document.querySelectorAll(`[data-figure=${name}]`)[0].chart.traces]"
        ".filter(trace => trace.meta === 'kl').length"
    )
    lines = "document.querySelectorAll('[data-figure=frontier] .trace').length"
    names = [
        name
        for name in ("frontier", "equal", "curves", "movement")
        if page.run(f"({shown})('{name}')")
    ]
    before = page.run(lines)
    assert names == ["frontier", "equal", "curves", "movement"]
    click(page, "[data-method=kl]")
    assert [page.run(f"({shown})('{name}')") for name in names] == [0] * 4 and page.run(
        lines
    ) == before - 2
    assert (
        page.run("[...document.querySelectorAll('[data-method=kl]')].map(one => one.ariaPressed)")
        == ["false"] * 3
    )
    assert "KL, two sequences" not in page.run(
        "document.querySelector('[data-figure=equal]').textContent"
    )
    click(page, "[data-method=kl]")
    assert page.run(lines) == before
    click(page, "[data-every=hide]")
    assert page.run(lines) == 1  # the base model
    click(page, "[data-every=show]")
    assert page.run(lines) == before and not page.problems


def test_of_many_methods_the_best_are_drawn_first_and_bars_show_all(chromium, page_file, tmp_path):
    drawn = (
        "name => new Set([...document.querySelectorAll(`[data-figure=${name}]`)[0].chart.traces]"
        ".map(trace => trace.meta)).size"
    )
    bars = "document.querySelector('[data-figure=equal]').chart.layout.yaxis.categoryarray.length"
    try:
        chromium.open(write_report(completed(comparison(many=True)), tmp_path / "many.html"))
        assert (
            chromium.run("document.querySelectorAll('#frontier .chip[aria-pressed=true]').length")
            == 9
            and chromium.run(bars) == 21
        )
        assert "12 more are a click away" in chromium.run(
            "document.querySelector('#frontier').textContent"
        )
        before = chromium.run(f"({drawn})('frontier')")
        click(chromium, "[data-method=oft]")
        assert (
            chromium.run(f"({drawn})('frontier')") == before + 1 and chromium.run(bars) == 10
        )  # from the first click on, of all figures alike
        click(chromium, "[data-every=show]")
        assert chromium.run(bars) == 21 and not chromium.problems
    finally:
        chromium.open(page_file)


def test_toggles_work_from_the_keyboard(page):
    page.run("document.querySelector('[data-method=kl]').focus()")
    for kind in ("keyDown", "keyUp"):
        page.send(
            "Input.dispatchKeyEvent",
            type=kind,
            key="Enter",
            code="Enter",
            windowsVirtualKeyCode=13,
            text="\r",
        )
    assert page.run("document.querySelector('[data-method=kl]').ariaPressed") == "false"


def test_domain_text_and_share_change_what_is_shown(page):
    title = "document.querySelector('[data-figure=frontier]').textContent"
    tables = (
        "[...document.querySelectorAll('.view')].filter(one => !one.hidden).map(one => "
        "[one.dataset.domain, one.dataset.text])"
    )
    assert "medmcqa" in page.run(title) and page.run(tables) == [["medmcqa", "wiki"]]
    click(page, "[data-choose=domain][data-value=sciq]")
    click(page, "[data-choose=text][data-value=news]")
    assert "sciq" in page.run(title) and page.run(tables) == [["sciq", "news"]]
    click(page, "#equal [data-choose=share][data-value='50 %']")
    assert "not reached" in page.run("document.querySelector('[data-figure=equal]').textContent")
    ticks = (
        "[...document.querySelectorAll('[data-figure=frontier] .xtick')]"
        ".map(one => Number(one.textContent))"
    )
    near = page.run(ticks)
    click(page, "[data-choose=axis][data-value=all]")
    assert max(page.run(ticks)) >= 0.3 <= max(near)  # the farthest point is on plain's own frontier
    click(page, "[data-choose=axis][data-value=log]")
    scaled = page.run(ticks)
    assert min(scaled) > 0 and scaled[-1] / scaled[0] >= 5 and not page.problems


def test_hovering_tells_settings_seeds_and_numbers(page):
    page.run("document.querySelector('#frontier').scrollIntoView()")
    spot = page.run("""(() => {
        const traces = document.querySelectorAll('[data-figure=frontier] .trace');
        const points = [...traces].at(-1).querySelectorAll('.point');
        const box = points[points.length - 1].getBoundingClientRect();
        return [box.x + box.width / 2, box.y + box.height / 2]; })()""")
    page.send("Input.dispatchMouseEvent", type="mouseMoved", x=spot[0], y=spot[1])
    page.run("new Promise(done => setTimeout(done, 400))")
    told = page.run("document.querySelector('[data-figure=frontier] .hover').textContent")
    assert "hold" in told and "3 seeds" in told and "strength 10" in told and "±" in told


def test_tables_sort_by_number_with_what_was_not_measured_last(page):
    column = (
        "index => [...document.querySelectorAll('#equal .view:not([hidden]) tbody tr')]"
        ".map(row => row.cells[index].dataset.value ?? null)"
    )
    button = "#equal .view:not([hidden]) th:nth-child(3) button"
    click(page, button)
    rising = page.run(f"({column})(2)")
    known = [float(value) for value in rising if value is not None]
    assert len(known) == 7 and known == sorted(known) and rising[-1] is None
    assert (
        page.run(f"document.querySelector({json.dumps(button)}).closest('th').ariaSort")
        == "ascending"
    )
    click(page, button)
    falling = page.run(f"({column})(2)")
    assert falling[:-1] == rising[:-1][::-1] and falling[-1] is None
    click(page, "#equal .view:not([hidden]) th:first-child button")
    names = page.run(
        "[...document.querySelectorAll('#equal .view:not([hidden]) tbody tr')].map(row => "
        "row.cells[0].textContent.trim())"
    )
    assert names == sorted(names, key=str.casefold)


def test_copying_gives_csv_with_whole_numbers_and_errors(page):
    page.send(
        "Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"]
    )
    page.run(
        "window.copied = []; const write = navigator.clipboard.writeText.bind(navigator.clipboard);"
        "navigator.clipboard.writeText = text => { copied.push(text); return write_report(text); }"
    )
    page.run(
        "document.querySelectorAll('#runs tbody td').forEach(cell => { if (cell.textContent === "
        "'sciq') cell.textContent = '=1+1, \"x\"'; })"
    )
    click(page, "#runs .copy")
    rows = list(csv.DictReader(io.StringIO(page.run("copied[0]"))))
    first = comparison()["runs"][0]["points"][0]
    assert len(rows) == 2 * 8 * 3 * 4 - 3
    assert rows[0]["method"] == "plain LoRA" and rows[0]["seed"] == "1"
    assert (
        float(rows[0]["learning"]) == first["learning"]["nats"]
        and float(rows[0]["learning, standard error"]) == 0.02
    )
    failed = next(row for row in rows if "out of memory" in row["status"])
    assert failed["learning"] == "" and failed["energy"] == ""
    assert (
        rows[-1]["domain"] == '\'=1+1, "x"'
        and page.run("document.querySelector('#runs .copied').textContent") == "copied"
    )


def test_it_prints_with_every_section_and_without_controls(page):
    printed = page.send("Page.printToPDF", preferCSSPageSize=False)
    assert len(printed["data"]) > 50_000
    page.send("Emulation.setEmulatedMedia", media="print")
    try:
        assert page.run("getComputedStyle(document.querySelector('#theme')).display") == "none"
        assert page.run("document.documentElement.scrollWidth <= innerWidth")
    finally:
        page.send("Emulation.setEmulatedMedia", media="")


@pytest.mark.parametrize("width", WIDTHS)
def test_no_width_overflows_in_either_theme(chromium, page_file, width):
    chromium.size(*WIDTHS[width][:2], phone=WIDTHS[width][2])
    chromium.system_theme("light")
    chromium.open(page_file)
    inks = []
    for theme, ground in (("light", "rgb(255, 255, 255)"), ("dark", "rgb(20, 23, 26)")):
        chromium.system_theme(theme)
        chromium.run("new Promise(done => setTimeout(done, 300))")
        assert chromium.run("getComputedStyle(document.body).backgroundColor") == ground
        assert chromium.run("document.documentElement.scrollWidth <= innerWidth")
        inks.append(
            chromium.run(
                "getComputedStyle(document.querySelector('[data-figure=equal] .ytick')).fill"
            )
        )
    assert inks[0] != inks[1] and quiet(chromium), (inks, chromium.problems, chromium.requests)
    click(chromium, "#theme")  # back to light, against the system
    assert chromium.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert chromium.run("document.querySelector('#theme').textContent") == "Dark"


def test_text_of_the_data_stays_text_and_long_words_fit_a_phone(chromium, tmp_path):
    made = comparison()
    evil = (
        "</script><img src=x onerror='document.title=1'><script>document.title=1</script><a "
        "href='https://example.org'>x</a>"
    )
    made["title"] = made["samples"][0]["prompt"] = made["samples"][0]["outputs"]["base"] = made[
        "verdict"
    ][0] = evil
    made["methods"][1]["label"] = made["runs"][0]["error"] = evil
    made["model"] = made["verdict"][1] = made["samples"][0]["outputs"]["plain"] = made["methods"][
        2
    ]["label"] = "supercalifragilistic" * 12
    chromium.size(*WIDTHS["phone"][:2], phone=True)
    chromium.open(write_report(completed(made), tmp_path / "evil.html"))
    assert quiet(chromium), (chromium.problems, chromium.requests)
    assert chromium.run("document.querySelectorAll('img, main section a, .figure a').length") == 0
    assert (
        chromium.run("document.title") == evil
        and chromium.run("document.querySelector('h1').textContent") == evil
    )
    assert chromium.run("document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_run_with_a_budget_shows_its_figures(chromium, tmp_path, theme):
    run = {
        **RUN,
        "configuration": {**RUN["configuration"], "budget": "1%"},
        "verdict": "met",
        "budget": kept_budget(),
    }
    (tmp_path / "run.json").write_text(json.dumps(run))
    chromium.system_theme(theme)
    chromium.size(1200, 900)
    chromium.problems.clear()
    chromium.open(write_report(load_contents(tmp_path), tmp_path / "report.html"))
    drawn = chromium.run(
        "[...document.querySelectorAll('.figure')].map(one => [one.dataset.figure, "
        "one.querySelectorAll('svg.chart').length > 0])"
    )
    assert drawn == [[name, True] for name in ("trade", "control", "curves", "movement")] and quiet(
        chromium
    ), chromium.problems
    assert chromium.run("document.querySelectorAll('[data-figure=trade] .trace').length") == 2
    assert "budget 1%" in chromium.run("document.querySelector('[data-figure=trade]').textContent")
