"""`python -m smartreg demo` with TensorFlow alone, as its user runs it."""

from test_demo import has_numpys_steps, shows_all

from smartreg_tf import demo


def test_the_demo_with_tensorflow_alone(tmp_path):
    shows_all(tmp_path, "Keras", other="PyTorch: smartreg_torch needs", without=("torch",))


def test_the_steps_are_those_of_numpy():
    has_numpys_steps(demo)
