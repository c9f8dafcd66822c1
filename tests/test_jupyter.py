"The notebooks in Jupyter as it is used: run by its own command, and in JupyterLab in a browser."
import json
import os
import shutil
import socket
import subprocess
import time

import pytest
from browser import browser
from conftest import ROOT

NOTEBOOKS = sorted(str(p.relative_to(ROOT/"nbs")) for p in (ROOT/"nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
ENV = {k: v for k, v in os.environ.items() if k not in ("TQDM_DISABLE", "MPLBACKEND")} # bars and pictures as they are


@pytest.fixture
def folder(tmp_path):
    "A copy of the notebooks without their outputs."
    shutil.copytree(ROOT/"nbs", tmp_path/"nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    for path in (tmp_path/"nbs").rglob("*.ipynb"):
        nb = json.loads(path.read_text(encoding="utf-8"))
        for cell in nb["cells"]:
            if cell["cell_type"] == "code": cell["outputs"] = []
        path.write_text(json.dumps(nb), encoding="utf-8")
    return tmp_path/"nbs"


def shown(path):
    "What the cells of a notebook show, as pairs of kind and text; none of it an error."
    outputs = [o for c in json.loads(path.read_text(encoding="utf-8"))["cells"] for o in c.get("outputs", [])]
    assert not [o for o in outputs if o["output_type"] == "error"]
    return [(kind, "".join(text)) for o in outputs for kind, text in (o.get("data") or {"text": o.get("text", "")}).items()]


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_notebook_runs_under_jupyter(notebook, folder):
    result = subprocess.run(["jupyter", "execute", "--inplace", str(folder/notebook)], env=ENV, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-4000:]
    assert shown(folder/notebook)


@pytest.fixture
def lab(folder, tmp_path):
    "The address of a JupyterLab in `folder`."
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["jupyter", "lab", "--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}", f"--ServerApp.root_dir={folder}",
               "--IdentityProvider.token=", "--LabApp.news_url=", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    with open(tmp_path/"lab.log", "w") as log, subprocess.Popen(command, env=ENV | {"JUPYTER_CONFIG_DIR": str(tmp_path), "JUPYTERLAB_SETTINGS_DIR": str(tmp_path)}, stdout=log, stderr=log) as server:
        for _ in range(600):
            assert server.poll() is None, (tmp_path/"lab.log").read_text()
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0: break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/lab/"
        server.terminate()


def test_jupyterlab_runs_a_notebook_and_shows_progress_and_pictures(lab, folder):
    with browser(viewport={"width": 1280, "height": 900}) as page:
        page.goto(f"{lab}tree/04_training.ipynb")
        idle = page.get_by_text("| Idle")
        idle.wait_for(timeout=60_000)
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        page.get_by_text("| Busy").wait_for(timeout=60_000)
        page.locator(".jp-OutputArea-output progress").first.wait_for(timeout=120_000) # while it trains
        idle.wait_for(timeout=300_000)
        page.keyboard.press("Control+s")
        page.locator(".jp-OutputArea-output table.dataframe").first.scroll_into_view_if_needed()
        picture = page.locator(".jp-OutputArea-output img").first
        picture.scroll_into_view_if_needed()
        assert picture.evaluate("i => i.naturalWidth") > 100
        assert page.wrong == []
    kinds = shown(folder/"04_training.ipynb")
    assert any("<progress" in text for _, text in kinds) and any(kind == "image/png" for kind, _ in kinds)
