"""How Sphinx builds the documentation site: tox run -e docs."""

import os
import re
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")

from sphinx import addnodes
from sphinx.transforms import SphinxTransform

import smartreg

HERE = Path(__file__).parent

project = "smartreg"
author = "the authors of smartreg"
version = release = smartreg.__version__
project_copyright = "MIT licence"

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx-mathjax-offline",  # MathJax itself, so that a page fetches nothing
    "sphinx_copybutton",
    "sphinx_design",
]
exclude_patterns = ["_generated", "pictures"]

myst_enable_extensions = ["amsmath", "attrs_block", "colon_fence", "dollarmath"]
myst_heading_anchors = 4  # GitHub's names, which the links of the pages use
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 600

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 88
default_role = "code"  # `x` in a docstring is code
napoleon_custom_sections = ["Source"]
napoleon_use_ivar = True

html_theme = "furo"
html_title = "smartreg"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_copy_source = False
copybutton_exclude = ".linenos, .gp, .go"
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True

# Types of the frameworks have no page here, and nothing is fetched to find theirs.
nitpick_ignore_regex = [("py:.*", r"(?!smartreg).*|.*\.T")]

ROOT_PAGES = {"README": "index", "CONTRIBUTING": "contributing", "CHANGELOG": "changelog"}


class PagesOfTheRoot(SphinxTransform):
    """Lead a link to README.md, CONTRIBUTING.md or CHANGELOG.md to the page of the site that includes it."""

    default_priority = 5

    def apply(self, **_: object) -> None:
        """Replace the links that MyST takes for downloads or does not find."""
        for node in list(self.document.findall(addnodes.download_reference)) + list(
            self.document.findall(addnodes.pending_xref)
        ):
            page = re.fullmatch(r"(?:.*/)?([A-Z]+)(?:\.md)?(?:#(.*))?", node.get("reftarget", ""))
            if page and page[1] in ROOT_PAGES:
                link = addnodes.pending_xref(
                    refdomain="doc",
                    reftype="myst",
                    reftarget=ROOT_PAGES[page[1]],
                    reftargetid=page[2],
                    refdoc=self.env.docname,
                    refexplicit=True,
                )
                link += node.children
                node.replace_self(link)


def plain_text(app: object, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Let a docstring mean in reStructuredText what it says: |x| is no markup, an indented block is as it stands."""
    text = "\n".join(lines)
    text = re.sub(r":\n\n(?=    +\S)", "::\n\n", text)
    literal = r"`[^`]+`|^ *>>> (?:.+\n)+|(?<=::\n\n)(?:    .*\n|\n)+"
    parts = re.split(f"({literal})", text + "\n", flags=re.MULTILINE)
    parts[::2] = [re.sub(r"([|*]|_(?=\W))", r"\\\1", part) for part in parts[::2]]
    parts[::2] = [re.sub(r"docs/(\w+)\.md", r":doc:`/\1`", part) for part in parts[::2]]
    parts[2::2] = [re.sub(r"\A(?=\w)", r"\\ ", part) for part in parts[2::2]]  # the plural of `x`
    lines[:] = "".join(parts).splitlines()


def no_alias(app: object, what: str, name: str, obj: object, skip: bool, options: object) -> bool | None:
    """Leave the fields of named tuples to the docstring of their class."""
    return True if (getattr(obj, "__doc__", None) or "").startswith("Alias for field number") else None


def setup(app):
    """Connect the rules above."""
    app.add_transform(PagesOfTheRoot)
    app.connect("autodoc-process-docstring", plain_text, priority=400)
    app.connect("autodoc-skip-member", no_alias)
