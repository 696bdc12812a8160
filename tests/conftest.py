"""Fixtures of all tests: a cache of their own, model folders, files of rows."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from support import ARCHITECTURES, BAD, GOOD, PROMPTS, make_model, write_jsonl


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    os.environ["FIDUCIAL_CACHE"] = str(folder)
    return folder


LOCAL = ("127.0.0.1", "localhost", "::1", "", None)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Sockets lead to this machine alone, where processes of a group meet. Whoever tries another
    address fails its test, also where it would go on without an answer.
    """
    tried: list[str] = []

    def allowed(address: Any) -> bool:
        return isinstance(address, str | bytes) or address[0] in LOCAL  # a Unix socket, or here

    class Denied(socket.socket):
        def connect(self, address: Any) -> None:
            return super().connect(checked(address))

        def connect_ex(self, address: Any) -> int:
            return super().connect_ex(checked(address))

        def bind(self, address: Any) -> None:
            return super().bind(checked(address))

    def checked(address: Any) -> Any:
        if not allowed(address):
            tried.append(str(address))
            raise OSError(f"the tests open no socket to {address}")
        return address

    inner = socket.getaddrinfo

    def lookup(host: Any, *rest: Any, **named: Any) -> Any:
        return inner(checked((host,))[0], *rest, **named)

    monkeypatch.setattr(socket, "socket", Denied)
    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    yield tried
    assert not tried, f"a test wanted to reach {tried}"


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The folders of the three models."""
    return {kind: make_model(kind, tmp_path_factory.mktemp(kind)) for kind in ARCHITECTURES}


@pytest.fixture(scope="session")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """make("gpt2", vocab_size=8): a model folder that differs from the common one."""
    return lambda kind, **changes: make_model(kind, tmp_path_factory.mktemp(kind), **changes)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Files of rows, lengths far apart, by format."""
    folder = tmp_path_factory.mktemp("data")
    triples = list(zip(PROMPTS, GOOD, BAD, strict=True))

    def turns(*texts: str) -> list[dict[str, str]]:
        return [
            {"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)
        ]

    return {
        "completions": write_jsonl(
            folder / "completions.jsonl", ({"prompt": p, "completion": g} for p, g, _ in triples)
        ),
        "pairs": write_jsonl(
            folder / "pairs.jsonl",
            ({"prompt": p, "chosen": g, "rejected": b} for p, g, b in triples),
        ),
        "messages": write_jsonl(
            folder / "messages.jsonl", ({"messages": turns(p, g, p, b)} for p, g, b in triples)
        ),
        "prompts": write_jsonl(
            folder / "prompts.jsonl", ({"prompt": p, "number": i} for i, p in enumerate(PROMPTS))
        ),
        "texts": write_jsonl(folder / "texts.jsonl", ({"text": p + g} for p, g, _ in triples)),
    }


LONG = (
    "lab/test_ppo.py",
    "methods/test_methods.py",
    "lab/test_dpo_transformer.py",
    "lab/test_sequence.py",
    "methods/test_processes.py",
    "methods/test_reinforce_grpo.py",
    "methods/test_resume.py",
    "lab/test_command.py",
    "lab/test_kit.py",
    "lab/test_dpo.py",
    "demo/test_demo.py",
    "lab/test_trainer.py",
    "models/test_contract.py",
    "test_imports.py",
    "methods/test_distill.py",
    "models/test_tabular.py",
)
"""The longest files, which begin first, so that no worker is left with one at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first; the order within a file stays."""

    def place(item: pytest.Item) -> int:
        name = item.path.as_posix()
        return next((k for k, long in enumerate(LONG) if name.endswith(long)), len(LONG))

    items.sort(key=place)
