"""JupyterLab and the built book in a real browser: ``make test-browser``. Skipped where one of them is not there."""

import functools
import http.server
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest

from kafnb.notebooks import available
from kafnb.paths import home

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SITE = home() / "build" / "book"
try:
    import axe_playwright_python
    from playwright.sync_api import sync_playwright
except ImportError:
    sync_playwright = None

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: apt install chromium"),
    pytest.mark.skipif(sync_playwright is None, reason="no playwright: make book installs requirements-book.txt"),
]
needs_site = pytest.mark.skipif(not (SITE / "index.html").exists(), reason="the book is not built: make book")


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def site():
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=SITE))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


class Watched:
    """A page that notes errors on its console, answers that failed, and requests to other servers."""

    def __init__(self, browser, **options):
        self.context = browser.new_context(**options)
        self.page, self.faults = self.context.new_page(), []
        self.page.on("console", lambda m: self.faults.append(m.text) if m.type == "error" else None)
        self.page.on("pageerror", lambda e: self.faults.append(str(e)))
        self.page.on("response", lambda r: self.faults.append(f"{r.status} {r.url}") if r.status >= 400 else None)
        self.context.route("**/*", self._local)

    def _local(self, route):
        if route.request.url.startswith(("http://127.0.0.1", "data:", "blob:")):
            return route.continue_()
        self.faults.append(f"asked another server: {route.request.url}")
        return route.abort()


@pytest.fixture
def watched(browser, request):
    made = Watched(browser, **getattr(request, "param", {}))
    yield made
    made.context.close()


PHONE = {"viewport": {"width": 390, "height": 844}, "device_scale_factor": 2}
PAGES = ["index", "walk", "gallery", "glossary", "bibliography", "reference", "modules/kafnb.kaf"]


def overflow(page):
    return page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")


def violations(page):
    """What axe-core finds that is serious or critical: rule and the first element."""
    page.add_script_tag(path=Path(axe_playwright_python.__file__).parent / "axe.min.js")
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")["violations"]
    return [(v["id"], v["nodes"][0]["html"][:200]) for v in found if v["impact"] in ("serious", "critical")]


@needs_site
@pytest.mark.parametrize("watched", [PHONE], indirect=True)
def test_every_page_fits_a_phone_and_has_no_errors(watched, site):
    wide = {}
    for name in PAGES + available():
        watched.page.goto(f"{site}/{name}.html")
        watched.page.wait_for_load_state("networkidle")
        if overflow(watched.page) > 0:
            wide[name] = overflow(watched.page)
    assert not wide
    assert not watched.faults


@needs_site
@pytest.mark.parametrize("watched", [PHONE], indirect=True)
def test_the_check_for_overflow_can_fail(watched, site):
    watched.page.goto(f"{site}/index.html")
    watched.page.evaluate("document.body.insertAdjacentHTML('beforeend', '<div style=\"width: 700px\">wide</div>')")
    assert overflow(watched.page) > 0


@needs_site
@pytest.mark.parametrize(
    ("scheme", "names"),
    [("light", ["index", "gallery", "reference", "06_kernel_activation_functions", "12_vgg_evaluation"]),
     ("dark", ["index", "06_kernel_activation_functions"])],
)  # fmt: skip
def test_no_serious_accessibility_fault(browser, site, scheme, names):
    watched, found = Watched(browser, color_scheme=scheme, **PHONE), {}
    for name in names:
        watched.page.goto(f"{site}/{name}.html")
        watched.page.wait_for_load_state("networkidle")
        watched.page.wait_for_timeout(1600)  # book.js names what scrolls, once formulas are set
        if faults := violations(watched.page):
            found[name] = faults
    watched.context.close()
    assert not found


@needs_site
def test_the_accessibility_check_can_fail(watched, site):
    watched.page.goto(f"{site}/index.html")
    watched.page.evaluate("document.querySelector('article img').removeAttribute('alt')")
    assert "image-alt" in [rule for rule, _ in violations(watched.page)]


@needs_site
def test_search_finds_catastrophic_overfitting(watched, site):
    watched.page.goto(f"{site}/index.html")
    watched.page.fill("input[name=q]", "catastrophic overfitting")
    watched.page.press("input[name=q]", "Enter")
    watched.page.wait_for_selector("#search-results li a")
    links = watched.page.eval_on_selector_all("#search-results li a", "all => all.map(a => a.getAttribute('href'))")
    assert any("11_fast_adversarial_training" in link for link in links), links
    assert not watched.faults


@needs_site
def test_formulas_are_set_and_figures_numbered(watched, site):
    watched.page.goto(f"{site}/06_kernel_activation_functions.html")
    watched.page.wait_for_selector("mjx-container[display=true]")
    assert watched.page.locator("mjx-merror").count() == 0
    assert watched.page.locator("span.eqno").count() >= 3
    captions = watched.page.locator("article figcaption").all_inner_texts()
    assert len(captions) >= 8 and all(c.startswith("Figure ") for c in captions)
    assert not watched.faults


@needs_site
def test_every_picture_in_the_site_has_words():
    import re

    for page in SITE.glob("*.html"):
        for image in re.findall(r"<img [^>]*>", page.read_text()):
            assert re.search(r'alt="[^"]{12,}"', image), (page.name, image[:200])


