"""What a report counts, by hand; its table, its comparison and its picture."""

import math
import sys
from dataclasses import replace

import numpy as np
import pytest

from smartreg import SMARTConfig
from smartreg.quality import RADII, Bin, Quality, Scores, measuring
from smartreg.tally import Tallies, Tally


def logits(*p):
    return np.log(np.array(p, np.float64))


def counted(divergence, z, y, *perturbed, kept=None):
    tally = Tally("logits", divergence, len(perturbed))
    tally.add(np.asarray(z), np.asarray(y), kept)
    for k, z_perturbed in enumerate(perturbed):
        tally.change(k, np.asarray(z_perturbed))
    return tally.scores()


Z = logits([0.9, 0.1], [0.38, 0.62], [0.61, 0.39], [0.3, 0.7])
FLIPPED = logits([0.9, 0.1], [0.6, 0.4], [0.3, 0.7], [0.3, 0.7])


def test_classes_by_hand():
    """Confidences 0.9; 0.62, 0.61 (one bin, (9/15, 10/15]); 0.7. Right are the first and the second."""
    scores = counted("symmetric_kl", Z, [0, 1, 1, 0], FLIPPED, Z)
    assert (scores.predictions, scores.accuracy, scores.mse) == (4, 0.5, None)
    assert scores.nll == pytest.approx(-np.log([0.9, 0.62, 0.39, 0.3]).mean(), rel=1e-12)
    filled = [bar for bar in scores.bins if bar.share > 0]
    assert [bar.share for bar in filled] == [0.5, 0.25, 0.25]
    assert [bar.accuracy for bar in filled] == [0.5, 0, 1]
    assert [bar.confidence for bar in filled] == pytest.approx([0.615, 0.7, 0.9], rel=1e-12)
    assert scores.ece == pytest.approx(0.5 * 0.115 + 0.25 * 0.7 + 0.25 * 0.1, rel=1e-12)
    assert scores.changes == (0.5, 0.0)


def test_a_confidence_of_1_is_in_the_last_bin():
    scores = counted("symmetric_kl", [[1000.0, 0.0]], [0])
    assert scores.bins[-1] == Bin(1.0, 1.0, 1.0)


def test_positions_without_a_label_or_masked_do_not_count():
    z = np.stack([Z, FLIPPED])  # (2, 4, 2)
    labels = np.array([[0, -100, 1, 0], [0, 0, -100, 1]])
    kept = np.array([[1, 1, 1, 0], [1, 1, 1, 1]])
    scores = counted("symmetric_kl", z, labels, np.stack([FLIPPED, FLIPPED]), kept=kept)
    assert scores.predictions == 5
    assert scores.accuracy == 4 / 5  # wrong is [0, 2]
    assert scores.changes == (1 / 5,)
    with pytest.raises(ValueError, match=r"no label of the output 'logits' counts"):
        counted("symmetric_kl", Z, [-100] * 4)


def test_labels_may_be_probabilities_of_classes():
    soft = np.array([[1, 0], [0.25, 0.75], [0.5, 0.5], [0, 1]])
    scores = counted("symmetric_kl", Z, soft)
    p = np.exp(Z)
    assert scores.nll == pytest.approx(-(soft * np.log(p)).sum(-1).mean(), rel=1e-12)
    assert scores.accuracy == 1
    excluded = np.array([[0.0, -np.inf]])  # a class that cannot be, and is not
    assert counted("symmetric_kl", excluded, [[1.0, 0.0]]).nll == 0


def test_several_labels_by_hand():
    z, y = np.array([[1.0, -2.0], [0.5, 3.0]]), np.array([[1, 1], [0, -100]])
    scores = counted("bernoulli_symmetric_kl", z, y, [[-1.0, -2.0], [0.5, -3.0]])
    assert (scores.predictions, scores.accuracy, scores.changes) == (3, 1 / 3, (1 / 3,))
    sigmoid = 1 / (1 + np.exp(-np.array([1.0, -2.0, 0.5])))
    assert scores.nll == pytest.approx(-np.log([sigmoid[0], sigmoid[1], 1 - sigmoid[2]]).mean(), rel=1e-12)
    assert [bar.share * 3 for bar in scores.bins if bar.share] == pytest.approx([1, 1, 1])


