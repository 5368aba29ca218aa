"""Draw docs/report.png and print its table: the digits of examples/demo.py, plain against SMART.

python tools/make_report.py
"""

from __future__ import annotations

import runpy
from pathlib import Path

import torch

from smartreg_torch import report

ROOT = Path(__file__).parents[1]


def main() -> None:
    torch.set_num_threads(1)
    demo = runpy.run_path(str(ROOT / "examples" / "demo.py"))
    data = demo["digits"]()
    pretrained = demo["pretrain"](data)
    x, y = demo["few_labels"](data, 5, 0)
    tests = [(torch.from_numpy(data.x_test), torch.from_numpy(data.y_test))]
    found = {}
    for name, config in demo["METHODS"].items():
        model = demo["network"](demo["initial_weights"](pretrained, 0))
        demo["train"](model, x, y, config, 0)
        found[name] = report(model, tests, demo["CONFIG"], site="input")
    plain, smart = found.values()
    names = "plain", "SMART"
    print(plain.compare(smart, names))
    plain.plot(ROOT / "docs" / "report.png", smart, names)


if __name__ == "__main__":
    main()
