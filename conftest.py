"""Which backends are tested, and how."""

import gc
import importlib.util
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# the models are tiny, and pytest-xdist has a worker a core: more threads only wait for each other
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")
os.environ.setdefault("TF_NUM_INTEROP_THREADS", "1")
# to set oneDNN up takes a fourteenth of the time; once a week the tests run with it (weekly.yml)
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

import hypothesis
import pytest

FRAMEWORKS = {"torch": "torch", "tf": "tensorflow"}

# SMARTREG_BACKENDS="torch tf" requests backends: one that is missing then fails. By default, those installed.
_requested = os.environ.get("SMARTREG_BACKENDS")
BACKENDS = (
    _requested.split()
    if _requested is not None
    else [name for name, module in FRAMEWORKS.items() if importlib.util.find_spec(module)]
)
# a script that a test runs, and what needs Triton, which aborts if TensorFlow is there first
collect_ignore_glob = ["tests/mirrored_tf.py", "smartreg_torch/kernels.py"]
collect_ignore_glob += [
    pattern
    for name in FRAMEWORKS
    if name not in BACKENDS
    for pattern in (
        f"tests/test_{name}_*.py",
        f"tests/*_{name}.py",
        f"smartreg_{name}/*",
        "tests/test_*_against_torch.py",
    )
]
collect_ignore_glob += [] if "torch" in BACKENDS else ["tests/architectures.py"]
collect_ignore_glob += [] if importlib.util.find_spec("matplotlib") else ["smartreg/demo/show.py"]

hypothesis.settings.register_profile("default", deadline=None, derandomize=True, max_examples=30)
hypothesis.settings.register_profile("nightly", deadline=None, max_examples=2000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_report_header() -> str:
    missing = [name for name in FRAMEWORKS if name not in BACKENDS]
    return f"smartreg backends: numpy {' '.join(BACKENDS)}" + (f" (not tested: {' '.join(missing)})" if missing else "")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", ["numpy", *BACKENDS], indirect=True)


@pytest.fixture(scope="session")
def every_backend():
    """The names of all backends under test."""
    return ["numpy", *BACKENDS]


@pytest.fixture(scope="session")
def backend(request: pytest.FixtureRequest):
    """A backend as `python -m smartreg check` takes it: `Face(backend, dtype)` calls it with NumPy arrays."""
    from smartreg.checking import load_backend

    return load_backend(request.param)


@pytest.fixture(scope="module", autouse=True)
def little_to_collect():
    """accelerate collects garbage at every turn, and here it would look through a million objects of imports."""
    gc.freeze()
    yield
    gc.unfreeze()


if "torch" in BACKENDS:
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

    @pytest.fixture(autouse=True)
    def seed():
        """Every test draws the same, in whatever order and process."""
        # torch.manual_seed would keep a traceback for each kind of GPU that is not there
        torch.default_generator.manual_seed(0)
        if torch.cuda.is_available():
            torch.cuda.manual_seed_all(0)
