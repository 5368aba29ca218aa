"""Run a model on one mini-batch: the clean pass, the pass again, the pass at other points."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from smartreg_torch import compat
from smartreg_torch.projection import Output, values_of
from smartreg_torch.replay import Given, Known, State, device_of, differing, first_differing_module
from smartreg_torch.sharding import HALF, is_engine, is_wrapper, reshard, sharded_parts
from smartreg_torch.site import Call, Site, shift
from smartreg_torch.teacher import Teacher, in_model

Outputs = dict[str, Output]  # those that are compared, by name, as the model gives them
_ONE_BACKWARD = (
    "SMART: the model's backward frees or overwrites what it needs, as some fused kernels do, and the margin start "
    "runs it once before loss.backward(): your gradients would be wrong. Say SMARTConfig(start='gaussian')"
)


class Runner:
    """Hold a model, how its passes are run, and what they have shown: one for all steps.

    Args:
        wrapped: what the clean pass calls, DistributedDataParallel, say.
        choose: gives the outputs that are compared of what the model returned.
        precision: as `SMART` takes it.

    Attributes:
        called: what the other passes call: a compiled module, say, since all passes run the same code.
        model: the module itself.
        modules, theta, sharded: its modules, its parameters by name, and the modules that `fully_shard` was called on,
            all as `look` found them.
    """

    def __init__(self, wrapped: nn.Module, choose: Callable[[Any], Outputs], precision: str) -> None:
        self.wrapped, self.choose, self.precision = wrapped, choose, precision
        inside: Any = wrapped.module if is_wrapper(wrapped) else wrapped
        self.called: nn.Module = inside
        self.model: nn.Module = compat.uncompiled(self.called)
        if isinstance(self.model, nn.parallel.DistributedDataParallel):
            raise ValueError(
                "SMART: torch.compile(DistributedDataParallel(model)) would run one pass compiled and the others not. "
                "Compile inside: DistributedDataParallel(torch.compile(model))"
            )
        self.known = Known()
        self.checked: set[Any] = set()  # the arguments with which a pass was seen to repeat
        self.needs_graph = False  # whether passes without a graph fail in the model's forward
        self.forget()

    def forget(self) -> None:
        """Forget the model's modules and parameters. The next `look` walks over it."""
        self.modules: list[nn.Module] = []
        self.theta: dict[str, nn.Parameter] = {}
        self.sharded: list[Any] = []
        self._held: list[Any] = []
        self.known.inside = None

    def look(self) -> dict[str, nn.Parameter]:
        """Return the parameters by name. Walk over the model only if a module holds others than before."""
        reshard(self.sharded)
        if not self.modules or _held(self.modules) != self._held:
            self.sharded = sharded_parts(self.wrapped, self.model)
            reshard(self.sharded)
            self.modules, self.theta = list(self.model.modules()), dict(self.model.named_parameters())
            self._held = _held(self.modules)
        return self.theta

    @property
    def takes_one_backward(self) -> bool:
        """Tell whether the wrapper takes the first backward through it for the loss's: static_graph=True, DeepSpeed."""
        wrapped = self.wrapped
        static = isinstance(wrapped, nn.parallel.DistributedDataParallel) and bool(wrapped.static_graph)
        return static or is_engine(wrapped)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"known": Known(), "modules": [], "theta": {}, "sharded": [], "_held": []}


def _held(modules: list[nn.Module]) -> list[Any]:
    """List how many modules and parameters each module holds, and their identities."""
    dicts = compat.held(modules)
    return [*map(len, dicts), *map(id, chain.from_iterable(map(dict.values, dicts)))]


class Pass(NamedTuple):
    """Hold one run of the model.

    Attributes:
        outputs: those that are compared, by name, as the model gives them.
        calls: the runs of the site; none if it has none.
    """

    outputs: Outputs
    calls: list[Call]


