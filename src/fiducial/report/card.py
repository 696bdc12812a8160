"""The model card of a trained model."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any


def model_card(
    method: str, settings: Mapping[str, Any], yaml: str, metrics: Mapping[str, float], steps: int
) -> str:
    """README.md of a model folder: what it was made from, how, and with what result.

    Args:
        settings: as plain values. yaml: the same as config.yaml has them.
    """
    numbers = "\n".join(f"| {k} | {v:.5g} |" for k, v in metrics.items())
    return (
        f"---\nlibrary_name: transformers\ntags: [{method}, fiducial]\n---\n\n"
        f"# {method} of {settings.get('model')}\n\n"
        f"Trained with fiducial {version('fiducial')} on `{settings.get('data')}`, "
        f"seed {settings.get('seed')}, {steps} steps.\n\n"
        f"## Last metrics\n\n| metric | value |\n|---|---|\n{numbers}\n\n"
        f"## Settings\n\n```yaml\n{yaml}```\n"
    )
