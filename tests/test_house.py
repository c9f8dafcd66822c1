"Modules are short, tell one story each, and import only from those before them in the plan."
import ast
import json
import re
from collections import defaultdict

import pytest
from conftest import ROOT

MODULES = sorted(p for p in (ROOT/"seqgpt").glob("*.py") if p.stem not in ("__init__", "_modidx"))
CODE = [*MODULES, *(ROOT/"tests").glob("*.py"), *(ROOT/"benchmarks").glob("*.py"), *(ROOT/"docs").glob("*.py")]
FILES = [p for pattern in ("seqgpt/*.yaml", "seqgpt/exported/*.py", "seqgpt/exported/*.js", "seqgpt/exported/*.html",
                           "docs/static/*.css", "docs/templates/*.html", "nbs/tutorials/scale/*", "pyproject.toml",
                           "settings.ini", "Dockerfile") for p in sorted(ROOT.glob(pattern))]
PAGES = sorted(p for p in (ROOT/"nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)


def plan() -> list[str]:
    "The pages of the plan, in its order; each exports a module."
    cells = json.loads((ROOT/"nbs/library/house.ipynb").read_text(encoding="utf-8"))["cells"]
    table, = ("".join(c["source"]) for c in cells if "| module |" in "".join(c["source"]))
    return re.findall(r"\| \[\w+\]\(([\w./]+)\.ipynb\)", table)


def exported(page: str) -> str:
    "The module that a page exports."
    cells = json.loads((ROOT/f"nbs/library/{page}.ipynb").read_text(encoding="utf-8"))["cells"]
    name, = re.findall(r"^#\| default_exp (\w+)", "\n".join("".join(c["source"]) for c in cells), re.M)
    return name


def imported(module) -> set[str]:
    "The modules of the package that a module imports, inside functions too."
    found = set()
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import): found |= {a.name for a in node.names if a.name.startswith("seqgpt.")}
        if isinstance(node, ast.ImportFrom):
            module = f"seqgpt.{node.module or ''}".rstrip(".") if node.level else node.module
            found |= {f"seqgpt.{a.name}" for a in node.names} if module == "seqgpt" else {module}
    names = {p.stem for p in MODULES}
    return {name.split(".")[1] for name in found if name.startswith("seqgpt.")} & names


def test_the_plan_has_every_module_once_and_chapters_in_their_order():
    order = [exported(page) for page in plan()]
    assert sorted(order) == [p.stem for p in MODULES]
    chapters = [page for page in plan() if page.startswith("../")]
    assert chapters == sorted(chapters)


@pytest.mark.parametrize("module", MODULES, ids=lambda p: p.stem)
def test_imports_run_one_way(module):
    order = [exported(page) for page in plan()]
    before = order[:order.index(module.stem)]
    assert imported(module) <= set(before)


@pytest.mark.parametrize("module", MODULES, ids=lambda p: p.stem)
def test_a_module_is_short(module):
    assert len(module.read_text(encoding="utf-8").splitlines()) <= 300


def functions(source: str):
    "Name and lines of each function in a piece of code."
    for node in ast.walk(ast.parse(re.sub(r"^(\s*)[%!].*", r"\1pass", source, flags=re.M))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef): yield node.name, node.end_lineno - node.lineno + 1


@pytest.mark.parametrize("path", [*CODE, *PAGES], ids=lambda p: str(p.relative_to(ROOT)))
def test_functions_are_short(path):
    text = path.read_text(encoding="utf-8")
    sources = [text]
    if path.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        sources = ["".join(c["source"]) for c in cells if c["cell_type"] == "code" and not c["source"][:1] == ["%%"]]
    assert {name: n for source in sources for name, n in functions(source) if n > 45} == {}


@pytest.mark.parametrize("path", [*MODULES, *FILES], ids=lambda p: str(p.relative_to(ROOT)))
def test_lines_are_short(path):
    "What ruff does not see, or not of modules; nbdev writes `__all__`."
    text = re.sub(r"^__all__ = \[.*?\]$", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    assert [line for line in text.splitlines() if len(line) > 120] == []


def code_cells(page) -> list[str]:
    "The code on a page."
    cells = json.loads(page.read_text(encoding="utf-8"))["cells"]
    return ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]


def test_a_public_name_means_one_thing():
    "No two modules define the same name."
    modules = defaultdict(list)
    for module in MODULES:
        names, = re.findall(r"^__all__ = (\[.*?\])$", module.read_text(encoding="utf-8"), re.M | re.S)
        for name in ast.literal_eval(names): modules[name].append(module.stem)
    assert {name: where for name, where in modules.items() if len(where) > 1} == {}


@pytest.mark.parametrize("page", sorted((ROOT/"nbs/library").glob("*.ipynb")), ids=lambda p: p.stem)
def test_definitions_are_shown_before_the_next(page):
    "A page of the library has no two cells of definitions without a cell between them that shows the first."
    found = []
    previous = ""
    for code in code_cells(page):
        both = [re.search(r"^(@|def |class |async def )", c, re.M) and "#| export" in c for c in (previous, code)]
        if all(both): found.append(code)
        previous = code
    assert found == []


@pytest.mark.parametrize("path", [*MODULES, *PAGES], ids=lambda p: str(p.relative_to(ROOT)))
def test_only_tests_mock(path):
    assert "unittest.mock" not in path.read_text(encoding="utf-8")


# Where a library has no public way, one place reaches into it, says why, and has a test of its own
PRIVATE = {
    ("cpu", "small_batch_linear"): {"_linear_pointwise"}, # test_generation.py::test_onednn_multiplies_as_addmm_does
    ("data", "column"): {"_indices"}, # test_data.py::test_a_column_of_selected_rows_has_their_values
    ("trainer", "_load_from_checkpoint"): {"_load_from_checkpoint"}, # test_processes.py::test_weights_are_loaded_by_us
}
PUBLIC = {"_replace", "_asdict", "_fields", "_repr_html_", "_exit"} # documented, in spite of their names


def is_private(name: str) -> bool: return name.startswith("_") and not name.endswith("__") and name not in PUBLIC


def private_names(node) -> set[str]:
    "Attributes, names of methods and imports in a piece of code that begin with an underscore."
    found = set()
    for part in ast.walk(node):
        if isinstance(part, ast.Attribute | ast.FunctionDef): found.add(getattr(part, "attr", None) or part.name)
        if isinstance(part, ast.ImportFrom): found |= {*(part.module or "").split("."), *(a.name for a in part.names)}
        if isinstance(part, ast.Import): found |= {n for a in part.names for n in a.name.split(".")}
    return {name for name in found if is_private(name)}


@pytest.mark.parametrize("module", [*MODULES, *sorted((ROOT/"seqgpt/exported").glob("*.py"))], ids=lambda p: p.stem)
def test_a_module_stays_out_of_the_private_parts_of_others(module):
    found = {}
    for node in ast.parse(module.read_text(encoding="utf-8")).body:
        names = private_names(node)
        if names: found[module.stem, getattr(node, "name", "module")] = names
    assert found == {place: names for place, names in PRIVATE.items() if place[0] == module.stem}
