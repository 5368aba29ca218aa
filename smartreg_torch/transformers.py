"""Train with SMART in the Hugging Face Trainer: one changed word in a script (docs/trainer.md)."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from smartreg_torch.compat import check_trainer

try:
    import transformers
    from accelerate.utils import gather_object  # type: ignore[import-untyped]
    from packaging.version import Version
    from tqdm.auto import tqdm  # type: ignore[import-untyped]

    if Version(transformers.__version__).release < (5, 18):
        raise ImportError(f"transformers {transformers.__version__} is installed")
    from transformers import Trainer, TrainerCallback
    from transformers.trainer_pt_utils import find_batch_size

    check_trainer(Trainer)
except ImportError as error:
    raise ImportError(
        f"smartreg_torch.transformers needs transformers 5.18 or later ({error}): pip install 'smartreg[hf]'"
    ) from error

from smartreg.config import SMARTConfig, SMARTWarning
from smartreg.report import Description
from smartreg_torch.probe import Probe, cloned, first_call, naming_create_smart, undone
from smartreg_torch.proximal import local
from smartreg_torch.sharding import is_sharded
from smartreg_torch.smart import SMART
from smartreg_torch.window import Window

__all__ = ["SMARTMixin", "SMARTTrainer"]

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class SMARTMixin(_Base):
    """Add SMART to a Trainer of your own, `class MyTrainer(SMARTMixin, TheirTrainer)`: one more argument, `smart=`.

    F(theta) = L(theta) + lambda_s R_s(theta) + mu D_Breg(theta, theta~), with L whatever TheirTrainer computes.

    Args:
        smart: the settings, by default `SMARTConfig()`. `total_steps` is the Trainer's own if it is None. lambda_s =
            mu = 0 is TheirTrainer, bit for bit. With evaluate="teacher" each evaluation during `train()` is of theta~,
            which the model has after it; checkpoints have theta. All other arguments are TheirTrainer's.

    Attributes:
        smart_config: as given.
        smart: the `SMART` of the last `train()`; None before it, and if lambda_s = mu = 0 and evaluate="theta".

    Raises:
        TypeError: smart= is no SMARTConfig. ValueError, RuntimeError: what cannot work; the message says what to do.

    Example:
        >>> from transformers import Seq2SeqTrainer
        >>> class SMARTSeq2SeqTrainer(SMARTMixin, Seq2SeqTrainer):
        ...     pass
    """

    def __init__(self, *args: Any, smart: SMARTConfig | None = None, **kwargs: Any) -> None:
        if not (smart is None or isinstance(smart, SMARTConfig)):
            raise TypeError(f"{type(self).__name__}: smart= must be a SMARTConfig, got {type(smart).__name__}")
        self.smart_config = SMARTConfig() if smart is None else smart
        self.smart: SMART | None = None
        self._smart_window: Window | None = None  # the metrics since the last log; None outside of train()
        self._smart_rows = 0  # of all batches of this optimiser step
        self._smart_ran = self._smart_checked = False
        self._smart_probe = Probe()
        self._smart_description: Description | None = None  # of the last train()
        self._smart_evaluations: list[tuple[bool, dict[str, float]]] = []  # since the last best: of theta~?, metrics
        self._smart_best_averaged = False  # whether the best metric is theta~'s
        self._smart_swapped = False  # whether an evaluation has put theta~ into the model
        super().__init__(*args, **kwargs)
        self.add_callback(_Steps(self))
        self.callback_handler.callbacks.insert(0, _End(self))  # before those that save the model at the end

    def create_smart(self, model: nn.Module, config: SMARTConfig) -> SMART:
        """Make the SMART of one `train()`. Override it to say site=, outputs=, divergence=, mask= or on_step=.

        Example:
            >>> class MyTrainer(SMARTMixin, Trainer):
            ...     def create_smart(self, model, config):
            ...         return SMART(model, config, site="bert.embeddings")
        """
        return SMART(model, config)

    @contextmanager
    def swap_teacher(self) -> Iterator[None]:
        """Put the averaged weights theta~ of the last `train()` into the model while the block lasts.

        Example:
            >>> def averaged(trainer):
            ...     with trainer.swap_teacher():
            ...         return trainer.evaluate()
        """
        if self.smart is None or not self.smart.teacher:
            raise RuntimeError(
                f"{type(self).__name__}.swap_teacher: there is no theta~. Call train() before, with mu > 0 or "
                "evaluate='teacher'"
            )
        with self.smart.swap_teacher():
            yield

    @contextmanager
    def _smart_evaluated(self) -> Iterator[None]:
        """Let the model have the weights that the settings evaluate: theta~ during `train()`, if they say so."""
        smart = self.smart
        if smart is None or self._smart_window is None or self._smart_swapped or smart.config.evaluate == "theta":
            yield
            return
        self._smart_swapped = True
        try:
            with smart.swap_teacher():
                yield
        finally:
            self._smart_swapped = False

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as Trainer does; afterwards the model is without SMART again, and `swap_teacher` still works."""
        try:
            return super().train(*args, **kwargs)
        finally:
            self._smart_window = None
            if self.smart is not None:
                self.smart.remove()

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Get the batches of one optimiser step, and count their examples."""
        batches, num_items = super().get_batch_samples(*args, **kwargs)
        self._smart_rows = sum(map(_rows, batches))
        return batches, num_items

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Do Trainer's step, and check that the penalty was in the loss."""
        self._smart_ran = False
        loss: Tensor = super().training_step(*args, **kwargs)
        if self._smart_window is not None and not self._smart_ran:
            raise RuntimeError(
                f"{type(self).__name__}: compute_loss is overridden without super().compute_loss(), so SMART is never "
                "reached. Override it in a Trainer of your own, Mine, and train class SMARTMine(SMARTMixin, Mine)."
            )
        return loss

    @naming_create_smart()
    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Add the penalty to TheirTrainer's loss while training."""
        settings: dict[str, Any] = {"return_outputs": return_outputs, "num_items_in_batch": num_items_in_batch}
        smart, window = self.smart, self._smart_window
        if smart is None or window is None or not (model.training and torch.is_grad_enabled()):
            return super().compute_loss(model, inputs, **settings)
        self._smart_ran = True
        if not smart.config.has_penalty:  # theta~ alone: nothing is compared
            with first_call(model, smart):
                return super().compute_loss(model, inputs, **settings)
        divided = _divided(self, num_items_in_batch)
        if not self._smart_checked:
            self._smart_checked = True
            if num_items_in_batch is not None and not divided:
                _check_scaling(self, super().compute_loss, inputs, num_items_in_batch)
        # Of the penalties of one optimiser step the mean over its examples counts, as in one large batch.
        share = _rows(inputs) / (self._smart_rows or _rows(inputs))
        labelled = self._smart_probe.label_mask(self, smart, super().compute_loss, inputs, num_items_in_batch)
        with first_call(model, partial(smart, label_mask=labelled)) as penalties:
            found: Any = super().compute_loss(model, inputs, **settings)
        if not penalties:
            raise RuntimeError(f"{type(self).__name__}: compute_loss did not call the model. Let it call the model")
        window.add(smart, share)
        if self.is_deepspeed_enabled:  # whose engine moves theta right after the backward
            smart._reports.judge(smart.config)
        penalty = penalties[0] * share * (self.current_gradient_accumulation_steps if divided else 1)
        if return_outputs:
            loss, outputs = found
            return loss + penalty, outputs
        return found + penalty

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log as Trainer does, and beside "loss" the means of SMART's metrics since the last log."""
        if self._smart_window is not None and self.smart is not None and "loss" in logs:
            logs.update(self._smart_window.means(self, self.smart.metrics))
            self._smart_window = Window()
        super().log(logs, *args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate as Trainer does, theta~ if the settings say so."""
        with self._smart_evaluated():
            return super().evaluate(*args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Predict as Trainer does, with theta~ if the settings say so."""
        with self._smart_evaluated():
            return super().predict(*args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate as Trainer does, and remember of which weights the metrics are."""
        with self._smart_evaluated():
            output = super().evaluation_loop(*args, **kwargs)
            if self.smart is not None and self._smart_window is not None:
                self._smart_evaluations.append((_has_averages(self.smart), dict(output.metrics or {})))
        return output

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write Trainer's card, and what SMART perturbed and compared."""
        super().create_model_card(*args, **kwargs)
        if self._smart_description is not None and self.is_world_process_zero():
            with Path(str(self.args.output_dir), "README.md").open("a", encoding="utf-8") as card:
                card.write(f"\n## SMART\n\n{self._smart_description.markdown()}\n")

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        is_best = super()._determine_best_metric(metrics, trial)
        if is_best:
            name = f"eval_{str(self.args.metric_for_best_model).removeprefix('eval_')}"
            self._smart_best_averaged = _of_averages(self._smart_evaluations, name, metrics[name])
        self._smart_evaluations = []
        return is_best

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.args.save_only_model and (self._smart_best_averaged or self._smart_ends_averaged):
            self._save_smart(Path(self._get_output_dir(trial), f"checkpoint-{self.state.global_step}"))

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self.smart is None or not self._smart_best_averaged:
            return
        file = _state_file(self, str(self.state.best_model_checkpoint))
        if not file.exists():
            warnings.warn(
                f"{type(self).__name__}: the best metric, {self.state.best_metric:g}, was measured with theta~, but "
                f"{file} does not exist, so theta was loaded. Keep that file, or set load_best_model_at_end=False.",
                SMARTWarning,
                stacklevel=4,
            )
            return
        teacher = torch.load(file, map_location="cpu", weights_only=True)["smart"]["teacher"]
        _put(self.smart, teacher)
        for name, average in self.smart.teacher.items():  # an evaluation in swap_teacher gives that metric again
            local(average).copy_(local(teacher[name]))

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self._save_smart(output_dir)

    def _save_smart(self, folder: str | Path) -> None:
        if self.smart is not None and self._smart_window is not None:
            state: dict[str, Any] = {"smart": self.smart.state_dict(), "window": self._smart_window.sums()}
            state |= {"averaged": self._smart_best_averaged, "probe": self._smart_probe.state_dict()}
            torch.save(state, _state_file(self, folder))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if checkpoint is None or self.smart is None:
            return
        file = _state_file(self, checkpoint)
        if not file.exists():
            raise ValueError(
                f"{type(self).__name__}: {checkpoint} has no {file.name}, so theta~ is lost. A plain Trainer wrote it, "
                "or save_only_model=True, or another number of processes. Resume it as it was made, or load its "
                "weights with from_pretrained and train anew from them."
            )
        state = torch.load(file, map_location="cpu", weights_only=True)
        if self.smart.teacher and not state["smart"]["teacher"]:
            config = self.smart.config
            now = f"mu = {config.mu:g}" if config.mu > 0 else "evaluate is 'teacher'"
            raise ValueError(
                f"{type(self).__name__}: {checkpoint} was made with mu = 0, so it has no theta~, and {now} now. Resume "
                "it with mu=0 and evaluate='theta', or load its weights with from_pretrained and train anew from them."
            )
        self.smart.load_state_dict(state["smart"])
        self._smart_window = Window(state["window"])
        self._smart_best_averaged = state.get("averaged", False)
        if "probe" in state:
            self._smart_probe.load_state_dict(state["probe"], self.smart)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict=state_dict)
        if self.args.should_save:
            config = self.smart_config if self.smart is None else self.smart.config
            folders = {str(output_dir or self.args.output_dir)}
            if self.args.push_to_hub:  # of a checkpoint Trainer copies there only the files that it knows
                folders.add(str(self.args.output_dir))
            for folder in folders:
                Path(folder, "smart_config.json").write_text(config.to_json() + "\n", encoding="utf-8")

    @naming_create_smart()
    def _begin_smart(self) -> None:
        """Make the SMART of this train(): the model is on its device, wrapped, with the weights that it starts from."""
        if self.smart is not None:
            self.smart.remove()
        self.smart, self._smart_checked, self._smart_probe = None, False, Probe()
        self._smart_description, self._smart_evaluations, self._smart_best_averaged = None, [], False
        config, args = self.smart_config, self.args
        if not config.active:
            return
        fsdp1 = self.is_fsdp_enabled and not getattr(self.accelerator, "is_fsdp2", False)
        unsupported = {
            "several GPUs in one process (nn.DataParallel). Start it with torchrun": args.n_gpu > 1,
            "FSDP1. Say fsdp_config={'version': 2} in TrainingArguments": fsdp1,
            "torch_xla's FSDP. Use that of PyTorch, fsdp_config={'version': 2}": self.is_fsdp_xla_enabled,
            "torch_compile=True with several processes. Leave it out, and call model.compile() before the trainer "
            "is made": args.torch_compile and args.world_size > 1,
        }
        for what, wanted in unsupported.items():
            if wanted:
                raise ValueError(f"{type(self).__name__}: not supported yet: {what}")
        config = config.replace(total_steps=config.total_steps or max(self.state.max_steps, 1))
        self.smart, self._smart_window = self.create_smart(self.model_wrapped, config), Window()

    @property
    def _smart_ends_averaged(self) -> bool:
        """Tell whether `train()` leaves theta~ in the model."""
        return self.smart is not None and self.smart.config.evaluate == "teacher"

    def _end_smart(self) -> None:
        """Leave theta~ in the model if that is what was evaluated, unless the best model was loaded."""
        best = self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None
        if self.smart is not None and self._smart_ends_averaged and not best:
            _put(self.smart, self.smart.teacher)

    def _describe_smart(self) -> None:
        """Say once, after the first step, what is perturbed and compared: on the screen and in TensorBoard."""
        if self._smart_description is not None or self.smart is None or not self.smart.config.has_penalty:
            return
        description = self._smart_description = self._smart_probe.explain(self.smart.describe())
        if not self.is_world_process_zero():
            return
        if transformers.logging.get_verbosity() <= logging.WARNING:
            tqdm.write(str(description))  # to where the logs go, past the progress bar
        for callback in self.callback_handler.callbacks:
            if (writer := getattr(callback, "tb_writer", None)) is not None:
                writer.add_text("SMART", description.markdown(), self.state.global_step)


class SMARTTrainer(SMARTMixin, Trainer):
    """Train as `transformers.Trainer` does, with SMART: `SMARTTrainer(..., smart=SMARTConfig(...))`.

    The logs have R_s, D_Breg, max_delta, vanished, beta and skipped beside "loss", of which the penalty is a part. The
    checkpoints have theta~ and the noise generator. See `SMARTMixin`, and docs/trainer.md.

    Example:
        >>> import tempfile
        >>> from transformers import BertConfig, BertForSequenceClassification, TrainingArguments
        >>> model = BertForSequenceClassification(
        ...     BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
        ... )
        >>> rows = [{"input_ids": [2, 3, 4], "labels": 0}, {"input_ids": [5, 6, 7], "labels": 1}]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     args = TrainingArguments(folder, max_steps=2, logging_steps=1, use_cpu=True, report_to="none")
        ...     trainer = SMARTTrainer(model, args, train_dataset=rows, smart=SMARTConfig())
        ...     _ = trainer.train()  # doctest: +ELLIPSIS
        site  ...
        >>> trainer.smart.config.total_steps, trainer.state.log_history[1]["D_Breg"] > 0
        (2, True)
    """


class _Steps(TrainerCallback):
    """Act at the moments that Trainer has no method for."""

    def __init__(self, trainer: SMARTMixin) -> None:
        self._trainer = trainer
        self._scale = 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._trainer._begin_smart()

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self._scale = self._loss_scale()
        smart = self._trainer.smart
        if smart is not None:  # on a GPU a penalty that is not finite is noticed here
            smart._reports.judge(smart.config)

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        # If a gradient overflows, theta does not move and GradScaler lowers its scale. accelerate's own
        # optimizer_step_was_skipped misses that with a fused optimiser, which is called and then does nothing.
        skipped = self._trainer.is_deepspeed_enabled and self._trainer.accelerator.optimizer_step_was_skipped
        if self._trainer.smart is not None and self._loss_scale() >= self._scale and not skipped:
            self._trainer.smart.update()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._trainer._describe_smart()

    def _loss_scale(self) -> float:
        scaler = self._trainer.accelerator.scaler
        return 1.0 if scaler is None else float(scaler.get_scale())


class _End(TrainerCallback):
    """Act at the end of the training."""

    def __init__(self, trainer: SMARTMixin) -> None:
        self._trainer = trainer

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self._trainer._end_smart()


def _divided(trainer: Trainer, num_items_in_batch: Any) -> bool:
    """Tell whether Trainer divides what compute_loss returns by the accumulation steps."""
    scaled = getattr(trainer, "loss_is_scaled_for_ga", None)
    if scaled is None:
        told = trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
        scaled = told or trainer.compute_loss_func is not None
    return not scaled


def _check_scaling(
    trainer: Trainer, compute_loss: Callable[..., Any], inputs: dict[str, Any], num_items: Tensor | int
) -> None:
    """Warn if the loss does not divide by num_items and Trainer leaves it to the loss (transformers issue 47688)."""
    steps, processes = trainer.args.gradient_accumulation_steps, trainer.args.world_size
    times = steps * (processes if trainer.args.average_tokens_across_devices else 1)
    if times == 1:
        return
    model: Any = trainer.model
    losses = []
    for items in (num_items, 2 * num_items):
        with torch.no_grad(), undone(trainer, model):
            losses.append(float(compute_loss(model, cloned(inputs), num_items_in_batch=items)))
    if losses[0] == losses[1] != 0:
        how = "set model.accepts_loss_kwargs = False before making the trainer"
        if trainer.compute_loss_func is not None:
            how = "let compute_loss_func divide a sum by num_items_in_batch"
        warnings.warn(
            f"{type(trainer).__name__}: the task loss ignores num_items_in_batch, and Trainer leaves it to the loss to "
            f"divide by it (transformers issue 47688). With gradient_accumulation_steps={steps} and {processes} "
            f"process(es) it is {times} times what one large batch gives, and lambda_s and mu weigh {times} times less "
            f"beside it. To mend it, {how}.",
            SMARTWarning,
            stacklevel=4,
        )


@torch.no_grad()
def _put(smart: SMART, averages: Mapping[str, Tensor]) -> None:
    """Copy averages into the weights of the model, for good."""
    for name, weight in smart._look().items():
        if name in averages:
            local(weight).copy_(local(averages[name]))


@torch.no_grad()
def _has_averages(smart: SMART) -> bool:
    """Tell whether the model has theta~ now, whoever put it there."""
    theta = smart._look()
    pairs = [(local(theta[name]), local(average)) for name, average in smart.teacher.items()]
    same = bool(pairs) and all(torch.equal(weight, average.to(weight)) for weight, average in pairs)
    return all(gather_object([same])) if any(map(is_sharded, theta.values())) else same  # each has its own shards


def _of_averages(evaluations: list[tuple[bool, dict[str, float]]], name: str, value: float) -> bool:
    """Tell whether this metric was measured with theta~: by its name, or by its value alone if it was renamed."""
    found = [averaged for averaged, metrics in evaluations if metrics.get(name) == value]
    found = found or [averaged for averaged, metrics in evaluations if value in metrics.values()]
    return all(found or [averaged for averaged, _ in evaluations] or [False])


def _state_file(trainer: Trainer, folder: str | Path) -> Path:
    """Return the file beside rng_state.pth; like it, one a process, since the noise differs."""
    several = trainer.args.world_size > 1
    return Path(folder, f"smart_state_{trainer.args.process_index}.pt" if several else "smart_state.pt")


def _rows(batch: Any) -> int:
    """Count the examples in a batch; 1 if it holds no tensor, so that every batch counts the same."""
    return find_batch_size(batch) or 1  # type: ignore[no-untyped-call]
