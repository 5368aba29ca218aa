"""Search thousands of hypothesis examples for the largest disagreement of two backends: the table of docs/backends.md.

python tools/disagreement.py               # prints the table, and puts it into docs/backends.md
python tools/disagreement.py --examples 50 --no-write
"""

import argparse
import itertools
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

for name, value in {"OMP_NUM_THREADS": "1", "TF_CPP_MIN_LOG_LEVEL": "3", "KERAS_BACKEND": "tensorflow"}.items():
    os.environ.setdefault(name, value)
ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import hypothesis  # noqa: E402
import numpy as np  # noqa: E402
import strategies  # noqa: E402

from smartreg.checking import BACKENDS, Face, load_backend  # noqa: E402
from smartreg.checking.bounds import eps, ulps_apart  # noqa: E402
from smartreg.checking.face import BALLS  # noqa: E402
from smartreg.divergences import DIVERGENCES  # noqa: E402
from smartreg.reference import forward  # noqa: E402

DTYPES = ("float32", "float64")


def results(face: Face, function: str, case: Any) -> Iterator[tuple[str, Any]]:
    """Yield what a backend gives on a case: (name, array)."""
    if function in DIVERGENCES:
        yield function, face.value(function, case.a, case.b, case.mask)[:, None]
        for gradient in face.grad(function, case.a, case.b, case.mask):
            yield f"{function}: gradient", gradient
    elif function == "normalize":
        yield function, face.call(function, case.u, norm=case.norm, granularity=case.granularity)
    elif function in BALLS.values():
        yield function, face.call(function, case.u, epsilon=case.radius, granularity=case.granularity)
    elif function == "ema_update":
        yield function, face.ema_update({"w": case.a}, {"w": case.b}, 0.99)["w"]
    elif function == "bregman_divergence":
        yield function, np.reshape(face.bregman_divergence(case.a, case.b, "symmetric_kl", case.mask), (1, 1))
    else:
        clean = forward(case.theta, case.x, case.mask)[0]
        yield function, face.ascend(case.theta, case.x, clean, case.config, case.noise, case.mask, case.divergence)


def cases(function: str, dtype: str) -> Any:
    """Return the strategy of a function's cases."""
    if function in DIVERGENCES:
        return strategies.pairs(function, dtype)
    if function == "bregman_divergence":
        return strategies.pairs("symmetric_kl", dtype)
    if function == "ema_update":
        return strategies.pairs("squared_error", dtype)
    return strategies.ascents(dtype) if function == "ascend" else strategies.balls(dtype)


def search(function: str, dtype: str, examples: int, backends: dict[str, Any], worst: dict[Any, float]) -> int:
    """Look for the worst example of one function in one type. Return the number of examples seen."""
    faces = {name: Face(backend, dtype) for name, backend in backends.items()}
    count = 0

    @hypothesis.settings(max_examples=examples, deadline=None, derandomize=True, database=None)
    @hypothesis.given(cases(function, dtype))
    def compare(case: Any) -> None:
        nonlocal count
        count += 1
        found = {name: list(results(face, function, case)) for name, face in faces.items()}
        largest = 0.0
        for pair in itertools.combinations(backends, 2):
            for (name, one), (_, other) in zip(found[pair[0]], found[pair[1]], strict=True):
                apart = ulps_apart(one, other, dtype)
                largest = max(largest, apart)
                worst[name, dtype, pair] = max(worst.get((name, dtype, pair), 0.0), apart)
        hypothesis.target(largest)

    compare()
    return count


def main() -> None:
    """Search each function in each type, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=600, help="of each function and type (default: 600)")
    parser.add_argument("--no-write", action="store_true", help="leave docs/backends.md as it is")
    given = parser.parse_args()
    backends = {name: load_backend(name) for name in BACKENDS}
    pairs = list(itertools.combinations(backends, 2))
    functions = [*DIVERGENCES, "normalize", *BALLS.values(), "ascend", "ema_update", "bregman_divergence"]
    worst: dict[Any, float] = {}
    count = 0
    for dtype, function in itertools.product(DTYPES, functions):
        count += search(function, dtype, given.examples, backends, worst)
        print(f"{dtype} {function}: {count} examples so far", file=sys.stderr)

    heads = [f"{dtype}: {a} and {b}" for dtype in DTYPES for a, b in pairs]
    lines = ["| | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for name in dict.fromkeys(name for name, _, _ in worst):
        cells = [f"{worst[name, dtype, pair]:.3g}" for dtype in DTYPES for pair in pairs]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    units = " and ".join(f"{eps(dtype):.2g}" for dtype in DTYPES)
    text = (
        f"The largest disagreement over {count:,} hypothesis examples, searched for the worst. The unit is one in the\n"
        f"last place of the largest entry of a row ({units} of it). `tox run -e nightly` prints the table\n"
        "and puts it here.\n\n" + "\n".join(lines)
    )
    print(text)
    if not given.no_write:
        page = ROOT / "docs" / "backends.md"
        before, rest = page.read_text("utf-8").split("<!-- disagreement -->")
        _, after = rest.split("<!-- /disagreement -->")
        page.write_text(f"{before}<!-- disagreement -->\n{text}\n<!-- /disagreement -->{after}", "utf-8")


if __name__ == "__main__":
    main()
