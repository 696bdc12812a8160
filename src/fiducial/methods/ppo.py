"""PPO with a critic and a KL penalty to a frozen reference, as in InstructGPT (Ouyang et al. 2022,
arXiv 2203.02155) and Ziegler et al. 2019.

Generation as a decision process: the state is the prompt with the tokens so far, the action the
next token, the transition certain, the reward the score of the whole response at its last token.
Each token also pays beta * log(pi / pi_ref), so that what is maximised is E[score] - beta KL(pi ||
pi_ref).

One iteration is five steps, each a function of the ones before: sample, score, look
(log-probabilities and values), shape, improve.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
import tyro
from pydantic import Field, model_validator
from torch import Tensor

from .. import losses
from ..core import advantages, kl
from ..core.reductions import select, whiten
from ..data.batches import Batches, pad, stream
from ..data.prepare import load
from ..data.render import Rendered, Renderer
from ..data.rows import ChatRow, CompletionRow, PromptRow, TextRow
from ..errors import InputError, RunError
from ..models.load import load_policy, load_reference, load_renderer, load_scorer, save
from ..models.roles import Policy, Scorer
from ..rewards import Responses, Reward, load_rewards
from ..rollout.answers import fitting_prompt, local_sampler, show
from ..rollout.shaping import KLSettings, Looks, ScoreSettings, look, shape
from ..rollout.shared import sample_all
from ..rollout.trajectory import Trajectory
from ..run import Run
from ..settings import LoraSettings, OptimizerSettings, RowSettings, RunSettings, Settings
from ..train.processes import Micro, accumulate
from ..train.progress import say
from ..train.step import Stepper


class CriticSettings(Settings):
    """The value model."""

    start: Literal["auto", "reward", "policy", "shared"] = "auto"
    """From the reward model (Stiennon et al. 2020), from the policy with a zero head, or a zero
    head on the policy's own trunk. auto: reward if it can.
    """
    learning_rate: float | None = Field(None, gt=0)
    """Default: the policy's."""
    coefficient: float = Field(0.1, gt=0)
    """Of the value loss. 0.1: Ziegler et al. 2019."""
    clip: float | None = Field(0.2, gt=0)
    """How far a value may move from its old one in an iteration, in units of reward. 0.2: Ziegler
    et al. 2019. None: free.
    """


class PtxSettings(Settings):
    """PPO-ptx: a language-model loss mixed in, against forgetting."""

    data: str | None = None
    """Rows with text, messages, or prompt and completion. None: no mix."""
    coefficient: float = Field(27.8, gt=0)
    """Of that loss. 27.8: InstructGPT."""
    batch_size: int = Field(8, gt=0)
    """Rows an optimizer step. Ours."""


