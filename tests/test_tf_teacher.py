"""theta~ by name, in the model and out of it."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from paper_settings import papers

from smartreg_tf.teacher import Teacher


class Twins(keras.Model):
    """Two layers of one name, so that two variables have one path."""

    def __init__(self):
        super().__init__(name="twins")
        self.first, self.second = (keras.layers.Dense(1, use_bias=False, name="head") for _ in range(2))

    def call(self, x):
        return self.first(x) + self.second(x)


def twins():
    model = Twins()
    model(np.ones((1, 2)))
    model.set_weights([np.ones((2, 1)), np.full((2, 1), 3.0)])
    return model


def test_every_variable_has_a_name_of_its_own():
    teacher = Teacher(twins(), papers(total_steps=9))
    teacher.follow()
    assert list(teacher.averages) == ["twins/head/kernel", "twins/head/kernel#2"]
    assert [float(average.numpy()[0, 0]) for average in teacher.averages.values()] == [1.0, 3.0]


def test_theta_tilde_moves_in_every_s_th_step():
    model = twins()
    teacher = Teacher(model, papers(total_steps=99, beta_early=0.75, proximal_steps=2))
    teacher.follow()
    assert bool(teacher.is_theta())
    model.set_weights([np.zeros((2, 1)), np.zeros((2, 1))])
    assert not bool(teacher.is_theta())
    found = []
    for step, new in ((1, 1), (2, 0), (2, 1), (3, 1), (4, 1)):
        teacher.move(keras.Variable(step, dtype="int64"), tf.constant(new))
        found.append(float(teacher.distance()))
    assert found == [3.0, 3.0, 2.25, 2.25, 1.6875]  # 0.75 of it, twice
    teacher.begin()
    assert bool(teacher.is_theta())


def test_the_model_has_theta_tilde_inside_the_block_alone():
    model = twins()
    teacher = Teacher(model, papers(total_steps=9))
    with pytest.raises(ValueError, match="no theta~ to swap in"), teacher.swapped():
        pass
    teacher.follow()
    model.set_weights([np.zeros((2, 1)), np.zeros((2, 1))])
    with teacher.swapped():
        assert [float(weight[0, 0]) for weight in model.get_weights()] == [1.0, 3.0]
    assert [float(weight[0, 0]) for weight in model.get_weights()] == [0.0, 0.0]


def test_what_becomes_trainable_later_is_named():
    model = twins()
    model.second.trainable = False
    teacher = Teacher(model, papers(total_steps=9))
    assert teacher.missing() == []
    teacher.follow()
    model.second.trainable = True
    assert teacher.missing() == ["twins/head/kernel"]
