"""What a critic starts from, so that its first values are on the scale of the returns."""

from __future__ import annotations

from typing import Protocol

from ..data.render import Renderer
from ..errors import InputError
from ..models.load import SHARED
from ..models.scores import CriticStart
from ..rewards.load import Rewards
from ..settings import LoraSettings, ScoreSettings


class _Settings(Protocol):
    @property
    def model(self) -> str: ...

    @property
    def lora(self) -> LoraSettings: ...

    @property
    def score(self) -> ScoreSettings: ...


def critic_start(
    asked: str, rewards: Rewards | None, renderer: Renderer, settings: _Settings
) -> CriticStart:
    """The folder that the critic starts from, or `SHARED`, and the scale of its scores.

    A reward model's head is scaled by the reward's weight and shifted by its mean, so that its
    values are rewards. `auto` takes the reward model where that makes them so exactly: it is the
    only reward that counts, and --score neither normalizes nor clips, whose effect depends on
    scores that are not known yet.

    Raises:
        InputError: the settings ask for a start that there is not, or whose values would not be on
            the scale of the rewards.
    """
    start, alone = (None, False) if rewards is None else rewards.critic_start(renderer)
    score = settings.score
    known = score.normalise == "none" and score.clip is None
    if asked == "shared":
        if settings.lora.r > 0:
            raise InputError(
                "--critic.start shared: with --lora.r the trunk stays frozen except for the "
                "policy's adapters: use policy or reward"
            )
        return CriticStart(SHARED)
    if asked == "reward" and start is None:
        raise InputError(
            "--critic.start reward: no --reward is a reward model with the policy's tokenizer "
            "and a weight other than 0: use policy or shared"
        )
    if asked == "reward" and not known:
        flag = "--score.normalise" if score.normalise != "none" else "--score.clip"
        raise InputError(
            f"--critic.start reward with {flag}: the reward model's values would not be on the "
            f"scale of the rewards: use policy, whose values start at 0, or leave {flag} out"
        )
    if start is not None and (asked == "reward" or (asked == "auto" and alone and known)):
        return start
    return CriticStart(settings.model)
