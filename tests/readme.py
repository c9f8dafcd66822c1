"Renders README.md and README.zh-CN.md from the front pages in nbs: python tests/readme.py"
import json
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = {"README.md": "index.ipynb", "README.zh-CN.md": "index.zh-CN.ipynb"}


def cells(page: str) -> list[tuple[str, str, list]]:
    "Type, source and outputs of each cell of a front page."
    return [(c["cell_type"], "".join(c["source"]), c.get("outputs", [])) for c in json.loads((ROOT/"nbs"/page).read_text(encoding="utf-8"))["cells"]]


def readme(page: str = "index.ipynb") -> str:
    "A front page as Markdown: hidden cells and hidden code left out, outputs as text, links made to hold from the top folder."
    parts, outputs = [], iter([out for kind, _, out in cells("index.ipynb") if kind == "code"]) # one run for both languages
    for kind, source, _ in cells(page):
        out = next(outputs) if kind == "code" else []
        if source.startswith("#| hide"): continue
        if kind == "markdown": parts.append(source)
        elif not source.startswith("#| echo: false"): parts.append(f"```python\n{source}\n```")
        text = "".join("".join(o.get("text") or o.get("data", {}).get("text/plain", "")) for o in out)
        if text: parts.append("\n".join(f"    {line}" for line in text.rstrip().splitlines()))
    top = {notebook: name for name, notebook in PAGES.items()}
    return re.sub(r"\]\((?!http)([\w./-]+)\)", lambda m: f"]({top.get(m[1], f'nbs/{m[1]}')})", "\n\n".join(parts)) + "\n"


if __name__ == "__main__":
    for name, page in PAGES.items(): (ROOT/name).write_text(readme(page), encoding="utf-8")