def test_one_logit_is_a_softmax_of_two():
    rng = np.random.default_rng(0)
    z, y = 2 * rng.normal(size=40), rng.integers(2, size=40)
    perturbed = z + rng.normal(size=40)
    one = counted("bernoulli_symmetric_kl", z[:, None], y, perturbed[:, None])
    two = counted("symmetric_kl", np.stack([0 * z, z], 1), y, np.stack([0 * z, perturbed], 1))
    assert (one.accuracy, one.changes) == (two.accuracy, two.changes)
    assert [one.nll, one.ece] == pytest.approx([two.nll, two.ece], rel=1e-12)
    assert 0 < one.changes[0] < 1


def test_regression_by_hand():
    z, y = np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([[0.0, 2.0], [math.nan, 7.0]])
    scores = counted("squared_error", z, y, z + np.array([[0.5, -1], [9, 0]]))
    assert (scores.predictions, scores.mse, scores.changes) == (3, (1 + 0 + 9) / 3, (0.5,))
    assert (scores.accuracy, scores.nll, scores.ece, scores.bins) == (None, None, None, ())
    assert counted("squared_error", [[-100.0]], [-100.0]).mse == 0  # a value like any other


@pytest.mark.parametrize(
    ("divergence", "z", "y", "message"),
    [
        ("symmetric_kl", Z, [0, 1, 2, 0], r"must be classes from 0 to 1, or -100 for none, got 0 to 2"),
        ("symmetric_kl", Z, [0, 1, -1, 0], r"must be classes from 0 to 1"),
        ("symmetric_kl", Z, [0, 1, 0.5, 0], r"must be classes from 0 to 1"),
        ("symmetric_kl", Z, [[0, 1]] * 3, r"the labels have the shape \(3, 2\), and the output 'logits' .*\(4, 2\)"),
        ("symmetric_kl", Z, [[1, 1]] * 4, r"no probabilities of classes. Say what the outputs are"),
        ("bernoulli_symmetric_kl", Z, [[0, 2]] * 4, r"must be between 0 and 1"),
        ("bernoulli_symmetric_kl", Z, [0, 1, 1, 0], r"Expected are labels of the shape that of the outputs"),
        ("squared_error", Z, [0.0] * 3, r"the labels have the shape \(3,\)"),
    ],
)
def test_labels_that_do_not_fit(divergence, z, y, message):
    with pytest.raises(ValueError, match=message):
        counted(divergence, z, y)


def test_a_nan_is_named():
    with pytest.raises(FloatingPointError, match=r"the output 'logits' is NaN"):
        counted("symmetric_kl", [[math.nan, 0.0]], [0])
    with pytest.raises(FloatingPointError, match="NaN"):
        counted("symmetric_kl", [[1.0, 0.0]], [0], [[math.nan, 0.0]])


def test_R_s_is_a_mean_over_the_examples_added_up_over_the_outputs():
    balls = measuring(SMARTConfig(), [1, 3], None)
    tallies = Tallies(balls)
    for name in ("a", "b"):
        tallies.of(name, "symmetric_kl").add(Z, np.zeros(4))
    tallies.add([[2.0, 3.0], [4.0, 9.0]], [2, 1], 2)
    tallies.add([[4.0, 1.0], [8.0, 1.0]], [1, 3], 3)
    quality = tallies.quality(None)
    assert quality.R_s == (6 / 3 + 4 / 4, 12 / 3 + 10 / 4)
    assert (quality.examples, quality.radii) == (5, pytest.approx((0.03, 0.09)))
    assert "a: accuracy" in quality.numbers
    with pytest.raises(ValueError, match="there is no batch"):
        Tallies(balls).quality(None)


def test_the_balls_are_the_trainings_and_the_ascent_is_one_for_all():
    config = SMARTConfig.paper(
        100, norm="2", granularity="token", lambda_s=0, smoothness_steps=3, dropout="independent"
    )
    balls = measuring(config, RADII, None)
    assert [ball.epsilon / config.epsilon for ball in balls] == pytest.approx([1 / 3, 1, 3, 10])
    for ball in balls:
        assert (ball.norm, ball.granularity, ball.scale) == ("2", "token", "absolute")
        assert (ball.start, ball.ascent_steps, ball.lambda_s, ball.mu) == ("margin", 3, 1, 0)
        assert ball.eta == 100 * ball.epsilon
        assert (ball.smoothness_steps, ball.dropout) == (1, "shared")


