"""Check any backend numerically: golden vectors, laws and Algorithm 1 (docs/backends.md).

A backend is a module or an object whose functions are named and called as this package's (`FUNCTIONS`), on arrays of
its own. Two more functions convert and differentiate; a backend without them follows NumPy's conventions:

    asarray(array, dtype)           a NumPy array as one of its own, dtype being "float32", "int64", "bool", ...
    gradients(function, *arrays)    the gradients of sum(function(*arrays)) with respect to each array

Without `gradients` the backend has `symmetric_kl_grad` and so on beside the divergences, and without those their values
are checked alone. Its `ascend` then gets a forward that returns (outputs, vjp).
"""

from smartreg.checking.bounds import DTYPES, Row, bound, worst
from smartreg.checking.check import Report, check_backend, golden_checks, law_checks, law_inputs, trajectory_checks
from smartreg.checking.compare import compare_run
from smartreg.checking.face import BACKENDS, FUNCTIONS, NUMPY, Face, Problem, load_backend
from smartreg.checking.trajectories import TRAJECTORIES, Trajectory, compare_steps, load_trajectory, run_trajectory

__all__ = [
    "BACKENDS",
    "DTYPES",
    "FUNCTIONS",
    "NUMPY",
    "TRAJECTORIES",
    "Face",
    "Problem",
    "Report",
    "Row",
    "Trajectory",
    "bound",
    "check_backend",
    "compare_run",
    "compare_steps",
    "golden_checks",
    "law_checks",
    "law_inputs",
    "load_backend",
    "load_trajectory",
    "run_trajectory",
    "trajectory_checks",
    "worst",
]
