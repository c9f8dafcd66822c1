"Builds the documentation from the notebooks into _docs, offline: python docs/build.py, or make docs"
import ast
import importlib
import inspect
import re
import shutil
import sys
from dataclasses import is_dataclass
from functools import cache
from pathlib import Path
from textwrap import dedent
from unittest.mock import patch

import nbformat
from fastcore.docments import docments
from fastcore.nbio import mk_cell, read_nb, write_nb
from nbconvert import MarkdownExporter
from nbdev.config import get_config
from nbdev.serve import proc_nbs
from sphinx.cmd.build import build_main

from seqgpt.onnx_folder import write_page

ROOT = Path(__file__).parent.parent
TRY = 'Try one: <a href="digits.html">begin a digit</a>, and a small model continues it in your browser.'
STARS = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}


def row(*texts: str | None) -> str:
    "A row of a Markdown table; `<bos>` is a symbol, also where it is not marked as code."
    cells = [re.sub(r"(`[^`]*`)|<(\w+)>", lambda m: m[1] or f"`<{m[2]}>`", text or "") for text in texts]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def api(module: str, name: str) -> str:
    "What an exported function or class is, takes (a dataclass: its fields) and gives; as a directive for Sphinx."
    symbol = importlib.import_module(module)
    for part in name.split("."): symbol = getattr(symbol, part)
    kind = "class" if inspect.isclass(symbol) else "method" if "." in name else "function"
    fields = getattr(symbol, "model_fields", {}) # of pydantic
    source = symbol if kind != "class" or is_dataclass(symbol) or fields else vars(symbol).get("__init__")
    if source is None: return f"````{{py:class}} {name}\n{inspect.getdoc(symbol)}\n````"
    types = annotations(source)
    about = {n: field.description for n, field in fields.items()} or docments(source, args_kwargs=True)
    rows = [row("", "type", "default", ""), "|---|---|---|---|"]
    names = []
    for n, p in inspect.signature(source).parameters.items():
        if n == "self": continue
        names.append(STARS.get(p.kind, "") + n)
        rows.append(row(f"`{names[-1]}`", types.get(n), default(p), about.get(n)))
    if "return" in types or about.get("return"):
        rows.append(row("*returns*", types.get("return"), "", about.get("return")))
    table = rows if types or any(about.values()) else []
    head = f"````{{py:{kind}}} {name}({', '.join(names)})"
    return "\n".join([head, inspect.getdoc(symbol), "", *table, "````"])


def annotations(source) -> dict[str, str]:
    "The types of parameters and result, or of the fields of a class, as they are written in the code."
    node = ast.parse(dedent(inspect.getsource(source))).body[0]
    if inspect.isclass(source): typed = {f.target.id: f.annotation for f in node.body if isinstance(f, ast.AnnAssign)}
    else:
        typed = {a.arg: a.annotation for a in ast.walk(node.args) if isinstance(a, ast.arg)}
        typed["return"] = node.returns
    return {n: f"`{ast.unparse(annotation)}`" for n, annotation in typed.items() if annotation}


def default(parameter: inspect.Parameter) -> str:
    "The default of a parameter as code, or nothing."
    value = parameter.default
    if value is parameter.empty: return ""
    return f"`{getattr(value, '__name__', repr(value))}`".replace("<factory>", "{}")


def directives(source: str) -> tuple[dict, str]:
    "The lines `#| key: value` at the top of a code cell, and the rest of it."
    head = re.match(r"(#\|.*\n?)*", source)[0]
    return dict(re.findall(r"#\| *([\w-]+):? *(.*)", head)), source[len(head):]


def prepare(path: Path):
    "Rewrites a notebook that nbdev has processed for MyST-NB: directives become tags, `show_doc` what it shows."
    nb = read_nb(path)
    module = None
    cells = []
    entries = []
    for cell in nb.cells:
        if cell.cell_type == "code":
            directive, cell.source = directives(cell.source)
            cell.metadata |= shown_as(cell.source, directive)
            if "default_exp" in directive:
                module = f"seqgpt.{directive['default_exp']}"
                cell = mk_cell(f"```{{py:module}} {module}\n```", "markdown")
            elif shown := re.match(r"show_doc\((.+)\)", cell.source):
                entries.insert(0, mk_cell(api(module, shown[1]), "markdown")) # nbdev puts the last one first
                continue
        cells += [*entries, cell] if cell.source else entries
        entries = []
    nb.cells = cells
    write_nb(nb, path)


def shown_as(source: str, directive: dict) -> dict:
    "What MyST-NB reads in the metadata of a code cell: what is folded or hidden, and what a picture shows."
    imports = all(re.match(r"(from .+ )?import |[ )]|$", line) for line in source.splitlines())
    answers = directive.get("code-fold") == "true"
    tags = {"hide-cell": answers, "hide-input": imports, "remove-input": directive.get("echo") == "false"}
    metadata = {"tags": [tag for tag, wanted in tags.items() if wanted]}
    folded = "answers" if answers else "imports"
    if answers or imports:
        metadata["mystnb"] = {f"code_prompt_{do}": f"{do.title()} the {folded}" for do in ("show", "hide")}
    if "fig-alt" in directive: metadata["mystnb"] = {"image": {"alt": directive["fig-alt"]}}
    return metadata


