"""A recorded run recomputed: what holds passes, and each way to tamper with the file fails by name."""

import json
import subprocess
import sys

import numpy as np
import pytest
from paper_settings import papers

from smartreg import SMARTConfig, SMARTWarning
from smartreg.checking import bound, compare_run
from smartreg.checking.recording import Recorder
from smartreg.divergences import DIVERGENCES
from smartreg.perturbation import Ball
from smartreg.proximal import mean_examples, momentum
from smartreg.report import StepSeen

N, TOKENS, D = 4, 5, 6
MASK = np.arange(TOKENS) < np.array([[5], [2], [3], [5]])
HEADS = [
    {"divergence": "symmetric_kl", "weight": 1.0, "by_weights": False},
    {"divergence": "squared_error", "weight": 0.5, "by_weights": True},
]
CONFIG = papers(lambda_s=2, mu=0.5, total_steps=20, epsilon=0.1)


def numbers(shape, rng, dtype):
    return rng.normal(size=shape).astype(dtype)


def mean(head, a, b, positions, weight):
    """As the backends take it."""
    total = mean_examples(DIVERGENCES[head["divergence"]].value(a, b, positions), weight)
    return head["weight"] * total * (len(weight) / weight.sum() if head["by_weights"] else 1)


def recorded(path, config=CONFIG, dtype=np.float32, steps=3):
    """Numbers that fit, and no model: two runs of the site, an output with positions and one without."""
    rng = np.random.default_rng(0)
    recorder = Recorder(path, steps, "test")
    recorder.begin("numpy", {}, config, "x")
    for step in range(steps):
        x = [numbers((N, TOKENS, D), rng, dtype) for _ in range(2)]
        masks = [MASK.astype(int), None]
        delta = []
        for point, mask in zip(x, masks, strict=True):
            keep = np.ones((N, TOKENS), bool) if mask is None else mask != 0
            noise = keep[..., None] * numbers(point.shape, rng, dtype)
            delta.append(Ball(point, config, mask).project(noise))
        outputs = [numbers((N, TOKENS, 3), rng, dtype), numbers((N, 1), rng, dtype)]
        outputs[0][:, :, 2] = -np.inf  # a masked class
        perturbed, teacher = ([z + numbers(z.shape, rng, dtype) * dtype(0.1) for z in outputs] for _ in range(2))
        weights = [np.array([1, 2, 0.5, 1], dtype)] * 2
        positions = [MASK, None]
        rest = (outputs, positions, weights)
        R_s = sum(mean(head, a, *one) for head, a, *one in zip(HEADS, perturbed, *rest, strict=True))
        D_Breg = sum(mean(head, a, *one) for head, a, *one in zip(HEADS, teacher, *rest, strict=True))
        seen = StepSeen(step + 1, x, delta, masks, outputs, perturbed, teacher, positions, weights, [], {})
        arrays = seen.tensors()
        reported = {
            "R_s": R_s,
            "D_Breg": D_Breg,
            "penalty": config.lambda_s * R_s + config.mu * D_Breg,
            "max_delta": max(np.abs(d).max() for d in delta),
            "vanished": 0.0,
            "step": step,
            "distance": 0.1 * step,
        }
        if step:
            reported["beta"] = momentum(step, config)
        recorder.add(arrays, reported, {name: np.dtype(dtype).name for name in arrays}, HEADS)
    recorder.write()
    return path


def failed(path):
    report = compare_run(path)
    assert report.ok == all(row.ok for row in report.rows)
    return {row.what for row in report.rows if not row.ok}


@pytest.fixture
def path(tmp_path):
    return recorded(tmp_path / "run.npz")


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("norm", ["inf", "2", "1"])
@pytest.mark.parametrize("granularity", ["example", "token"])
def test_a_run_as_it_should_be_passes(tmp_path, dtype, norm, granularity):
    config = CONFIG.replace(norm=norm, granularity=granularity)
    report = compare_run(recorded(tmp_path / "run.npz", config, dtype))
    assert report.ok, str(report)
    ball = [row for row in report.rows if row.what == "delta in the ball"]
    assert len(ball) == 3
    assert all(0.99 < row.recomputed < 1.00001 for row in ball)  # the noise is far outside: the projection binds
    assert {row.bound for row in ball} == {bound("divergence", np.dtype(dtype).name)}
    assert len({row.what for row in report.rows}) == 13


