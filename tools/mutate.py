"""Break each formula of each backend in turn, and see that the check or a test fails: python tools/mutate.py

mutmut and cosmic-ray mutate every operator, and universalmutator every line that a pattern fits: none takes one edit
with the tests that are to kill it, nor fails when an edit no longer applies; hence this list of our own.

Each mutation is made in a copy of the tree. Where the file is one that `python -m smartreg check` runs, its rows in
float64 are computed up to the first that fails; where none does, and for the other files, the tests named here run.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
CHECKED = ("divergences.py", "perturbation.py", "proximal.py")  # what `python -m smartreg check` runs of a backend
# A crash that has nothing to do with the formula: the mutation is badly written.
CRASH = re.compile(
    r"(?:^E\s+|raised )((?:Syntax|Indentation|Name|UnboundLocal|Import|ModuleNotFound|Attribute)Error)", re.M
)
CHECK = """
import sys
from smartreg.checking import FUNCTIONS, Face, golden_checks, law_checks, load_backend, trajectory_checks
face = Face(load_backend(sys.argv[1]), "float64")
for check in (golden_checks, law_checks, trajectory_checks):
    for row in check(face, FUNCTIONS):
        if not row.ok:
            print(row.what, row.problem, sep="; ")
            sys.exit(1)
"""


class Mutation(NamedTuple):
    """One edit: `old`, which occurs once in the file, becomes `new`; `tests` are the node ids that may kill it."""

    backend: str
    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


def _of(backend: str, file: str, *edits: tuple[str, ...]) -> list[Mutation]:
    return [
        Mutation(backend, name, file, old, new, tuple(test.replace("[*", f"[{backend}") for test in tests))
        for name, old, new, *tests in edits
    ]


# Tests that more than one mutation needs
TURNS = "test_training.py::test_R_s_in_the_first_of_every_K_steps_with_K_times_its_weight"
TORCH_TURNS = "test_torch_training.py::test_other_settings[R_s every 3rd step]"
PURE = "test_perturbation.py::test_"
SIGMA = PURE + "gaussian_start_has_standard_deviation_sigma[*]"
PROJECTED = PURE + "gaussian_start_is_projected[*-float64-example-inf]"
ONE_STEP = PURE + "one_step_by_hand[*-inf]"
RMS = PURE + "rms_is_of_the_unmasked_entries_of_each_example[*]"
MARGIN = PURE + "margin_gradient[*]"
AGREES = PURE + "ascent_agrees_with_numpy_and_stays_in_the_ball[*]"
BEST = PURE + "margin_start_is_the_best_linear_move[*-example-inf]"
BEST_L1 = PURE + "margin_start_is_the_best_linear_move[*-example-1]"
RELEASED = PURE + "released_update[*]"
SLOPES = "test_training.py::test_gradients_against_finite_differences[True-symmetric_kl]"
POSITIONS = "test_torch_trainer_positions.py::test_"
FOUND = POSITIONS + "find_positions"
ASKING = POSITIONS + "asking_leaves_nothing_behind"
BEST = "test_torch_transformers.py::test_the_best_model_is_the_one_that_was_measured"
MOVES = "test_training.py::test_theta_tilde_moves_every_S_steps_with_the_scheduled_beta"
FOLLOWS = "test_config.py::test_the_ascent_goes_with_the_start_of_a_copy"
MISSING = PURE + "rms_is_of_the_finite_entries[*]"
BROKEN = PURE + "a_broken_gradient_at_a_finite_entry_is_not_hidden[*-margin-example-inf]"

NUMPY = [
    *_of(
        "numpy",
        "smartreg/divergences.py",
        ("half of the KL is missing", "np.maximum(p_minus_q * r, 0)", "np.maximum(p * r, 0)"),
        ("the KL's gradient without p - q", "_sum(p * d_p)) + p_minus_q", "_sum(p * d_p))"),
        ("the KL's gradient with E_q for E_p", "_sum(p * d_p)", "_sum(q * d_p)"),
        ("the KL's second gradient with a sign wrong", "- d_q) - p_minus_q", "- d_q) + p_minus_q"),
        ("log p - log q without its normaliser", "r = d - log_z", "r = d"),
        ("the rounding of a - b is lost", "low = (a - (high - (high - a))) - (b + (high - a))", "low = 0 * high"),
        ("far classes are taken for near ones", "near = np.abs(d) < 1", "near = np.abs(d) < 3"),
        ("expm1(r) as exp(r) - 1", "q * np.expm1(np.where(near & alike, r, 0))", "q * (np.exp(r) - 1)"),
        ("log1p(x) as log(1 + x)", "np.log1p(np.where(alike, excess", "np.log(1 + np.where(alike, excess"),
        ("classes of -inf are not left out", "np.where(masked, 0, np.abs(a / 4 - b / 4))", "np.abs(a / 4 - b / 4)"),
        ("sigma(-min) as sigma(min)", "_sigmoid(-np.minimum(a, b))", "_sigmoid(np.minimum(a, b))"),
        ("sigma(a) - sigma(b) without its sign", "np.sign(d) * difference", "difference"),
        ("sigma' without 1 - sigma", "_sigmoid(a) * _sigmoid(-a) * d", "_sigmoid(a) * d"),
        ("the Bernoulli's second gradient with a sign wrong", "-_mean_grad(_sigmoid(b)", "_mean_grad(_sigmoid(b)"),
        ("the squared error is not squared", "_sum((a - b) ** 2)", "_sum(np.abs(a - b))"),
        ("the squared error's gradient is halved", "_mean_grad(2 * (a - b), mask)", "_mean_grad(a - b, mask)"),
        ("values are averaged, not summed", "_sum((a - b) ** 2)[..., 0]", "np.mean((a - b) ** 2, axis=-1)"),
        ("the mask is ignored", "np.asarray(mask) != 0", "np.ones(shape, bool)"),
        ("the mean counts masked positions", "keep.sum(axis=axes, keepdims=True)", "np.prod(shape[1:])"),
        ("positions are summed, not averaged", "(keep / count)", "(keep / 1)"),
        ("masked positions have a gradient", "np.where(weights > 0, grad, 0) * weights", "grad * weights.max()"),
    ),
    *_of(
        "numpy",
        "smartreg/perturbation.py",
        ("g is not divided by max|g|", "unit = rows / np.where(largest > 0, largest, 1)", "unit = rows"),
        ("the l2 norm without its root", "np.sqrt(total) if square else total", "total"),
        ("l_inf: no projection", "np.clip(delta, -radius, radius)", "delta"),
        ("l2: points inside are moved to the boundary", "radius, length <= radius)", "radius, length < 0)"),
        ("l1: sorted upwards", "-np.sort(-size, axis=-1)", "np.sort(size, axis=-1)"),
        ("l1: the threshold is not divided", "over, kept - 1, -1) / kept", "over, kept - 1, -1)"),
        ("example and token swapped", 'if granularity == "example" else x', 'if granularity == "token" else x'),
        ("sigma squared for sigma", "_each(sigma, x)", "_each(sigma**2, x)", SIGMA),
        (
            "the Gaussian start is not projected",
            'epsilon, config) if config.projection == "ball"',
            "10 * epsilon, config) if True",
            PROJECTED,
        ),
        ("descent for ascent", "_project(delta + step", "_project(delta - step"),
        ("eta is ignored", "step = _each(eta, x) * normalize(", "step = normalize(", ONE_STEP),
        ("the steps are not projected", "delta = _project(delta + step, epsilon, config)", "delta = delta + step"),
        ("one step too few", "range(config.ascent_steps)", "range(config.ascent_steps - 1)", ONE_STEP),
        ("the gradient at x, not at x + delta", "forward(x + delta)", "forward(x)", ONE_STEP),
        ("the gradient of the clean side", "outputs, positions)[1]", "outputs, positions)[0]"),
        ("the gradient at padding is kept", "g = np.where(keep, vjp(", "g = np.where(True, vjp(", AGREES),
        ("the noise at padding is kept", "np.where(keep, _each(sigma, x)", "np.where(True, _each(sigma, x)"),
        ("entries that are not finite are moved", "np.isfinite(x)", "np.ones_like(x, bool)", MISSING),
        ("rms counts padding", "np.where(keep, x * x, 0)", "x * x", RMS),
        ("the mean square without its root", "np.sqrt(np.sum(np.where(keep", "(np.sum(np.where(keep", RMS),
        ("the scale is ignored", 'if config.scale == "rms"', 'if config.scale == "neither"', SIGMA),
        ("margin: away from the boundary", "order[..., :1], -1, -1)", "order[..., :1], -1, 1)", MARGIN),
        ("margin: the most certain label", "np.argmin(np.abs(z)", "np.argmax(np.abs(z)", MARGIN),
        ("margin: that label away from 0", "-1) < 0, 1, -1)", "-1) < 0, -1, 1)", MARGIN),
        ("margin, l_inf: the gradient for its sign", "_each(epsilon, g) * np.sign(g)", "_each(epsilon, g) * g", BEST),
        ("margin, l1: the largest, whatever its sign", "np.argmax(np.abs(rows)", "np.argmax(rows", BEST_L1),
        ("margin: at padding too", "direction = np.where(keep, vjp(", "direction = np.where(True, vjp(", AGREES),
        ("the released code's epsilon is left out", "keepdims=True) + guard", "keepdims=True)", RELEASED),
        (
            "outputs by position take no mask",
            "outputs.ndim < 3",
            "outputs.ndim < 9",
            "test_proximal.py::test_bregman_divergence_leaves_masked_positions_out",
        ),
    ),
    *_of(
        "numpy",
        "smartreg/proximal.py",
        ("beta and 1 - beta swapped", "old + (1 - beta) * (new - old)", "old + beta * (new - old)"),
        ("a small beta is taken for 0", "new - beta * (new - old)", "new"),
        ("beta_early and beta_late swapped", "config.beta_early if step <=", "config.beta_early if step >"),
        ("beta switches a step early", "step <= last_early_step", "step < last_early_step"),
        (
            "0.29 of 100 steps is 28",
            "round(config.early_fraction * (config.total_steps or 0), 9)",
            "config.early_fraction * (config.total_steps or 0)",
        ),
        (
            "theta~ in half precision",
            "np.result_type(average, np.float32)",
            "average.dtype",
            "test_proximal.py::test_ema_is_kept_in_float32_or_wider",
        ),
        ("sample weights are ignored", "values = values * weight", "values = values * 1"),
        ("D_Breg is a sum over the batch", "float(np.mean(values))", "float(np.sum(values))"),
        ("D_Breg ignores the mask", "positions = output_mask(np.asarray(outputs), mask)", "positions = None"),
        (
            "D_Breg of theta and theta",
            "value(outputs, teacher_outputs, positions)",
            "value(outputs, outputs, positions)",
        ),
    ),
    *_of(
        "numpy",
        "smartreg/training.py",
        ("the target of R_s is detached", "+ lambda_s * each * grad_clean", "+ 0 * grad_clean", SLOPES),
        ("the perturbed side is detached", "lambda_s * each * grad_perturbed", "0 * grad_perturbed", SLOPES),
        ("lambda_s is ignored in the objective", "loss + lambda_s * r_s", "loss + r_s", SLOPES),
        ("mu is ignored in the gradient", "config.mu * each * grad_breg", "each * grad_breg", SLOPES),
        (
            "R_s of the clean outputs alone",
            "(divergence, perturbed_outputs, outputs, positions), s",
            "(divergence, outputs, outputs, positions), s",
            SLOPES,
        ),
        (
            "R_s counts masked positions",
            "(divergence, perturbed_outputs, outputs, positions), s",
            "(divergence, perturbed_outputs, outputs, None), s",
            SLOPES.replace("True", "False"),
        ),
        (
            "the student's outputs for the teacher's",
            'forward(teacher, teacher["E"][ids]',
            'forward(theta, theta["E"][ids]',
            SLOPES,
        ),
        (
            "the gradient ignores sample weights",
            "np.ones(n) if sample_weight is None else np.asarray(sample_weight)",
            "np.ones(n)",
            SLOPES,
        ),
        (
            "a token that comes twice counts once",
            'np.add.at(gradients["E"], ids, grad_x)',
            'gradients["E"][ids] += grad_x',
            SLOPES,
        ),
        ("tanh' as 1 - h", "(1 - h * h)", "(1 - h)", SLOPES),
        (
            "theta~ does not move",
            "teacher = f.ema_update(teacher, theta, beta)",
            "f.ema_update(teacher, theta, beta)",
            MOVES,
        ),
        ("theta~ moves every step though S = 3", "if t % config.proximal_steps == 0", "if t > 0", MOVES),
        ("beta of the next step", "f.momentum(t, config)", "f.momentum(t + 1, config)", MOVES),
        (
            "Keras' epsilon in PyTorch's Adam",
            'optimizer == "adam_torch"',
            'optimizer == "adam_keras"',
            "test_training.py::test_optimizers_by_hand",
        ),
        ("R_s of the next step's turn", "config.smoothness_weight(t - 1)", "config.smoothness_weight(t)", TURNS),
    ),
    *_of(
        "numpy",
        "smartreg/config.py",
        ("R_s every K-th step, unweighted", "else self.smoothness_steps * self.lambda_s", "else self.lambda_s", TURNS),
        ("R_s in every step, K times", "0.0 if steps % self.smoothness_steps else ", "", TURNS),
        (
            "a copy keeps the ascent of another start",
            " or isinstance(self.ascent_steps, _Followed)",
            "",
            FOLLOWS + "[replace]",
        ),
        ("a file keeps it", "None if isinstance(v, _Followed) else v for", "v for", FOLLOWS + "[edited json]"),
        (
            "an unknown keyword is left to Python",
            "        _check_names(self, settings, TypeError)\n",
            "",
            "test_config.py::test_an_unknown_keyword_gets_a_suggestion[SMARTConfig]",
        ),
    ),
]

COST = "test_torch_cost.py::test_"
SMART = "test_torch_smart.py::test_"
TORCH_RUN = "test_torch_training.py::test_fifty_steps_equal_the_reference[1-0-inf-example-gaussian-sgd-betas0]"
TORCH_S3 = "test_torch_training.py::test_fifty_steps_equal_the_reference[3-0-inf-example-gaussian-sgd-betas0]"
TORCH_KINDS = "test_torch_training.py::test_every_kind_of_output[gaussian-True-symmetric_kl]"
TORCH_POSITIONS = "test_torch_training.py::test_every_kind_of_output[gaussian-False-symmetric_kl]"
TORCH_ALIKE = "test_torch_architectures.py::test_the_perturbed_pass_at_zero_is_the_clean_pass_bit_for_bit[CNN]"
TORCH_ALONE = "test_torch_architectures.py::test_a_step_leaves_everything_else_alone[CNN-gaussian]"
TEACHER = SMART + "the_teacher_is_a_model_with_the_averaged_weights[Model]"
STREAMS = SMART + "all_random_streams_are_replayed"
BROKEN_OFF = SMART + "a_pass_that_breaks_off_leaves_the_random_streams_as_the_clean_pass_did"

REPEATS = "test_torch_repeats.py::test_"
HEADS = "test_torch_heads.py::test_"
LIFE = "test_torch_life.py::test_"
TORCH = [
    *_of(
        "torch",
        "smartreg_torch/divergences.py",
        ("half of the KL is missing", "(p_minus_q * r).clamp", "(p * r).clamp"),
        ("the KL's gradient without p - q", "keepdim=True)) + p_minus_q", "keepdim=True))"),
        ("the KL's gradient with E_q for E_p", "(p * d_p).sum", "(q * d_p).sum"),
        ("the KL's second gradient with a sign wrong", "- d_q) - p_minus_q", "- d_q) + p_minus_q"),
        ("log p - log q without its normaliser", "r = d - log_z", "r = d"),
        ("the rounding of a - b is lost", "low = (a - (high - (high - a))) - (b + (high - a))", "low = 0 * high"),
        ("far classes are taken for near ones", "near = d.abs() < 1", "near = d.abs() < 3"),
        ("expm1(r) as exp(r) - 1", "q * r.where(exact, 0).expm1()", "q * (r.exp() - 1)"),
        ("classes of -inf are not left out", ".abs().where(~masked, 0)", ".abs()"),
        ("sigma(-min) as sigma(min)", "(-torch.minimum(a, b)).sigmoid()", "torch.minimum(a, b).sigmoid()"),
        ("sigma(a) - sigma(b) without its sign", "d.sign() * size", "size"),
        ("sigma' without 1 - sigma", "a.sigmoid() * (-a).sigmoid() * d", "a.sigmoid() * d"),
        ("the Bernoulli's second gradient with a sign wrong", "grad_b = -(b.sigmoid()", "grad_b = (b.sigmoid()"),
        ("the squared error is not squared", "(a - b).square().sum(-1)", "(a - b).abs().sum(-1)"),
        ("values are averaged, not summed", "(a - b).square().sum(-1)", "(a - b).square().mean(-1)"),
        ("the mask is ignored", "keep = (mask != 0).flatten(1)", "keep = (mask == mask).flatten(1)"),
        ("the mean counts masked positions", "keep.sum(1).clamp(min=1)", "keep.shape[1]"),
        ("what comes from above is not passed on", "grad.unsqueeze(-1) * g for g", "g for g"),
        (
            "create_graph: the gradients are constants",
            "if not torch.is_grad_enabled():",
            "if True:",
            "test_torch_divergences.py::test_second_and_third_derivatives_at_every_distance[symmetric_kl-0.9]",
        ),
        (
            "create_graph: the gradients are counted twice",
            "tuple(g - g.detach() for g in gradients)",
            "tuple(gradients)",
            "test_torch_divergences.py::test_the_gradients_themselves_do_not_depend_on_create_graph[symmetric_kl]",
        ),
        (
            "create_graph: E_q for E_p",
            "(p * r_p).sum(-1, keepdim=True)) + (p - q)",
            "(q * r_p).sum(-1, keepdim=True)) + (p - q)",
            "test_torch_divergences.py::test_second_and_third_derivatives_at_every_distance[symmetric_kl-0.9]",
        ),
        (
            "create_graph: sigma' without 1 - sigma",
            "-(q * (-b).sigmoid() * d + (p - q))",
            "-(q * d + (p - q))",
            "test_torch_divergences.py::test_second_and_third_derivatives_at_every_distance[bernoulli_symmetric_kl-0.9]",
        ),
    ),
    *_of(
        "torch",
        "smartreg_torch/perturbation.py",
        ("g is not divided by max|g|", "unit = rows / largest.where(largest > 0, 1)", "unit = rows"),
        (
            "the l2 norm without its root",
            "rows.square().sum(-1, keepdim=True).sqrt()",
            "rows.square().sum(-1, keepdim=True)",
        ),
        ("l_inf: no projection", "delta.clamp(-radius, radius)", "delta"),
        ("l2: points inside are moved to the boundary", "radius, length <= radius)", "radius, length < 0)"),
        ("l1: sorted upwards", "size.sort(-1, descending=True)", "size.sort(-1)"),
        ("example and token swapped", 'if granularity == "example" else x', 'if granularity == "token" else x'),
        ("sigma squared for sigma", "_radius(s, point) * nu.to(point)", "_radius(s * s, point) * nu.to(point)"),
        (
            "the Gaussian start is not projected",
            'if config.projection == "ball":\n        delta',
            "if False:\n        delta",
        ),
        ("descent for ascent", "_project(d + _step(", "_project(d - _step("),
        ("eta is ignored", "length = _radius(eta, g)", "length = 1.0"),
        ("one step too few", "range(config.ascent_steps)", "range(config.ascent_steps - 1)"),
        ("the gradient at x, not at x + delta", "(c + d).to(point.dtype)", "(c + 0 * d).to(point.dtype)"),
        ("the mask is ignored", "x.isfinite() & expand_mask(mask, x)", "x.isfinite()"),
        ("the gradient at padding is kept", "_step(direction.to(d.dtype).where(k, 0)", "_step(direction.to(d.dtype)"),
        (
            "entries that are not finite are moved",
            "return x.isfinite() if mask is None",
            "return x == x if mask is None",
            MISSING,
        ),
        ("rms counts padding", "x.where(keep, 0).square()", "x.square()"),
        ("margin, l_inf: a NaN is hidden", "g.sign().where(~g.isnan(), g)", "g.sign()", BROKEN),
        ("the scale is ignored", 'if config.scale == "rms"', 'if config.scale == "neither"'),
        (
            "margin: away from the boundary",
            "scatter(-1, top[..., :1], -1).scatter(-1, top[..., 1:], 1)",
            "scatter(-1, top[..., :1], 1).scatter(-1, top[..., 1:], -1)",
            MARGIN,
        ),
        ("margin: the most certain label", "z.abs().argmin(-1", "z.abs().argmax(-1", MARGIN),
        ("margin, l_inf: the gradient for its sign", "radius * _sign(g)", "radius * g", BEST),
        ("margin, l1: the largest, whatever its sign", "rows.abs().argmax(-1", "rows.argmax(-1", BEST_L1),
        (
            "the released code's epsilon is left out",
            "keepdim=True) + _radius(epsilon, rows)",
            "keepdim=True)",
            RELEASED,
        ),
    ),
    *_of(
        "torch",
        "smartreg_torch/proximal.py",
        ("beta and 1 - beta swapped", "values, 1 - beta)", "values, beta)"),
        (
            "the teacher's gradient is not stopped",
            "teacher_outputs.detach(), positions",
            "teacher_outputs, positions",
            SMART + "no_gradient_reaches_the_teachers_outputs",
        ),
        ("sample weights are ignored", "(values * sample_weight.to(values)).mean()", "values.mean()"),
        ("D_Breg is a sum over the batch", "return values.mean()", "return values.sum()"),
        ("D_Breg ignores the mask", "positions = output_mask(outputs, mask)", "positions = None"),
        ("theta~ stays in the model after the block", "put(kept)", "pass", TEACHER),
    ),
    *_of(
        "torch",
        "smartreg_torch/smart.py",
        (
            "theta~ does not move",
            "ema_update(self.teacher, ",
            "ema_update({}, ",
            SMART + "theta_tilde_moves_every_S_steps",
        ),
        (
            "theta~ moves every step though S = 3",
            "self.step % self.config.proximal_steps == 0",
            "self.step > 0",
            SMART + "theta_tilde_moves_every_S_steps",
        ),
        (
            "R_s in every step though K = 3",
            "config.smoothness_weight(self.step)",
            "config.lambda_s",
            TORCH_TURNS,
        ),
        (
            "R_s of the next step's turn",
            "config.smoothness_weight(self.step)",
            "config.smoothness_weight(self.step + 1)",
            TORCH_TURNS,
        ),
        (
            "beta of the next step",
            "momentum(self.step, self.config)",
            "momentum(self.step + 1, self.config)",
            TORCH_RUN,
        ),
        ("update() counts twice", "self.step += 1", "self.step += 2", SMART + "remove_undoes_everything"),
        (
            "theta~ starts at 0",
            "parameter.detach().to(wide, copy=True)",
            "torch.zeros_like(parameter, dtype=wide)",
            SMART + "parameters_that_become_trainable_later_join_the_teacher",
        ),
        (
            "theta~ shares the weights' memory",
            "to(wide, copy=True)",
            "to(wide)",
            SMART + "theta_tilde_moves_every_S_steps",
        ),
        (
            "theta~ in half precision",
            "wide = torch.promote_types(parameter.dtype, torch.float32)",
            "wide = parameter.dtype",
            SMART + "bf16_weights_have_a_float32_teacher_that_moves",
        ),
        (
            "the student's weights in the teacher's pass",
            "with self._averaged(theta, copied, teacher):",
            "if True:",
            TEACHER,
        ),
        (
            "the target of R_s is detached",
            "(z_perturbed, z, m)",
            "(z_perturbed, z.detach(), m)",
            SMART + "both_sides_of_r_s_carry_gradient",
        ),
        (
            "the perturbed side is detached",
            "(z_perturbed, z, m)",
            "(z_perturbed.detach(), z, m)",
            SMART + "both_sides_of_r_s_carry_gradient",
        ),
        ("R_s counts masked positions", "(z_perturbed, z, m)", "(z_perturbed, z)", TORCH_POSITIONS),
        ("R_s of the clean outputs alone", "(z_perturbed, z, m)", "(z.detach(), z, m)", TORCH_RUN),
        (
            "R_s ignores sample weights",
            "(z_perturbed, z, m), sample_weight)",
            "(z_perturbed, z, m))",
            SMART + "sample_weights_weigh_both_terms",
        ),
        (
            "D_Breg ignores sample weights",
            "z_taught, name, m, sample_weight)",
            "z_taught, name, m)",
            SMART + "sample_weights_weigh_both_terms",
        ),
        (
            "D_Breg counts masked positions",
            "z_taught, name, m, sample_weight)",
            "z_taught, name, None, sample_weight)",
            SMART + "outputs_with_a_position_axis_leave_padding_out",
        ),
        (
            "D_Breg's gradient goes to the teacher",
            "bregman_divergence(z, z_taught",
            "bregman_divergence(z_taught, z",
            TORCH_RUN,
        ),
        ("lambda_s is ignored", '("R_s", lambda_s)', '("R_s", 1.0)', TORCH_KINDS),
        ("mu is ignored", '("D_Breg", config.mu)', '("D_Breg", 1.0)', TORCH_KINDS),
        (
            "several outputs are averaged, not added",
            "torch.stack(list(terms)).sum()",
            "torch.stack(list(terms)).mean()",
            SMART + "several_heads_add_up",
        ),
        (
            "fresh dropout masks in the passes",
            "torch.set_rng_state(self._streams[0])",
            "pass",
            TORCH_ALIKE,
            SMART + "a_resumed_run_equals_the_unbroken_one_bit_for_bit[gaussian]",
        ),
        ("NumPy's random stream is not replayed", "np.random.set_state(self._streams[1])", "pass", STREAMS),
        ("Python's random stream is not put back", "random.setstate(streams[1])", "pass", BROKEN_OFF),
        (
            "torch's random stream is not put back",
            "with self.kept_streams(), torch.autocast",
            "with torch.autocast",
            BROKEN_OFF,
        ),
        (
            "BatchNorm's statistics are moved by each pass",
            "buffers.update({name: _copy(buffer, copies) for name, buffer in before.items()})",
            "pass",
            TORCH_ALONE,
        ),
        (
            "buffers stay as the passes left them",
            "buffers.update(values)",
            "buffers.update({})",
            SMART + "batchnorm_statistics_are_the_clean_passs",
        ),
        ("the noise is from torch's own stream", "generator=self._generator", "generator=None", TORCH_ALONE),
        (
            "the noise is uniform",
            "torch.randn(",
            "torch.rand(",
            SMART + "the_noise_is_standard_normal",
        ),
        (
            "the lean step's other side is lost",
            "term.backward(gradient.to(term))",
            "pass",
            COST + "lean_changes_neither_value_nor_gradient",
        ),
        (
            "the lean step's other side has no lambda_s",
            "lambda_s * r_s(passes(), fixed)",
            "r_s(passes(), fixed)",
            COST + "lean_changes_neither_value_nor_gradient",
        ),
        (
            "the lean step's clean gradients wait beside .grad",
            "_PutOff.apply(self._terms, smallest)",
            "_PutOff.apply(self._terms, max(weights, key=torch.Tensor.numel))",
            COST + "lean_keeps_one_set_of_gradients",
        ),
        (
            "the lean step has two graphs",
            "if afterwards is None:",
            "if True:",
            COST + "lean_keeps_one_graph_at_a_time",
        ),
        (
            "a late NaN is noticed after the optimiser's step",
            "register_step_pre_hook(judge)",
            "register_step_pre_hook(lambda *_: None)",
            COST + "a_penalty_that_arrives_late_and_is_not_finite_is_raised_before_harm_is_done",
        ),
        (
            "a skipped step gives its NaN",
            "penalty = _zero(self.model)",
            "pass",
            SMART + "nan_can_be_skipped_and_is_counted",
        ),
        ("a skipped step is not counted", "self._skipped += 1", "pass", SMART + "nan_can_be_skipped_and_is_counted"),
        (
            "NaN is skipped though it should raise",
            'non_finite == "skip" or',
            'non_finite == "raise" or',
            SMART + "nan_raises_and_names_the_step",
        ),
        (
            "a penalty in eval mode",
            "(self.model.training and torch.is_grad_enabled())",
            "torch.is_grad_enabled()",
            SMART + "eval_mode_and_no_grad_are_the_models_own_call",
        ),
        (
            "attention_mask is not read",
            'arguments.get("attention_mask")',
            'arguments.get("no_mask")',
            SMART + "arguments_may_be_positional",
        ),
        (
            "a regression's l_s is the KL",
            '"regression": "squared_error"',
            '"regression": "symmetric_kl"',
            SMART + "hugging_faces_problem_type_chooses_the_divergence[gaussian-regression-3]",
        ),
        (
            "max_delta is the smallest",
            "delta.abs().max() for delta",
            "delta.abs().min() for delta",
            SMART + "both_sides_of_r_s_carry_gradient",
        ),
        (
            "vanished counts what did not vanish",
            "shift(x, delta) == x",
            "shift(x, delta) != x",
            SMART + "vanishing_perturbations_warn_once",
        ),
        (
            "the noise generator is not restored",
            'generator.set_state(state["generator"].cpu())',
            "pass",
            SMART + "a_resumed_run_equals_the_unbroken_one_bit_for_bit[gaussian]",
        ),
        (
            "what fully_shard gathered of theta~ stays",
            "reshard(self._sharded)  # what was gathered inside was of theta~",
            "pass",
            "test_torch_distributed.py::test_fully_shard",
        ),
        (
            "the ranks drift apart with static_graph and the margin start",
            "xs = [x.detach() for x in xs]",
            "pass",
            "test_torch_distributed.py::test_distributed_data_parallel",
        ),
        (
            "theta~ is not restored",
            "local(average).copy_(local(saved[name]))",
            "pass",
            SMART + "a_resumed_run_equals_the_unbroken_one_bit_for_bit[gaussian]",
        ),
        (
            "the weights stay frozen after the ascent",
            "weight.requires_grad_(True)",
            "pass",
            SMART + "the_ascent_builds_no_graph_for_the_weights",
        ),
    ),
    *_of(
        "torch",
        "smartreg_torch/site.py",
        ("delta is not added", "(x.to(delta.dtype) + delta)", "x.to(delta.dtype)", TORCH_RUN),
        ("delta is subtracted", "(x.to(delta.dtype) + delta)", "(x.to(delta.dtype) - delta)", TORCH_RUN),
        (
            "every run of the site takes the first delta",
            "put(output, values[run - 1])",
            "put(output, values[0])",
            "test_torch_architectures.py::test_r_s_is_the_divergence_at_the_perturbed_embeddings[siamese]",
        ),
        (
            "padding and tokens swapped",
            "padding = ids != index",
            "padding = ids == index",
            SMART + "mask_may_be_a_function_or_a_name_or_padding_idx",
        ),
        (
            "the tensor of a tuple is not found",
            "if type(output) is tuple and output and",
            "if False and",
            "test_torch_matrix.py::test_an_architecture[Swin-train step]",
        ),
        (
            "a model without embeddings hides those inside it",
            "                outermost.append(name)\n                break",
            "                break\n        outermost.append(name)",
            "test_torch_matrix.py::test_an_architecture[CLIP, images-site]",
        ),
        (
            "x is what the model made of it in place",
            "return x.clone()",
            "return x",
            SMART + "a_model_that_changes_its_embeddings_in_place",
        ),
    ),
    *_of(
        "torch",
        "smartreg_torch/labels.py",
        ("the next token's label is not looked for", "(first, 0, -1, more, more - 1)", "(first, 0, more)", FOUND),
        ("an ignore_index counts", "ignored, left = (value,), left & ~left", "left = left & ~left", FOUND),
        ("labels shifted the wrong way", "self.more - self.offset", "self.more + self.offset", FOUND),
        ("cross-entropy's sign", "z.sigmoid() - y", "z.sigmoid() + y", POSITIONS + "find_divergence"),
        ("squared error's sign", '"squared_error": z - y', '"squared_error": z + y', POSITIONS + "find_divergence"),
        (
            "fractions are bits",
            "if fitting and bool(((y == 0) | (y == 1)).all())",
            "if True",
            POSITIONS + "labels_that_nothing_explains_are_asked_for",
        ),
    ),
    *_of(
        "torch",
        "smartreg_torch/probe.py",
        ("a reference's call is SMART's", "if not torch.is_grad_enabled():", "if False:", ASKING),
        ("asking logs", "vars(trainer).update(kept, log=lambda *_, **__: None)", "vars(trainer).update(kept)", ASKING),
        ("asking takes the labels away", "compute_loss(model, cloned(inputs)", "compute_loss(model, inputs", ASKING),
        ("asking moves the buffers", "nullcontext(), state.undone(again):", "nullcontext():", ASKING),
        (
            "the gradient of accelerate's copies",
            "return convert_to_fp32(output), output",
            "return (convert_to_fp32(output),) * 2",
            POSITIONS + "the_shift_is_the_losss[bfloat16]",
        ),
        (
            "a resumed run asks again",
            'self._state = state["state"]',
            "pass",
            POSITIONS + "a_resumed_run_does_not_ask_another_batch",
        ),
        (
            "what no shift explains counts everywhere",
            'if self._state == "each" or not',
            "if not",
            POSITIONS + "labels_of_ctc_that_are_as_long_as_the_frames",
        ),
        (
            "classes on the last axis, whatever the loss says",
            "smart._class_axis = self._axis = axis",
            "self._axis = axis",
            POSITIONS + "the_axis_of_the_classes_is_the_losss",
        ),
    ),
    *_of(
        "torch",
        "smartreg_torch/transformers.py",
        ("theta is loaded where theta~ was measured", "weight.copy_(teacher[name])", "pass", BEST),
        (
            "the metric is theta's, whoever was measured",
            "_of_averages(self._smart_evaluations, name, metrics[name])",
            "False",
            BEST,
        ),
        (
            "an old transformers goes through",
            "release < (5, 18)",
            "release < (4, 18)",
            "test_torch_transformers.py::test_an_old_transformers_is_refused_at_import",
        ),
    ),
    *_of(
        "torch",
        "smartreg_torch/replay.py",
        (
            "generators go on from pass to pass",
            "generator.put(generator.before)\n            args, kwargs",
            "pass\n            args, kwargs",
            REPEATS + "a_generator_of_ones_own_is_replayed",
        ),
        (
            "generators stay where a pass left them",
            "for (_, generator), state in zip(generators, states, strict=True):\n                generator.put(state)",
            "pass",
            "test_torch_faults.py::test_nothing_is_left_wherever_the_model_raises",
        ),
        (
            "containers are not put back before a pass",
            "if not _same(own, before):\n                    slot.put(slot.owner, before)",
            "pass",
            REPEATS + "what_a_module_keeps_is_the_same_in_every_pass",
        ),
        (
            "side results are the last pass's",
            "if not _same(slot.get(), own):\n                    slot.put(slot.owner, own)",
            "if False:",
            REPEATS + "a_side_result_is_the_clean_passs",
        ),
        (
            "an input that was written into is not copied",
            "memo[id(value)] = found.stand_in() if found.written else value",
            "memo[id(value)] = value",
            REPEATS + "an_input_that_is_written_into",
        ),
        (
            "one copy of an input for all passes",
            "self.stands = self.value if self.copy is None else clone(self.copy)",
            "self.stands = self.value if self.copy is None else self.copy",
            REPEATS + "an_input_that_is_written_into",
        ),
        (
            "what is set up once is set up in each pass",
            "        self.kept.accept(moved)\n",
            "",
            LIFE + "a_layer_that_initialises_itself_by_its_first_batch[attribute]",
        ),
        (
            "lean's last pass is in the mode of the backward",
            "self._set_modes(self._modes)",
            "pass",
            REPEATS + "lean_runs_its_last_pass_in_the_mode_of_the_clean_one",
        ),
        (
            "frozen weights move in every pass",
            "parameters.update({name: _parameter(value, copies)",
            "parameters.update({} if True else {name: _parameter(value, copies)",
            REPEATS + "a_momentum_encoder_moves_once_a_batch",
        ),
        (
            "a shared buffer is copied twice",
            "    if id(value) not in copies:\n        copies[id(value)] = clone",
            "    if True:\n        copies[id(value)] = clone",
            REPEATS + "state_in_odd_places[SharedBuffer]",
        ),
        (
            "hooks are not looked into",
            'for hook in hooks:\n                self._keep_function(hook, "a hook")',
            "pass",
            REPEATS + "what_a_hook_keeps_elsewhere",
        ),
    ),
    *_of(
        "torch",
        "smartreg_torch/passes.py",
        (
            "the check sees nothing",
            "if apart > torch.finfo(z.dtype).eps ** digits * size:",
            "if False:",
            REPEATS + "a_model_that_does_not_repeat_itself_is_named",
        ),
        (
            "the check takes rounding for a difference",
            "digits = 0.7 if",
            "digits = 3 if",
            REPEATS + "rounding_and_masked_positions_are_no_difference",
        ),
        (
            "the ascent's gradients stay in .grad",
            "for weight, grad in zip(weights, own, strict=True):\n            weight.grad = grad",
            "pass",
            REPEATS + "no_gradient_is_touched_by_a_layer_that_fills_grad_itself",
        ),
    ),
    *_of(
        "torch",
        "smartreg_torch/outputs.py",
        (
            "classes on axis 1 are not moved",
            "else z.movedim(self.axis, -1)",
            "else z",
            HEADS + "a_tagger_with_classes_on_axis_1",
        ),
        (
            "where nothing says it, the last axis is taken",
            'if hasattr(evidence.config, "model_type") and z.ndim == 3:',
            "if True:",
            HEADS + "what_no_shape_says_is_asked_for",
        ),
        (
            "an additive mask is read as it is",
            "return torch.where(additive, mask == 0, mask != 0)",
            "return mask",
            HEADS + "a_mask_is_found_however_it_is_given",
        ),
        (
            "key_padding_mask is true at tokens",
            'return f"{name}, true at padding", value == 0',
            'return f"{name}, true at padding", value',
            HEADS + "a_mask_is_found_however_it_is_given",
        ),
        (
            "probabilities pass for logits",
            "    inside = bool(((z >= 0) & (z <= 1)).all())",
            "    inside = False",
            HEADS + "probabilities_are_not_taken_for_logits",
        ),
        (
            "any loss is one of classes",
            "if len(left) < 3 or apart <= total",
            "if True or apart <= total",
            HEADS + "a_loss_of_no_classes_warns_once_in_the_first_backward",
        ),
        (
            "the gradient of classes is taken for another",
            "left = wide.sum(-1).flatten()",
            "left = wide.abs().sum(-1).flatten()",
            HEADS + "a_loss_of_classes_says_nothing",
        ),
    ),
    *_of(
        "torch",
        "smartreg_torch/smart.py",
        (
            "theta~ stays at the weights of the constructor",
            "moved = stamp is not None and not stamp.holds(parameter)",
            "moved = False",
            LIFE + "theta_tilde_starts_at_the_weights_of_the_first_step",
        ),
        (
            "theta~ follows weights for ever",
            "        self._stamps = None\n        step = self._step(",
            "        step = self._step(",
            LIFE + "theta_tilde_starts_at_the_weights_of_the_first_step",
        ),
        (
            "the model writes into theta~",
            "self._copies_teacher = True  # until",
            "self._copies_teacher = False  # until",
            REPEATS + "theta_tilde_is_not_written_into",
        ),
        (
            "measure trains on",
            "                self.model.eval()\n",
            "",
            HEADS + "measure_is_R_s_in_eval_mode_and_changes_nothing",
        ),
        (
            "a pass is not checked",
            "self._check_repeated(calls, targets, positions, state, passes)",
            "pass",
            REPEATS + "a_model_that_does_not_repeat_itself_is_named",
        ),
        (
            "a backward that runs once is not noticed",
            "self._check_backward(calls, targets)",
            "pass",
            REPEATS + "a_backward_that_runs_only_once_is_named",
        ),
        (
            "what is below the site is not checked",
            "graph=False) if self.config.mu > 0 else",
            "graph=False) if False else",
            REPEATS + "what_is_below_the_site_is_checked_as_well",
        ),
        (
            "what is the same for the same batch is set up for good",
            "state.reject()",
            "pass",
            REPEATS + "state_in_odd_places[LastBatch]",
        ),
        (
            "a delta that is NaN passes in silence",
            'math.isfinite(values.get("max_delta", 0.0))',
            "True",
            SMART + "a_perturbation_that_is_not_finite_is_noticed",
        ),
    ),
    *_of(
        "torch",
        "smartreg_torch/site.py",
        (
            "an old hook stays for ever",
            "self._on_end = weakref.finalize(self, _take_off, self._hooks)",
            "pass",
            LIFE + "a_cell_that_is_run_twice_leaves_one_hook",
        ),
    ),
]

RUN = "test_tf_reference.py::test_fifty_steps_equal_numpy[{}]"
OUTPUTS = "test_tf_outputs.py::test_"
LOSSES = "test_tf_losses.py::test_"
SITES = "test_tf_sites.py::test_"
FIT = "test_tf_fit.py::test_"
EDGES = "test_tf_edges.py::test_"
ALIKE = FIT + "same_masks_in_every_pass_and_nothing_left[{}]"

PASSES = "test_tf_passes.py::test_"
TF = [
    *_of(
        "tf",
        "smartreg_tf/divergences.py",
        ("half of the KL is missing", "tf.maximum(p_minus_q * r, 0)", "tf.maximum(p * r, 0)"),
        ("the KL's gradient without p - q", "_sum(p * d_p)) + p_minus_q", "_sum(p * d_p))"),
        ("the KL's gradient with E_q for E_p", "_sum(p * d_p)", "_sum(q * d_p)"),
        ("the KL's second gradient with a sign wrong", "- d_q) - p_minus_q", "- d_q) + p_minus_q"),
        ("log p - log q without its normaliser", "r = d - log_z", "r = d"),
        ("the rounding of a - b is lost", "low = (a - (high - (high - a))) - (b + (high - a))", "low = 0 * high"),
        ("far classes are taken for near ones", "near = tf.abs(d) < 1", "near = tf.abs(d) < 3"),
        ("expm1(r) as exp(r) - 1", "q * tf.math.expm1(tf.where(near & alike, r, zero))", "q * (tf.exp(r) - 1)"),
        (
            "classes of -inf are not left out",
            "tf.where(masked, zero, tf.abs(a / eighth - b / eighth))",
            "tf.abs(a / eighth - b / eighth)",
        ),
        ("sigma(-min) as sigma(min)", "_sigmoid(-tf.minimum(a, b))", "_sigmoid(tf.minimum(a, b))"),
        ("sigma' without 1 - sigma", "_sigmoid(a) * _sigmoid(-a) * d", "_sigmoid(a) * d"),
        ("the squared error is not squared", "tf.reduce_sum((a - b) ** 2, -1)", "tf.reduce_sum(tf.abs(a - b), -1)"),
        ("values are averaged, not summed", "tf.reduce_sum((a - b) ** 2, -1)", "tf.reduce_mean((a - b) ** 2, -1)"),
        ("the mask is ignored", "keep = tf.cast(mask, outputs.dtype)", "keep = tf.ones_like(mask, outputs.dtype)"),
        ("positions are summed, not averaged", "(keep / count)", "(keep / 1)"),
        (
            "what comes from above is not passed on",
            "each * grad_a, each * grad_b",
            "grad_a, grad_b",
            "test_tf_divergences.py::test_float64_equals_numpy_with_masks_and_positions[symmetric_kl-eager]",
        ),
        (
            "sigma(a) - sigma(b) has no derivative where a = b",
            "return tf.sign(a - b) * difference, vjp",
            "return tf.sign(a - b) * difference, lambda upstream: (0 * upstream, 0 * upstream)",
            "test_tf_divergences.py::test_second_derivatives_are_those_of_the_gradient[bernoulli_symmetric_kl-equal]",
        ),
        (
            "sigma' is 0 at 0",
            "return upstream * _sigmoid(a) * _sigmoid(-a)\n",
            "return upstream * _sigmoid(a) * _sigmoid(-a) * tf.abs(tf.sign(a))\n",
            "test_tf_divergences.py::test_the_third_derivative_where_a_logit_is_0",
        ),
    ),
    *_of(
        "tf",
        "smartreg_tf/perturbation.py",
        ("g is not divided by max|g|", "unit = rows / tf.where(largest > 0, largest, 1)", "unit = rows"),
        ("l_inf: no projection", "tf.minimum(tf.maximum(delta, -radius), radius)", "delta"),
        ("l2: points inside are moved to the boundary", "radius, length <= radius)", "radius, length < 0)"),
        ("l1: sorted upwards", 'direction="DESCENDING"', 'direction="ASCENDING"'),
        ("example and token swapped", 'if granularity == "example" else x', 'if granularity == "token" else x'),
        ("sigma squared for sigma", "each(self.sigma, noise)", "each(self.sigma**2, noise)"),
        ("the start is not projected", "_project(delta, self.epsilon, self.config) if", "delta if"),
        ("descent for ascent", "_project(delta + each(", "_project(delta - each("),
        ("eta is ignored", "each(self.eta, g) * g", "g"),
        ("one step too few", "range(balls[0].config.ascent_steps)", "range(balls[0].config.ascent_steps - 1)"),
        ("the gradient at x, not at x + delta", "gradient(x + deltas[0]", "gradient(x + 0 * deltas[0]"),
        ("the mask is ignored", "finite & expand_mask(mask, x)", "finite"),
        (
            "what is not finite is perturbed",
            "finite = tf.math.is_finite(x)",
            "finite = x == x",
            "test_tf_perturbation.py::test_entries_that_are_not_finite_keep_the_rest_of_their_row",
        ),
        ("rms counts padding", "tf.where(keep, x * x, tf.zeros_like(x))", "x * x"),
        ("the scale is ignored", 'if config.scale == "rms"', 'if config.scale == "neither"'),
        (
            "margin: away from the boundary",
            "tf.one_hot(order[..., 1], classes, dtype=z.dtype) - tf.one_hot(order[..., 0]",
            "tf.one_hot(order[..., 0], classes, dtype=z.dtype) - tf.one_hot(order[..., 1]",
            MARGIN,
        ),
        ("margin: the most certain label", "tf.argmin(tf.abs(z)", "tf.argmax(tf.abs(z)", MARGIN),
        ("margin, l_inf: the gradient for its sign", "each(epsilon, g) * tf.sign(g)", "each(epsilon, g) * g", BEST),
        (
            "the released code's epsilon is left out",
            "_largest(rows) + _radius(epsilon, rows)",
            "_largest(rows)",
            RELEASED,
        ),
    ),
    *_of(
        "tf",
        "smartreg_tf/proximal.py",
        ("beta and 1 - beta swapped", "tf.cast(1 - beta, average.dtype)", "tf.cast(beta, average.dtype)"),
        ("beta switches a step early", "<= last_early_step", "< last_early_step"),
        (
            "the teacher's gradient is not stopped",
            "tf.stop_gradient(teacher_outputs)",
            "teacher_outputs",
            "test_tf_perturbation.py::test_no_gradient_reaches_the_teacher_and_weights_are_checked",
        ),
        ("sample weights are ignored", "values * tf.cast(weight, values.dtype)", "values"),
        ("D_Breg ignores the mask", "positions = output_mask(outputs, mask)", "positions = None"),
    ),
    *_of(
        "tf",
        "smartreg_tf/outputs.py",
        (
            "probabilities are not turned to logits",
            "_log_probabilities(self._classes_last(z), self.kind)",
            "floating(self._classes_last(z))",
            OUTPUTS + "probabilities_keep_the_digits_of_their_logits",
        ),
        (
            "the softmax layer's logits are not taken",
            'kept = getattr(z, "_keras_logits", None)',
            "kept = None",
            OUTPUTS + "probabilities_keep_the_digits_of_their_logits",
        ),
        (
            "log p for the log odds",
            "tf.math.log(p) - tf.math.log1p(-p)",
            "tf.math.log(p)",
            OUTPUTS + "probabilities_keep_the_digits_of_their_logits",
        ),
        (
            "from_logits is not read",
            '.get("from_logits", False)',
            '.get("no_logits", False)',
            OUTPUTS + "the_loss_says_what_the_outputs_are[loss0-None-3-logits]",
        ),
        (
            "labels are taken for classes",
            'return "label_" + logits',
            "return logits",
            OUTPUTS + "the_loss_says_what_the_outputs_are[loss5-None-3-label_logits]",
        ),
        (
            "loss_weights are not read",
            "1.0 if weight is None else float(weight)",
            "1.0",
            OUTPUTS + "several_outputs_loss_weights_and_one_without_a_loss",
        ),
        (
            "sample weights of another output",
            "for step in self.path if",
            "for step in () if",
            EDGES + "loss_weights_and_sample_weights_are_found_by_output[None]",
        ),
        (
            "weights by position are not weighed by the mask",
            "position_weights(a, mask)[..., 0] * weight",
            "position_weights(a, None)[..., 0] * weight",
            OUTPUTS + "weights_of_positions_and_the_mean_by_weights",
        ),
        (
            "the mean by weights divides by n",
            "        if by_weights:",
            "        if by_weights is None:",
            OUTPUTS + "weights_of_positions_and_the_mean_by_weights",
        ),
        (
            "Keras' mask on the output is ignored",
            '(getattr(z, "_keras_mask", None), *masks)',
            "masks",
            OUTPUTS + "keras_mask_on_the_output_goes_before_the_sites",
        ),
        (
            "the site's mask is ignored for the outputs",
            '(getattr(z, "_keras_mask", None), *masks)',
            '(getattr(z, "_keras_mask", None),)',
            RUN.format("positions"),
        ),
        (
            "the loss's axis is not read",
            'options.get("axis", ',
            'options.get("no_axis", ',
            LOSSES + "classes_on_the_axis_of_the_loss[logits]",
        ),
        (
            "the loss's reduction is not read",
            '"reduction": loss.reduction',
            '"reduction": "sum_over_batch_size"',
            LOSSES + "a_loss_that_is_a_sum_has_a_penalty_that_is_a_sum[None-]",
        ),
        (
            "ignored labels count",
            "_without_last_1(label) != tf.cast(self.ignore_class",
            "_without_last_1(label) != tf.cast(self.ignore_class - 1",
            LOSSES + "what_the_loss_ignores_is_left_out[False-sum_over_batch_size]",
        ),
        (
            "ignored examples are of the n",
            "factor *= tf.math.divide_no_nan(n, self.examples(a, y))",
            "factor *= 1",
            LOSSES + "examples_that_the_loss_ignores_are_not_of_the_n[False]",
        ),
        (
            "a sum counts masked positions",
            "n * replicas * tf.reduce_sum(counted,",
            "n * replicas * tf.reduce_sum(tf.ones_like(counted),",
            LOSSES + "a_sum_counts_the_positions_that_are_not_masked",
        ),
        (
            "the axis that the labels lack is not looked for",
            "if len(lacking) == 1 else -1",
            "if len(lacking) == 9 else -1",
            LOSSES + "the_axis_that_sparse_labels_lack[shape0-label0-1]",
        ),
    ),
    *_of(
        "tf",
        "smartreg_tf/site.py",
        (
            "fresh dropout masks in the passes",
            "keras.StatelessScope([*clean.draws, *weights])",
            "keras.StatelessScope([*weights])",
            ALIKE.format("Sequential"),
        ),
        (
            "the clean weights in every pass",
            "keras.StatelessScope([*clean.draws, *weights])",
            "keras.StatelessScope([*clean.draws])",
            RUN.format("D_Breg alone"),
        ),
        (
            "model.losses are the last pass'",
            "            now.restore()\n",
            "            pass\n",
            FIT + "model_losses_are_those_of_the_clean_pass",
        ),
        (
            "every run of the site takes the first delta",
            "put(len(calls), x)",
            "put(0, x)",
            FIT + "each_run_of_the_site_has_its_own_delta",
        ),
        (
            "a tied head is perturbed too",
            '_argument(original, args, kwargs, "reverse")',
            '_argument(original, args, kwargs, "no")',
            ALIKE.format("tied embeddings"),
        ),
        (
            "the layer's mask is ignored",
            "return self._moved(output, mask, id(layer))",
            "return self._moved(output, None, id(layer))",
            FIT + "padding_is_not_perturbed",
        ),
        (
            "the padding_mask input is ignored",
            "mask = given.get(name)",
            "mask = None",
            FIT + "padding_is_not_perturbed",
        ),
        (
            "a layer's attribute does not tell that it is a position table",
            "names[id(layer)].append(name)",
            "names[id(layer)].append(layer.name)",
            SITES + "position_tables_are_known_by_the_attribute_that_holds_them[by key-True]",
        ),
        (
            "what is shared by the batch is a site",
            "or several) and self._depends(x)",
            "or several or first > 0)",
            SITES + "a_table_of_positions_alone_leaves_the_float_input",
        ),
        (
            "runs inside a loop are a site",
            "traced_graph(output) is not self.graph",
            "self.graph is self",
            SITES + "an_embedding_inside_a_loop_is_refused_by_name",
        ),
        (
            "ragged padding is perturbed",
            "return x.to_tensor(), there,",
            "return x.to_tensor(), tf.ones_like(there),",
            SITES + "ragged_ids_have_the_R_s_of_the_padded_and_masked_ones[margin]",
        ),
        (
            "zeros of a sparse input are not perturbed",
            "return values, None, _all_entries",
            "return values, values != 0, _all_entries",
            SITES + "sparse_inputs_have_the_R_s_of_the_dense_ones[margin]",
        ),
        (
            "a mask that is true at the padding is taken as it is",
            "tf.where(_varies(x, ~real) & ~_varies(x, real), ~real, real)",
            "real",
            SITES + "a_padding_mask_input_in_any_convention[true at padding]",
        ),
        (
            "a label is perturbed",
            "if asked[0] or not given.is_label(name)",
            "if asked",
            SITES + "a_label_among_the_float_inputs_is_not_perturbed[reached-margin]",
        ),
    ),
    *_of(
        "tf",
        "smartreg_tf/training.py",
        (
            "theta~ does not move",
            "average.assign(moved[name])",
            "average.assign(averages[name])",
            RUN.format("D_Breg alone"),
        ),
        (
            "R_s in every step though K = 3",
            "self.config.smoothness_weight(int(_numpy(self.step)) if len(weights) > 1 else 0)",
            "self.config.smoothness_weight(0)",
            RUN.format("R_s every 3rd step"),
        ),
        (
            "K is no part of R_s's weight",
            "penalty += lambda_s * r_s",
            "penalty += config.lambda_s * r_s",
            RUN.format("R_s every 3rd step"),
        ),
        (
            "theta~ moves every step though S = 3",
            "& (step % self.config.proximal_steps == 0)",
            "",
            RUN.format("D_Breg alone"),
        ),
        (
            "theta~ moves where the optimiser did not step",
            "(tf.cast(steps, tf.int64) > 0) & ",
            "",
            EDGES + "accumulation_moves_theta_tilde_by_hand",
        ),
        (
            "beta of the next step",
            "momentum(step, self.config)",
            "momentum(step + 1, self.config)",
            RUN.format("recommended"),
        ),
        (
            "a step counts twice",
            "self.step.assign_add(steps)",
            "self.step.assign_add(2 * steps)",
            FIT + "gradient_accumulation_moves_theta_once_a_step",
        ),
        (
            "accumulated batches count as steps",
            "* steps // accumulated",
            "* steps",
            FIT + "gradient_accumulation_moves_theta_once_a_step",
        ),
        (
            "theta~ starts before the weights are loaded",
            "average.assign(weight.value)  #",
            "average.value  #",
            "test_tf_resume.py::test_theta_0_is_what_the_first_step_begins_with",
        ),
        (
            "the student's weights in the teacher's pass",
            "weights=list(zip(self.weights, self.averages, strict=True))",
            "weights=[]",
            RUN.format("D_Breg alone"),
        ),
        (
            "the clean side is detached",
            "head.mean(a, gate(b), mask",
            "head.mean(a, tf.stop_gradient(b), mask",
            RUN.format("R_s alone"),
        ),
        (
            "the perturbed side is detached",
            "gate(weight.value))",
            "tf.stop_gradient(weight.value))",
            RUN.format("R_s alone"),
        ),
        ("delta is not added", "+ delta, x.dtype)", ", x.dtype)", RUN.format("R_s alone")),
        (
            "the gradient of the ascent at x alone",
            "tf.cast(x + delta, call.x.dtype)",
            "tf.cast(x + 0 * delta, call.x.dtype)",
            RUN.format("R_s alone"),
        ),
        (
            "lambda_s is ignored",
            "penalty += lambda_s * r_s",
            "penalty += r_s",
            FIT + "val_loss_is_plain_and_loss_has_the_penalty",
        ),
        ("mu is ignored", "penalty += config.mu * d_breg", "penalty += d_breg", RUN.format("D_Breg alone")),
        (
            "loss_weights are ignored in the penalty",
            "head.weight * head.mean(",
            "head.mean(",
            EDGES + "loss_weights_and_sample_weights_are_found_by_output[None]",
        ),
        (
            "loss_weights are ignored in the ascent",
            "scale * DIVERGENCES",
            "DIVERGENCES",
            EDGES + "a_head_that_weighs_nothing_does_not_turn_the_ascent[gaussian]",
        ),
        (
            "loss_weights are ignored in the margin start",
            "each(scale, target) * margin_gradient(",
            "margin_gradient(",
            EDGES + "a_head_that_weighs_nothing_does_not_turn_the_ascent[margin]",
        ),
        (
            "sample weights are ignored",
            "gate(b), mask, sample_weight, y)",
            "gate(b), mask, None, y)",
            RUN.format("l1, weighted"),
        ),
        (
            "the mask of the outputs is ignored",
            "positions = [head.mask(clean.outputs, masks, y, sample_weight) for head in heads]",
            "positions = [None for head in heads]",
            RUN.format("positions"),
        ),
        (
            "the mask of the site is ignored",
            "Ball(x, config, mask)",
            "Ball(x, config, None)",
            FIT + "padding_is_not_perturbed",
        ),
        (
            "replicas count the penalty once each",
            "tf.cast(replicas * entries, penalty.dtype)",
            "tf.cast(entries, penalty.dtype)",
            "test_tf_mirrored.py::test_two_replicas_equal_one_device",
        ),
        (
            "a loss with training=False is penalised",
            'given.get("training") is False',
            "False",
            EDGES + "compute_loss_of_ones_own_keeps_its_signature",
        ),
        (
            "the float32 passes are dropped",
            "if self._float32 and half_precision_layers(self.model)",
            "if self._float32 is None",
            "test_tf_precision.py::test_the_published_epsilon_survives[mixed_bfloat16]",
        ),
        (
            "the noise is the same every step",
            "self.draws.assign_add(1)",
            "self.draws.assign_add(0)",
            RUN.format("R_s alone"),
        ),
        (
            "every run of the site has the same noise",
            "for number in (run, replica):",
            "for number in (replica,):",
            OUTPUTS + "the_noise_is_its_own_stream",
        ),
        (
            "a penalty that is not finite is returned",
            "tf.where(gate.open, penalty, tf.zeros_like(penalty))",
            "penalty",
            OUTPUTS + "a_penalty_that_is_not_finite[eager]",
        ),
        (
            "its gradient reaches the weights",
            "tf.where(self.open, gradient, tf.zeros_like(gradient))",
            "gradient",
            OUTPUTS + "a_penalty_that_is_not_finite[eager]",
        ),
        (
            "it is skipped though it should raise",
            'non_finite == "raise"',
            'non_finite == "skip"',
            OUTPUTS + "a_penalty_that_is_not_finite[eager]",
        ),
        (
            "max_delta is the smallest",
            "tf.reduce_max([tf.reduce_max(tf.abs(delta))",
            "tf.reduce_min([tf.reduce_max(tf.abs(delta))",
            FIT + "each_run_of_the_site_has_its_own_delta",
        ),
        (
            "vanished counts what did not vanish",
            "(_shifted(call.x, delta) == call.x)",
            "(_shifted(call.x, delta) != call.x)",
            "test_tf_precision.py::test_the_published_epsilon_survives[mixed_bfloat16]",
        ),
        (
            "theta~ stays in the model after the block",
            "weight.assign(value)\n",
            "pass\n",
            FIT + "the_averaged_weights_can_be_evaluated",
        ),
        (
            "the penalty of another call of the model",
            "if asked & {id(tensor)",
            "if not asked & {id(tensor)",
            OUTPUTS + "the_penalty_is_of_the_call_that_gave_y_pred",
        ),
    ),
    *_of(
        "tf",
        "smartreg_tf/passes.py",
        (
            "what a layer keeps is not put back",
            "                if value is not _ABSENT:\n                    object.__setattr__(owner, name, value)\n",
            "                if value is not _ABSENT:\n                    pass\n",
            PASSES + "what_the_model_keeps_is_put_back[attribute-eager]",
        ),
        (
            "TensorFlow's variables are not put back",
            "variable.assign(value)",
            "variable.assign(variable)",
            PASSES + "what_the_model_keeps_is_put_back[tf.Variable-eager]",
        ),
        (
            "the inputs are not copied",
            "x.copy() if isinstance(x, np.ndarray) else x, arguments)",
            "x, arguments) if 0 else arguments",
            PASSES + "what_the_model_keeps_is_put_back[input-eager]",
        ),
        (
            "the states that Keras does not track stay",
            "others = [*state.untracked, ",
            "others = [",
            PASSES + "what_the_model_keeps_is_put_back[recurrent-eager]",
        ),
        (
            "a masked output counts in the check",
            "tf.reduce_any(counted & ~same & ~close)",
            "tf.reduce_any(~same & ~close)",
            PASSES + "the_rounding_that_is_allowed",
        ),
    ),
    *_of(
        "tf",
        "smartreg_tf/training.py",
        (
            "no first step is checked",
            "tf.convert_to_tensor(self.repeats.value) == 0, compare",
            "tf.convert_to_tensor(self.repeats.value) < 0, compare",
            PASSES + "a_pass_that_cannot_be_repeated_is_named[eager-1.0]",
        ),
        (
            "every step is checked",
            "self.repeats.assign_add(1)",
            "self.repeats.assign_add(0)",
            PASSES + "the_check_is_paid_once[eager-0.0]",
        ),
        (
            "theta~ may be another in the check",
            "tf.reduce_all(same) & differ(",
            "differ(",
            PASSES + "theta_tilde_that_is_not_theta_is_no_fault",
        ),
        (
            "measure counts every batch once",
            "head.weight * n * head.mean(",
            "head.weight * head.mean(",
            "test_tf_asking.py::test_measure_by_hand[True]",
        ),
        (
            "measure counts what the loss leaves out",
            "examples = [head.examples(target, y)",
            "examples = [head.examples(target, None)",
            "test_tf_asking.py::test_measure_is_a_mean_of_what_the_loss_counts[sum_over_batch_size-True]",
        ),
        (
            "measure reduces as the loss",
            'head._replace(reduction="sum_over_batch_size")',
            "head._replace()",
            "test_tf_asking.py::test_measure_is_a_mean_of_what_the_loss_counts[sum-True]",
        ),
        (
            "the axis that labels showed is forgotten",
            "if y is None and self._found is not None:",
            "if False:",
            "test_tf_asking.py::test_measure_without_labels_has_the_axis_that_they_showed",
        ),
        (
            "measure takes what training refuses",
            "            engine.refuse({name: bool(fault) for name, fault in found.faults.items()})\n",
            "",
            "test_tf_asking.py::test_measure_refuses_what_training_refuses",
        ),
    ),
    *_of(
        "tf",
        "smartreg_tf/callback.py",
        (
            "a broken fit never ends",
            "return callbacks is None or not any(",
            "return callbacks is None and not any(",
            "test_tf_life.py::test_what_comes_after_a_broken_fit_is_plain[fit]",
        ),
        (
            "a refused fit leaves the model patched",
            "            engine.remove()\n            raise\n",
            "            raise\n",
            "test_tf_life.py::test_a_loop_of_ones_own_with_callbacks_keeps_smart",
        ),
    ),
]

MUTATIONS = NUMPY + TORCH + TF


def place(mutation: Mutation, root: Path = ROOT) -> Path:
    """The file that the edit is in: its own, or, since code moves, the only one of that package that has the text."""
    own = root / mutation.file
    files = [own] if own.exists() and own.read_text().count(mutation.old) else sorted(own.parent.glob("*.py"))
    counts = {file: file.read_text().count(mutation.old) for file in files}
    if sum(counts.values()) != 1:
        raise LookupError(
            f"{mutation.backend}, {mutation.name}: {mutation.old!r} is {sum(counts.values())} times in "
            f"{mutation.file} and beside it, expected once: change the list in tools/mutate.py"
        )
    return max(counts, key=lambda file: counts[file])


def edited(mutation: Mutation, root: Path = ROOT) -> str:
    """The file's text with the mutation in it; LookupError where it does not apply."""
    return place(mutation, root).read_text().replace(mutation.old, mutation.new)