class PPO(Settings):
    """PPO: sample, score, and improve the policy, with a critic and a KL penalty to a frozen reference."""

    model: str
    """The policy to start from, a folder or a Hub name; the same weights, frozen, are the reference."""
    data: str
    """Rows with a prompt; their other columns reach the reward function. A file or a Hub name."""
    reward: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """A reward model's folder, file.py:function with TRL's signature, or exact_match,
    numeric_answer, format, length (they read the row's columns); may be
    given several times."""
    reward_weights: tuple[float, ...] | None = None
    """One weight a reward. Default: 1 each."""
    out: str | None = None
    """The run folder. Default: runs/ppo-1, -2, ..."""
    steps: int = Field(100, gt=0)
    """Iterations of sampling and improving. InstructGPT: 500 of 512 responses."""
    batch_size: int = Field(64, gt=0)
    """Responses an iteration, over all processes. InstructGPT: 512."""
    minibatches: int = Field(1, gt=0)
    """Optimizer steps an epoch makes of them. 1: Ziegler et al. 2019, Huang et al. 2024."""
    epochs: int = Field(4, gt=0)
    """Passes over an iteration's responses. 4: Ziegler et al. 2019."""
    learning_rate: float = Field(3e-6, gt=0)
    """Peak. 3e-6: Huang et al. 2024. Ten to a hundred times that for LoRA and small models."""
    beta: float = Field(0.05, ge=0)
    """KL coefficient. 0.05: Stiennon et al. 2020, Huang et al. 2024; InstructGPT: 0.02. 0: no KL
    penalty.
    """
    clip: float = Field(0.2, gt=0)
    """How far a token's probability ratio may usefully move in an iteration. 0.2: Schulman et al. 2017."""
    gamma: float = Field(1.0, gt=0, le=1)
    """Discount a token. 1: InstructGPT."""
    lam: float = Field(0.95, ge=0, le=1)
    """GAE's lambda. 0.95: Ziegler et al. 2019."""
    whiten: bool = True
    """Advantages to mean 0 and deviation 1 over the iteration's tokens. Ziegler et al. 2019."""
    target_kl: float | None = Field(None, gt=0)
    """Stop an iteration's epochs when the policy has moved this many nats a token from the one that
    sampled. Spinning Up: 0.015.
    """
    max_new_tokens: int = Field(64, gt=0)
    """Tokens of a response, at most. Ziegler et al. 2019: 24 to 75."""
    temperature: float = Field(1.0, gt=0)
    """Of sampling, and of every log-probability. 1: InstructGPT."""
    stop: tuple[str, ...] = ()
    """Tokens that end a response beside EOS."""
    seed: int = 0
    """Of the order of prompts and of the samples."""
    resume: bool = False
    """Go on from the newest checkpoint in the run folder."""
    kl: KLSettings = KLSettings()
    critic: CriticSettings = CriticSettings()
    score: ScoreSettings = ScoreSettings()
    ptx: PtxSettings = PtxSettings()
    rows: RowSettings = RowSettings()
    lora: LoraSettings = LoraSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    run: RunSettings = RunSettings(eval_every=10)

    @model_validator(mode="after")
    def _fit(self) -> PPO:
        self.score.fits(self.max_new_tokens)
        self.kl.steers(self.beta)
        return self


def ppo(settings: PPO) -> Run:
    """Train; returns the run: its path, metrics and model."""
    with Run(
        "ppo",
        settings,
        out=settings.out,
        run=settings.run,
        seed=settings.seed,
        resume=settings.resume,
    ) as run:
        processes, tokens = run.processes, settings.run.tokens
        renderer = load_renderer(settings.model, settings.rows)
        prompt_ids, rows, note = load(
            settings.data,
            settings.rows,
            (PromptRow,),
            lambda r: fitting_prompt(r, renderer, settings.max_new_tokens),
        )
        ptx = read_ptx(settings, renderer)
        rewards = load_rewards(settings.reward, settings.reward_weights, settings.run, processes)
        rewards.check_rows(rows)
        policy = load_policy(settings.model, settings.lora, settings.run, renderer.tokenizer).to(
            processes.device
        )
        critic = make_critic(
            settings, policy, rewards, renderer
        )  # None: a head on the policy's own trunk
        reference = load_reference(settings.model, policy, settings.lora, settings.run)
        sampler = local_sampler(
            policy,
            renderer,
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            stop=settings.stop,
        )
        updates = settings.steps * settings.epochs * settings.minibatches
        steppers = [Stepper(policy, settings.learning_rate, settings.optimizer, updates, processes)]
        if critic is not None:
            steppers.append(
                Stepper(
                    critic,
                    settings.critic.learning_rate or settings.learning_rate,
                    settings.optimizer,
                    updates,
                    processes,
                )
            )
        _, penalty = settings.kl.resolve()
        run.start(settings.steps)
        run.state.setdefault("beta", settings.beta)
        if run.main:
            say(
                f"ppo: {len(rows):,} prompts, {settings.steps} iterations of {settings.batch_size} "
                "responses" + (f"; {note}" if note else "")
            )

        def answers(seen: Sequence[PromptRow]) -> list[dict[str, Any]]:
            return show(
                policy,
                renderer,
                [(r.prompt, r.where) for r in seen],
                processes,
                seed=settings.seed,
                max_new_tokens=settings.max_new_tokens,
                temperature=settings.temperature,
                stop=settings.stop,
                score=lambda t: rewards(Responses.of(seen, t, renderer)).scores,
            )

        if run.step == 0:
            try:  # a reward that cannot be called is found out before an hour of sampling
                run.record_samples(answers(rows[: settings.run.samples]))
            except RunError as error:
                raise InputError(str(error)) from error
            run.pause()

        while run.running():
            chosen = stream(
                len(rows), run.step * settings.batch_size, settings.batch_size, settings.seed
            )
            batch = [rows[i] for i, _ in chosen]
            trajectory = sample_all(
                sampler,
                [prompt_ids[i] for i, _ in chosen],
                processes,
                seed=settings.seed,
                step=run.step,
                prompt=[i for i, _ in chosen],
                sample=[epoch for _, epoch in chosen],
            )
            try:
                scored = rewards(Responses.of(batch, trajectory, renderer))
            except RunError as error:
                raise RunError(f"step {run.step + 1}: {error}; {run.how_to_go_on()}") from error
            looks = look(trajectory, policy, reference, processes, tokens, critic=critic)
            shaped, metrics = shape(
                trajectory,
                scored,
                looks,
                settings.score,
                run.state,
                priced=penalty == "k1",
                limit=settings.max_new_tokens,
            )
            advantage, returns = advantages.gae(
                shaped, looks.values, trajectory.mask, gamma=settings.gamma, lam=settings.lam
            )
            weight = whiten(advantage, trajectory.mask) if settings.whiten else advantage

            moved = improve(
                trajectory, looks, weight, returns, penalty, ptx, steppers, settings, run
            )

            settings.kl.adapt(run.state, metrics["objective/kl"], len(batch))
            metrics |= scored.metrics()
            metrics["explained_variance"] = explained_variance(
                looks.values, returns, trajectory.mask
            )
            run.end_step(
                metrics | moved,
                rows=len(batch),
                tokens=int(trajectory.lengths.sum()) * moved["epochs_done"].__ceil__(),
                show=("reward", "objective/kl", "approx_kl"),
            )
            run.checkpoint_if_due()

        run.record_samples(answers(rows[: settings.run.samples]))
        run.model = policy
        return run.finish(
            save=lambda path: save(policy, renderer.tokenizer, path, torch.tensor([prompt_ids[0]]))
        )


