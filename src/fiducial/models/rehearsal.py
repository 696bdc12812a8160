"""The memory of a run, counted before anything is loaded.

The models are built without numbers and a step of the run is rehearsed with them: the forward pass,
the backward pass and the sampling are the ones that the run will use, and a ledger counts what they
would hold at a time. So there is no formula for each architecture, and what the ledger counts is
what the allocator of the real run counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, DynamicCache

from ..core.shared_prefix import SharedPrefix
from ..errors import InputError
from ..settings import LoraSettings, RunSettings
from .ledger import ImaginedLedger
from .load import SHARED, frozen, load_config
from .memory import Models, Plan, Sampling, Shape, Work
from .roles import Policy, ScoreModel
from .trainable import trainable
from .trunk import autocast, evaluating, logits, plain, text_config, trunk

WEIGHTS, GRADIENTS, OPTIMIZER, CACHE, COPY = (
    "weights of the {}",
    "gradients",
    "optimizer state",
    "cache of sampling",
    "the saved model, loaded again",
)


class Rehearsal:
    """The models of a run without numbers, on which steps of it are rehearsed."""

    def __init__(
        self, models: Models, lora: LoraSettings, run: RunSettings, device: torch.device
    ) -> None:
        """Raises:
        InputError: a model has no configuration, or its kind cannot be rehearsed.
        """
        self.models, self.lora, self.run, self.device = models, lora, run, device
        self.ledger = ImaginedLedger()
        self.policy = self.critic = self.scorer = self.teacher = self.reference = None
        with _refusing(models.trained):
            if models.scored:
                self.scorer = self._scorer(models.trained, lora, "model")
            else:
                self.policy = self._policy(models.trained, lora, "policy")
            if models.critic == SHARED and self.policy is not None:
                width = plain(self.policy.lm).get_output_embeddings().weight.shape[1]
                with self.ledger, self.ledger.of(WEIGHTS.format("critic")):
                    self.policy.value_head = nn.Linear(width, 1, device=device)
            elif models.critic is not None:
                self.critic = self._scorer(models.critic, lora, "critic")
            if models.reference and lora.r == 0:
                self.reference = self._policy(models.trained, None, "reference")
            if models.teacher is not None:
                self.teacher = self._policy(models.teacher, None, "teacher")
            self.rewards = [self._scorer(name, None, "reward model") for name in models.rewards]

    def plan(self, work: Work, process: int) -> Plan:
        """What the run needs with these micro-batches.

        Args:
            process: bytes that the process holds besides tensors.

        Raises:
            InputError: the kind of model cannot be rehearsed.
        """
        with _refusing(self.models.trained), self.ledger:
            try:
                return Plan(work.tokens, self._phases(work), process)
            finally:
                self._forget_gradients()

    @property
    def shares_prefix(self) -> bool:
        """Whether a row may hold one prompt and two responses to it."""
        return self.policy is not None and self.policy.may_share_prefix

    def _phases(self, work: Work) -> dict[str, dict[str, int]]:
        self.ledger.vocabulary = 0 if self.policy is None else self.policy.vocabulary
        largest = max((work.first, work.later or work.first), key=lambda shape: shape.tokens)
        probe, found = Shape(2, work.probe, min(work.probe - 1, 64)), {}
        if probe.tokens > largest.tokens:  # less than the training otherwise
            found["checking the models"] = self._peak(lambda: self._read(probe, everything=True))
        moments = [] if work.once else self._moments()
        if work.sampling is not None and self.policy is not None:
            found["sampling"] = self._sampling(self.policy, work.sampling)
        if self.rewards or self.teacher is not None:
            found["reading the responses"] = self._peak(lambda: self._read(largest))
        found["training"] = self._peak(lambda: self._step(work))
        self._forget_gradients()
        moments = moments or self._moments()
        with self.ledger.of(COPY):
            found["saving"] = self._peak(self._saved_copy)
        del moments
        return found

    # -- phases

    def _peak(self, phase: Callable[[], Any]) -> dict[str, int]:
        self.ledger.begin()
        phase()
        return {use: size for use, size in self.ledger.peak.items() if size}

    @torch.no_grad()
    def _read(self, shape: Shape, *, everything: bool = False) -> None:
        """What models say of a micro-batch without gradients, one after the other: those that are
        not trained, which may be larger than the others, or all.
        """
        ids, mask, lengths = self._batch(shape)
        for policy in (self.policy if everything else None, self.reference, self.teacher):
            if policy is not None:
                policy(ids, mask)
        for scorer in (*(self.scorer, self.critic)[: 2 * everything], *self.rewards):
            if scorer is not None:
                scorer(ids, lengths)

    def _step(self, work: Work) -> None:
        """The micro-batches of an optimizer step that may need most."""
        with self.ledger.of(GRADIENTS):
            exchanged = [torch.empty_like(p) for p in self._trained() if work.copies]
        if work.later is None or work.first.tokens > work.later.tokens:
            self._accumulate(work.first, work.shared)
        if work.later is not None:
            with self.ledger.of(GRADIENTS):
                for parameter in self._trained():
                    parameter.grad = torch.empty_like(parameter)
            self._accumulate(work.later, work.shared)
        del exchanged

    def _accumulate(self, shape: Shape, shared: bool) -> None:
        self._loss(shape, shared).backward()  # type: ignore[no-untyped-call]
        grads = [p.grad for p in self._trained() if p.grad is not None]
        self.ledger.assign(grads, GRADIENTS)

    def _forget_gradients(self) -> None:
        for parameter in self._trained():
            parameter.grad = None

    def _loss(self, shape: Shape, shared: bool) -> Tensor:
        ids, mask, lengths = self._batch(shape)
        if self.scorer is not None:
            out: Tensor = self.scorer(ids, lengths).sum()
            return out
        assert self.policy is not None
        layout = _two_branches(ids) if shared and self.shares_prefix else None
        teacher = self.teacher if self.models.exact else None
        now = self.policy(ids, mask, shared_prefix=layout, teacher=teacher)
        if self.teacher is not None and not self.models.exact:
            with torch.no_grad():
                self.teacher(ids, mask)
        parts = [now.logprobs if now.kl is None else now.kl, now.values]
        if self.critic is not None:
            parts.append(self.critic(ids))
        total: Tensor = sum(part.sum() for part in parts if part is not None)
        return total

    @torch.no_grad()
    def _sampling(self, policy: Policy, asked: Sampling) -> dict[str, int]:
        """The prompts are read; then the cache is as long as it gets, and one token is added."""
        model, ledger = plain(policy.lm), self.ledger
        body, config = trunk(model), text_config(model.config)
        cache = _LedgerCache(ledger, config)
        ids = torch.zeros((asked.prompts, asked.width), dtype=torch.long, device=self.device)
        positions = torch.arange(asked.width, device=self.device).expand_as(ids)
        with autocast(policy.precision, self.device), evaluating(policy.lm):

            def prompts() -> None:
                body(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True)
                if asked.prompts < asked.rows:
                    which = torch.arange(asked.rows, device=self.device) % asked.prompts
                    with ledger.of(CACHE):
                        cache.batch_select_indices(which)

            def token() -> None:
                last = torch.zeros((asked.rows, 1), dtype=torch.long, device=self.device)
                hidden = body(
                    input_ids=last, position_ids=last, past_key_values=cache, use_cache=True
                ).last_hidden_state[:, -1]
                z = logits(policy.lm, hidden, policy.precision).float()
                z.log_softmax(-1).exp().cumsum(-1, dtype=torch.float64)

            both = [self._peak(prompts)]
            cache.lengthen(asked.new - 1)
            both.append(self._peak(token))
        return max(both, key=lambda uses: sum(uses.values()))

    def _saved_copy(self) -> list[Tensor]:
        """A model that was saved is loaded again and compared. An adapter needs its base, whose
        file is mapped into memory while it is widened to float32.
        """
        module = self.scorer or self.policy
        assert module is not None
        copies = [torch.empty_like(p) for p in module.parameters()]
        kept = getattr(load_config(self.models.trained, trust=self.models.trust), "dtype", None)
        if self.policy is not None and self.lora.r > 0 and kept in (torch.bfloat16, torch.float16):
            copies += [torch.empty_like(p, dtype=kept) for p in module.parameters()]
        return copies

    # -- what phases are made of

    def _trained(self) -> list[nn.Parameter]:
        modules = [m for m in (self.policy, self.scorer, self.critic) if m is not None]
        return [p for module in modules for p in module.parameters() if p.requires_grad]

    def _moments(self) -> list[Tensor]:
        with self.ledger.of(OPTIMIZER):
            return [torch.empty_like(p) for p in self._trained() for _ in range(2)]

    def _batch(self, shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
        """Ids [B, T], label mask [B, T] and lengths [B]."""
        ids = torch.zeros((shape.rows, shape.width), dtype=torch.long, device=self.device)
        mask = torch.zeros(ids.shape, dtype=torch.bool, device=self.device)
        mask[:, shape.width - min(shape.labels, shape.width - 1) :] = True
        return ids, mask, torch.full((shape.rows,), shape.width, device=self.device)

    def _policy(self, name: str, lora: LoraSettings | None, role: str) -> Policy:
        model = self._imagined(AutoModelForCausalLM, name)
        model = trainable(model, lora or LoraSettings(), self.run, "CAUSAL_LM")
        policy = Policy(model, self._precision)
        policy = policy if lora is not None else frozen(policy, self.run)
        with self.ledger:
            self.ledger.take(policy, self.device, WEIGHTS.format(role))
        return policy

    def _scorer(self, name: str, lora: LoraSettings | None, role: str) -> ScoreModel:
        model = self._imagined(AutoModelForSequenceClassification, name, num_labels=1)
        model = trainable(model, lora or LoraSettings(), self.run, "SEQ_CLS")
        scorer = ScoreModel(model, self._precision)
        if lora is None:
            scorer.requires_grad_(False)
        with self.ledger:
            self.ledger.take(scorer, self.device, WEIGHTS.format(role))
        return scorer

    @property
    def _precision(self) -> torch.dtype | None:
        return torch.bfloat16 if self.run.precision == "bfloat16" else None

    def _imagined(self, auto: Any, name: str, **changes: Any) -> Any:
        config = load_config(name, trust=self.models.trust)
        for key, value in changes.items():
            setattr(config, key, value)
        with torch.device("meta"):
            return auto.from_config(
                config, dtype=torch.float32, trust_remote_code=self.models.trust
            )


class _LedgerCache(DynamicCache):  # type: ignore[misc]
    """A cache of sampling whose tensors are written down as such."""

    def __init__(self, ledger: ImaginedLedger, config: Any) -> None:
        super().__init__(config=config)
        self._ledger = ledger

    def update(self, *args: Any, **kwargs: Any) -> Any:
        with self._ledger.of(CACHE):
            return super().update(*args, **kwargs)

    def lengthen(self, tokens: int) -> None:
        """Every layer that keeps keys and values gets as many more."""
        for number, layer in enumerate(self.layers):
            if tokens and isinstance(getattr(layer, "keys", None), Tensor):
                both = (layer.keys, layer.values)
                new = [x.new_empty((*x.shape[:2], tokens, x.shape[3])) for x in both]
                self.update(*new, number)


def _two_branches(ids: Tensor) -> SharedPrefix:
    """A layout of rows with a beginning and two continuations of a third each."""
    width = ids.shape[1]
    columns = torch.arange(width, device=ids.device)
    branch = (columns * 3 // width).expand_as(ids)
    return SharedPrefix(columns.expand_as(ids), branch, (columns - 1).clamp(min=0).expand_as(ids))


@contextmanager
def _refusing(name: str) -> Iterator[None]:
    """What a kind of model cannot do without numbers is told as such."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        first = str(error).strip().split("\n")[0][:120]
        raise InputError(
            f"the memory that {name} needs cannot be told before it is loaded, because its kind of "
            f"model cannot be computed without numbers ({type(error).__name__}: {first}): give "
            "--run.tokens a number, and lower it if memory runs out"
        ) from error