class Passes:
    """Run a model on one mini-batch.

    `again` and `at` have the buffers and the states of the clean pass, and change none of them. They have its dropout
    masks, too, if they are not given a seed.

    Args:
        runner: of the model, after its `look`.
        call: what the clean pass calls.
        given: the model's arguments, (args, kwargs).
        site: where x is; None if nothing is perturbed.

    Attributes:
        output: what the model returned to the user.
        clean: f(x; theta), in the precision of the other passes.
        lost: what the model wrote into for the first time, of which there is no earlier copy.
    """

    output: Any
    clean: Pass
    lost: list[str]

    def __init__(self, runner: Runner, call: nn.Module, given: Given, site: Site | None) -> None:
        self.site, self._runner, self.theta = site, runner, runner.theta
        self._call, self._given = call, given
        self._state = State(runner.model, self.theta, given, runner.known, runner.modules)
        half = runner.precision == "float32" and _in_half(runner.model, self.theta)
        self._float32 = _Float32(runner) if half else None

    @property
    def given_tensors(self) -> list[Tensor]:
        """List the tensors among the arguments."""
        return self._state.kept.given_tensors

    @property
    def own_outputs(self) -> Outputs:
        """Return the outputs of the model's own pass, in its own precision."""
        return self.clean.outputs if self._float32 is None else self._runner.choose(self.output)

    def run_clean(self, differentiable: bool) -> None:
        """Make the model's own pass; in float32, too, if the model is in half precision.

        Args:
            differentiable: whether the graph of the outputs has to reach x.
        """
        args, kwargs = self._given
        none: Any = nullcontext([])
        recording = self.site.recording(differentiable) if self.site else none
        with recording if self._float32 is None else none as calls:
            self.output = self._call(*args, **kwargs)
        self.lost = self._state.settle(self._runner.called)
        if self._float32 is None:
            self.clean = Pass(self._runner.choose(self.output), calls)
            return
        with recording as calls:  # once more: the rounding of the model's own pass is far above R_s
            self.clean = Pass(self._run(), calls)

    def given(self) -> AbstractContextManager[Given]:
        """Give the arguments as they were before the clean pass, inside a block."""
        return self._state.kept.as_before()

    def again(self, teacher: Teacher, watched: bool) -> Outputs:
        """Return f(x; theta~) without a graph.

        Args:
            watched: whether to check if the model writes into theta~.
        """
        averages = teacher.for_a_pass()
        # half-precision weights get theta~ in float32
        copied = {name for name in averages if self.theta[name].dtype in HALF} if self._float32 else set[str]()
        with in_model(self.theta, averages, self._runner.sharded, copied):
            taught = self._without_graph(lambda: self._run(averages))
        if watched:
            teacher.see(averages)
        return taught

    def at(self, points: list[Tensor], seed: int | None = None, graph: bool = True) -> Outputs:
        """Return the outputs if the k-th run of the site gives points[k].

        Args:
            seed: of the pass's own dropout masks; None: the clean pass's masks.
            graph: False detaches them, and keeps no activation either.
        """
        assert self.site is not None
        if graph:
            with self.site.replaced(points):
                return self._run(seed=seed)
        with self._frozen(), self.site.replaced([x.detach() for x in points]):
            # a head in outputs= may have weights of its own
            return {name: z.detach() for name, z in self._run(seed=seed).items()}

    def shifted(self, deltas: list[Tensor], seed: int | None = None) -> Outputs:
        """Return f(x + delta) with a graph of its own below the site, too; `seed` is as in `at`."""
        assert self.site is not None
        if seed is None:
            with self.site.shifted(deltas):
                return self._run()
        with self.site.recording(differentiable=False) as calls:  # the layers below x have the clean pass's masks
            self._run()
        return self.at([shift(call.own, delta) for call, delta in zip(calls, deltas, strict=True)], seed)

    def without_clean(self) -> Passes:
        """Copy this without the clean pass, whose graph it would hold."""
        passes = copy.copy(self)
        del passes.clean, passes.output
        return passes

    @property
    def starts(self) -> list[Tensor]:
        """Return x, on the graph of the clean outputs if a gradient may be taken of it."""
        xs = [call.x for call in self.clean.calls]
        # static_graph=True averages gradients in the first backward; the margin start's must not be that one
        return [x.detach() for x in xs] if self._runner.takes_one_backward else xs

    @contextmanager
    def ascending(self) -> Iterator[Callable[[list[Tensor], int | None], Outputs]]:
        """Yield `at` for the ascent: no graph is built for the weights, and no `.grad` or random stream changes."""
        frozen = ExitStack()

        def at(points: list[Tensor], seed: int | None) -> Outputs:
            # freeze in the first pass of the ascent: the margin start first needs the clean graph, which checkpointed
            # layers rebuild as it was
            frozen.enter_context(self._frozen())
            return self.at(points, seed)

        try:
            with self._own_backward(), frozen, self._state.without_autocast():
                yield at
        except RuntimeError as error:
            if compat.says(error, "reentrant"):
                raise RuntimeError(
                    "SMART: reentrant checkpointing cannot work: it allows no gradient with respect to embeddings. "
                    "Use use_reentrant=False (gradient_checkpointing_kwargs={'use_reentrant': False} in Hugging Face)."
                ) from error
            raise

    # In the first step

    def is_first(self, names: frozenset[str]) -> bool:
        """Tell whether no step with these arguments was checked."""
        mine = self.site is not None, names
        return self._runner.model.training and not {mine, (True, names)} & self._runner.checked

    def checked(self, names: frozenset[str]) -> None:
        """Note that a step with these arguments was checked."""
        self._runner.checked.add((self.site is not None, names))

    def check_repeated(
        self,
        read: Callable[[Outputs], list[Output]],
        targets: list[Output],
        positions: list[Tensor | None],
        own_x: bool,
    ) -> None:
        """Raise RuntimeError if the pass at delta = 0 is another one: R_s and D_Breg would compare two models.

        Args:
            read: arranges the outputs of a pass as the targets are.
            targets, positions: of the clean pass; which positions count.
            own_x: whether the layers below the site are checked, too: theta~'s pass does not have the clean pass's x.
        """
        site = self.site
        zeros = [torch.zeros_like(call.own) for call in self.clean.calls]
        points = [call.own.detach() for call in self.clean.calls]

        def repeated() -> Outputs:
            if site is None:
                return self._run()
            with site.shifted(zeros, graph=False) if own_x else site.replaced(points, graph=False):
                return self._run()

        def compared() -> str:
            again = read(self._without_graph(repeated, trying=True))
            return differing(values_of(targets), values_of(again), positions)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # reentrant checkpointing is refused by the ascent
            difference = compared()
            if difference:  # a value taken as initialised for good changed again
                self._state.reject()
                difference = compared()
            if not difference:
                return
            where = first_differing_module(self._runner.model, lambda: self._without_graph(self._run, trying=True))
        changed = [name for name in self._state.kept.changed if not name.endswith(".config.problem_type")]
        hints = [f"the first module whose output differs is {where}"] if where else []
        hints += [f"the forward changes {', '.join(changed[:5])}"] if changed else []
        raise RuntimeError(
            f"SMART: the model does not repeat itself: with the same batch, weights and dropout, {difference}; "
            + ("; ".join(hints) or "nothing that SMART sees was changed")
            + ". R_s and D_Breg would compare two models. Keep what changes in a buffer or a plain attribute, "
            "pass it as an argument, or draw random numbers from torch's, NumPy's or Python's global stream"
        )

    def check_backward(self, targets: list[Output]) -> None:
        """Raise RuntimeError if the model's backward changes what it needs: the margin start runs it once more."""
        xs = self.starts
        if self._runner.takes_one_backward or not all(x.requires_grad for x in xs):
            return
        values = values_of(targets)
        ones = [torch.ones_like(z) for z in values]
        with self._own_backward():
            try:
                first, second = (
                    torch.autograd.grad(values, xs, ones, retain_graph=True, allow_unused=True) for _ in range(2)
                )
            except (AttributeError, IndexError, KeyError, RuntimeError) as error:  # what it has saved is gone
                raise RuntimeError(_ONE_BACKWARD) from error
        both = zip(first, second, strict=True)
        if any(a is not None and b is not None and differing([a], [b], [None]) for a, b in both):
            raise RuntimeError(_ONE_BACKWARD)

    def _run(self, averages: Mapping[str, Tensor] | None = None, seed: int | None = None) -> Outputs:
        """Run the model as in the clean pass, half-precision weights with these values if given."""
        runner = self._runner
        with self._state.replayed(None if self._float32 is None else _widened, seed) as (args, kwargs):
            if self._float32 is None:
                return runner.choose(runner.called(*args, **kwargs))
            return self._float32(averages or {}, args, kwargs)

    def _without_graph(self, run: Callable[[], Outputs], trying: bool = False) -> Outputs:
        """Run a pass of which no gradient is taken; with a graph if the model's forward needs one.

        Args:
            trying: whether to find out if it does.
        """
        if not self._runner.needs_graph:
            try:
                with torch.no_grad():
                    return run()
            except (RuntimeError, AssertionError):
                if not trying:
                    raise
        with torch.enable_grad():
            found = {name: z.detach() for name, z in run().items()}
        self._runner.needs_graph = True
        return found

    def _frozen(self) -> Any:
        return frozen_weights(self.theta.values(), self._runner.sharded)

    @contextmanager
    def _own_backward(self) -> Iterator[None]:
        """Leave random streams and every `.grad` as they are after a backward of ours."""
        # fully_shard reduces what it has accumulated in whichever backward comes next
        weights = [] if self._runner.sharded else self.theta.values()
        with self._state.kept_streams(), untouched_gradients(weights):
            yield


