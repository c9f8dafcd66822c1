"The notebooks in Jupyter as it is used: run by its own command, and in JupyterLab in a browser."
import json
import os
import shutil
import subprocess
import time

import pytest
from browser import tab
from conftest import ROOT
from test_project import JUPYTER, LAB, RUN

IN_LAB = f"tutorials/{LAB}.ipynb"
ENV = {k: v for k, v in os.environ.items() if k not in ("TQDM_DISABLE", "MPLBACKEND")} # bars and pictures as they are


@pytest.fixture
def folder(tmp_path):
    "A copy of the notebooks without their outputs, and of what one of them copies."
    ignored = shutil.ignore_patterns(".ipynb_checkpoints", "__pycache__")
    for name in ("nbs", "seqgpt"): shutil.copytree(ROOT/name, tmp_path/name, ignore=ignored)
    shutil.copy(ROOT/"pyproject.toml", tmp_path)
    for path in (tmp_path/"nbs").rglob("*.ipynb"):
        nb = json.loads(path.read_text(encoding="utf-8"))
        for cell in nb["cells"]:
            if cell["cell_type"] == "code": cell["outputs"] = []
        path.write_text(json.dumps(nb, ensure_ascii=False), encoding="utf-8")
    return tmp_path/"nbs"


def shown(path):
    "What the cells of a notebook show, as pairs of kind and text; none of it an error."
    outputs = [o for c in json.loads(path.read_text(encoding="utf-8"))["cells"] for o in c.get("outputs", [])]
    assert not [o for o in outputs if o["output_type"] == "error"]
    parts = [part for o in outputs for part in (o.get("data") or {"text": o.get("text", "")}).items()]
    return [(kind, "".join(text)) for kind, text in parts]


PAGES = [pytest.param(p, marks=[] if p.stem == JUPYTER else [pytest.mark.slow]) for p in RUN]


@pytest.mark.parametrize("notebook", PAGES, ids=lambda p: p.stem)
def test_page_runs_under_jupyter(notebook, folder):
    copy = folder/notebook.relative_to(ROOT/"nbs")
    command = ["jupyter", "execute", "--inplace", str(copy)]
    result = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=3600)
    assert result.returncode == 0, result.stderr[-4000:]
    assert shown(copy)


SETTINGS = {
    "notebook-extension/tracker": {"windowingMode": "none"}, # all cells are in the page, not only those in view
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}


@pytest.fixture
def lab(folder, tmp_path):
    "The address of a JupyterLab in `folder`."
    for name, values in SETTINGS.items():
        path = tmp_path/"settings/@jupyterlab"/f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    port = 20_000 + os.getpid() % 10_000 # or one of the next: below those that systems hand out by chance
    command = ["jupyter", "lab", "--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1",
               f"--ServerApp.port={port}", f"--ServerApp.root_dir={folder}", "--IdentityProvider.token="]
    own = {"JUPYTER_CONFIG_DIR": str(tmp_path), "JUPYTER_RUNTIME_DIR": str(tmp_path/"runtime"),
           "JUPYTERLAB_SETTINGS_DIR": str(tmp_path/"settings"),
           "JUPYTERLAB_WORKSPACES_DIR": str(tmp_path/"workspaces")}
    until = time.monotonic() + 600
    with open(tmp_path/"lab.log", "w") as log, \
            subprocess.Popen(command, env=ENV | own, stdout=log, stderr=log) as server:
        about = tmp_path/f"runtime/jpserver-{server.pid}.json" # where it listens
        try:
            while not (about.exists() and about.read_text().endswith("}")):
                assert server.poll() is None and time.monotonic() < until, (tmp_path/"lab.log").read_text()
                time.sleep(0.1)
            yield f"http://127.0.0.1:{json.loads(about.read_text())['port']}/lab/"
        finally: server.terminate()


def run_all(page):
    "Runs the open notebook to its end."
    page.get_by_text("| Idle").wait_for() # the kernel is there
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    page.locator(".jp-OutputArea-output progress").first.wait_for() # while it trains
    prompts = page.locator(".jp-Notebook .jp-CodeCell .jp-InputArea-prompt") # not that of the last, collapsed cell
    page.wait_for_function("([last, n]) => last.textContent == `[${n}]:`",
                           arg=[prompts.last.element_handle(), prompts.count()], timeout=1_800_000)
    page.get_by_text("| Idle").wait_for()


def use_slider(page):
    "Another number of pixels gives another chart of the next token."
    slider = page.locator(".widget-slider", has_text="pixels")
    chart = page.locator(".widget-interact .jp-OutputArea img")
    slider.scroll_into_view_if_needed()
    before = chart.get_attribute("src")
    slider.locator(".noUi-handle").press("ArrowRight")
    page.wait_for_function("([chart, before]) => !chart.isConnected || chart.src != before",
                           arg=[chart.element_handle(), before])


# share of a canvas
INKED = ("c => c.getContext('2d').getImageData(0, 0, c.width, c.height)"
         ".data.filter((v, i) => i % 4 == 0 && v < 100).length / (c.width*c.height)")
HOOK = ((95, 18), (128, 10), (160, 18), (176, 50), (165, 85), (152, 112), (128, 124))


def use_canvas(page):
    "A hook drawn with the mouse is completed, and can be wiped out."
    canvas = page.locator(".jp-OutputArea canvas").last
    answer = page.locator(".jp-OutputArea-child:has(canvas) .jp-OutputArea img")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    def at(x, y): return box["x"] + x*box["width"]/256, box["y"] + y*box["height"]/128
    page.mouse.move(*at(83, 42))
    page.mouse.down()
    for point in HOOK: page.mouse.move(*at(*point), steps=2)
    page.mouse.up()
    page.mouse.move(*at(20, 100), steps=5) # the button is up: this draws nothing
    assert answer.count() == 0
    page.get_by_role("button", name="Go on").click()
    answer.wait_for() # by then the kernel has heard of every move
    page.wait_for_function(f"c => ({INKED})(c) > 0.1", arg=canvas.element_handle())
    assert canvas.evaluate(INKED) < 0.5
    page.wait_for_function("i => i.complete && i.naturalWidth > 300", arg=answer.element_handle())
    page.get_by_role("button", name="Clear").click()
    page.wait_for_function(f"c => ({INKED})(c) == 0", arg=canvas.element_handle())


def saved(response):
    path = response.request.url.partition("?")[0]
    return response.request.method == "PUT" and path.endswith(IN_LAB) and response.ok


@pytest.mark.parametrize("notebook", [LAB]) # so that `-k` finds it
def test_jupyterlab_runs_a_notebook_and_answers(notebook, lab, folder, chromium):
    with tab(chromium, viewport={"width": 1280, "height": 900}) as page:
        page.goto(f"{lab}tree/{IN_LAB}")
        run_all(page)
        page.locator(".jp-OutputArea-output table.dataframe").first.scroll_into_view_if_needed() # of the progress
        pictures = page.locator(".jp-OutputArea-output img")
        assert pictures.count() > 5 and all(p.evaluate("i => i.naturalWidth") > 100 for p in pictures.all())
        use_slider(page)
        use_canvas(page)
        with page.expect_response(saved): page.keyboard.press("Control+s")
        assert page.wrong == []
    assert any("<progress" in text for _, text in shown(folder/IN_LAB))
