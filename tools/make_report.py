"""Draw docs/report.png and print its table: the digits of `python -m smartreg demo`, plain against SMART.

python tools/make_report.py
"""

from __future__ import annotations

from pathlib import Path

import torch

from smartreg.demo.digits import CONFIG, METHODS, digits, few_labels, initial_weights, pretrain
from smartreg_torch import report
from smartreg_torch.demo import network, train

ROOT = Path(__file__).parents[1]


def main() -> None:
    torch.set_num_threads(1)
    data = digits()
    pretrained = pretrain(data, train)
    x, y = few_labels(data, 5, 0)
    tests = [(torch.from_numpy(data.x_test), torch.from_numpy(data.y_test))]
    found = {}
    for name, config in METHODS.items():
        model = network(train(initial_weights(pretrained, 0), x, y, config, 0))
        found[name] = report(model, tests, CONFIG, site="input")
    plain, smart = found.values()
    names = "plain", "SMART"
    print(plain.compare(smart, names))
    plain.plot(ROOT / "docs" / "report.png", smart, names)


if __name__ == "__main__":
    main()