class _Float32:
    """Run passes of a model in float32, whatever it computes in itself.

    Autocast is off, and half-precision weights and buffers have float32 copies: of the weights, on the graph of theta.
    """

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._copies = {name: weight.to(torch.float32) for name, weight in runner.theta.items() if _is_half(weight)}
        self._buffers = any(_is_half(b) for module in runner.modules for b in compat.own_buffers(module).values())
        if not self._copies:
            return
        unsupported = {
            "torch.compile": is_compiled(runner.called),
            "checkpointed layers, which run again with the weights as they are": any(
                getattr(module, "gradient_checkpointing", False) for module in runner.modules
            ),
            "fully_shard or ZeRO 3, which puts its own in their place": bool(runner.sharded),
            "nn.LSTM, nn.GRU and nn.RNN": any(isinstance(module, nn.RNNBase) for module in runner.modules),
        }
        for what, found in unsupported.items():
            if found:
                raise ValueError(
                    f"SMART: the model has {runner.theta[next(iter(self._copies))].dtype} weights, and with {what}, "
                    "the float32 copies of them that the passes of SMART need are not possible. Train float32 weights "
                    "under torch.autocast, or say SMART(..., precision='model') with a radius that this precision can "
                    "hold."
                )

    def __call__(self, averages: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Outputs:
        """Run one pass, with these values of the weights if there are some."""
        runner, theta = self._runner, self._runner.theta
        whole: Any = _Whole(runner)
        copies = {name: averages.get(name, copy) for name, copy in self._copies.items()}
        # frozen_weights may have come since the copies were made
        tensors = {f"model.{name}": z if theta[name].requires_grad else z.detach() for name, z in copies.items()}
        if self._buffers:
            tensors |= {name: z.to(torch.float32) for name, z in whole.named_buffers() if _is_half(z)}
        own, inside = vars(runner.model).get("forward"), compat.original_forward(runner.model)
        with torch.autocast(device_of(runner.model).type, enabled=False):
            try:
                if inside is not None:  # accelerate has put autocast around it
                    vars(runner.model)["forward"] = inside
                outputs: Outputs = functional_call(whole, tensors, args, kwargs) if tensors else whole(*args, **kwargs)
                return outputs
            finally:
                if own is not None:
                    vars(runner.model)["forward"] = own


class _Whole(nn.Module):
    """Join a model and the function outputs=, which may use its weights, for `functional_call`."""

    def __init__(self, runner: Runner) -> None:
        super().__init__()
        self.model, self._choose = runner.called, runner.choose

    def forward(self, *args: Any, **kwargs: Any) -> Outputs:
        return self._choose(self.model(*args, **kwargs))


@contextmanager
def frozen_weights(parameters: Iterable[nn.Parameter], sharded: list[Any]) -> Iterator[None]:
    """Build no graph for the weights, nor keep the activations that it would need."""
    weights = [parameter for parameter in parameters if parameter.requires_grad]
    reshard(sharded)  # whole weights that are kept have the flag that their shards had when they were gathered
    try:
        for weight in weights:
            weight.requires_grad_(False)
        yield
    finally:
        reshard(sharded)
        for weight in weights:
            weight.requires_grad_(True)


@contextmanager
def untouched_gradients(weights: Iterable[Tensor]) -> Iterator[None]:
    """Leave every `.grad` after the block as it was before, whatever a layer's own backward does.

    Reversible layers run a backward of their own inside theirs, which adds to the `.grad` of their weights.
    """
    weights = [weight for weight in weights if weight.requires_grad]
    own = [weight.grad for weight in weights]
    try:
        for weight in (weight for weight, grad in zip(weights, own, strict=True) if grad is not None):
            weight.grad = None
        yield
        filled = [weight for weight in weights if weight.grad is not None]
        if any(map(compat.has_accumulation_hooks, filled)):
            raise RuntimeError(
                "SMART: a layer of the model fills the .grad of its weights in its own backward, as reversible layers "
                "do, and these weights have hooks, which saw the gradient of the perturbation. Take the hooks off"
            )
    finally:
        for weight, grad in zip(weights, own, strict=True):
            if weight.grad is not grad:
                weight.grad = grad


def is_compiled(model: nn.Module) -> bool:
    """Tell whether torch.compile or .compile() was called on it or on a module inside."""
    return any(map(compat.is_compiled, model.modules()))


def _in_half(model: nn.Module, theta: Mapping[str, Tensor]) -> bool:
    """Tell whether anything in the model computes in half precision, as far as can be seen from outside."""
    kind = next((weight.device.type for weight in theta.values()), "cpu")
    autocast = torch.is_autocast_enabled(kind) or compat.original_forward(model) is not None
    return autocast or not {weight.dtype for weight in theta.values()}.isdisjoint(HALF)


def _is_half(tensor: Any) -> bool:
    return isinstance(tensor, Tensor) and tensor.dtype in HALF


def _widened(value: Any) -> Any:
    """Return a half-precision tensor as float32, and anything else as it is."""
    return value.to(torch.float32) if _is_half(value) else value
