"""The defaults of the public losses and estimators are the values of the papers that their
docstrings name, and a loss has the same ones in both of its forms.
"""

import inspect

import pytest

import fiducial as fd
from fiducial.core import corrections

PUBLISHED = {
    fd.losses.ppo_clip: {"clip": 0.2, "clip_high": None},
    fd.losses.gspo: {"clip": 3e-4, "clip_high": 4e-4},
    fd.losses.cispo: {"cap": 5.0},
    fd.losses.clipped_value: {"clip": 0.2},
    fd.losses.dpo: {"beta": 0.1, "label_smoothing": 0.0},
    fd.losses.bradley_terry: {"margin": None, "centering": 0.0},
    fd.losses.ranking: {"margin": None, "centering": 0.0},
    fd.losses.reverse_kl: {"temperature": 1.0},
    fd.losses.reverse_kl_states: {"discount": 0.0},
    fd.losses.reverse_kl_sampled: {"discount": 0.0},
    fd.advantages.gae: {"gamma": 1.0, "lam": 0.95},
    fd.advantages.group_normalised: {"eps": 1e-4},
    corrections.tis: {"cap": 2.0},
    corrections.icepop: {"cap": 2.0, "floor": 0.5},
    corrections.sequence_tis: {"cap": 2.0},
    corrections.sequence_mis: {"cap": 2.0},
}


def defaults(function) -> dict[str, object]:
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


@pytest.mark.parametrize("function", PUBLISHED, ids=lambda f: f.__name__)
def test_the_defaults_are_the_published_ones(function):
    assert defaults(function) == PUBLISHED[function]
    summed = getattr(fd.losses, f"{function.__name__}_sum", None)
    if summed is not None and function.__module__.startswith("fiducial.losses"):
        more = {"weight": None} if function is fd.losses.bradley_terry else {}
        assert defaults(summed) == PUBLISHED[function] | more
