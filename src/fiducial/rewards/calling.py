"""A user's own function: found by its name, read for what it takes, called, and its errors told.

A function may be any callable: a plain or asynchronous function, a bound method, a partial, an
object with `__call__`, a decorated function, or a torch module. This file does not import torch,
because the process of a function that does not need it begins without it.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import importlib
import importlib.util
import inspect
import sys
import threading
import traceback
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError

if TYPE_CHECKING:
    import asyncio


@dataclass(frozen=True)
class Takes:
    """What a function can be given by keyword.

    names: of its parameters. required: those without a default. everything: it has `**keywords`.
    """

    names: frozenset[str]
    required: tuple[str, ...]
    everything: bool

    @staticmethod
    def of(function: Callable[..., Any], name: str, flag: str) -> Takes:
        """Read from the signature. A decorator that passes everything on takes what the function
        inside takes.

        Raises:
            InputError: it is a class or a model of token ids, its signature cannot be read, or it
                takes arguments that have no name.
        """
        if inspect.isclass(function):
            raise InputError(
                f"{flag}: {name} is a class: make an object of it in the file, and name that object"
            )
        call: Any = function
        if _is_module(function):
            call = call.forward
        try:
            found = inspect.signature(call, follow_wrapped=False)
            if hasattr(call, "__wrapped__") and _open(found):
                found = inspect.signature(call)
        except (TypeError, ValueError) as error:
            raise InputError(
                f"{flag}: what {name} takes cannot be read, as of most functions that are not "
                "written in Python: wrap it in a function (prompts, completions, **columns)"
            ) from error
        every = found.parameters.values()
        if nameless := [p.name for p in every if p.kind is p.POSITIONAL_ONLY]:
            raise InputError(
                f"{flag}: {name} takes {', '.join(nameless)} by position only, and rewards are "
                "given by name: remove the '/' from its signature"
            )
        if _is_module(function) and "input_ids" in found.parameters:
            raise InputError(
                f"{flag}: {name} is a model that reads token ids: save it with its tokenizer, and "
                "give the folder"
            )
        named = [p for p in every if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        required = tuple(p.name for p in named if p.default is p.empty)
        return Takes(frozenset(p.name for p in named), required, _open(found))

    def chosen(self, offered: Mapping[str, Any]) -> dict[str, Any]:
        """The offered keywords that the function takes."""
        return {k: v for k, v in offered.items() if self.everything or k in self.names}


def load_function(name: str, flag: str) -> Callable[..., Any]:
    """The callable that `file.py:function` or `module:function` names.

    Raises:
        InputError: there is no such file, module or function, or the file cannot be run.
    """
    where, _, attribute = name.rpartition(":")
    if where.endswith(".py"):
        module = _module_of(Path(where), flag)
    elif not where or where.startswith("."):
        raise InputError(
            f"{flag}: {name} names neither a file that ends in .py nor a module: give "
            "file.py:function or module:function"
        )
    else:
        try:
            with _importing_from(Path.cwd()):
                module = importlib.import_module(where)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            raise InputError(
                f"{flag}: {where} is neither a file that ends in .py nor a module that can be "
                f"imported: {told(error)}"
            ) from error
    try:
        function = functools.reduce(getattr, attribute.split("."), module)
    except AttributeError:
        function = None
    if not callable(function):
        there = [
            n
            for n, v in vars(module).items()
            if inspect.isfunction(v) and v.__module__ == module.__name__
        ]
        raise InputError(
            f"{flag}: {where} has no function {attribute}"
            + (f"; it has {', '.join(there)}" if there else "")
        )
    found: Callable[..., Any] = function
    return found


@dataclass(frozen=True)
class Call:
    """One call of a user's function, begun.

    out: what it returned, or an awaitable of it. failed: what it raised.
    """

    out: Any = None
    failed: BaseException | None = None

    @staticmethod
    def begin(function: Callable[..., Any], keywords: Mapping[str, Any]) -> Call:
        """Call the function. What it raises is kept, so that calls beside it can end."""
        try:
            out = function(**keywords)
            # what a generator raises is raised here, in the user's code
            return Call(list(out) if isinstance(out, Iterator) else out)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            return Call(failed=error)


def finished(calls: Sequence[Call]) -> list[Call]:
    """The calls with the results of those that are awaitables, which are awaited together."""
    waiting = [i for i, call in enumerate(calls) if inspect.isawaitable(call.out)]
    if not waiting:
        return list(calls)
    import asyncio  # few functions need it, and a worker begins sooner without

    async def together() -> list[Call]:
        return await asyncio.gather(*(_awaited(calls[i].out) for i in waiting))

    results = asyncio.run_coroutine_threadsafe(together(), _loop()).result()
    done = dict(zip(waiting, results, strict=True))
    return [done.get(i, call) for i, call in enumerate(calls)]


def told(error: BaseException, function: Callable[..., Any] | None = None) -> str:
    """An error of a user's code in one line: its kind, its message, and the place where it arose.

    The place is the deepest line of the function's own file.
    """
    try:
        text = " ".join(str(error).split())
    except Exception as second:
        text = f"(its message cannot be read: {type(second).__name__})"
    text = text if len(text) <= 500 else text[:497] + "..."
    return f"{type(error).__name__}: {text}".removesuffix(": ") + _place(error, function)


def _place(error: BaseException, function: Callable[..., Any] | None) -> str:
    package = str(Path(__file__).resolve().parents[1])
    frames = [(f.f_code.co_filename, line) for f, line in traceback.walk_tb(error.__traceback__)]
    library = Path(importlib.__path__[0])
    foreign = ("<frozen", package, str(library.with_name("asyncio")), str(library))
    frames = [frame for frame in frames if not frame[0].startswith(foreign)]
    file = file_of(function) if function is not None else (frames[0][0] if frames else None)
    inside = [line for name, line in frames if name == file]
    if inside:
        return f" ({Path(str(file)).name}:{inside[-1]})"
    return f" ({Path(frames[0][0]).name}:{frames[0][1]})" if frames else ""


def file_of(function: Any) -> str | None:
    """The file of the Python code that a callable ends in."""
    for _ in range(20):  # partials of methods of decorated functions
        if _is_module(function):
            function = type(function).forward
        elif isinstance(function, functools.partial):
            function = function.func
        elif hasattr(function, "__wrapped__"):
            function = function.__wrapped__
        elif hasattr(function, "__func__"):
            function = function.__func__
        elif hasattr(function, "__code__"):
            return str(function.__code__.co_filename)
        else:
            function = type(function).__call__
    return None


def _is_module(function: Any) -> bool:
    """Whether it is a module of torch, which is imported if it is."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(function, torch.nn.Module)


