"Packaging: everything that describes the package stands in settings.ini."
import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import setup

here = Path(__file__).parent
ini = ConfigParser(delimiters=["="])
ini.read(here/"settings.ini", encoding="utf-8")
cfg = ini["DEFAULT"]
def lines(key): return cfg[key].strip().splitlines()
extras = {name: lines(f"{name}_requirements") for name in ("onnx", "serve", "lora", "docs")}
extras["docs"] += extras["onnx"] + extras["serve"] # the pages of the library are made from its modules

setup(
    version=re.search(r'__version__ = "(.+)"', (here/"seqgpt/__init__.py").read_text())[1],
    description=cfg["description"], author=cfg["author"], license=cfg["license"],
    long_description=(here/"README.md").read_text(encoding="utf-8"), long_description_content_type="text/markdown",
    keywords=cfg["keywords"].split(), classifiers=lines("classifiers"), python_requires=f">={cfg['min_python']}",
    packages=["seqgpt"], package_data={"seqgpt": ["*.yaml", "exported/*"]}, include_package_data=False,
    install_requires=lines("requirements"),
    extras_require=extras | {"dev": sum(extras.values(), []) + lines("dev_requirements"),
                             "harness": lines("harness_requirements")},
    entry_points={"console_scripts": lines("console_scripts"), "nbdev": ["seqgpt=seqgpt._modidx:d"]},
)
