"""Every page that the package writes, in a browser: on a phone and a desk, light and dark, by keyboard, and by axe-core."""

import contextlib
import os
import shutil
from pathlib import Path

import playwright.sync_api
import pytest
from axe_playwright_python.sync_playwright import Axe

from qbheat_jax import cli, compare, report
from qbheat_jax.compare import table
from qbheat_jax.report import comparison_page
from qbheat_jax.train import config_tables
from tests import workdirs

CHECKS = Path(__file__).with_name("page_checks.js")
BROWSERS = ("chromium-headless-shell", "chromium", "google-chrome")
ARGUMENTS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
PHONE = {"viewport": {"width": 375, "height": 812}, "device_scale_factor": 2, "is_mobile": True, "has_touch": True}
DESK = {"viewport": {"width": 1440, "height": 900}}
SCREENS = {"phone": PHONE, "desk": DESK}
SCHEMES = ("light", "dark")
WCAG = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"]
# Complete pages, and those of workdirs in which hardly anything is there yet.
PAGES = (
    "run", "run-begun", "analysis", "detection", "detection-without-images", "segmentation", "comparison",
    "comparison-begun", "runs", "neighbours",
)  # fmt: skip


# --- The pages and the browser ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """{name of PAGES: path}."""
    place = {name: tmp_path_factory.mktemp(name) for name in PAGES}
    workdirs.analyse_run(place["analysis"])
    shutil.copytree(place["analysis"], place["run"], dirs_exist_ok=True)
    workdirs.add_results(place["run"])
    workdirs.add_detectors(place["run"])
    workdirs.segmentation(place["run"] / "probe" / "seg-lin")
    workdirs.write_config(place["run-begun"], **{"quarter.placements": "all9"})
    pages = {"analysis": place["analysis"] / "analysis" / "index.html"}
    for name in ("run", "run-begun"):
        config = config_tables.from_json((place[name] / "config.json").read_text())
        pages[name] = report.write(place[name], workdirs.make_model(config), workdirs.make_images())
    for name, source in (("detection", "scenes:64"), ("detection-without-images", "coco:/no/such/folder")):
        workdirs.detector(place[name], source)
        pages[name] = report.write(place[name])
    workdirs.segmentation(place["segmentation"])
    pages["segmentation"] = report.write(place["segmentation"])
    plan = compare.read(workdirs.comparison_config(place["comparison"]))
    workdirs.compared(plan, place["comparison"])
    failures = {"masked/seed-0": "the loss is nan at step 2"}
    for name, failed in (("comparison", {}), ("comparison-begun", failures)):
        pages[name] = comparison_page.write(table.gather(plan, place[name], failed), place[name])
    pages["runs"] = workdirs.several(place["runs"]) / "index.html"
    assert cli.main(["runs", str(place["runs"]), "--page", str(pages["runs"])]) == 0
    pages["neighbours"] = workdirs.neighbours(place["neighbours"])
    return pages


def find_browser():
    """Path of a browser. Where there is none the test is skipped, and fails in CI."""
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        reason = f"no browser is installed: {', '.join(BROWSERS)}"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    return path


@pytest.fixture(scope="module")
def executable():
    return find_browser()


@pytest.fixture(scope="module")
def browser(executable, written):
    """One browser for all tests. Playwright's event loop runs while it is open, so all pages are written before."""
    with playwright.sync_api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=executable, args=ARGUMENTS)
        yield browser
        browser.close()


class Opened:
    """A page in a window of its own. `asked`: the addresses that it loads, data apart; `said`: console and errors."""

    def __init__(self, browser, path, screen):
        self.address, self.width = path.as_uri(), SCREENS[screen]["viewport"]["width"]
        self.asked, self.said = [], []
        self.context = browser.new_context(**SCREENS[screen])
        self.context.route("**/*", self._route)
        self.context.add_init_script(path=CHECKS)
        self.page = self.context.new_page()
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.goto(self.address)

    @staticmethod
    def _route(route):
        if route.request.url.startswith(("file:", "data:")):
            route.continue_()
        else:
            route.abort()

    def foreign(self):
        """Addresses that the page asked for and that are not its own file or data."""
        return [url for url in self.asked if url != self.address and not url.startswith("data:")]

    def unfold(self):
        self.page.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")


@pytest.fixture
def opened(browser):
    """Function (path, name of SCREENS) -> Opened."""
    with contextlib.ExitStack() as stack:

        def open_page(path, screen):
            window = Opened(browser, path, screen)
            stack.callback(window.context.close)
            return window

        yield open_page


# --- What is looked at -----------------------------------------------------------------------------------------------


def axe_faults(page):
    """Violations of WCAG 2 A and AA, a line each."""
    found = Axe().run(page, options={"runOnly": WCAG, "resultTypes": ["violations"]}).response["violations"]
    return [f"{rule['id']}: {node['failureSummary']}: {node['html'][:120]}" for rule in found for node in rule["nodes"]]


