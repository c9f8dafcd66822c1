"Renders README.md and README.zh-CN.md from the front pages in nbs: python tests/readme.py"
import json
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = {"README.md": "index.ipynb", "README.zh-CN.md": "index.zh-CN.ipynb"}


def cells(page: str) -> list[tuple[str, str, list]]:
    "Type, source and outputs of each cell of a front page."
    notebook = json.loads((ROOT/"nbs"/page).read_text(encoding="utf-8"))
    return [(cell["cell_type"], "".join(cell["source"]), cell.get("outputs", [])) for cell in notebook["cells"]]


def output_text(output: dict) -> str:
    "What an output of a cell says as text."
    return "".join(output.get("text") or output.get("data", {}).get("text/plain", ""))


def readme(page: str = "index.ipynb") -> str:
    "A front page as Markdown: without hidden cells and code, outputs as text, links as seen from the top folder."
    parts = []
    outputs = iter([out for kind, _, out in cells("index.ipynb") if kind == "code"]) # one run for both languages
    for kind, source, _ in cells(page):
        out = next(outputs) if kind == "code" else []
        if source.startswith("#| hide"): continue
        if kind == "markdown": parts.append(source)
        elif not source.startswith("#| echo: false"): parts.append(f"```python\n{source}\n```")
        text = "".join(map(output_text, out))
        if text: parts.append("\n".join(f"    {line}" for line in text.rstrip().splitlines()))
    top = {notebook: name for name, notebook in PAGES.items()}
    def link(match): return f"]({top.get(match[1], 'nbs/' + match[1])})"
    return re.sub(r"\]\((?!http)([\w./-]+)\)", link, "\n\n".join(parts)) + "\n"


if __name__ == "__main__":
    for name, page in PAGES.items(): (ROOT/name).write_text(readme(page), encoding="utf-8")
