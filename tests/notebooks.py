"""Run the code of a notebook of the documentation in this process, with small settings."""

import json
from pathlib import Path

import matplotlib

ROOT = Path(__file__).parents[1]


def run(name, monkeypatch, **settings):
    """Run the cells in order, as the build of the documentation does. Return the names that they leave.

    `settings` replace the constants of the notebook as soon as it has set them.
    """
    notebook = ROOT / "docs" / "notebooks" / name
    monkeypatch.chdir(notebook.parent)
    monkeypatch.delenv("SMARTREG_REVIEWS", raising=False)
    matplotlib.use("Agg")
    names, waiting = {}, dict(settings)
    with matplotlib.rc_context():
        for k, cell in enumerate(json.loads(notebook.read_text("utf-8"))["cells"]):
            if cell["cell_type"] == "code":
                exec(compile("".join(cell["source"]), f"{name}, cell {k}", "exec"), names)
                if waiting and waiting.keys() <= names.keys():
                    names |= waiting
                    waiting = {}
        figures = [matplotlib.pyplot.figure(number) for number in matplotlib.pyplot.get_fignums()]
        for figure in figures:
            figure.canvas.draw()
        matplotlib.pyplot.close("all")
    assert not waiting
    return names, len(figures)