# --- JupyterLab --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """JupyterLab on a copy of the notebooks; figures and trained models are this checkout's."""
    folder = tmp_path_factory.mktemp("lab")
    shutil.copytree(home() / "notebooks", folder / "notebooks", ignore=shutil.ignore_patterns(".*"))
    (folder / "figures").mkdir()
    shutil.copytree(home() / "figures", folder / "figures", dirs_exist_ok=True)
    if (home() / "results").is_dir():
        (folder / "results").symlink_to(home() / "results")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    package = str(Path(__file__).resolve().parents[1])
    environment = os.environ | {
        "KAFNB_HOME": str(folder),
        "PYTHONPATH": package,
        "JUPYTER_CONFIG_DIR": str(folder / "c"),
    }
    options = ["--no-browser", "--allow-root", f"--port={port}", "--IdentityProvider.token=", "--expose-app-in-browser",
               f"--notebook-dir={folder / 'notebooks'}", f"--LabApp.workspaces_dir={folder / 'w'}",
               f"--LabApp.user_settings_dir={folder / 's'}"]  # fmt: skip
    log = (folder / "lab.log").open("w")
    process = subprocess.Popen([sys.executable, "-m", "jupyterlab", *options], env=environment, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    for _ in range(120):
        try:
            urllib.request.urlopen(f"{url}/api", timeout=1)
            break
        except OSError:
            assert process.poll() is None, (folder / "lab.log").read_text()[-2000:]
            time.sleep(0.5)
    yield url
    process.terminate()
    process.wait(20)


@pytest.fixture(scope="module")
def desk(browser, lab):
    watched = Watched(browser, viewport={"width": 1300, "height": 900})
    watched.page.goto(f"{lab}/lab")
    ready = "window.jupyterapp && jupyterapp.commands.hasCommand('docmanager:open')"
    watched.page.wait_for_function(ready, timeout=60e3)
    watched.page.evaluate("jupyterapp.restored.then(() => true)")
    yield watched.page
    watched.context.close()


OPEN = """async name => {
  const panel = await jupyterapp.commands.execute('docmanager:open', {path: name + '.ipynb', factory: 'Notebook'});
  await panel.context.ready; await panel.revealed;
  window.panel = panel;
  return panel.content.widgets.length;
}"""
RUN = """async () => {
  await panel.sessionContext.ready;
  const done = await jupyterapp.commands.execute('notebook:run-all-cells');
  const faults = [];
  for (const cell of panel.content.widgets) {
    if (cell.model.type !== 'code') continue;
    if (!cell.model.executionCount) faults.push('not run: ' + cell.model.id);
    for (const o of cell.model.outputs.toJSON()) if (o.output_type === 'error') faults.push(o.ename + ': ' + o.evalue);
  }
  return faults;
}"""
CLOSE = "async () => { await panel.sessionContext.shutdown(); panel.dispose(); }"
PICTURE = """id => { const cell = panel.content.widgets.find(c => c.model.id === id);
  return cell.model.outputs.toJSON().map(o => (o.data || {})['image/png']).filter(Boolean).join().slice(0, 200000); }"""
SHOW = """async id => { const i = panel.content.widgets.findIndex(c => c.model.id === id);
  panel.content.activeCellIndex = i; await panel.content.scrollToItem(i, 'start');
  panel.content.widgets[i].node.setAttribute('data-test', id); }"""


def ask(desk, script, argument=None):
    """What an async script returns. The page itself holds the promise: chromium may collect one that only waits."""
    return desk.evaluate(f"argument => window.asked = ({script})(argument)", argument)


def test_jupyterlab_opens_every_notebook(desk):
    import nbformat

    for name in available():
        cells = len(nbformat.read(home() / "notebooks" / f"{name}.ipynb", 4).cells)
        assert ask(desk, OPEN, name) == cells, name
        ask(desk, CLOSE)


@pytest.mark.parametrize(("name", "cell"), [("00_start_here", "00-101"), ("06_kernel_activation_functions", "06-101")])
def test_all_cells_run_and_a_slider_changes_the_picture(desk, name, cell):
    desk.set_default_timeout(150e3)
    ask(desk, OPEN, name)
    assert ask(desk, RUN) == []
    ask(desk, SHOW, cell)
    place = f"[data-test='{cell}']"
    image = f'[...document.querySelectorAll("{place} .jp-OutputArea img")].at(-1)'
    handle = desk.locator(f"{place} .noUi-handle").last
    handle.scroll_into_view_if_needed()
    before = None  # the sliders draw once more of their own accord: only what comes after that is an answer
    while before != (before := (desk.evaluate(PICTURE, cell), desk.evaluate(f"{image}.src"))):
        desk.wait_for_timeout(2000)
    value, top = (float(handle.get_attribute(f"aria-value{end}")) for end in ("now", "max"))
    handle.focus()
    for _ in range(5):
        handle.press("ArrowUp" if value < top else "ArrowDown")
    assert float(handle.get_attribute("aria-valuenow")) != value
    desk.wait_for_function(f"before => ({PICTURE})('{cell}') !== before", arg=before[0], timeout=30e3)
    desk.wait_for_function(f"before => {image}.src !== before", arg=before[1], timeout=30e3)
    if folder := os.environ.get("KAFNB_SCREENSHOTS"):
        desk.screenshot(path=f"{folder}/lab_{name}.png")
    ask(desk, CLOSE)
