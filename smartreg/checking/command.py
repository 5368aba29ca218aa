"""Run the checks of several backends and types: `python -m smartreg check`."""

from __future__ import annotations

import importlib.util
import itertools
import json
import multiprocessing
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor

from smartreg.checking.bounds import DTYPES
from smartreg.checking.check import Report, check_backend
from smartreg.checking.face import BACKENDS, load_backend
from smartreg.quiet import quiet

FULL_NAMES = {"numpy": "NumPy", "torch": "PyTorch", "tf": "TensorFlow"}


def main(backends: Sequence[str], dtypes: Sequence[str], as_json: bool, verbose: bool = False) -> int:
    """Check and print; return the exit status, 1 after any failure."""
    reports: list[Report] = []
    absent: dict[str, list[tuple[str, str]]] = {}  # the reason, and of what
    names, types = zip(*itertools.product(backends or BACKENDS, dtypes or DTYPES[:3]), strict=True)
    width = max(map(len, ("backend", *names)))
    if not as_json and not verbose:
        print(f"{'backend':<{width}}  dtype     passed    worst ratio  of", flush=True)
    # one process each: a framework may need more threads, and two frameworks share no state
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        for name, dtype, report in zip(names, types, pool.map(_report, names, types), strict=True):
            if isinstance(report, str):
                absent.setdefault(report, []).append((name, dtype))
                continue
            reports.append(report)
            if verbose and not as_json:
                print(report, end="\n\n", flush=True)
            elif not as_json:
                print(_line(report, width), flush=True)
    if as_json:
        print(json.dumps([report.to_dict() for report in reports], indent=2))
    for reason, what in absent.items():
        given = [name if {(name, each) for each in types} <= set(what) else f"{name}, {dtype}" for name, dtype in what]
        listed = "; ".join(dict.fromkeys(given))
        print(f"not checked: {listed}: {reason}", file=sys.stderr if as_json else sys.stdout)
    if not as_json:
        print("\n".join(_end(reports, verbose)))
    asked_and_absent = bool(backends) and bool(absent)
    return int(asked_and_absent or not all(report.ok for report in reports))


def _line(report: Report, width: int) -> str:
    """Return the summary of a report on one line."""
    passed = f"{sum(row.ok for row in report.rows)} of {len(report.rows)}"
    worst = max(report.rows, key=lambda row: (bool(row.problem), row.ratio), default=None)
    ratio = "" if worst is None else "-" if worst.problem else f"{worst.ratio:.2g}"
    what = "" if worst is None else worst.what
    return f"{report.backend:<{width}}  {report.dtype:<8}  {passed:<9} {ratio:>11}  {what}"


def _end(reports: Sequence[Report], verbose: bool) -> list[str]:
    """Return the failures in full, and the sentence that sums all up."""
    lines = []
    for report in reports:
        failed = [row for row in report.rows if not row.ok]
        if failed and not verbose:
            lines += ["", f"{report.backend}, {report.dtype}: FAILED", report.table(failed)]
    if reports and not verbose:
        lines += [
            "",
            "A ratio is the largest error found, as a share of its bound. -v prints every check.",
        ]
    bad = [f"{report.backend} in {report.dtype}" for report in reports if not report.ok]
    good = dict.fromkeys(FULL_NAMES.get(report.backend, report.backend) for report in reports)
    if bad:
        lines.append(f"FAILED: {', '.join(bad)}.")
    elif good:
        lines.append(f"All passed: {', '.join(good)}.")
    return lines


def _report(name: str, dtype: str) -> Report | str:
    """Return a report, or why there is none."""
    if name == "numpy" and dtype == "bfloat16" and not importlib.util.find_spec("ml_dtypes"):
        return "NumPy has no such type without the package ml_dtypes: pip install ml_dtypes"
    try:
        with quiet():
            backend = load_backend(name)
    except Exception as error:  # a module of the user's own may raise anything
        return str(error) if isinstance(error, ImportError) else f"{type(error).__name__}: {error}"
    return check_backend(backend, dtype, name=name)