def test_a_rescaled_delta_has_a_largest_entry_of_1(tmp_path):
    path = recorded(tmp_path / "run.npz", SMARTConfig.mtdnn(mu=1, total_steps=9))
    assert failed(path) == set()
    tamper(path, {"delta/0": lambda v: 2 * v})
    assert "delta in the ball" in failed(path)


def tamper(path, changes, steps=(0, 1, 2)):
    with np.load(path) as file:
        arrays = dict(file)
    for step in steps:
        for name, change in changes.items():
            arrays[f"{step}/{name}"] = np.asarray(change(arrays[f"{step}/{name}"]))
    np.savez(path, **arrays)


def tamper_header(path, change):
    with np.load(path) as file:
        arrays = dict(file)
    about = json.loads(str(arrays["recording"]))
    change(about)
    np.savez(path, **{**arrays, "recording": np.array(json.dumps(about))})


def with_one(at, value):
    def change(array):
        array = array.copy()
        array[at] = value
        return array

    return change


TERMS = {"R_s", "D_Breg", "penalty"}
TAMPERED = {
    "R_s": ({"R_s": lambda v: v * (1 + 3e-5)}, {"R_s"}),
    "D_Breg": ({"D_Breg": lambda v: v * (1 - 3e-5)}, {"D_Breg"}),
    "penalty": ({"penalty": lambda v: v * (1 + 3e-5)}, {"penalty"}),
    "max_delta": ({"max_delta": lambda v: v * 1.001}, {"max_delta"}),
    "vanished": ({"vanished": lambda v: 0.01}, {"vanished"}),
    "beta": ({"beta": lambda v: 0.9}, {"beta"}),
    "delta too long": ({"delta/1": lambda v: v * np.float32(1.001)}, {"delta in the ball", "max_delta"}),
    "padding moved": ({"delta/0": with_one((1, 4, 0), 1e-3)}, {"delta 0 at padding"}),
    "delta all 0": ({f"delta/{k}": np.zeros_like for k in (0, 1)}, {"delta not all 0", "max_delta"}),
    "delta below rounding": (
        {f"delta/{k}": lambda v: v * np.float32(1e-9) for k in (0, 1)},
        {"x + delta is not x", "vanished", "max_delta"},
    ),
    "x not finite": ({"x/1": with_one((0, 0, 0), np.inf)}, {"all finite", "vanished", "delta in the ball"}),
    "outputs not finite": ({"outputs/1": with_one((0, 0), np.nan)}, {"all finite"} | TERMS),
    "a class masked in one pass": ({"teacher/0": with_one((0, 0, 1), -np.inf)}, {"all finite", "D_Breg", "penalty"}),
    "x smaller": ({"x/0": lambda v: v / 2}, {"delta in the ball"}),
    "outputs": ({"outputs/1": lambda v: v * np.float32(1.001)}, TERMS),
    "perturbed outputs": ({"perturbed/0": lambda v: v * np.float32(1.001)}, {"R_s", "penalty"}),
    "teacher's outputs": ({"teacher/0": lambda v: v * np.float32(1.001)}, {"D_Breg", "penalty"}),
    "positions": ({"positions/0": with_one((1, 4), True)}, TERMS),
    "sample weights": ({"sample_weight/1": with_one(0, 1.01)}, TERMS),
    "no step counted": ({"step": lambda v: 0.0}, {"theta~ is counted"}),
}  # fmt: skip


@pytest.mark.parametrize("how", TAMPERED)
def test_what_is_tampered_with_fails_by_name(path, how):
    changes, expected = TAMPERED[how]
    steps = (1, 2) if how == "beta" else (0, 1, 2)
    tamper(path, changes, steps)
    with np.errstate(all="ignore"):
        assert failed(path) == expected
    report = str(compare_run(path))
    for what in expected:
        assert f"\n- {what}: " in report


