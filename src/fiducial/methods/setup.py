"""Preparing is not training: rows are read and models loaded and checked, and no run is opened.

A method's page calls `prepare_offline` or `prepare_online` and gets all that its loop needs, or an
InputError for everything that can be known before training.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from ..data.batches import Batches
from ..data.prepare import joined, load, split
from ..data.render import Renderer
from ..data.row_types import PromptRow
from ..data.sources import records
from ..errors import InputError, RunError
from ..models.load import SHARED, exists, load_policy, load_roles, load_scorer
from ..models.roles import Roles, plain
from ..rewards.load import check_names as check_rewards
from ..rewards.load import load_rewards
from ..rewards.types import Responses, Scored, Scorer
from ..rollout.local import local_sampler
from ..rollout.samples import show_samples
from ..rollout.sampling import (
    Keys,
    Sampler,
    SamplingParams,
    fitting_prompt,
    sample_all,
    sampling_params,
)
from ..rollout.trajectory import Trajectory
from ..settings import LoraSettings, RowSettings, RunSettings
from ..train.processes import Processes
from ..train.renderer import load_renderer, same_ends

T = TypeVar("T")


class _Common(Protocol):
    """The settings that all methods have."""

    @property
    def model(self) -> str: ...

    @property
    def data(self) -> str: ...

    @property
    def rows(self) -> RowSettings: ...

    @property
    def lora(self) -> LoraSettings: ...

    @property
    def run(self) -> RunSettings: ...

    @property
    def seed(self) -> int: ...

    @property
    def batch_size(self) -> int: ...


class OfflineSettings(_Common, Protocol):
    """The settings of a method that learns from rows."""

    @property
    def epochs(self) -> float: ...

    @property
    def steps(self) -> int | None: ...


class OnlineSettings(_Common, Protocol):
    """The settings of a method that learns from its own samples and their rewards."""

    @property
    def max_new_tokens(self) -> int: ...

    @property
    def temperature(self) -> float: ...

    @property
    def stop(self) -> tuple[str, ...]: ...

    @property
    def reward(self) -> tuple[str, ...]: ...

    @property
    def reward_weights(self) -> tuple[float, ...] | None: ...


@dataclass(frozen=True)
class RowFormat(Generic[T]):
    """Which rows a method reads, and what it makes of them.

    accept: the formats of rows. render: from a renderer to a function of one row.
    key: what must not stand in both training and evaluation, usually the prompt.
    join: from rendered rows and the rows themselves to elements with a key each, for a method whose
        elements are made of several rows; None: a row is an element.
    """

    accept: tuple[type, ...]
    render: Callable[[Renderer], Callable[[Any], Any]]
    key: Callable[[Any], str]
    join: Callable[[list[Any], list[Any]], tuple[list[str], list[T]]] | None = None


@dataclass(frozen=True)
class Elements(Generic[T]):
    """Elements to train on or to evaluate with: what was rendered, their keys, and their rows.

    `rows` has one row per element, or is empty where elements are made of several rows.
    """

    items: list[T]
    keys: list[str]
    rows: list[Any]

    def __len__(self) -> int:
        return len(self.items)

    def take(self, numbers: Sequence[int]) -> Elements[T]:
        """Only these elements, in this order."""
        rows = [self.rows[i] for i in numbers] if self.rows else []
        return Elements([self.items[i] for i in numbers], [self.keys[i] for i in numbers], rows)


@dataclass(frozen=True)
class Prepared(Generic[T]):
    """What a method that learns from rows needs for its loop.

    note: one sentence about rows that were skipped, or "".
    """

    renderer: Renderer
    train: Elements[T]
    held_out: Elements[T]
    roles: Roles
    batches: Batches
    total: int
    note: str


@dataclass(frozen=True)
class PreparedOnline:
    """What a method that learns from its own samples needs for its loop.

    rows, prompts: the prompt rows, and their token ids. shown: number of prompts that are answered
    before and after training.
    """

    renderer: Renderer
    rows: list[PromptRow]
    prompts: list[list[int]]
    roles: Roles
    sampler: Sampler
    params: SamplingParams
    rewards: Scorer
    processes: Processes
    seed: int
    shown: int
    note: str

    def sample(
        self, chosen: Sequence[tuple[int, int]], step: int, *, greedy: bool = False
    ) -> Trajectory:
        """One response to each of the prompts (row number, sample number) by the current policy."""
        self.sampler.sync(self.roles.policy, step)
        params = replace(self.params, temperature=0.0) if greedy else self.params
        keys = Keys(self.seed, step, [i for i, _ in chosen], [k for _, k in chosen])
        prompts = [self.prompts[i] for i, _ in chosen]
        return sample_all(self.sampler, prompts, params, keys, self.processes)

    def score(self, chosen: Sequence[tuple[int, int]], trajectory: Trajectory) -> Scored:
        """The rewards of the responses to these prompts."""
        rows = [self.rows[i] for i, _ in chosen]
        return self.rewards.score(Responses.of(rows, trajectory, self.renderer))

    def answers(self) -> list[dict[str, Any]]:
        """What the policy answers to the first prompts, with its rewards, for the page."""
        rows = self.rows[: self.shown]

        def score(trajectory: Trajectory) -> list[float]:
            return self.rewards.score(Responses.of(rows, trajectory, self.renderer)).scores

        return show_samples(
            self.roles.policy,
            self.renderer,
            [(r.prompt, r.where) for r in rows],
            self.processes,
            seed=self.seed,
            params=self.params,
            score=score,
        )


def prepare_offline(
    settings: OfflineSettings,
    processes: Processes,
    rows: RowFormat[T],
    *,
    scorer: bool = False,
    skipped: Path | None = None,
) -> Prepared[T]:
    """Rows, a model and the plan of a method that learns from rows.

    Args:
        scorer: the trained role is a model with a scalar head instead of a policy.
        skipped: the file for rows that `--rows.on-error skip` leaves out.

    Raises:
        InputError: a row or a model cannot be used.
    """
    check_names(settings)
    renderer = load_renderer(settings.model, settings.rows)
    train, held_out, note = read(
        settings.data, settings.rows, rows, renderer, settings.seed, skipped
    )
    if scorer:
        model = load_scorer(
            settings.model,
            settings.lora,
            settings.run,
            head="normal",
            tokenizer=renderer.tokenizer,
            seed=settings.seed,
        )
        roles = Roles(scorer=model)
    else:
        policy = load_policy(settings.model, settings.lora, settings.run, renderer.tokenizer)
        same_ends(plain(policy.lm), renderer)
        roles = Roles(policy=policy.to(processes.device))
    batches = Batches(len(train), settings.batch_size, settings.seed)
    total = settings.steps or max(1, round(settings.epochs * batches.per_epoch))
    return Prepared(renderer, train, held_out, roles, batches, total, note)


def prepare_online(
    settings: OnlineSettings,
    processes: Processes,
    *,
    critic: str | None = None,
    sampler: Sampler | None = None,
    rewards: Scorer | None = None,
) -> PreparedOnline:
    """Prompts, rewards, roles and a sampler for a method that learns from its own samples.

    Args:
        critic: where a critic starts: "reward", "policy", "shared" (a value head on the policy's
            trunk) or "auto" (from the reward model if it can); None for no critic.
        sampler: of the policy's responses; None samples in this process.
        rewards: scores them in place of --reward.

    Raises:
        InputError: a row, a reward or a model cannot be used.
    """
    check_names(settings)
    if rewards is None:
        check_rewards(settings.reward, settings.reward_weights)
    renderer = load_renderer(settings.model, settings.rows)
    prompts, rows, note = read_prompts(settings.data, settings, renderer)
    start, alone = None, False
    if rewards is None:
        loaded = load_rewards(settings.reward, settings.reward_weights, settings.run, processes)
        rewards = loaded
        start, alone = loaded.critic_start(renderer)
    rewards.check_rows(rows)
    if critic is not None:
        start = _critic_start(critic, start, alone, settings)
    roles = load_roles(
        settings.model,
        settings.lora,
        settings.run,
        renderer.tokenizer,
        processes.device,
        critic=None if critic is None else start,
        seed=settings.seed,
    )
    same_ends(plain(roles.policy.lm), renderer)
    return PreparedOnline(
        renderer,
        rows,
        prompts,
        roles,
        sampler or local_sampler(roles.policy),
        sampling_params(renderer, settings.max_new_tokens, settings.temperature, settings.stop),
        rewards,
        processes,
        settings.seed,
        settings.run.samples,
        note,
    )


def check_names(settings: _Common) -> None:
    """Refuse models, files and rewards that do not exist, before any row is read.

    Raises:
        InputError: names the setting.
    """
    exists(settings.model, "--model")
    if teacher := getattr(settings, "teacher", None):
        exists(teacher, "--teacher")
    for flag, source in _sources(settings):
        try:
            records(source)  # opens the file and reads nothing yet
        except InputError as error:
            raise InputError(f"{flag}: {error}") from error


def _sources(settings: Any) -> Iterator[tuple[str, str]]:
    yield "--data", settings.data
    for name in ("rows.eval_data", "ptx.data", "reference_data"):
        value = settings
        for part in name.split("."):
            value = getattr(value, part, None)
        if value is not None:
            yield f"--{name.replace('_', '-')}", value


def read(
    source: str,
    settings: RowSettings,
    rows: RowFormat[T],
    renderer: Renderer,
    seed: int,
    skipped: Path | None = None,
) -> tuple[Elements[T], Elements[T], str]:
    """Rendered elements for training and for evaluation, with no key in both; and a note.

    Raises:
        InputError: a row cannot be used, with its file:line.
    """

    def elements(name: str, file: Path | None) -> tuple[Elements[T], str]:
        rendered, kept, note = load(
            name, settings, rows.accept, rows.render(renderer), skipped=file
        )
        note = joined(note, renderer.take_notes(len({r.where for r in kept})))
        if rows.join is None:
            return Elements(rendered, [rows.key(r) for r in kept], kept), note
        keys, items = rows.join(rendered, kept)
        return Elements(items, keys, []), note

    train, note = elements(source, skipped)
    if settings.eval_data:
        return train, elements(settings.eval_data, None)[0], note
    here, there = split(train.keys, settings.held_out, seed)
    return train.take(here), train.take(there), note


def read_prompts(
    source: str, settings: OnlineSettings, renderer: Renderer
) -> tuple[list[list[int]], list[PromptRow], str]:
    """Token ids of all prompts that leave room for a response, their rows, and a note."""

    def render(row: PromptRow) -> list[int]:
        return fitting_prompt(row, renderer, settings.max_new_tokens)

    prompts, rows, note = load(source, settings.rows, (PromptRow,), render)
    return prompts, rows, joined(note, renderer.take_notes(len(rows)))


@contextlib.contextmanager
def before_training() -> Iterator[None]:
    """Nothing was trained yet, so what fails here is refused like any bad input."""
    try:
        yield
    except RunError as error:
        raise InputError(str(error)) from error


def _critic_start(asked: str, reward: str | None, alone: bool, settings: OnlineSettings) -> str:
    """The folder that the critic starts from, or `SHARED`."""
    if asked == "auto":
        asked = "reward" if reward is not None and alone else "policy"
    if asked == "shared":
        if settings.lora.r > 0:
            raise InputError(
                "--critic.start shared: with --lora.r the trunk stays frozen except for the "
                "policy's adapters: use policy or reward"
            )
        return SHARED
    if asked == "reward" and reward is None:
        raise InputError(
            "--critic.start reward: no --reward is a reward model with the policy's tokenizer: "
            "use policy or shared"
        )
    return reward if asked == "reward" and reward is not None else settings.model
