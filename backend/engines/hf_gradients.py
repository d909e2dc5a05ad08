"""Backward passes through a PyTorch model: the gradient of the loss, its square, and the diagonal of its Hessian, by canonical weight.

The loss of a window of tokens is the negative log-likelihood of each of its tokens but the first, given those before it. Only the
parameters in question take gradients; each is folded into a float32 sum as soon as the pass has made it. When the passes are over the
model is as it was: no gradients, no hooks, `requires_grad` as before, every weight the same.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from backend.engines import Request, ShouldStop, check_request, never_stop, no_sink
from backend.engines.hf_architecture import Architecture
from backend.engines.hf_taps import Tap, installed, to_numpy
from backend.engines.hf_tokenizer import first_line
from backend.engines.hf_weights import Found
from backend.errors import LayerscopeError
from backend.model_info import ModelInfo

if TYPE_CHECKING:
    from torch import Tensor, nn

Windows = Sequence[Sequence[int]]
Named = Iterator[tuple[str, NDArray[np.float32]]]
OnWindow = Callable[[int], Any]  # told how many windows are done
_NOT_TWICE = re.compile(r"derivative for '?([\w:]+)'? is not implemented|once_differentiable|twice differentiable|double backward")


def _unwatched(done: int) -> None:
    """The callback of a caller who does not watch."""


class Gradients:
    """What backward passes say of some weights. Each method runs over all windows and then gives (canonical name, array), in the order of the names.

    Arrays are float32 in the shape of the canonical weight, and belong to the receiver; two names of one tied parameter share memory, and
    both have the gradient of that one parameter. weights: where each lies. Every method raises LayerscopeError for no windows, a
    window shorter than 2 tokens or longer than n_ctx, a token outside the vocabulary, or a loss that is not finite; Cancelled.
    """

    def __init__(self, model: nn.Module, row: Architecture, info: ModelInfo, n_ctx: int, weights: Sequence[Found]) -> None:
        self._model, self._row, self._info, self._n_ctx, self._weights = model, row, info, n_ctx, weights
        # By identity: several canonical weights may lie in one parameter.
        self._parameters = {id(parameter): parameter for weight in weights for parameter in weight.parameters}

    def mean(self, windows: Windows, should_stop: ShouldStop = never_stop, on_window: OnWindow = _unwatched) -> Named:
        """dL/dw, L the mean over all predicted tokens of all windows."""
        n_tokens = self._check(windows)
        if self._accumulates_in_float32():
            return self._handed_out(self._accumulated(windows, 1 / n_tokens, should_stop, on_window))
        return self._handed_out(self._summed(windows, lambda n: 1 / n_tokens, lambda total, gradient: total.add_(gradient), should_stop, on_window))

    def mean_squared(self, windows: Windows, should_stop: ShouldStop = never_stop, on_window: OnWindow = _unwatched) -> Named:
        """Mean over windows of (dl/dw)^2, l the mean loss of the one window."""
        self._check(windows)
        share = 1 / len(windows)
        return self._handed_out(self._summed(windows, lambda n: 1 / n, lambda total, gradient: total.addcmul_(gradient, gradient, value=share), should_stop, on_window))

    def hessian_diagonal(self, windows: Windows, probes: int, seed: int, should_stop: ShouldStop = never_stop, on_window: OnWindow = _unwatched) -> Named:
        """Hutchinson's estimate of d2L/dw2: mean over `probes` Rademacher vectors z of z * Hz, H the Hessian of L over all these weights.

        Each window draws probes of its own, so that their errors are independent and the sum over windows has fewer of them than one
        set of probes would leave. Raises LayerscopeError, with its name, for an operation without a second derivative.
        """
        if probes < 1:
            raise LayerscopeError(f"{probes} probes are asked for, and at least 1 is needed.")
        return self._handed_out(self._curvature(windows, self._check(windows), probes, seed, should_stop, on_window))

    def _check(self, windows: Windows) -> int:
        """The number of predicted tokens."""
        if not windows:
            raise LayerscopeError("There is no window of text to take gradients over, and at least 1 is needed.")
        for i, window in enumerate(windows, 1):
            if len(window) < 2:
                raise LayerscopeError(f"Window {i} of {len(windows)} has {len(window)} token{'s' * (len(window) != 1)}, and at least 2 are needed to predict one from another.")
            check_request(self._info, (), Request(()), list(window), self._n_ctx)
        return sum(len(window) - 1 for window in windows)

    @contextmanager
    def _taking(self, should_stop: ShouldStop) -> Iterator[None]:
        """The model with gradients of the parameters in question and of nothing else, for the length of a `with`."""
        import torch

        before = [(parameter, parameter.requires_grad) for parameter in self._model.parameters()]
        tap = Tap(self._info, Request(()), no_sink, (), should_stop, 0)
        try:
            for parameter, _ in before:
                parameter.requires_grad_(id(parameter) in self._parameters)
            with torch.enable_grad(), installed(self._model, self._row, tap, ()):
                yield
        finally:
            for parameter, taken in before:
                parameter.requires_grad_(taken)
                parameter.grad = None

    def _summed(self, windows: Windows, weigh: Callable[[int], float], fold: Callable[[Tensor, Tensor], Any],
                should_stop: ShouldStop, on_window: OnWindow) -> dict[int, Tensor]:  # fmt: skip
        """Id of each parameter -> the windows' gradients of `weigh(predicted tokens)` times their loss, folded into one sum."""
        sums = self._zeros()

        def take(parameter: Tensor) -> None:
            assert parameter.grad is not None, "the hook runs when there is one"
            fold(sums[id(parameter)], parameter.grad.float())
            parameter.grad = None

        handles: list[Any] = []
        with self._taking(should_stop):
            try:
                handles = [parameter.register_post_accumulate_grad_hook(take) for parameter in self._parameters.values()]
                for i in range(len(windows)):
                    (self._loss(windows, i) * weigh(len(windows[i]) - 1)).backward()  # type: ignore[no-untyped-call]
                    on_window(i + 1)
            finally:
                for handle in handles:
                    handle.remove()
        return sums

    def _accumulates_in_float32(self) -> bool:
        import torch

        return all(parameter.dtype == torch.float32 for parameter in self._parameters.values())

    def _accumulated(self, windows: Windows, share: float, should_stop: ShouldStop, on_window: OnWindow) -> dict[int, Tensor]:
        """Id of each parameter -> the sum of the windows' gradients of `share` times their loss, as PyTorch adds them up: no sum lies beside its gradient."""
        import torch

        with self._taking(should_stop):
            for i in range(len(windows)):
                (self._loss(windows, i) * share).backward()  # type: ignore[no-untyped-call]
                on_window(i + 1)
            return {key: torch.zeros_like(parameter, requires_grad=False) if parameter.grad is None else parameter.grad for key, parameter in self._parameters.items()}

    def _curvature(self, windows: Windows, n_tokens: int, probes: int, seed: int, should_stop: ShouldStop, on_window: OnWindow) -> dict[int, Tensor]:
        import torch
        from torch.nn.attention import SDPBackend, sdpa_kernel

        sums, parameters = self._zeros(), list(self._parameters.values())
        draw = torch.Generator().manual_seed(seed)
        # Of PyTorch's attention kernels the fused ones have no second derivative.
        with self._taking(should_stop), sdpa_kernel([SDPBackend.MATH]), self._named_where_missing():
            for i in range(len(windows)):
                loss = self._loss(windows, i) / n_tokens
                signs = ([_signs(parameter, draw) for parameter in parameters] for _ in range(probes))
                for z, products in hessian_products(loss, parameters, signs, probes):
                    for parameter, sign, product in zip(parameters, z, products, strict=True):
                        sums[id(parameter)].addcmul_(sign.float(), product.float(), value=1 / probes)
                on_window(i + 1)
        return sums

    def _loss(self, windows: Windows, i: int) -> Tensor:
        """The sum over the predicted tokens of one window, in nats. Raises LayerscopeError where it is not finite."""
        import torch

        ids = torch.tensor([list(windows[i])], device=next(self._model.parameters()).device)
        logits = self._model(input_ids=ids, use_cache=False).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits.float(), ids[0, 1:].to(logits.device), reduction="sum")
        if not math.isfinite(value := float(loss.detach())):
            raise LayerscopeError(f"The loss of window {i + 1} of {len(windows)} is {value}, and gradients need a finite one.")
        return loss

    @contextmanager
    def _named_where_missing(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # PyTorch's only sign of a second derivative that it does not have
            found = _NOT_TWICE.search(str(error))
            if found is None:
                raise
            what = f"of {found[1]}" if found[1] else f"({first_line(error)})"
            raise LayerscopeError(f"{self._info.name} ({self._info.architecture}) has no Hessian here: PyTorch has no second derivative {what}.") from error

    def _zeros(self) -> dict[int, Tensor]:
        import torch

        return {key: torch.zeros_like(parameter, dtype=torch.float32, requires_grad=False) for key, parameter in self._parameters.items()}

    def _handed_out(self, sums: dict[int, Tensor]) -> Named:
        """Each sum is freed when the last canonical weight that lies in it has been handed out."""
        left = Counter(id(parameter) for weight in self._weights for parameter in weight.parameters)
        for weight in self._weights:
            keys = [id(parameter) for parameter in weight.parameters]
            yield weight.name, np.ascontiguousarray(to_numpy(weight.of([sums[key] for key in keys])))
            left.subtract(keys)
            for key in keys:
                if not left[key]:
                    del sums[key]


def hessian_products(loss: Tensor, parameters: Sequence[Tensor], signs: Iterator[list[Tensor]], probes: int) -> Iterator[tuple[list[Tensor], tuple[Tensor, ...]]]:
    """(z, Hz) for each of `probes` vectors z of `signs`, H the Hessian of `loss` over all the parameters together; each a tensor a parameter.

    By backward through backward (Pearlmutter, Neural Computation 6, 1994). The graph of the first pass serves all probes.
    """
    import torch

    slopes = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True, materialize_grads=True)
    for i, z in enumerate(signs, 1):
        bent = [(slope, sign) for slope, sign in zip(slopes, z, strict=True) if slope.requires_grad]  # a slope that hangs on nothing has none
        if not bent:
            yield z, tuple(torch.zeros_like(parameter) for parameter in parameters)
            continue
        along, weights = zip(*bent, strict=True)
        yield z, torch.autograd.grad(along, parameters, weights, retain_graph=i < probes, allow_unused=True, materialize_grads=True)


def _signs(parameter: Tensor, draw: Any) -> Tensor:
    """+1 and -1 with even chances; drawn on the CPU, so that every device has the same."""
    import torch

    return torch.randint(0, 2, parameter.shape, generator=draw, dtype=torch.int8).mul_(2).sub_(1).to(parameter.device, parameter.dtype)
