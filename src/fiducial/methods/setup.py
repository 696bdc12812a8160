"""Preparing is not training: rows are read and models loaded and checked, and no run is opened.

A method's page calls `prepare_offline` or `prepare_online` and gets all that its loop needs, or an
InputError for everything that can be known before training.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from ..data.batches import Batches
from ..data.elements import Elements, RowFormat, read
from ..data.findings import Finding, warned
from ..data.judged import judged
from ..data.prepare import joined, load
from ..data.render import Renderer
from ..data.row_types import PromptRow
from ..data.sources import records
from ..data.survey import Survey
from ..errors import InputError, RunError, Unscored
from ..models.contract import check_roles
from ..models.load import exists, load_policy, load_roles, load_scorer
from ..models.roles import Roles
from ..models.trunk import context, plain
from ..rewards.load import check_names as check_rewards
from ..rewards.load import load_rewards
from ..rewards.types import Responses, Scored, Scorer, TrainerState
from ..rollout.agreement import check_online
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
from ..settings import CommonSettings, OfflineSettings, OnlineSettings
from ..train import machine
from ..train.processes import Processes
from ..train.progress import reading
from ..train.renderer import load_renderer, same_ends
from . import memory
from .critic import critic_start

T = TypeVar("T")

USUAL_TOKENS = 256
"""Tokens of a sample that every model may be asked for: a smaller context shortens it."""
NO_REFERENCE = (
    "beta is 0, so no reference is loaded and the KL to it is not measured (--kl.estimator k1 "
    "measures it)"
)


@dataclass(frozen=True)
class Prepared(Generic[T]):
    """What a method that learns from rows needs for its loop.

    needs: what the run's memory depends on. note: a line about rows that were skipped and about
    what was checked, and then a line for each warning. ids: the token ids of each sequence in an
    element. survey: what the rows hold.
    """

    renderer: Renderer
    needs: memory.Needs
    train: Elements[T]
    held_out: Elements[T]
    roles: Roles
    batches: Batches
    total: int
    note: str
    ids: Callable[[T], Sequence[Sequence[int]]]
    survey: Survey

    def describe(self, step: int) -> Iterator[dict[str, Any]]:
        """The rows of a step as people read them."""
        for number in self.batches[step]:
            row = self.train.rows[number].where if self.train.rows else self.train.keys[number]
            texts = [self.renderer.decode(ids) for ids in self.ids(self.train.items[number])]
            yield {"row": row, "texts": texts}


@dataclass(frozen=True)
class PreparedOnline:
    """What a method that learns from its own samples needs for its loop.

    rows, prompts: the prompt rows, and their token ids. shown: number of prompts that are answered
    before and after training. steps: iterations of the run. needs, note, survey: as in `Prepared`.
    """

    renderer: Renderer
    needs: memory.Needs
    rows: list[PromptRow]
    prompts: list[list[int]]
    roles: Roles
    sampler: Sampler
    params: SamplingParams
    rewards: Scorer
    processes: Processes
    seed: int
    shown: int
    steps: int
    note: str
    survey: Survey

    def sample(
        self, chosen: Sequence[tuple[int, int]], step: int, *, greedy: bool = False
    ) -> Trajectory:
        """One response to each of the prompts (row number, sample number) by the current policy."""
        self.sampler.sync(self.roles.policy, step)
        params = replace(self.params, temperature=0.0) if greedy else self.params
        keys = Keys(self.seed, step, [i for i, _ in chosen], [k for _, k in chosen])
        prompts = [self.prompts[i] for i, _ in chosen]
        return sample_all(self.sampler, prompts, params, keys, self.processes)

    def score(
        self, chosen: Sequence[tuple[int, int]], trajectory: Trajectory, step: int, drawn: int
    ) -> Scored:
        """The rewards of the responses to these prompts.

        Args:
            step, drawn: number of iterations done and of prompts drawn before, for functions that
                ask for `trainer_state`.

        Raises:
            Unscored: a reward failed, or no reward judges one of the responses.
        """
        return self._scored([self.rows[i] for i, _ in chosen], trajectory, step, drawn)

    def describe(self, trajectory: Trajectory) -> Iterator[dict[str, Any]]:
        """The responses of a step as people read them, with the row of each prompt."""
        return described(trajectory, self.prompts, self.rows, self.renderer)

    def answers(self, step: int, drawn: int) -> list[dict[str, Any]]:
        """What the policy answers to the first prompts, with its rewards, for the page."""
        rows, columns = self.rows[: self.shown], dict[str, Sequence[Any]]()

        def score(trajectory: Trajectory) -> list[float]:
            scored = self._scored(rows, trajectory, step, drawn)
            columns.update(scored.columns)
            return scored.floats()

        shown = show_samples(
            self.roles.policy,
            self.renderer,
            [(r.prompt, r.where) for r in rows],
            self.processes,
            seed=self.seed,
            params=self.params,
            score=score,
            sampler=self.sampler,
        )
        return [r | {name: c[i] for name, c in columns.items()} for i, r in enumerate(shown)]

    def _scored(
        self, rows: list[PromptRow], trajectory: Trajectory, step: int, drawn: int
    ) -> Scored:
        state = TrainerState(step, self.steps, drawn / len(self.rows))
        responses = Responses.of(rows, trajectory, self.renderer, state)
        try:
            scored = self.rewards.score(responses)
            scored.floats(responses.where)
        except RunError as error:
            both = zip(responses.as_rows(), responses.token_ids(), responses.where, strict=True)
            rows_kept = [row | ids | {"where": where} for row, ids, where in both]
            raise Unscored(str(error), rows_kept) from error
        return scored


def described(
    trajectory: Trajectory,
    prompts: Sequence[list[int]],
    rows: Sequence[PromptRow],
    renderer: Renderer,
) -> Iterator[dict[str, Any]]:
    """Sampled responses as people read them, with the row of each prompt."""
    where = {tuple(ids): row.where for ids, row in zip(prompts, rows, strict=True)}
    lengths, responses = trajectory.prompt_lengths.tolist(), trajectory.responses()
    for ids, n, response in zip(trajectory.ids.tolist(), lengths, responses, strict=True):
        texts = {"prompt": renderer.decode(ids[:n]), "response": renderer.decode(response)}
        yield {"row": where.get(tuple(ids[:n]), ""), **texts}


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
    trust = settings.trust_remote_code
    renderer = load_renderer(settings.model, settings.rows, trust=trust)
    survey = Survey(renderer)
    with reading(f"reading {settings.data}", show=processes.main) as told:
        train, held_out, note = read(
            settings.data, settings.rows, rows, renderer, settings.seed, skipped, told, survey
        )
    findings = judged(survey)
    batches = Batches(len(train), settings.batch_size, settings.seed)
    total = settings.steps or max(1, round(settings.epochs * batches.per_epoch))
    both = (train.items, held_out.items)
    probed = extremes(ids for items in both for item in items for ids in rows.ids(item))
    longest, items = len(probed[-1]), train.items
    needs = memory.offline(
        settings, processes, scorer, rows, items, longest, batches, total
    ).settled()
    if scorer:
        model = load_scorer(
            settings.model,
            settings.lora,
            settings.run,
            head="normal",
            tokenizer=renderer.tokenizer,
            seed=settings.seed,
            trust=trust,
        )
        roles = Roles(scorer=model)
    else:
        policy = load_policy(
            settings.model, settings.lora, settings.run, renderer.tokenizer, trust=trust
        )
        same_ends(plain(policy.lm), renderer)
        limit = context(plain(policy.lm).config)
        if (asked := getattr(settings, "max_new_tokens", 0)) > max(limit, USUAL_TOKENS):
            raise InputError(
                f"--max-new-tokens {asked:,} is more than the model's context of {limit:,} tokens"
            )
        roles = Roles(policy=policy.to(processes.device))
    checked = check_roles(roles, probed, longest, {"model": settings.model})
    note = notes(note, checked, findings)
    return Prepared(renderer, needs, train, held_out, roles, batches, total, note, rows.ids, survey)


def prepare_online(
    settings: OnlineSettings,
    processes: Processes,
    *,
    reference: bool,
    critic: str | None = None,
    sampler: Sampler | None = None,
    rewards: Scorer | None = None,
) -> PreparedOnline:
    """Prompts, rewards, roles and a sampler for a method that learns from its own samples.

    Args:
        reference: whether anything reads the frozen reference; otherwise none is loaded.
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
    trust = settings.trust_remote_code
    renderer = load_renderer(settings.model, settings.rows, trust=trust)
    prompts, rows, note = read_prompts(settings.data, settings, renderer)
    survey = Survey(renderer)
    survey.look(rows, prompts)
    findings = judged(survey)
    loaded, held = None, machine.resident_memory(processes.device)
    if rewards is None:
        loaded = load_rewards(
            settings.reward,
            settings.reward_weights,
            settings.run,
            processes,
            settings.worker,
            trust=trust,
        )
        rewards = loaded
    rewards.check_rows(rows)
    start = None if critic is None else critic_start(critic, loaded, renderer, settings)
    models = memory.online_models(settings, reference, start, loaded)
    needs = memory.online(settings, processes, models, prompts, held).settled()
    roles = load_roles(
        settings.model,
        settings.lora,
        settings.run,
        renderer.tokenizer,
        processes.device,
        critic=start,
        reference=reference,
        seed=settings.seed,
        trust=trust,
    )
    same_ends(plain(roles.policy.lm), renderer)
    params = sampling_params(renderer, settings.max_new_tokens, settings.temperature, settings.stop)
    sampler, checked = check_online(
        roles,
        prompts,
        params,
        sampler,
        {"model": settings.model, "critic": "" if start is None else start.folder},
    )
    if not reference:
        note = "; ".join(filter(None, [note, NO_REFERENCE]))
    return PreparedOnline(
        renderer,
        needs,
        rows,
        prompts,
        roles,
        sampler,
        params,
        rewards,
        processes,
        settings.seed,
        settings.run.samples,
        settings.steps,
        notes(note, checked, findings),
        survey,
    )


def notes(note: str, checked: str, findings: Sequence[Finding] = ()) -> str:
    """What is said at the beginning of a run: rows that were skipped, and what was checked; then,
    one a line, what is likely wrong with the rows.
    """
    first = "; ".join(part for part in (note, f"checked: {checked}") if part)
    return "\n".join([first, *warned(findings)])


def extremes(sequences: Iterable[Sequence[int]]) -> list[Sequence[int]]:
    """The shortest sequence of more than one token and the longest, on which models are checked."""
    shortest = longest = None
    for ids in sequences:
        if shortest is None or len(shortest) < 2 or 2 <= len(ids) < len(shortest):
            shortest = ids
        if longest is None or len(ids) >= len(longest):
            longest = ids
    assert shortest is not None and longest is not None
    return [shortest, longest]


def check_names(settings: CommonSettings) -> None:
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
