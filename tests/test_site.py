"The documentation is built without a warning, holds together, and works in a browser."
import http.server
import shutil
import threading
from functools import partial
from urllib.parse import unquote, urldefrag

import pytest
from browser import tab
from bs4 import BeautifulSoup
from conftest import ROOT

BUILD = """
import runpy
try: runpy.run_path("docs/build.py", run_name="__main__")
except SystemExit as e: assert not e.code, e.code
"""


@pytest.fixture(scope="module")
def site(forks, once):
    "The folder of the site, as `make docs` makes it. Warnings of Sphinx are errors."
    assert "docs:\n\tpython docs/build.py\n" in (ROOT/"Makefile").read_text()
    def site(folder):
        built = forks(cwd=ROOT, code=BUILD)
        assert built["passed"], built["printed"][-5000:]
        shutil.copytree(ROOT/"_docs", folder, dirs_exist_ok=True)
    return once(site)


@pytest.fixture(scope="module")
def pages(site):
    "The pages of the site, read: name to soup."
    files = [path for path in sorted(site.rglob("*.html")) if "_static" not in path.parts]
    def soup(path): return BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")
    return {str(path.relative_to(site)): soup(path) for path in files}


@pytest.fixture(scope="module")
def address(site):
    "Where the site is served."
    quiet = type("Quiet", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *a: None})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(quiet, directory=site)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def notebooks():
    "The pages made from notebooks."
    files = [p for p in (ROOT/"nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts]
    return sorted(str(p.relative_to(ROOT/"nbs").with_suffix(".html")) for p in files)


def test_each_notebook_is_a_page_with_its_outputs(pages):
    for name in notebooks():
        page = pages[name]
        assert page.find("h1") and page.select_one("article div.cell_output, article div.highlight"), name


def test_every_link_leads_somewhere(site, pages):
    anchors = {site/name: {tag["id"] for tag in page.find_all(id=True)} for name, page in pages.items()}
    for name, page in pages.items():
        path = site/name
        for tag, key in [(t, k) for k in ("href", "src") for t in page.find_all(**{k: True})]:
            url, anchor = urldefrag(tag[key])
            if url.startswith(("https://", "data:", "mailto:")): continue
            target = (path.parent/unquote(url.split("?")[0])).resolve() if url else path
            assert target.is_file(), f"{path}: {tag[key]}"
            if anchor and target in anchors: assert unquote(anchor) in anchors[target] or not url, f"{path}: {tag[key]}"


def test_symbols_in_backticks_are_links(pages):
    import importlib
    modules = [importlib.import_module(f"seqgpt.{p.stem}") for p in (ROOT/"seqgpt").glob("[a-z]*.py")]
    def named_so(module, name): return getattr(getattr(module, name), "__name__", "") == name
    names = {name for module in modules for name in module.__all__ if named_so(module, name)}
    linked = set()
    for name in notebooks():
        for code in pages[name].select("article code.literal"):
            text = code.get_text().split("(")[0]
            if text in names and not code.find_parent(["h1", "h2", "h3"]) and not code.find_parent("dl", class_="py"):
                assert code.find_parent("a"), f"{name}: {text}"
                linked.add(text)
    assert len(linked) > 20


def test_every_exported_symbol_has_a_table_and_its_source(site, pages):
    page = pages["00_tokenizer.html"]
    entry = page.find(id="seqgpt.tokenizer.make_tokenizer")
    assert "Symbol to id, or the path of a" in entry.find_next("table").get_text()
    source = entry.find("a", string="[source]")["href"]
    assert (site/source.split("#")[0]).is_file() and "make_tokenizer" in source


def test_every_picture_says_what_is_seen(pages):
    for name in notebooks():
        for picture in pages[name].select("article img"):
            alt = picture.get("alt", "")
            assert len(alt) > 10 and "_images/" not in alt, f"{name}: {picture['src']} {alt}"


def test_machines_find_the_pages(site):
    lines = (site/"llms.txt").read_text(encoding="utf-8").splitlines()
    named = [line.split("](")[1].split(")")[0] for line in lines if line.startswith("- ")]
    assert {name.removesuffix(".html") for name in notebooks()} == {name.removesuffix(".md") for name in named}
    for name in named: assert (site/name).read_text(encoding="utf-8").startswith("# ")


def test_pages_hold_together_in_a_browser(pages, address, chromium):
    broken = "[...document.images].filter(i => !i.complete || i.naturalWidth == 0).map(i => i.src)"
    wide = "document.documentElement.scrollWidth - innerWidth"
    # these are seen in both themes, the other notebooks in one of them in turn
    both = {"index.html", "03_model.html", "tutorials/inside.html"}
    widths = [1440, 360]
    with tab(chromium, viewport={"width": 1440, "height": 900}) as page:
        for k, theme in enumerate(("light", "dark")):
            page.emulate_media(color_scheme=theme)
            for name in sorted({*notebooks()[k::2]} | both):
                page.goto(address + name)
                assert page.evaluate("document.documentElement.dataset.theme") == theme
                for width in widths:
                    page.set_viewport_size({"width": width, "height": 900})
                    page.wait_for_function("width => innerWidth == width", arg=width)
                    assert page.evaluate(wide) <= 0, f"{name} is wider than {width} pixels"
                widths.reverse() # the next page is laid out at this width first
                assert page.evaluate(broken) == [], name
        page.set_viewport_size({"width": 360, "height": 900})
        for name in sorted(pages.keys() - {*notebooks()}): # sources and indexes too
            page.goto(address + name)
            assert page.evaluate(wide) <= 0, f"{name} is wider than a phone"
        assert both <= {*notebooks()} and page.wrong == []


def test_menus_open_on_a_phone(address, chromium):
    with tab(chromium, viewport={"width": 360, "height": 800}) as page:
        page.goto(address + "03_model.html")
        page.locator("button.primary-toggle:visible").click()
        page.get_by_role("link", name="Glossary").click()
        page.wait_for_url("**/glossary.html")
        page.goto(address + "03_model.html")
        page.locator("button.secondary-toggle:visible").click()
        page.get_by_role("link", name="Exercises").click()
        page.wait_for_url("**/*#exercises")
        assert page.wrong == []


def test_answers_are_folded(pages):
    for name in notebooks():
        exercises = pages[name].find("section", id="exercises")
        if not exercises: continue
        assert "Show the answers" in exercises.select_one("details.hide").get_text(), name
        assert not [out for out in exercises.select("div.cell_output") if not out.find_parent("details")], name


def test_search_and_copy_and_theme(address, chromium):
    allowed = ["clipboard-read", "clipboard-write"]
    with tab(chromium, viewport={"width": 1440, "height": 900}, permissions=allowed) as page:
        page.goto(address)
        page.keyboard.press("Control+k")
        page.locator("input[type=search]:focus").wait_for()
        page.keyboard.type("perplexity")
        page.keyboard.press("Enter")
        page.wait_for_selector("#search-results li a[href*='06_evaluation.html']")
        page.wait_for_load_state("networkidle") # it shows a piece of each page found
        page.goto(address + "00_tokenizer.html")
        cell = page.locator("div.highlight", has_text="vocab = {").first
        cell.hover()
        cell.locator("button.copybtn").click()
        page.wait_for_function("text => navigator.clipboard.readText().then(copied => copied.trim() == text)",
                               arg=cell.locator("pre").inner_text().strip())
        page.locator("button.theme-switch-button:visible").click()
        page.get_by_text("Dark", exact=True).click()
        page.locator("a.right-next").click()
        page.wait_for_url("**/01_data.html")
        assert page.evaluate("document.documentElement.dataset.theme") == "dark"
        assert page.wrong == []


def test_a_model_draws_on_the_site(address, chromium):
    with tab(chromium, viewport={"width": 360, "height": 800}, has_touch=True) as page:
        page.goto(address)
        page.get_by_role("link", name="begin a digit").click()
        page.get_by_role("status").filter(has_text="Ready.").wait_for()
        page.context.set_offline(True) # no server any more
        page.get_by_role("button", name="Clear").tap()
        box = page.get_by_label("Drawing of 16 by 16 pixels").bounding_box()
        x = box["x"] + box["width"]/2
        for y in (0.1, 0.2, 0.3, 0.4): page.touchscreen.tap(x, box["y"] + box["height"]*y)
        page.get_by_label("Temperature").fill("0")
        page.get_by_role("button", name="Continue").tap()
        page.get_by_role("status").filter(has_text="Done").wait_for()
        def symbols(child): return page.evaluate(f"document.getElementById('tokens').{child}.textContent").split()
        given = symbols("firstChild")
        drawn = symbols("lastChild")
        # each pixel once, and the end after the last
        assert [s[:6] for s in given + drawn] == [f"r{r:02}c{c:02}" for r in range(16) for c in range(16)]
        assert len(given) == 128 and "r02c08g1" in given and "g1" in {s[6:] for s in drawn}
        assert page.wrong == []
