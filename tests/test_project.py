"Notebooks run, and everything made from them is in step with them."
import ast
import builtins
import json
import re
import shutil
import subprocess
from configparser import ConfigParser

import pytest
import yaml
from conftest import ROOT
from readme import PAGES, cells, readme

import seqgpt

NOTEBOOKS = sorted((ROOT/"nbs").rglob("*.ipynb"))


RUN = [p for p in NOTEBOOKS if p.name != "index.zh-CN.ipynb"] # which has the cells of index.ipynb
# run each time as readers run them, the latter two in test_jupyter.py; all others are, on request
NBDEV = "00_tokenizer"
JUPYTER = "published_digits"
LAB = "inside"
BY_NBDEV = [pytest.param(p, marks=[] if p.stem == NBDEV else [pytest.mark.slow]) for p in RUN]


@pytest.mark.parametrize("notebook", [p for p in RUN if p.stem not in (NBDEV, JUPYTER, LAB)], ids=lambda p: p.stem)
def test_page_runs(notebook, forks):
    ran = forks(cwd=ROOT, page=str(notebook))
    assert ran["passed"], ran["printed"][-4000:]


@pytest.mark.parametrize("notebook", BY_NBDEV, ids=lambda p: p.stem)
def test_page_runs_under_nbdev_test(notebook):
    "In a process of its own, with the cells that make stored results again."
    command = ["nbdev-test", str(notebook), "--flags", "slow"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=3600)
    assert result.returncode == 0, result.stderr[-4000:]


def test_modules_are_exported_from_the_notebooks(tmp_path):
    ignored = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
    for name in ("nbs", "seqgpt"): shutil.copytree(ROOT/name, tmp_path/name, ignore=ignored)
    shutil.copy(ROOT/"pyproject.toml", tmp_path)
    subprocess.run(["nbdev-export"], cwd=tmp_path, check=True, timeout=120)
    modules = sorted(p.name for p in (ROOT/"seqgpt").glob("*.py"))
    assert modules == sorted(p.name for p in (tmp_path/"seqgpt").glob("*.py"))
    for name in modules:
        exported = (tmp_path/"seqgpt"/name).read_text()
        assert exported == (ROOT/"seqgpt"/name).read_text(), f"{name}: run nbdev-export"


def test_static_checks():
    "Security, unused names and likely bugs; pyproject.toml says what is asked, and why not more."
    command = ["ruff", "check", "--no-cache", "--output-format", "concise"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout + result.stderr


def test_every_promise_names_a_test_that_is_there():
    page = (ROOT/"nbs/tutorials/promises.ipynb").read_text(encoding="utf-8")
    file = None
    named = []
    for proof in re.findall(r"`(test_\w+\.py)?(?:::(test_\w+))?`", page):
        if not any(proof): continue
        file = proof[0] or file # `::name` is in the file of the one before
        named.append((file, proof[1]))
    assert len(named) > 40
    for file, name in named:
        text = (ROOT/"tests"/file).read_text(encoding="utf-8")
        assert not name or f"\ndef {name}(" in text, f"{file}::{name}"


def test_ci_runs_the_command_of_the_readme():
    assert (ROOT/".ci/run").read_text().strip().splitlines()[-1] in (ROOT/"README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", PAGES)
def test_readme_is_rendered_from_its_notebook(name):
    assert (ROOT/name).read_text(encoding="utf-8") == readme(PAGES[name]), "run python tests/readme.py"


BLOCKS = r"```.*?```"
SAME = { # the words between may come in another order
    "headings": r"^#+ ",
    "links and pictures": r"\]\((.+?)\)",
    "code": r"`.+?`",
    "numbers": r"\d+\.\d+|\d+(?= %)",
}


def without_blocks(text): return re.sub(BLOCKS, "", text, flags=re.S).replace("index.zh-CN.ipynb", "index.ipynb")


def test_front_pages_say_the_same_in_both_languages():
    english, chinese = (cells(page) for page in PAGES.values())
    assert [kind for kind, *_ in english] == [kind for kind, *_ in chinese]
    for (kind, here, _), (_, there, _) in zip(english, chinese):
        if kind == "code": assert here == there
        assert re.findall(BLOCKS, here, re.S) == re.findall(BLOCKS, there, re.S)
        here = without_blocks(here)
        there = without_blocks(there)
        for what, pattern in SAME.items():
            found = sorted(re.findall(pattern, here, re.M))
            assert found == sorted(re.findall(pattern, there, re.M)), f"{what}: {here[:80]}"


COLLAPSED = {"jupyter": {"source_hidden": True, "outputs_hidden": True}} # answers to exercises, input and output

@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_is_clean_and_has_outputs(notebook):
    nb = json.loads(notebook.read_text(encoding="utf-8"))
    assert set(nb["metadata"]) <= {"kernelspec"}
    code = [c for c in nb["cells"] if c["cell_type"] == "code"]
    for cell in nb["cells"]:
        expected = COLLAPSED if "#| code-fold: true" in cell["source"][0] else {}
        assert cell["metadata"] == expected, "run nbdev-clean; answers to exercises are collapsed, input and output"
    for cell in code:
        assert cell["execution_count"] is None, "run nbdev-clean"
        broken = any("it/s" in str(o) or o["output_type"] == "error" for o in cell["outputs"])
        assert not broken, "run TQDM_DISABLE=1 nbdev-test --save"
    def has_plot(source): return source.endswith(";") and not source.startswith(("#| hide", "#| export"))
    shown = [c for c in code if has_plot("".join(c["source"]))]
    assert any(c["outputs"] for c in code) and all(c["outputs"] for c in shown), "run nbdev-test --save"
    assert notebook.stat().st_size < 600_000


HIDDEN = re.compile(r"^#\| *(hide|echo: *false)", re.M)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_reader_who_copies_what_is_shown_lacks_no_name(notebook):
    "What a page shows uses no name that only a hidden cell imports or sets."
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    sources = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
    shown = "\n".join(s for s in sources if not HIDDEN.search(s) and not s.startswith("%%"))
    used = set()
    known = {*dir(builtins), "get_ipython"}
    for node in ast.walk(ast.parse(re.sub(r"^(\s*)[%!].*", r"\1pass", shown, flags=re.M))):
        if isinstance(node, ast.Name): (used if isinstance(node.ctx, ast.Load) else known).add(node.id)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef): known.add(node.name)
        elif isinstance(node, ast.arg): known.add(node.arg)
        elif isinstance(node, ast.ExceptHandler): known.add(node.name)
        elif isinstance(node, ast.alias): known.add(node.asname or node.name.split(".")[0])
    assert not used - known