def _open(signature: inspect.Signature) -> bool:
    return any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())


def _module_of(path: Path, flag: str) -> Any:
    """The module that a file holds.

    It is registered as an import would do, because dataclasses and pickle look it up by its name.
    """
    if not path.is_file():
        raise InputError(f"{flag}: there is no file {path}")
    mark = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]
    name = f"fiducial_user_{path.stem}_{mark}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        with _importing_from(path.resolve().parent):
            spec.loader.exec_module(module)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        sys.modules.pop(name, None)
        raise InputError(f"{flag}: {path} cannot be run: {told(error)}") from error
    return module


@contextlib.contextmanager
def _importing_from(folder: Path) -> Iterator[None]:
    """Find modules of a folder first, and later, when a function runs, last."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # the user's code may have removed it
            sys.path.remove(str(folder))
        if str(folder) not in sys.path:
            sys.path.append(str(folder))


async def _awaited(out: Awaitable[Any]) -> Call:
    try:
        return Call(await out)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        return Call(failed=error)


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
    """An event loop in a thread of its own, kept for the whole run.

    Clients that a user's file opens stay bound to it, and it also runs where the caller's thread
    has a loop of its own, as in a notebook.
    """
    import asyncio

    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="rewards", daemon=True)
    thread.start()

    def close() -> None:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(timeout=5)
        if not thread.is_alive():
            loop.close()

    atexit.register(close)
    return loop
