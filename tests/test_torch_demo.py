"""`python -m smartreg demo` with PyTorch alone, as its user runs it."""

from test_demo import has_numpys_steps, shows_all

from smartreg_torch import demo


def test_the_demo_with_pytorch_alone(tmp_path):
    shows_all(tmp_path, "PyTorch", other="Keras: smartreg_tf needs", without=("tensorflow", "keras"))


def test_the_steps_are_those_of_numpy():
    has_numpys_steps(demo)