def test_citation_and_licence_are_those_of_the_package():
    cited = yaml.safe_load((ROOT/"CITATION.cff").read_text(encoding="utf-8"))
    package = (ROOT/"settings.ini").read_text()
    assert {"cff-version", "message", "title", "authors"} <= cited.keys() and cited["cff-version"] == "1.2.0"
    assert cited["version"] == seqgpt.__version__ and f"license = {cited['license']}" in package
    assert "Apache License\n" in (ROOT/"LICENSE").read_text()
    assert f"author = {cited['authors'][0]['name']}" in package


def stored(name): return json.loads((ROOT/f"nbs/tutorials/results/{name}.json").read_text())


def test_results_on_the_front_page_are_the_stored_ones():
    front = (ROOT/"README.md").read_text(encoding="utf-8")
    digits = stored("published_digits")
    one = digits["test_best"][0]
    together = digits["test_together"][0]
    assert f"one model takes {one:.1f} and four together take {together:.1f}" in front
    best = stored("known_limits")["default"]
    assert best["metrics"]["perplexity_over_floor"] < 1.01 and best["metrics"]["accuracy_below_best"] < 0.005
    assert f"{best['tokens']/1e6:.0f} million tokens" in front
    assert abs(best["minutes"] - 150) < 15 and "two and a half hours on one core" in front
    classes = stored("classification")
    def mean(start, share): return f"{100*sum(classes['sweep'][start][share])/3:.1f}"
    pretrained = float(mean("language model", "0.05"))
    assert f"{pretrained:.0f} % rightly with 5 %" in front
    blank = float(mean("random weights", "0.05"))
    assert f"{blank:.0f} % when it starts" in front
    both = f"{mean('language model', '1.0')} % and {mean('random weights', '1.0')} %"
    assert f"{both} (means of three seeds)" in front
    assert f"{100*classes['digits']['accuracy']:.1f} %, as many as the SVM" in front
    assert f"within {100*classes['markov']['accuracy_below_best']:.1f} points" in front


# what the image is made from
IMAGE = {"seqgpt", "setup.py", "settings.ini", "pyproject.toml", "requirements.txt", "README.md"}

def test_dockerfile_is_in_step_with_the_package():
    lines = re.sub(r"\\\n", " ", (ROOT/"Dockerfile").read_text()).splitlines()
    steps = [line.partition(" ") for line in lines if line and line[0] != "#"]
    last = {word: rest for word, _, rest in steps}
    settings = ConfigParser(delimiters=["="])
    settings.read(ROOT/"settings.ini", encoding="utf-8")
    install, = re.findall(r"pip install .*", " && ".join(rest for word, _, rest in steps if word == "RUN"))
    extras, = re.findall(r"'\.\[(.+)\]'", install)
    assert {f"{e}_requirements" for e in extras.split(",")} <= settings["DEFAULT"].keys()
    assert "-c requirements.txt" in install
    versions = {rest.split()[0] for word, _, rest in steps if word == "FROM"}
    assert versions == {f"python:{settings['DEFAULT']['min_python']}-slim"} # requirements.txt is of this version
    sent = [line[1:] for line in (ROOT/".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert set(sent) >= IMAGE and all((ROOT/name).exists() for name in sent)
    assert last["USER"].split(":")[0].isdigit() and int(last["USER"].split(":")[0]) > 0
    command, *words = json.loads(last["ENTRYPOINT"])
    result = subprocess.run([command, words[0], "--help"], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    for flag in words[1::2]: assert f"{flag} " in result.stdout # each has a value
    port = words[words.index("--port") + 1]
    assert last["EXPOSE"] == port and f"127.0.0.1:{port}/" in last["HEALTHCHECK"]
    compile(json.loads(last["HEALTHCHECK"].partition("CMD ")[2])[2], "HEALTHCHECK", "exec")