def sight_faults(window):
    """What is wrong with how a page looks in one colour scheme, a line each."""
    page = window.page
    window.unfold()
    return [
        *page.evaluate("(width) => checks.layout(width)", window.width),
        *page.evaluate("() => checks.images()"),
        *page.evaluate("() => checks.faint()"),
        *page.evaluate("() => checks.headless()"),
        *axe_faults(page),
    ]


def keyboard_faults(window):
    """What Tab does not reach, in the order of the page, or shows no outline on; and what no key operates."""
    page, faults = window.page, []
    window.unfold()
    stops = page.evaluate("() => checks.stops()")
    for n, stop in enumerate(stops):
        page.keyboard.press("Tab")
        focused, outlined = page.evaluate("() => checks.focused()")
        if focused != str(n):
            return [*faults, f"not reached: {stop['name']}"]
        if not outlined:
            faults.append(f"no outline: {stop['name']}")
    for n, stop in enumerate(stops):
        element = page.locator(f"[data-stop='{n}']")
        if not _operated(page, element, stop["kind"]):
            faults.append(f"not operated: {stop['name']}")
    return faults


def _operated(page, element, kind):
    """Whether keys do to an element what a mouse does."""
    if kind == "summary":
        unfolded = []
        for key in ("Enter", "Space"):
            element.press(key)
            unfolded.append(element.evaluate("(e) => e.parentElement.open"))
        return unfolded == [False, True]
    if kind == "scroll":
        element.press("ArrowRight")
        try:
            page.wait_for_function("(e) => e.scrollLeft > 0", arg=element.element_handle(), timeout=2000)
        except playwright.sync_api.TimeoutError:
            return False
    if kind == "jump":
        element.press("Enter")
        return element.evaluate("(e) => location.hash === e.hash && document.querySelector(':target') !== null")
    return kind != "unfocusable"


# --- Tests -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("screen", SCREENS)
@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_complete_readable_and_silent(opened, written, name, screen):
    window = opened(written[name], screen)
    for scheme in SCHEMES:
        window.page.emulate_media(color_scheme=scheme)
        assert sight_faults(window) == [], scheme
    assert window.foreign() == [] and window.said == []


@pytest.mark.parametrize("screen", SCREENS)
@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_operated_by_keyboard(opened, written, name, screen):
    assert keyboard_faults(opened(written[name], screen)) == []


WRONG = """<!DOCTYPE html><html><head><title>Wrong</title><meta name="viewport" content="width=device-width">
<style>:root { --line: #ddd } :focus-visible { outline: 2px solid blue }</style></head><body style="background: #fff"><main>
<div style="width: 2000px">far</div><div style="width: 3em; overflow: hidden; white-space: nowrap">longer than three</div>
<p style="color: #999">faint</p><img src="data:image/png;base64,AAAA" alt="torn"><img src="http://127.0.0.1:9/a.png" alt="">
<figure class="chart"><svg role="img" aria-label="a"><text y="20" style="fill: #999">t</text>
<path d="M0 0H9" fill="none" stroke="#ccc"/></svg></figure>
<i class="key" style="border: 2px solid #ccc"></i><table><tbody><tr><td>1</td></tr></tbody></table>
<a href="#nowhere">jump</a> <a href="#wrong" style="outline: none" id="wrong">here</a>
<div style="width: 99px; overflow-x: auto"><div style="width: 999px">rest</div></div>
<script>console.error("said"); addEventListener("load", () => { throw Error("thrown") })</script></main></body></html>"""


def test_what_is_wrong_is_found(opened, tmp_path):
    path = tmp_path / "wrong.html"
    path.write_text(WRONG)
    window = opened(path, "desk")
    found = " ".join(sight_faults(window))
    for fault in (
        "wide: the page", 'wide: <div style="width: 2000px', 'cut off: <div style="width: 3em', 'broken: <img src="data:',
        'broken: <img src="http:', "faint: 2.85: <text", "faint: 1.61: <path", "faint: 2.85: <p ", "html-has-lang: ",
        "color-contrast: ", "faint: 1.61: <i", "headless: <tr",
    ):  # fmt: skip
        assert fault in found
    assert window.foreign() == ["http://127.0.0.1:9/a.png"]
    assert any("said" in text for text in window.said) and any("thrown" in text for text in window.said)
    kinds = [(fault.partition(":")[0], fault.partition(">")[2][:4]) for fault in keyboard_faults(window)]
    assert kinds == [("no outline", "here"), ("not operated", "jump"), ("not operated", "<div")]


@pytest.mark.parametrize("ci, outcome", [("1", pytest.fail.Exception), ("", pytest.skip.Exception)])
def test_a_missing_browser_fails_in_ci_alone(monkeypatch, ci, outcome):
    monkeypatch.setenv("CI", ci)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(outcome):
        find_browser()