def test_one_bad_step_is_named(path):
    tamper(path, {"R_s": lambda v: 1.01 * v}, steps=[1])
    report = compare_run(path)
    assert [(row.step, row.what) for row in report.rows if not row.ok] == [(2, "R_s")]
    assert any(line.split()[:5] == ["R_s", "2", "of", "3", "2"] for line in str(report).splitlines())


def test_a_teacher_that_is_the_student(path):
    with np.load(path) as file:
        arrays = dict(file)
    for i in range(3):
        copies = {f"{i}/teacher/{k}": arrays[f"{i}/outputs/{k}"] for k in (0, 1)}
        arrays |= copies | {f"{i}/D_Breg": np.array(0.0), f"{i}/penalty": 2 * arrays[f"{i}/R_s"]}
    np.savez(path, **arrays)
    assert failed(path) == {"theta~ is not theta"}
    tamper(path, {"step": lambda v: 0.0, "distance": lambda v: 0.0})  # several batches before the first update
    assert failed(path) == set()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda about: about["config"].update(epsilon=0.099), {"delta in the ball"}),
        (lambda about: about["config"].update(norm="2"), {"delta in the ball"}),
        (lambda about: about["config"].update(lambda_s=3), {"penalty"}),
        (lambda about: about["config"].update(total_steps=9), {"beta"}),
        (lambda about: about["steps"][0]["outputs"][1].update(weight=1), TERMS),
        (lambda about: about["steps"][0]["outputs"][1].update(by_weights=False), TERMS),
        (lambda about: about["steps"][0]["outputs"][1].update(divergence="bernoulli_symmetric_kl"), TERMS),
    ],
)
def test_another_configuration_fails(path, change, expected):
    tamper_header(path, change)
    assert failed(path) == expected


def test_weights_of_positions_weigh_each_by_its_share(tmp_path):
    z = np.array([[[1.0], [3.0]], [[0.0], [2.0]]])
    arrays = {"outputs/0": np.zeros_like(z), "teacher/0": z, "sample_weight/0": np.array([[1.0, 2.0], [0.0, 4.0]])}
    for by_weights, D_Breg in ((False, ((1 + 18) / 2 + 16 / 2) / 2), (True, ((1 + 18) / 2 + 16 / 2) / 2 * 4 / 7)):
        recorder = Recorder(tmp_path / f"{by_weights}.npz", 1, "test")
        recorder.begin("numpy", {}, papers(lambda_s=0, total_steps=9), "x")
        reported = {"D_Breg": D_Breg, "penalty": D_Breg, "step": 0, "distance": 1}
        head = {"divergence": "squared_error", "weight": 1.0, "by_weights": by_weights}
        recorder.add(arrays, reported, {"outputs/0": "float64", "teacher/0": "float64"}, [head])
        recorder.write()
        assert compare_run(recorder.path).ok


# the file


def test_the_file_needs_no_pickle_and_holds_what_the_module_says(path):
    with np.load(path, allow_pickle=False) as file:
        assert {"recording", "0/x/1", "0/delta/0", "2/mask/0", "1/sample_weight/1", "2/beta"} <= set(file.files)
        assert "0/mask/1" not in file.files
        about = json.loads(str(file["recording"]))
    assert about["format"] == 1
    assert SMARTConfig.from_dict(about["config"]) == CONFIG
    assert {"smartreg", "numpy", "python"} <= set(about["versions"])


