"""How Sphinx builds the documentation site: tox run -e docs."""

import os
import re
import runpy
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

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx-mathjax-offline",  # MathJax itself, so that a page fetches nothing
    "sphinx_copybutton",
    "sphinx_design",
]
smartquotes = False  # a command or a message can be copied
exclude_patterns = ["_generated", "pictures"]

myst_enable_extensions = ["amsmath", "attrs_block", "colon_fence", "dollarmath"]
myst_heading_anchors = 4  # GitHub's names, which the links of the pages use
nb_execution_mode = "cache"  # run again if their code has changed; a fresh clone, as in CI, has no cache
nb_execution_cache_path = str(HERE.parent / "out" / "notebooks")
nb_execution_raise_on_error = True
nb_execution_timeout = 1800  # seconds for a cell, which takes two minutes on a free core

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_type_aliases = {"Array": "Array", "ArrayLike": "ArrayLike"}
python_maximum_signature_line_length = 88
default_role = "code"  # `x` in a docstring is code
napoleon_custom_sections = ["Source"]
napoleon_use_ivar = True

html_theme = "furo"
html_title = "smartreg"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = html_show_copyright = False
html_copy_source = False
copybutton_exclude = ".linenos, .gp, .go"
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True

# Types of the frameworks have no page here, and nothing is fetched to find theirs.
nitpick_ignore_regex = [("py:obj", ".*"), ("py:.*", r"(?!smartreg).*|.*\.T")]

ROOT_PAGES = {"README": "index", "CONTRIBUTING": "contributing", "CHANGELOG": "changelog"}


class LinksOfGitHub(SphinxTransform):
    """Let the links that GitHub follows work in the site.

    README.md, CONTRIBUTING.md and CHANGELOG.md are the pages that include them. A link that is called like its file,
    [docs/math.md](docs/math.md), is called like its page or section.
    """

    default_priority = 5

    def apply(self, **_: object) -> None:
        """Replace the links."""
        for node in list(self.document.findall(addnodes.pending_xref)):
            if re.fullmatch(r"(?:docs/)?\w+\.md", node.astext()):
                node["refexplicit"] = False
            page = re.fullmatch(r"(?:.*/)?([A-Z]+)(?:\.md)?(?:#(.*))?", node.get("reftarget", ""))
            if page and page[1] in ROOT_PAGES:
                link = addnodes.pending_xref(
                    refdomain="doc",
                    reftype="myst",
                    reftarget=ROOT_PAGES[page[1]],
                    reftargetid=page[2],
                    refdoc=self.env.docname,
                    refexplicit=node["refexplicit"],
                )
                link += node.children
                node.replace_self(link)


# The notation of the docstrings' equations in TeX, in this order.
TEX = (
    (r"KL\((\w)\|\|(\w)\)", r"\\mathrm{KL}(\1 \\Vert \2)"),
    (r"\|\|(.+?)\|\|", r"\\lVert \1 \\rVert"),
    (r"<-", r"\\leftarrow "),
    (r"<=", r"\\le "),
    (r"   +(\(.*\))$", r"\\qquad\\text{\1}"),
    (r"   +", r"\n\n   "),
    (r"\bd(\w)/d(\w)\b", r"\\partial \1/\\partial \2"),
    (r"\b1/n\b", r"\\frac1n"),
    (r"\bgrad_", r"\\nabla_"),
    (r"\bl_s\b", r"\\ell_s"),
    (r"\btheta~", r"\\tilde\\theta "),
    (r"\b(x|g)~", r"\\tilde \1"),
    (r"(?<![\\a-zA-Z])(theta|lambda|mu|delta|eta|sigma|beta|log|sum|max)(?![a-zA-Z])", r"\\\1"),
    (r"(?<![\\a-zA-Z])epsilon\b", r"\\varepsilon"),
)
WORD = re.compile(r"\\(?:text|mathrm)\{[^}]*\}|\\[a-zA-Z]+|([A-Za-z]{3,})")  # in roman type if TeX does not know it


def tex(equation: str) -> str:
    """Return an equation of a docstring as a block of mathematics."""
    for pattern, replacement in TEX:
        equation = re.sub(pattern, replacement, equation)
    roman = WORD.sub(lambda found: rf"{{\mathrm{{{found[1]}}}}}" if found[1] else found[0], equation)
    roman = roman if "\n" not in roman else "& " + roman.replace("\n\n   ", "\n\n   & ")  # lines with one left edge
    return f".. math::\n\n   {roman}"


def plain_text(app: object, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Let a docstring mean in reStructuredText what it says: |x| is no markup, an indented block is as it stands."""
    text = "\n\n" + "\n".join(lines) + "\n"
    text = re.sub(r":\n\n(?=    +\S)", "::\n\n", text)
    equation = r"[^ .:>`][^.`\n]*(?: = |<-)[^.`\n]*"
    literal = rf"`[^`]+`|^ *>>> (?:.+\n)+|(?<=::\n\n)(?:    .*\n|\n)+|(?<=\n\n){equation}(?=\n\n)"
    parts = re.split(f"({literal})", text, flags=re.MULTILINE)
    parts[::2] = [re.sub(r"([|*]|_(?=\W))", r"\\\1", part) for part in parts[::2]]
    parts[::2] = [re.sub(r"docs/(\w+)\.md", r":doc:`/\1`", part) for part in parts[::2]]
    parts[1::2] = [tex(part) if re.fullmatch(equation, part) else part for part in parts[1::2]]
    parts[1::2] = [f":py:obj:{part}" if re.fullmatch(r"`[A-Za-z_][\w.]*`", part) else part for part in parts[1::2]]
    parts[2::2] = [re.sub(r"\A(?=\w)", r"\\ ", part) for part in parts[2::2]]  # the plural of `x`
    lines[:] = "".join(parts).splitlines()[2:]


def plain_names(app: object, what: str, name: str, obj: object, options: object, *parts: str | None) -> tuple[str, ...]:
    """Show an alias of a type by its name in a signature."""
    return tuple(part and re.sub(r"TypeAliasForwardRef\('(\w+)'\)", r"\1", part) for part in parts)


def no_alias(app: object, what: str, name: str, obj: object, skip: bool, options: object) -> bool | None:
    """Leave the fields of named tuples to the docstring of their class."""
    return True if (getattr(obj, "__doc__", None) or "").startswith("Alias for field number") else None


def draw_pictures(app: object) -> None:
    """Let each script of docs/pictures write its files into docs/_generated, unless they are newer than the script."""
    drawn = HERE / "_generated"
    drawn.mkdir(exist_ok=True)
    for script in sorted((HERE / "pictures").glob("*.py")):
        done = drawn / f"{script.stem}.png"
        if not done.exists() or done.stat().st_mtime < script.stat().st_mtime:
            runpy.run_path(str(script))["main"](drawn)


def setup(app):
    """Connect the rules above."""
    app.connect("builder-inited", draw_pictures)
    app.add_transform(LinksOfGitHub)
    app.connect("autodoc-process-docstring", plain_text, priority=400)
    app.connect("autodoc-process-signature", plain_names)
    app.connect("autodoc-skip-member", no_alias)
