"How Sphinx makes pages of the notebooks; docs/build.py calls it."
import os
import re
from pathlib import Path

from docutils import nodes
from sphinx.addnodes import desc_content, pending_xref
from sphinx.transforms.post_transforms import SphinxPostTransform

import seqgpt

ROOT = Path(__file__).parent.parent

project = "seqgpt"
author = "The seqgpt developers"
release = seqgpt.__version__
project_copyright = f"2026, {author}"
extensions = ["myst_nb", "sphinx.ext.viewcode", "sphinx_copybutton"]
exclude_patterns = [".build", "**.ipynb_checkpoints"]
add_module_names = False
toc_object_entries = False # the pages' own headings are enough

nb_execution_mode = "off" # the notebooks are tested, and store what they showed
nb_ipywidgets_js = {} # nothing from other hosts

html_theme = "sphinx_book_theme"
html_title = "seqgpt"
html_static_path = [str(ROOT/"docs/static")]
html_css_files = ["site.css"]
templates_path = ["templates"]
copybutton_selector = "div:not(.output) > div.highlight > pre" # code, not what it printed
html_favicon = str(ROOT/"docs/static/favicon.svg")
html_context = {"default_mode": "auto"}
html_show_sourcelink = html_copy_source = False
html_theme_options = {"use_download_button": False, "show_toc_level": 2, "home_page_in_toc": True}
if repository := os.environ.get("GITHUB_REPOSITORY"): # on a code host: a link from each page to its notebook
    html_theme_options |= {
        "repository_url": f"{os.environ['GITHUB_SERVER_URL']}/{repository}", "path_to_docs": "nbs",
        "use_repository_button": True, "use_source_button": True,
    }


def is_parameter(node) -> bool:
    "Whether this is the name of a parameter, in the description of the function that has it."
    place = node.parent
    while place and not isinstance(place, desc_content): place = place.parent
    return bool(place) and any(row[0].astext().lstrip("*") == node.astext() for row in place.findall(nodes.row))


class LinkNames(SphinxPostTransform):
    "Makes a link of every symbol of the library in backticks, and of every term of the glossary in italics."
    default_priority = 5 # before links are resolved

    def run(self):
        symbols = self.symbols()
        terms = {term for kind, term in self.env.domains["std"].objects if kind == "term"}
        for node in [*self.document.findall(nodes.literal), *self.document.findall(nodes.emphasis)]:
            if isinstance(node.parent, (nodes.reference, nodes.title, pending_xref)) or is_parameter(node): continue
            text = node.astext()
            if isinstance(node, nodes.literal): self.link(node, "py", "obj", symbols.get(re.sub(r"\(.*\)$", "", text)))
            else:
                forms = (text, text.lower(), text.lower().removesuffix("s"))
                self.link(node, "std", "term", next((form for form in forms if form in terms), None))

    def symbols(self) -> dict[str, str]:
        "Full names by what is written: seqgpt.data.collate is also meant by collate, but seqgpt.data not by data."
        symbols = {}
        for full in self.env.domains["py"].objects:
            symbols[full] = full
            if full.count(".") > 1: symbols.setdefault(full.split(".", 2)[2], full)
        return symbols

    def link(self, node, domain: str, kind: str, target: str | None):
        "Puts the node into a link to its target, if there is one."
        if not target: return
        link = pending_xref("", refdomain=domain, reftype=kind, reftarget=target, refexplicit=True,
                            refdoc=self.env.docname, refwarn=True)
        node.replace_self(link)
        link += node


def name_language(app, pagename, templatename, context, doctree):
    "Says of the Chinese page that it is Chinese."
    if pagename.endswith(".zh-CN"): context["language"] = "zh-CN"


def setup(app):
    app.add_post_transform(LinkNames)
    app.connect("html-page-context", name_language)
