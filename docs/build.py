"Builds the documentation from the notebooks into _docs, offline: python docs/build.py, or make docs"
import ast
import importlib
import inspect
import re
import shutil
import sys
from dataclasses import is_dataclass
from pathlib import Path
from textwrap import dedent

from fastcore.docments import docments
from fastcore.nbio import mk_cell, read_nb, write_nb
from nbconvert import MarkdownExporter
from nbdev.serve import proc_nbs
from sphinx.cmd.build import build_main

ROOT = Path(__file__).parent.parent
STARS = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}


def row(*texts: str | None) -> str:
    "A row of a Markdown table."
    return "| " + " | ".join((text or "").replace("|", "\\|") for text in texts) + " |"


def api(module: str, name: str) -> str:
    "What an exported function or class is, takes (a dataclass: its fields) and gives; as a directive of Sphinx's Python domain."
    symbol = importlib.import_module(module)
    for part in name.split("."): symbol = getattr(symbol, part)
    kind = "class" if inspect.isclass(symbol) else "method" if "." in name else "function"
    source = symbol if kind != "class" or is_dataclass(symbol) else vars(symbol).get("__init__")
    if source is None: return f"````{{py:class}} {name}\n{inspect.getdoc(symbol)}\n````"
    node = ast.parse(dedent(inspect.getsource(source))).body[0]
    if kind == "class" and source is symbol: typed = {f.target.id: f.annotation for f in node.body if isinstance(f, ast.AnnAssign)}
    else: typed = {**{a.arg: a.annotation for a in ast.walk(node.args) if isinstance(a, ast.arg)}, "return": node.returns}
    types = {n: f"`{ast.unparse(annotation)}`" for n, annotation in typed.items() if annotation} # as they are written in the code
    about, rows, names = docments(source, args_kwargs=True), [row("", "type", "default", ""), "|---|---|---|---|"], []
    for n, p in inspect.signature(source).parameters.items():
        if n == "self": continue
        names.append(STARS.get(p.kind, "") + n)
        rows.append(row(f"`{names[-1]}`", types.get(n), "" if p.default is p.empty else f"`{p.default!r}`".replace("<factory>", "{}"), about.get(n)))
    if "return" in types or about.get("return"): rows.append(row("*returns*", types.get("return"), "", about.get("return")))
    return "\n".join([f"````{{py:{kind}}} {name}({', '.join(names)})", inspect.getdoc(symbol), "", *(rows if len(rows) > 2 else []), "````"])


def directives(source: str) -> tuple[dict, str]:
    "The lines `#| key: value` at the top of a code cell, and the rest of it."
    head = re.match(r"(#\|.*\n?)*", source)[0]
    return dict(re.findall(r"#\| *([\w-]+):? *(.*)", head)), source[len(head):]


def prepare(path: Path):
    "Rewrites a notebook that nbdev has processed for MyST-NB: directives become tags, `show_doc` what it shows."
    nb, module, cells = read_nb(path), None, []
    for cell in nb.cells:
        if cell.cell_type == "code":
            found, cell.source = directives(cell.source)
            imports = all(re.match(r"(from .+ )?import |[ )]|$", line) for line in cell.source.splitlines())
            tags = {"hide-input": found.get("code-fold") == "true" or imports, "remove-input": found.get("echo") == "false"}
            cell.metadata["tags"] = [tag for tag, wanted in tags.items() if wanted]
            if "fig-alt" in found: cell.metadata["mystnb"] = {"image": {"alt": found["fig-alt"]}}
            if "default_exp" in found:
                module = f"seqgpt.{found['default_exp']}"
                cell = mk_cell(f"```{{py:module}} {module}\n```", "markdown")
            elif shown := re.match(r"show_doc\((.+)\)", cell.source): cell = mk_cell(api(module, shown[1]), "markdown")
        if cell.source: cells.append(cell)
    nb.cells = cells
    write_nb(nb, path)


def reading_order(pages: Path) -> list[str]:
    "The pages as a book, from the first: the last cell of each links to the next, that of the last to the front page."
    order, page = [], min(pages.glob("*.ipynb"))
    while page.name != "index.ipynb":
        order.append(str(page.relative_to(pages)))
        target = re.search(r"\]\(([\w./-]+\.ipynb)\)", read_nb(page).cells[-1].source)[1]
        page = (page.parent/target).resolve()
    return order


def contents(pages: Path) -> str:
    "The table of contents, to stand behind the front page: the library, the tutorials, and what is not part of the walk."
    order = reading_order(pages)
    rest = sorted(str(p.relative_to(pages)) for p in pages.rglob("*.ipynb") if p.name != "index.ipynb" and str(p.relative_to(pages)) not in order)
    parts = {"The library, step by step": [p for p in order if "/" not in p], "Tutorials": [p for p in order if "/" in p], "More": rest}
    return "\n\n".join("\n".join(["```{toctree}", ":hidden:", f":caption: {caption}", *names, "```"]) for caption, names in parts.items() if names)


def glossary(page: Path):
    "Turns the entries of the glossary into ones that other pages can refer to."
    nb = read_nb(page)
    for cell in nb.cells:
        entries = re.findall(r"^\*\*(.+?)\*\*: (.+)$", cell.source, re.M) if cell.cell_type == "markdown" else []
        if entries: cell.source = "\n".join(["````{glossary}", *(f"{term}\n  {meaning}\n" for term, meaning in entries), "````"])
    write_nb(nb, page)


def for_machines(pages: Path, out: Path):
    "`llms.txt`, and each page as Markdown beside its HTML (llmstxt.org)."
    lines = []
    for name in ["index.ipynb", *reading_order(pages)]:
        text, _ = MarkdownExporter().from_filename(ROOT/"nbs"/name)
        (out/name).with_suffix(".md").write_text(re.sub(r"\]\(([\w./-]+)\.ipynb\)", r"](\1.md)", text), encoding="utf-8")
        title, about = (re.search(pattern, text, re.M)[1] for pattern in (r"^# (.+)", r"^> (.+)"))
        lines.append(f"- [{title}]({name.removesuffix('ipynb')}md): {about}")
    (out/"llms.txt").write_text("# seqgpt\n\n" + "\n".join(lines) + "\n", encoding="utf-8")


def build(out: Path = ROOT/"_docs") -> int:
    "Builds the site into `out`; the exit code of Sphinx, which takes warnings for errors."
    pages = Path(proc_nbs(str(ROOT/"nbs"), n_workers=0, force=True)).resolve()
    for page in pages.rglob("*.ipynb"): prepare(page)
    if (pages/"glossary.ipynb").exists(): glossary(pages/"glossary.ipynb")
    front = read_nb(pages/"index.ipynb")
    front.cells.append(mk_cell(contents(pages), "markdown"))
    write_nb(front, pages/"index.ipynb")
    made = pages/".build/html"
    code = build_main(["-W", "--keep-going", "-q", "-j", "auto", "-c", str(ROOT/"docs"), "-d", str(pages/".build/doctrees"), str(pages), str(made)])
    if code: return code
    for_machines(pages, made)
    shutil.rmtree(out, ignore_errors=True)
    made.rename(out)
    return 0


if __name__ == "__main__": sys.exit(build())