def reading_order(pages: Path) -> list[str]:
    "The pages as a book, from the first: the last cell of each links to the next, in the end to the front page."
    order = []
    page = min(pages.glob("*.ipynb"))
    while page.name != "index.ipynb":
        order.append(str(page.relative_to(pages)))
        link = re.search(r"\]\(([\w./-]+\.ipynb)\)", read_nb(page).cells[-1].source)
        if not link: sys.exit(f"{order[-1]}: no link to the next page in its last cell.")
        page = (page.parent/link[1]).resolve()
    return order


def house(pages: Path) -> list[str]:
    "The pages for contributors, in the order of the plan of the library; its chapters are elsewhere."
    plan = "\n".join(cell.source for cell in read_nb(pages/"library/house.ipynb").cells)
    names = dict.fromkeys(["house.ipynb", *re.findall(r"\]\((\w+\.ipynb)\)", plan)])
    return [f"library/{name}" for name in names]


def parts(pages: Path) -> dict[str, list[str]]:
    "The parts of the book and their pages."
    order = reading_order(pages)
    library = house(pages)
    names = [str(p.relative_to(pages)) for p in sorted(pages.rglob("*.ipynb"))]
    return {
        "The library, step by step": [p for p in order if "/" not in p],
        "Tutorials": [p for p in order if "/" in p],
        "More": [name for name in names if name not in (*order, *library, "index.ipynb")],
        "The library, for contributors": library,
    }


def contents(caption: str, names: list[str]) -> str:
    "A part of the table of contents, which comes after the front page."
    return "\n".join(["```{toctree}", ":hidden:", f":caption: {caption}", *names, "```"])


def glossary(page: Path):
    "Turns the entries of the glossary into ones that other pages can refer to."
    nb = read_nb(page)
    for cell in nb.cells:
        if cell.cell_type != "markdown": continue
        entries = re.findall(r"^\*\*(.+?)\*\*: (.+)$", cell.source, re.M)
        lines = [f"{term}\n  {meaning}\n" for term, meaning in entries]
        if entries: cell.source = "\n".join(["````{glossary}", *lines, "````"])
    write_nb(nb, page)


def as_text(page: Path, exporter: MarkdownExporter) -> str:
    "A prepared page as Markdown; of a picture, what is seen."
    nb = nbformat.read(page, 4)
    nb.metadata["language_info"] = {"name": "python"}
    for cell in nb.cells:
        alt = cell.metadata.get("mystnb", {}).get("image", {}).get("alt")
        for output in cell.get("outputs", []):
            if "data" not in output: continue
            plain = f"[{alt}]" if "image/png" in output.data else output.data.get("text/plain", "")
            output.data = {"text/plain": plain}
    text = re.sub(r"!\[(.*?)\]\(.*?\)", r"[\1]", exporter.from_notebook_node(nb)[0])
    return re.sub(r"\]\(([\w./-]+)\.ipynb\)", r"](\1.md)", text)


def for_machines(pages: Path, names: list[str], out: Path):
    "`llms.txt`, and each page as Markdown next to its HTML (llmstxt.org)."
    lines = []
    exporter = MarkdownExporter()
    for name in names:
        text = as_text(pages/name, exporter)
        (out/name).with_suffix(".md").write_text(text, encoding="utf-8")
        title = re.search(r"^# (.+)", text, re.M)[1]
        about = re.search(r"^> (.+)", text, re.M)[1]
        lines.append(f"- [{title}]({name.removesuffix('ipynb')}md): {about}")
    (out/"llms.txt").write_text("\n".join(["# seqgpt", "", *lines, ""]), encoding="utf-8")


def build() -> int:
    "Builds the site into `_docs`; the exit code of Sphinx, which takes warnings for errors."
    with patch("nbdev.processors.get_config", cache(get_config)): # else it reads pyproject.toml for each cell
        pages = Path(proc_nbs(str(ROOT/"nbs"), n_workers=0, force=True)).resolve()
    book = parts(pages)
    made = pages/".build/html"
    for page in pages.rglob("*.ipynb"): prepare(page)
    glossary(pages/"glossary.ipynb")
    front = read_nb(pages/"index.ipynb")
    tables = [mk_cell(contents(*part), "markdown") for part in book.items() if part[1]]
    cells = [*front.cells[:2], mk_cell(TRY, "markdown"), *front.cells[2:], *tables]
    write_nb(front | {"cells": cells}, pages/"index.ipynb")
    settings = ["-c", str(ROOT/"docs"), "-d", str(pages/".build/doctrees")]
    code = build_main(["-W", "--keep-going", "-q", *settings, str(pages), str(made)])
    if code: return code
    write_nb(front, pages/"index.ipynb")
    write_page(ROOT/"docs/model/fast_int8.onnx", made/"digits.html")
    for_machines(pages, ["index.ipynb", *sum(book.values(), [])], made)
    shutil.rmtree(ROOT/"_docs", ignore_errors=True)
    made.rename(ROOT/"_docs")
    return 0


if __name__ == "__main__": sys.exit(build())