def test_what_is_no_recording_is_said_to_be_none(tmp_path, path):
    whole = path.read_bytes()
    bad = tmp_path / "bad.npz"
    for content in (b"", b"step,loss\n1,2\n", whole[:1000], whole[:-1], whole[:2000] + b"?" * 50 + whole[2050:]):
        bad.write_bytes(content)
        with pytest.raises(ValueError, match=r"bad.npz' is no recording, or it is damaged or cut short"):
            compare_run(bad)
    np.save(tmp_path / "bad.npy", np.array([{}], dtype=object))
    with pytest.raises(ValueError, match="is no recording"):
        compare_run(tmp_path / "bad.npy")
    np.savez(bad, x=1)
    with pytest.raises(ValueError, match=r"an .npz file, but not one that record= wrote"):
        compare_run(bad)
    with np.load(path) as file:
        np.savez(bad, **{name: file[name] for name in file.files if name != "1/x/1"})
    with pytest.raises(ValueError, match=r"is damaged: step 2 has no 'x/1'"):
        compare_run(bad)
    np.savez(bad, recording=5)
    with pytest.raises(ValueError, match="not one that record= wrote"):
        compare_run(bad)
    tamper_header(path, lambda about: about["config"].update(colour="red"))
    with pytest.raises(ValueError, match=r"no setting is called 'colour'.*It was written by smartreg .*Install"):
        compare_run(path)
    tamper_header(path, lambda about: about.update(format=2))
    with pytest.raises(ValueError, match=r"has format 2, this smartreg reads 1. It was written by smartreg"):
        compare_run(path)
    with pytest.raises(FileNotFoundError):
        compare_run(tmp_path / "none.npz")


def test_a_recorder_refuses_early(tmp_path, path):
    with pytest.raises(FileExistsError, match=r"^test: record='.*run.npz' is there already. Give another path"):
        Recorder(path, 1, "test")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        Recorder(tmp_path / "none" / "run.npz", 1, "test")
    with pytest.raises(ValueError, match="record_steps must be at least 1, got 0"):
        Recorder(tmp_path / "new.npz", 0, "test")
    for steps in (1.5, True, "3"):
        with pytest.raises(TypeError, match="record_steps must be a whole number"):
            Recorder(tmp_path / "new.npz", steps, "test")
    with pytest.raises(ValueError, match="nothing to record: lambda_s and mu are 0"):
        Recorder(tmp_path / "new.npz", 1, "test").begin("numpy", {}, papers(lambda_s=0, mu=0), "x")


def recorder_with_a_step(path):
    recorder = Recorder(path, 5, "test")
    recorder.begin("numpy", {}, papers(lambda_s=0, total_steps=9), "x")
    z = np.ones((1, 1))
    reported = {"D_Breg": 0, "penalty": 0, "step": 0, "distance": 0}
    head = {"divergence": "squared_error", "weight": 1.0, "by_weights": False}
    recorder.add({"outputs/0": z, "teacher/0": z}, reported, {}, [head])
    return recorder


def test_it_is_written_complete_or_not_at_all(tmp_path, monkeypatch):
    recorder = recorder_with_a_step(tmp_path / "run.npz")
    monkeypatch.setattr(np, "savez_compressed", lambda file, **_: file.write(b"half") and raises())

    def raises():
        raise OSError("no space left on device")

    with pytest.warns(SMARTWarning, match=r"could not be written.*no space left on device. Training goes on"):
        recorder.write()
    assert list(tmp_path.iterdir()) == []
    assert recorder.done


def test_a_file_that_appeared_since_is_kept(tmp_path):
    recorder = recorder_with_a_step(tmp_path / "run.npz")
    (tmp_path / "run.npz").write_text("another process's")
    with pytest.warns(SMARTWarning, match="a file has appeared there since"):
        recorder.close()
    assert (tmp_path / "run.npz").read_text() == "another process's"


def test_no_step_is_no_file_and_a_warning(tmp_path):
    recorder = Recorder(tmp_path / "run.npz", 5, "test")
    with pytest.warns(SMARTWarning, match="no training step was taken"):
        recorder.close()
    recorder.close()
    assert list(tmp_path.iterdir()) == []


def test_it_is_written_where_the_run_began(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recorder = recorder_with_a_step("run.npz")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    recorder.close()
    assert compare_run(tmp_path / "run.npz").ok


def test_recording_loads_no_framework():
    code = "import sys, smartreg.checking; assert not {'torch', 'tensorflow', 'keras', 'scipy'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
