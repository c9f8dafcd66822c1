"Renders README.md from nbs/index.ipynb: python tests/readme.py"
import json
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def readme() -> str:
    "The front page as Markdown: hidden cells left out, outputs as text, links made to hold from the top folder."
    parts = []
    for cell in json.loads((ROOT/"nbs/index.ipynb").read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown": parts.append(source)
        elif not source.startswith("#| hide"):
            parts.append(f"```python\n{source}\n```")
            text = "".join("".join(o.get("text") or o.get("data", {}).get("text/plain", "")) for o in cell["outputs"])
            if text: parts.append("\n".join(f"    {line}" for line in text.rstrip().splitlines()))
    return re.sub(r"\]\((?!http|#)([\w./]+)\)", r"](nbs/\1)", "\n\n".join(parts)) + "\n"


if __name__ == "__main__": (ROOT/"README.md").write_text(readme(), encoding="utf-8")
