"""Sphinx, for the site that ``build.py`` prepares: nothing is executed, and nothing comes from another server."""

import re
import sys
from pathlib import Path

ROOT = next(p for p in Path(__file__).resolve().parents if (p / "kafnb").is_dir())
sys.path.insert(0, str(ROOT))

project = "kafnb"
author = "the kafnb developers"
html_title = "kafnb"
extensions = [
    "myst_nb", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon", "sphinxcontrib.bibtex",
    "sphinx-mathjax-offline",
]  # fmt: skip
nb_execution_mode = "off"  # the stored outputs
nb_merge_streams = True
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
suppress_warnings = ["ref.python"]  # an attribute's name in a docstring that several classes have
numfig = True
numfig_format = {"figure": "Figure %s:"}
math_eqref_format = "({number})"
bibtex_bibfiles = ["references.bib"]
bibtex_default_style = "plain"
autosummary_generate = False  # build.py writes the pages
autodoc_typehints = "none"
autodoc_member_order = "bysource"
add_module_names = False
napoleon_google_docstring = False
napoleon_use_rtype = False

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["book.css"]
html_js_files = ["book.js"]
html_show_sourcelink = False
html_copy_source = False
html_domain_indices = False
html_theme_options = {"navigation_with_keys": True, "top_of_page_buttons": []}
# which of Sphinx' versions loads MathJax differs; the path is that of the bundled files
mathjax_path = "mathjax/tex-chtml.js"
mathjax3_config = {"options": {"enableMenu": False}}
nitpick_ignore_regex = [("py:(class|exc)", ".*")]  # types in docstrings are words: "int", "shape (N, C, H, W)"


def _escape(app, what, name, obj, options, lines):
    """Docstrings are written to be read in the source: |f'(x)|, (N, C, *). Escape what is no markup in them.

    A source named at the end is no part of the section above it.
    """
    formula = False
    for i in [i for i, line in enumerate(lines) if line.startswith("Source") and i and not lines[i - 1]][::-1]:
        lines[i:i] = ["References", "----------"]
    for i, line in enumerate(lines):
        formula = line.lstrip().startswith(".. math::") or (formula and (not line.strip() or line.startswith(" ")))
        if not formula:
            spans = re.split(r"(``.+?``|:\w+:`.+?`|(?<![\w*])\*{1,2}[A-Za-z][^*]*?\*{1,2}(?![\w*]))", line)
            spans[::2] = [re.sub(r"([*|]|``)", r"\\\1", s) for s in spans[::2]]
            lines[i] = "".join(spans)


def setup(app):
    app.connect("autodoc-process-docstring", _escape, priority=400)  # before napoleon's own stars