def improve(
    trajectory: Trajectory,
    looks: Looks,
    advantage: Tensor,
    returns: Tensor,
    penalty: kl.Penalty,
    ptx: list[Rendered],
    steppers: list[Stepper],
    settings: PPO,
    run: Run,
) -> dict[str, float]:
    """Epochs of minibatches over one frozen batch; `step` numbers the optimizer steps of the whole run."""
    processes, device = run.processes, run.processes.device
    per_step = -(-len(trajectory) // settings.minibatches)
    update = run.step * settings.epochs * settings.minibatches
    out: dict[str, float] = {}
    done = 0
    for epoch in range(settings.epochs):
        order = Batches(len(trajectory), per_step, settings.seed)
        for rows in (
            order[(run.step * settings.epochs + epoch) * order.per_epoch + i]
            for i in range(order.per_epoch)
        ):
            count = int(trajectory.mask[rows].sum())
            plan = processes.plan([[int(trajectory.lengths[i])] for i in rows], settings.run.tokens)
            approx_kl = torch.zeros((), dtype=torch.float64)
            for micro in accumulate(plan, processes, *(s.module for s in steppers)):
                numbers = [rows[i] for i in micro.rows]
                ids, mask = trajectory.slice_rows(numbers, device)
                now = steppers[0].module(ids, mask, trajectory.temperature)
                values = now.values if len(steppers) == 1 else select(steppers[1].module(ids), mask)
                old, ref, old_values, adv, ret = (
                    x[numbers, : ids.shape[1]].to(device)
                    for x in (looks.logprobs, looks.ref_logprobs, looks.values, advantage, returns)
                )
                policy_loss, policy_metrics = losses.ppo_clip_sum(
                    now.logprobs, old, adv, mask, clip=settings.clip
                )
                value_loss, value_metrics = losses.clipped_value_sum(
                    values, old_values, ret, mask, clip=settings.critic.clip
                )
                if penalty != "k1":  # k1 is in the reward
                    policy_loss = (
                        policy_loss
                        + run.state["beta"]
                        * kl.penalty(now.logprobs, ref, old, mask, estimator=penalty).sum()
                    )
                steppers[0].backward(
                    (policy_loss + settings.critic.coefficient * value_loss) * micro.weight / count
                )
                if micro.weight:
                    approx_kl += policy_metrics["approx_kl"].cpu()
                    run.meter.add(policy_metrics | value_metrics, float(mask.sum()))
                    if update == run.step * settings.epochs * settings.minibatches:
                        run.meter.add({"ratio/first": policy_metrics["ratio"]}, float(mask.sum()))
            if (
                settings.target_kl is not None
                and float(processes.sum(approx_kl)) / count > settings.target_kl
            ):
                for stepper in steppers:
                    stepper.optimizer.zero_grad(set_to_none=True)
                return out | {"epochs_done": float(done) / order.per_epoch}
            if ptx:
                mix_in(ptx, update, steppers[0], settings, run)
            for name, stepper in zip(("", "critic/"), steppers, strict=False):
                out |= {
                    f"{name}{k}": v
                    for k, v in stepper.step(update).items()
                    if not (name and k == "learning_rate")
                }
            update += 1
            done += 1
    return out | {"epochs_done": float(settings.epochs)}


def mix_in(rows: list[Rendered], update: int, stepper: Stepper, settings: PPO, run: Run) -> None:
    """Add the gradient of the language-model loss of the next few rows (PPO-ptx)."""
    numbers = [
        i
        for i, _ in stream(
            len(rows), update * settings.ptx.batch_size, settings.ptx.batch_size, settings.seed
        )
    ]
    labels = sum(rows[i].num_labels for i in numbers)
    plan: list[Micro] = run.processes.plan([[len(rows[i])] for i in numbers], settings.run.tokens)
    for micro in accumulate(plan, run.processes, stepper.module):
        batch = pad([rows[numbers[i]] for i in micro.rows]).to(run.processes.device)
        out = stepper.module(batch.ids, batch.mask)
        loss, metrics = losses.nll_sum(out.logprobs, batch.mask)
        if (
            out.values is not None
        ):  # several processes wait for a gradient of every weight, the value head's too
            loss = loss + 0.0 * out.values.sum()
        stepper.backward(settings.ptx.coefficient * loss * micro.weight / labels)
        if micro.weight:
            run.meter.add({"ptx_loss": metrics["loss"]}, float(batch.mask.sum()))


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 - Var(returns - values) / Var(returns) over real tokens: 1 for a perfect critic, 0 for a
    constant one.
    """
    error, target = (returns - values)[mask], returns[mask]
    variance = target.var(correction=0)
    return float(1 - error.var(correction=0) / variance) if variance > 1e-12 else 0.0


def read_ptx(settings: PPO, renderer: Renderer) -> list[Rendered]:
    """Rows for the language-model loss."""
    if settings.ptx.data is None:
        return []

    def render(row: TextRow | ChatRow | CompletionRow) -> Rendered:
        if isinstance(row, TextRow):
            return renderer.text(row)
        return (
            renderer.chat(row)
            if isinstance(row, ChatRow)
            else renderer.completion(row.prompt, row.completion, row.where)
        )

    return load(settings.ptx.data, settings.rows, (TextRow, ChatRow, CompletionRow), render)[0]


def make_critic(
    settings: PPO, policy: Policy, rewards: Reward, renderer: Renderer
) -> Scorer | None:
    """The value model, or None where the policy carries its own value head."""
    start = settings.critic.start
    fitting = [m for m in rewards.models if m.same_tokens(renderer)]
    if start == "auto":
        start = "reward" if fitting and sum(w != 0 for w in rewards.weights) == 1 else "policy"
    if start == "shared":
        if settings.lora.r > 0:
            raise InputError(
                "--critic.start shared: with --lora.r the trunk stays frozen but for the policy's "
                "adapters: use policy or reward"
            )
        policy.add_value_head()
        return None
    if start == "reward" and not fitting:
        raise InputError(
            "--critic.start reward: no --reward is a reward model with the policy's tokenizer: use "
            "policy or shared"
        )
    name = fitting[0].name if start == "reward" else settings.model
    return load_scorer(name, settings.lora, settings.run, head="zero", seed=settings.seed)