@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        (({"epsilon": 1}, RADII, None), TypeError, r"report\(\): config must be a SMARTConfig, got dict"),
        ((SMARTConfig.mtdnn(), RADII, None), ValueError, r"with projection='rescale' epsilon is no radius"),
        ((None, [], None), ValueError, r"radii must be a list of multiples"),
        ((None, 3, None), ValueError, r"radii must be a list of multiples"),
        ((None, [1, 0], None), ValueError, r"radii must be finite numbers > 0"),
        ((None, [math.inf], None), ValueError, r"radii must be finite numbers > 0"),
        ((None, RADII, 0), ValueError, r"batches must be None, for all, or a whole number >= 1, got 0"),
        ((None, RADII, True), ValueError, r"batches must be None"),
    ],
)
def test_what_measuring_refuses(asked, error, message):
    with pytest.raises(error, match=message):
        measuring(*asked)


def quality(divergence="symmetric_kl", config=SMARTConfig(), R_s=(0.25, 1.0)):  # noqa: B008
    labels = [0, 1, 1, 0] if divergence == "symmetric_kl" else [[0.0, 1.0]] * 4
    scores = counted(divergence, Z, labels, FLIPPED, FLIPPED)
    return Quality(config, (0.01, 0.03), R_s, {"logits": scores}, 4)


def test_before_against_after():
    before, after = quality(), quality(R_s=(0.125, 2.0))
    table = before.compare(after).splitlines()
    assert table[0] == "4 examples; radii: norm inf of each example, in rms of x"
    assert table[1].split() == ["before", "after", "change"]
    assert [line.split() for line in table if line.startswith("R_s")] == [
        ["R_s", "at", "0.01", "0.25", "0.125", "-0.125"],
        ["R_s", "at", "0.03", "1", "2", "+1"],
    ]
    assert len({len(line) for line in table[1:]}) == 1
    assert before.compare(after, ("plain", "SMART")).splitlines()[1].split() == ["plain", "SMART", "change"]
    assert list(before.numbers) == [
        *("accuracy", "ECE", "NLL", "R_s at 0.01", "R_s at 0.03", "flips at 0.01", "flips at 0.03")
    ]
    assert [line.split("  ")[0].strip() for line in str(before).splitlines()[1:]] == list(before.numbers)


def test_only_what_was_measured_alike_is_compared():
    before = quality()
    with pytest.raises(TypeError, match=r"with what report\(\) gives, got dict"):
        before.compare({})
    for other, what in (
        (replace(before, radii=(0.01, 0.1)), "the radii differ"),
        (quality(config=SMARTConfig(norm="2")), "norm, granularity and scale differ"),
        (quality("squared_error"), "the outputs"),
        (replace(before, examples=5), "the numbers of examples differ: 4 and 5"),
    ):
        with pytest.raises(ValueError, match=what):
            before.compare(other)
        with pytest.raises(ValueError, match=what):
            before.plot(after=other)
    assert before.compare(quality(config=SMARTConfig(lambda_s=3)))


@pytest.mark.parametrize(("divergence", "panels"), [("symmetric_kl", 3), ("squared_error", 2)])
def test_the_picture_has_both(tmp_path, divergence, panels):
    figures = pytest.importorskip("matplotlib.figure")
    before, after = quality(divergence), quality(divergence, R_s=(0.125, 0.5))
    figure = before.plot(tmp_path / "picture.png", after)
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert len(figure.axes) == panels
    drawn = {line.get_label(): line for line in figure.axes[0].get_lines()}
    assert list(drawn["before"].get_ydata()) == [0.25, 1.0]
    assert list(drawn["after"].get_ydata()) == [0.125, 0.5]
    assert list(figure.axes[1].get_lines()[0].get_ydata()) == list(before.scores["logits"].changes)
    if panels == 3:
        labels = [line.get_label() for line in figure.axes[2].get_lines()]
        assert f"before: ECE {before.numbers['ECE']:.3f}" in labels
    named = before.plot(None, after, ("plain", "SMART")).axes[0].get_lines()[:2]
    assert [line.get_label() for line in named] == ["plain", "SMART"]
    own = figures.Figure()
    assert before.plot(own) is own
    assert len(own.axes) == panels


def test_without_matplotlib_the_table_is_there_and_the_picture_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "R_s at 0.01" in str(quality())
    with pytest.raises(ImportError, match="needs matplotlib: pip install matplotlib"):
        quality().plot()


def test_several_outputs_have_a_name_before_their_numbers():
    one = quality()
    both = replace(one, scores={"start": one.scores["logits"], "end": replace(one.scores["logits"], accuracy=1.0)})
    assert (both.numbers["start: accuracy"], both.numbers["end: accuracy"]) == (0.5, 1.0)
    assert both.numbers["end: flips at 0.03"] == 0.5
    assert isinstance(one.scores["logits"], Scores)