def copied(to: Path) -> None:
    """The working tree's files, those that git does not ignore."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, to / name)


def run(backend: str, tree: Path, *command: str) -> tuple[int, str]:
    """The exit status and the output of a Python command that imports the packages of that tree."""
    set_env = {
        "PYTHONPATH": str(tree),
        "OMP_NUM_THREADS": "1",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "KERAS_BACKEND": "tensorflow",
        "HYPOTHESIS_PROFILE": "default",
        "SMARTREG_BACKENDS": "" if backend == "numpy" else backend,
    }
    done = subprocess.run(
        [sys.executable, *command],
        cwd=tree,
        env={**os.environ, **set_env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1200,
    )
    return done.returncode, done.stdout


def pytest(tests: tuple[str, ...]) -> tuple[str, ...]:
    """The command that runs these tests up to the first that fails."""
    return "-m", "pytest", "-x", "-q", "-n", "0", "-p", "no:cacheprovider", *(f"tests/{test}" for test in tests)


def kill(mutation: Mutation) -> str:
    """What noticed the mutation; "" where nothing did. RuntimeError where it is no fair mutation."""
    with tempfile.TemporaryDirectory(prefix="mutate-") as folder:
        tree = Path(folder)
        copied(tree)
        file = place(mutation)
        (tree / file.relative_to(ROOT)).write_text(edited(mutation))
        if file.name in CHECKED:
            status, output = run(mutation.backend, tree, "-c", CHECK, mutation.backend)
            said = output.strip().splitlines()[-1:] or [""]
            if status:
                if "Traceback" in output or CRASH.search(output):
                    raise RuntimeError(said[0])
                return "check: " + said[0].split(";")[0]
        if mutation.tests:
            status, output = run(mutation.backend, tree, *pytest(mutation.tests))
            failed = re.search(r"^(?:FAILED|ERROR) tests/(\S+?::[^\s\[]+(?:\[.*?\](?= - |$))?)", output, re.M)
            if status:
                if status != 1 or failed is None or CRASH.search(output):
                    raise RuntimeError(output.strip()[-300:])
                return failed[1]
    return ""


def baseline(backend: str, mutations: list[Mutation]) -> None:
    """SystemExit where the tree as it is does not pass the check and the tests named."""
    tests = sorted({test for mutation in mutations for test in mutation.tests})
    for command in (
        ("-m", "smartreg", "check", "--backend", backend, "--dtype", "float64"),
        *([pytest(tuple(tests))] if tests else []),
    ):
        with tempfile.TemporaryDirectory(prefix="mutate-") as folder:
            copied(Path(folder))
            status, output = run(backend, Path(folder), *command)
        if status:
            sys.exit(f"{output}\n{backend}: fails before any mutation: {' '.join(command)}")


def main() -> int:
    """Print the table; 1 where a mutation survived or is invalid."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    backends = sorted({mutation.backend for mutation in MUTATIONS})
    parser.add_argument("--backend", nargs="+", choices=backends, default=["numpy", "torch", "tf"])
    parser.add_argument("--only", default="", help="mutations whose name or file has this in it")
    parser.add_argument("--jobs", type=int, default=2, help="mutations at a time")
    given = parser.parse_args()
    chosen = [m for m in MUTATIONS if m.backend in given.backend and given.only in f"{m.file} {m.name}"]
    for mutation in chosen:
        edited(mutation)

    def attempt(mutation: Mutation) -> tuple[str, float]:
        started = time.perf_counter()
        try:
            found = kill(mutation) or "SURVIVED"
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            found = f"INVALID: {error}"
        return found, time.perf_counter() - started

    started, faults = time.perf_counter(), []
    for backend in given.backend:
        mutations = [mutation for mutation in chosen if mutation.backend == backend]
        if not mutations:
            continue
        baseline(backend, mutations)
        width = max(len(mutation.name) for mutation in mutations)
        print(f"\n{backend}: {len(mutations)} mutations\n  {'mutation':<{width}}  seconds  killed by", flush=True)
        with ThreadPoolExecutor(given.jobs) as pool:
            for mutation, (found, seconds) in zip(mutations, pool.map(attempt, mutations), strict=True):
                fault = found.startswith(("SURVIVED", "INVALID"))
                print(f"{'!' if fault else ' '} {mutation.name:<{width}}  {seconds:7.1f}  {found}", flush=True)
                faults += [f"  {backend}, {mutation.file}: {mutation.name}: {found.split(':')[0]}"] if fault else []
    print(f"\n{len(chosen)} mutations, {len(chosen) - len(faults)} killed, in {time.perf_counter() - started:.0f} s")
    print("\n".join(faults) if faults else "none survived")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
