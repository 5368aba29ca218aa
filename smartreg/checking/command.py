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


def main(backends: Sequence[str], dtypes: Sequence[str], as_json: bool) -> int:
    """Check and print; return the exit status, 1 after any failure."""
    status, reports = 0, []
    names, types = zip(*itertools.product(backends or BACKENDS, dtypes or DTYPES[:3]), strict=True)
    # one process each: a framework may need more threads, and two frameworks share no state
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        for name, dtype, report in zip(names, types, pool.map(_report, names, types), strict=True):
            if isinstance(report, str):
                status |= bool(backends)  # it was asked for by name
                print(f"{name}, {dtype}: not checked: {report}", file=sys.stderr if as_json else sys.stdout)
                continue
            reports.append(report)
            status |= not report.ok
            if not as_json:
                print(report, end="\n\n", flush=True)
    if as_json:
        print(json.dumps([report.to_dict() for report in reports], indent=2))
    return status


def _report(name: str, dtype: str) -> Report | str:
    """Return a report, or why there is none."""
    if name == "numpy" and dtype == "bfloat16" and not importlib.util.find_spec("ml_dtypes"):
        return "NumPy has no such type without the package ml_dtypes"
    try:
        backend = load_backend(name)
    except Exception as error:  # a module of the user's own may raise anything
        return str(error) if isinstance(error, ImportError) else f"{type(error).__name__}: {error}"
    return check_backend(backend, dtype, name=name)
