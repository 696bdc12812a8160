"""The roles of a run as modules over ordinary Hugging Face models.

A `Policy` gives log-probabilities of tokens, a `ScoreModel` gives scalars, a `Reference` is frozen,
and `Roles` says which of them a run has and over which weights: a copy of its own, adapters that
are switched off, or a head on the policy's trunk. Methods ask `Roles` and do not need to know.

Sequences are padded on the right and attention is causal, so a real token never sees padding and no
attention mask is needed. Position ids are always passed.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..core.equal_rows import equal_rows
from ..core.logprobs import chosen_logprobs, compared
from ..core.reductions import select
from ..core.shared_prefix import SharedPrefix
from .scores import ScoreFacts
from .trunk import accepts, hidden_states, logits, plain, text_config, trunk, windowed


class TokenOutputs(NamedTuple):
    """What a policy says of each token, [B, T] each; column t is about token t.

    `entropy` and `values` are None unless they were asked for and exist. `kl` and
    `teacher_logprobs` are given where a teacher was named.
    """

    logprobs: Tensor
    entropy: Tensor | None
    values: Tensor | None
    kl: Tensor | None = None
    teacher_logprobs: Tensor | None = None


@contextlib.contextmanager
def full_precision(module: Policy | ScoreModel) -> Iterator[None]:
    """Compute without autocast for the time of a block, where two ways of computing are compared
    that round differently. The rounding of a real model in bfloat16 can exceed any fixed tolerance.
    """
    before, module.precision = module.precision, None
    try:
        yield
    finally:
        module.precision = before


class Policy(nn.Module):
    """A causal language model that gives log-probabilities of tokens.

    lm: the Hugging Face model, perhaps inside adapters.
    precision: of the forward pass; None for float32.
    base_on_disk: False where `lm` was merged from an adapter folder in memory, so that no folder
        holds the base of new adapters.
    value_head: a scalar head on the trunk; a policy that has one is its own critic.
    """

    def __init__(
        self, lm: Any, precision: torch.dtype | None = None, *, base_on_disk: bool = True
    ) -> None:
        super().__init__()
        self.lm, self.precision, self.base_on_disk = lm, precision, base_on_disk
        self.value_head: nn.Linear | None = None

    def _head(self, hidden: Tensor) -> Tensor:
        return logits(self.lm, hidden, self.precision)

    @property
    def vocabulary(self) -> int:
        """Number of logits."""
        return int(plain(self.lm).get_output_embeddings().weight.shape[0])

    @property
    def may_share_prefix(self) -> bool:
        """Whether the kind of attention leaves the choice of a mask to the caller."""
        config, body = plain(self.lm).config, trunk(self.lm)
        return (
            getattr(text_config(config), "_attn_implementation", None) == "sdpa"
            and not windowed(config)
            and accepts(body, "position_ids")
            and accepts(body, "attention_mask")
        )

    @functools.cached_property
    def supports_shared_prefix(self) -> bool:
        """Whether a row may hold one prompt and several responses to it.

        It is tried once on a short row: an architecture that ignores the mask fails the comparison.
        """
        if not self.may_share_prefix:
            return False
        weight = plain(self.lm).get_input_embeddings().weight
        size, device = len(weight), weight.device
        rows = [[i % size for i in row] for row in ([1, 2, 3, 4, 5], [1, 2, 3, 6, 7])]
        labels = torch.tensor([[False, False, False, True, True]] * 2, device=device)
        layout = SharedPrefix(
            torch.tensor([[0, 1, 2, 3, 4, 3, 4]], device=device),
            torch.tensor([[0, 0, 0, 1, 1, 2, 2]], device=device),
            torch.tensor([[0, 0, 0, 2, 3, 2, 5]], device=device),
        )
        ids = torch.tensor([rows[0] + rows[1][3:]], device=device)
        mask = torch.tensor([[False, False, False, True, True, True, True]], device=device)
        with torch.no_grad(), full_precision(self):
            try:
                together = self(ids, mask, shared_prefix=layout).logprobs[mask]
            except Exception:  # an architecture that wants its mask in another form
                return False
            alone = self(torch.tensor(rows, device=device), labels).logprobs[labels]
        return bool(torch.allclose(together, alone, atol=1e-4))

    def forward(
        self,
        ids: Tensor,
        mask: Tensor,
        temperature: float = 1.0,
        entropy: bool = False,
        shared_prefix: SharedPrefix | None = None,
        teacher: Policy | None = None,
    ) -> TokenOutputs:
        """Log-probabilities of the labeled tokens, and what else is asked for.

        Args:
            ids: [B, T], padded on the right.
            mask: [B, T], true at labels. Token 0 has no context and cannot be one.
            temperature: divides the logits.
            entropy: whether the entropy of each token's distribution is needed.
            shared_prefix: given where a row holds several sequences with a common beginning (see
                `fiducial.core.shared_prefix`).
            teacher: a policy with the same vocabulary. The outputs then hold the exact
                KL(this, teacher) at each token, with a gradient for this policy alone, the
                teacher's log-probabilities, and the entropy.

        Returns:
            [B, T] each, in nats (values: in units of the reward), 0 outside the mask.

        Raises:
            ValueError: token 0 is a label.
        """
        if bool(mask[:, 0].any()):
            raise ValueError("token 0 cannot be a label: there is no token before it")
        hidden = self._states(ids, mask, shared_prefix)
        kl = theirs = None
        if teacher is None:
            values, entropies = chosen_logprobs(
                hidden,
                ids[mask],
                self._head,
                self.vocabulary,
                temperature=temperature,
                entropy=entropy,
            )
        else:
            with torch.no_grad():
                other = teacher._states(ids, mask, shared_prefix)
            kl, values, theirs, entropies = compared(
                hidden,
                other,
                ids[mask],
                self._head,
                teacher._head,
                self.vocabulary,
                temperature=temperature,
            )
        return TokenOutputs(
            _scatter(values, mask),
            None if entropies is None else _scatter(entropies, mask),
            None if self.value_head is None else _scatter(self._values(hidden), mask),
            None if kl is None else _scatter(kl, mask),
            None if theirs is None else _scatter(theirs, mask),
        )

    def _values(self, hidden: Tensor) -> Tensor:
        assert self.value_head is not None
        out: Tensor = self.value_head(hidden.to(self.value_head.weight.dtype))[:, 0]
        return out

    def _states(self, ids: Tensor, mask: Tensor, layout: SharedPrefix | None) -> Tensor:
        """[N, H] of the states from which the labeled tokens are predicted."""
        if layout is None:
            return hidden_states(self.lm, ids[:, :-1], self.precision)[mask[:, 1:]]
        row, column = mask.nonzero(as_tuple=True)
        previous = layout.previous[row, column]
        return hidden_states(self.lm, ids, self.precision, layout)[row, previous]

    @contextlib.contextmanager
    def adapters_off(self) -> Iterator[None]:
        """The base model without its adapters."""
        with self.lm.disable_adapter():
            yield


class ScoreModel(nn.Module):
    """A sequence-classification model with one label.

    Read at the last token it is a reward model, at the ends of steps a process reward model, at
    every token a critic.
    """

    def __init__(
        self, model: Any, precision: torch.dtype | None = None, facts: ScoreFacts | None = None
    ) -> None:
        super().__init__()
        self.model, self.precision, self.facts = model, precision, facts or ScoreFacts()

    def _score(self, hidden: Tensor) -> Tensor:
        head = plain(self.model).score  # with LoRA a trained copy of the head stands in its place
        out: Tensor = head(hidden)[..., 0]
        return out.to(torch.float64 if hidden.dtype == torch.float64 else torch.float32)

    def forward(
        self, ids: Tensor, lengths: Tensor | None = None, after: Tensor | None = None
    ) -> Tensor:
        """Scores of right-padded `ids` [B, T].

        With `lengths` [B]: scores [B] at the last real token of each row. With a mask `after`
        [B, T]: scores [B, T] of the state after each marked token, 0 outside the mask. With
        neither: values [B, T], column t for the state before token t (column 0: 0).
        """
        hidden = hidden_states(self.model, ids, self.precision)
        if lengths is not None:
            return self._score(hidden[torch.arange(len(ids), device=ids.device), lengths - 1])
        if after is not None:
            return _scatter(self._score(hidden[after]), after)
        values = self._score(hidden[:, :-1])
        return torch.cat([torch.zeros_like(values[:, :1]), values], dim=1)


class Reference:
    """The frozen reference: a model of its own, or the policy with its adapters switched off."""

    def __init__(self, policy: Policy, own: Policy | None = None) -> None:
        self._policy, self._own = policy, own

    @torch.no_grad()
    def __call__(self, ids: Tensor, mask: Tensor, temperature: float = 1.0) -> Tensor:
        """Log-probabilities [B, T] in nats, 0 outside the mask, without a gradient."""
        if self._own is not None:
            return self._own(ids, mask, temperature).logprobs  # type: ignore[no-any-return]
        with self._policy.adapters_off():
            return self._policy(ids, mask, temperature).logprobs  # type: ignore[no-any-return]


class Roles:
    """Who is who in a run, and over which weights.

    policy: the language model that is trained. critic: a value model of its own; None where the
    policy carries a value head, or where there is no critic. scorer: the reward model that is
    trained. Roles that a run does not have raise an AssertionError when they are asked for.
    """

    def __init__(
        self,
        *,
        policy: Policy | None = None,
        reference: Reference | None = None,
        critic: ScoreModel | None = None,
        scorer: ScoreModel | None = None,
        teacher: Policy | None = None,
    ) -> None:
        self._policy, self._reference, self._teacher = policy, reference, teacher
        self._scorer, self.critic = scorer, critic

    @property
    def policy(self) -> Policy:
        """The language model that is trained."""
        assert self._policy is not None, "this run has no policy"
        return self._policy

    @property
    def scorer(self) -> ScoreModel:
        """The reward model or process reward model that is trained."""
        assert self._scorer is not None, "this run has no scorer"
        return self._scorer

    @property
    def teacher(self) -> Policy:
        """The frozen model that a student learns from."""
        assert self._teacher is not None, "this run has no teacher"
        return self._teacher

    @property
    def trains_policy(self) -> bool:
        """Whether a policy is trained, and not a scorer."""
        return self._policy is not None

    @property
    def has_reference(self) -> bool:
        """Whether there is a frozen reference."""
        return self._reference is not None

    @property
    def has_teacher(self) -> bool:
        """Whether there is a teacher."""
        return self._teacher is not None

    def trained(self) -> dict[str, nn.Module]:
        """The modules with weights that are trained, by role, in a fixed order."""
        roles = {"policy": self._policy, "scorer": self._scorer, "critic": self.critic}
        return {name: module for name, module in roles.items() if module is not None}

    def reference(self, ids: Tensor, mask: Tensor, temperature: float = 1.0) -> Tensor:
        """The reference's log-probabilities [B, T] in nats, 0 outside the mask, no gradient."""
        assert self._reference is not None, "this run has no reference"
        return self._reference(ids, mask, temperature)

    def outputs(
        self,
        ids: Tensor,
        mask: Tensor,
        temperature: float = 1.0,
        *,
        entropy: bool = False,
        wrapped: Mapping[str, Any] | None = None,
    ) -> TokenOutputs:
        """What the policy says of each token, with the critic's values wherever they come from.
        Equal rows, as groups of short answers have them, are computed once.

        Args:
            wrapped: the trained modules by role as a launcher has wrapped them, so that gradients
                cross the processes; None uses the modules themselves.
        """
        modules = wrapped or self.trained()
        first, places = equal_rows(ids, mask)
        repeated = len(first) < len(ids)
        if repeated:
            ids, mask = ids[first], mask[first]
        out: TokenOutputs = modules["policy"](ids, mask, temperature, entropy=entropy)
        if self.critic is not None:
            out = out._replace(values=select(modules["critic"](ids), mask))
        if repeated:
            out = TokenOutputs._make(None if x is None else x[places] for x in out)
        return out


def _scatter(values: Tensor, mask: Tensor) -> Tensor:
    out = torch.zeros(mask.shape, dtype=values.dtype, device=values.device)
    return out.masked_scatter(mask, values)
