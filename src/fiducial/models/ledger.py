"""A ledger of tensors: every storage that is made is written down with its size and what it is for,
and crossed out when it is freed. It counts real tensors and, without any memory, imagined ones.
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

# what cannot be imagined is told in a sentence
logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)

ACTIVATIONS, LOGITS = "activations", "logits"


class _Entry:
    """A storage that is alive: its bytes, and what it is for."""

    def __init__(self, size: int, use: str) -> None:
        self.size, self.use = size, use


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the tensors that are made while it is active; use it as a context.

    It sees what each operation returns. What an operation allocates within itself and frees again
    is not seen.

    live: bytes by use at this moment. peak: the largest sum since `begin`, by use.
    use: what new tensors are for. vocabulary: tensors whose last dimension it is are logits.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live: Counter[str] = Counter()
        self.peak: dict[str, int] = {}
        self.use, self.vocabulary = ACTIVATIONS, 0
        self._total = self._largest = 0
        self._entries: weakref.WeakKeyDictionary[Any, _Entry] = weakref.WeakKeyDictionary()

    def begin(self) -> None:
        """The peak is sought from here on."""
        self._largest, self.peak = self._total, dict(self.live)

    @contextlib.contextmanager
    def of(self, use: str) -> Iterator[None]:
        """What is made in a block is for this."""
        before, self.use = self.use, use
        try:
            yield
        finally:
            self.use = before

    def assign(self, tensors: Iterable[Tensor], use: str) -> None:
        """These tensors turned out to be for something else."""
        for tensor in tensors:
            entry = self._entries.get(tensor.untyped_storage())
            if entry is not None:
                self.live[entry.use] -= entry.size
                self.live[use] += entry.size
                entry.use = use

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = self._compute(func, args, kwargs or {})
        for tensor in _tensors((out,)):
            self._write(tensor)
        return out

    def _compute(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return func(*args, **kwargs)

    def _write(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._entries:
            return
        logits = self.use == ACTIVATIONS and tensor.dim() and tensor.shape[-1] == self.vocabulary
        entry = _Entry(storage.nbytes(), LOGITS if logits else self.use)
        self._entries[storage] = entry
        weakref.finalize(storage, self._cross_out, entry).atexit = False
        self.live[entry.use] += entry.size
        self._total += entry.size
        if self._total > self._largest:
            self._largest, self.peak = self._total, dict(self.live)

    def _cross_out(self, entry: _Entry) -> None:
        self.live[entry.use] -= entry.size
        self._total -= entry.size


class ImaginedLedger(Ledger):  # type: ignore[no-untyped-call]
    """A ledger under which floating-point tensors have a shape and no numbers, and so no memory.

    Token ids, positions and masks are computed really: what a model does may depend on them.
    """

    def __init__(self) -> None:
        super().__init__()
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)

    def __enter__(self) -> Any:
        self._mode.__enter__()
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._mode.__exit__(*error)

    def take(self, module: nn.Module, device: torch.device, use: str) -> None:
        """Writes down the tensors of a module on the meta device as imagined ones of `device`."""
        seen: dict[int, tuple[Tensor, Tensor]] = {}  # shared weights are made once
        with self.of(use):
            for owner in module.modules():
                for tensors in (owner._parameters, owner._buffers):
                    for name, old in tensors.items():
                        if old is not None:
                            both = seen.get(id(old)) or (old, self._imagined(old, device))
                            seen[id(old)] = both
                            tensors[name] = both[1]  # type: ignore[assignment]

    @staticmethod
    def _imagined(old: Tensor, device: torch.device) -> Tensor:
        new = torch.empty(old.shape, dtype=old.dtype, device=device)
        is_weight = isinstance(old, nn.Parameter)
        return nn.Parameter(new, requires_grad=old.requires_grad) if is_weight else new

    def _compute(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        tensors = [*_tensors(args), *_tensors(kwargs.values())]
        imagined = any(isinstance(t, FakeTensor) for t in tensors)
        if not imagined and (tensors or _counts(func, args, kwargs)):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if func in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default):
            args = (args[0], _places(args[1]), *args[2:])
        return func(*args, **kwargs)


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among the values of an operation, lists included."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors(value)


def _counts(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether an operation without a tensor before it makes whole numbers or truth values."""
    dtype = kwargs.get("dtype")
    if dtype is not None:
        return not (dtype.is_floating_point or dtype.is_complex)
    return "arange" in str(func) and not any(isinstance(a, float) for a in args)


def _places(indices: Any) -> list[Any]:
    """Real masks among the indices of a tensor as the numbers of what they choose."""
    out: list[Any] = []
    for index in indices:
        real = isinstance(index, Tensor) and not isinstance(index, FakeTensor)
        if real and index.dtype in (torch.bool, torch.uint8):
            with unset_fake_temporarily():
                out.extend(index.nonzero(as_tuple=True))
        else:
            out.append(index)
    return out
