"""Align language models on one machine, with every method held against a known optimum.

    import fiducial as fd

    loss, metrics = fd.losses.dpo(
        policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta=0.1
    )
    run = fd.ppo(fd.PPO(model="...", data="prompts.jsonl", reward=("reward.py:score",)))

Names are loaded when they are used: `import fiducial` itself imports nothing heavy. They are listed
once, in `__init__.pyi`, which type checkers read too.
"""

from __future__ import annotations

import ast
import importlib

__version__ = "0.1.0"


def _public_names() -> dict[str, tuple[str, str]]:
    """Each public name with its module and its name there, from the imports of the stub."""
    with open(f"{__path__[0]}/__init__.pyi", encoding="utf-8") as stub:
        imports = [node for node in ast.parse(stub.read()).body if isinstance(node, ast.ImportFrom)]
    return {
        alias.asname or alias.name: (f".{node.module or ''}", alias.name)
        for node in imports
        for alias in node.names
    }


_WHERE = _public_names()
_ROOMS = (".", ".core")
"""Where the public names that are modules live; a public name of any other module is an object."""
__all__ = ["__version__", *_WHERE]


def __getattr__(name: str) -> object:
    if name not in _WHERE:
        raise AttributeError(f"module 'fiducial' has no attribute {name!r}")
    module, attribute = _WHERE[name]
    value: object
    if module.endswith(_ROOMS):  # `from .core import kl`: the name is itself a module
        value = importlib.import_module(f"{module.rstrip('.')}.{attribute}", __name__)
    else:
        value = getattr(importlib.import_module(module, __name__), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
