"""Sphinx configuration: the API reference comes from the docstrings, every other page is Markdown."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

sys.path.insert(0, str(Path(__file__).parents[1]))

import crosskd

project = "crosskd"
author = "the crosskd developers"
project_copyright = "the crosskd developers"
release = version = crosskd.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build"]
myst_enable_extensions = ["colon_fence", "dollarmath", "deflist"]
myst_heading_anchors = 3

# Single backticks in docstrings name an object of the package; what isn't one is set as plain code.
default_role = "py:obj"
autodoc_default_options = {"members": True, "show-inheritance": True, "member-order": "bysource"}
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 88
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

html_theme = "furo"
html_title = f"crosskd {release}"
html_static_path: list[str] = []


def resolve_short_name(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, content: nodes.TextElement
) -> nodes.Element | None:
    """Links a name written without its module, such as `CrossKD`, if the package has just one of it."""
    target = node.get("reftarget", "")
    if node.get("refdomain") != "py" or node.get("reftype") != "obj" or not target:
        return None
    domain: Any = env.get_domain("py")
    found = {name for name in domain.objects if name.endswith(f".{target}")}
    if len(found) != 1:
        return None
    node["reftarget"] = found.pop()
    resolved: nodes.Element | None = domain.resolve_xref(
        env, node["refdoc"], app.builder, "obj", node["reftarget"], node, content
    )
    return resolved


def setup(app: Sphinx) -> None:
    """Registers what is defined above."""
    app.connect("missing-reference", resolve_short_name)
