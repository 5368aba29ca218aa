"""Run the checks of several backends and types: `python -m smartreg check`."""

from __future__ import annotations

import itertools
import json
import math
import multiprocessing
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor

from smartreg.checking.bounds import DTYPES
from smartreg.checking.check import UNITS, Report, check_backend
from smartreg.checking.face import BACKENDS, FUNCTIONS, load_backend
from smartreg.quiet import quiet

FULL_NAMES = {"numpy": "NumPy", "torch": "PyTorch", "tf": "TensorFlow"}


def main(
    backends: Sequence[str],
    dtypes: Sequence[str],
    as_json: bool,
    verbose: bool = False,
    functions: Sequence[str] = (),
) -> int:
    """Check and print; return the exit status, 1 after any failure."""
    reports: list[Report] = []
    left_out: dict[str, list[tuple[str, str]]] = {}  # what was not checked and why, and of which backend and type
    names, types = zip(*itertools.product(backends or BACKENDS, dtypes or DTYPES[:3]), strict=True)
    width = max(map(len, ("backend", *names)))
    header = "" if as_json or verbose else f"{'backend':<{width}}  dtype     passed    worst ratio  in which check"
    # one process each: a framework may need more threads, and two frameworks share no state
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        asked = itertools.repeat(functions or FUNCTIONS, len(names))
        for name, dtype, report in zip(names, types, pool.map(_report, names, types, asked), strict=True):
            if isinstance(report, str):
                left_out.setdefault(report, []).append((name, dtype))
                continue
            for reason in [] if verbose else report.not_checked:  # -v has it in the report
                left_out.setdefault(reason, []).append((name, dtype))
            if header and not reports:
                print(header, flush=True)
            reports.append(report)
            if verbose and not as_json:
                print(report, end="\n\n", flush=True)
            elif not as_json:
                print(_line(report, width), flush=True)
    if as_json:
        print(json.dumps([report.to_dict() for report in reports], indent=2))
    for reason, what in left_out.items():
        given = [name if {(name, each) for each in types} <= set(what) else f"{name}, {dtype}" for name, dtype in what]
        listed = "; ".join(dict.fromkeys(given))
        print(f"not checked: {listed}: {reason}", file=sys.stderr if as_json else sys.stdout)
    unchecked = _unchecked(reports, backends, dtypes)
    if not as_json:
        print("\n".join(_end(reports, unchecked, verbose)))
    return int(bool(unchecked) or not all(report.ok for report in reports))


def _line(report: Report, width: int) -> str:
    """Return the summary of a report on one line."""
    passed = f"{sum(row.ok for row in report.rows)} of {len(report.rows)}"
    worst = max(report.rows, key=lambda row: row.badness, default=None)
    ratio, what = "", ""
    if worst is not None:
        ratio = "-" if worst.problem else "nan" if math.isnan(worst.error) else f"{worst.ratio:.2g}"
        what = worst.what
    return f"{report.backend:<{width}}  {report.dtype:<8}  {passed:<9} {ratio:>11}  {what}"


def _unchecked(reports: Sequence[Report], backends: Sequence[str], dtypes: Sequence[str]) -> list[str]:
    """Return what was asked for by name and not checked: backends, or types of one."""
    found = []
    for name in dict.fromkeys(backends):
        checked = [report.dtype for report in reports if report.backend == name]
        if not checked:
            found.append(name)
        found += [f"{name} in {dtype}" for dtype in dict.fromkeys(dtypes) if checked and dtype not in checked]
    return found


def _end(reports: Sequence[Report], unchecked: Sequence[str], verbose: bool) -> list[str]:
    """Return the failures in full, and the sentence that sums all up."""
    lines = []
    for report in reports:
        failed = [row for row in report.rows if not row.ok]
        if failed and not verbose:
            lines += ["", f"{report.backend}, {report.dtype}: FAILED", report.table(failed)]
    units = [UNITS] if lines else []
    if reports and not verbose:
        lines += [
            "",
            *units,
            "A ratio is the largest error found, as a share of its bound. -v prints every check.",
        ]
    bad = [f"{report.backend} in {report.dtype}" for report in reports if not report.ok]
    bad += [f"{what} (not checked)" for what in unchecked]
    good = dict.fromkeys(FULL_NAMES.get(report.backend, report.backend) for report in reports)
    if bad:
        lines.append(f"FAILED: {', '.join(bad)}.")
    elif good:
        lines.append(f"All passed: {', '.join(good)}.")
    return lines


def _report(name: str, dtype: str, functions: Sequence[str]) -> Report | str:
    """Return a report, or why there is none."""
    try:
        with quiet():
            backend = load_backend(name)
    except Exception as error:  # a module of the user's own may raise anything
        return str(error) if isinstance(error, ImportError) else f"{type(error).__name__}: {error}"
    report = check_backend(backend, dtype, functions, name=name)
    return report if report.rows else report.not_checked[0]
