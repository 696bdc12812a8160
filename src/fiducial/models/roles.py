"""The roles as modules: a Policy gives log-probabilities of tokens, a Scorer gives scalars. Both
wrap an ordinary Hugging Face model.

Sequences are padded right and attention is causal, so a real token never sees padding and no
attention mask is needed; positions are always passed. The reference is a frozen Policy of its own,
or, where the policy is a base with adapters, that base with the adapters off.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..core.logprobs import chosen_logprobs, compared
from ..core.shared_prefix import SharedPrefix


def plain(model: Any) -> Any:
    """The Hugging Face model itself; with LoRA the layers are inside it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def autocast(model: Any, like: Tensor) -> Any:
    dtype = getattr(plain(model), "autocast_dtype", None)
    return torch.autocast(like.device.type, dtype=dtype, enabled=dtype is not None)


def hidden_states(model: Any, ids: Tensor, shared_prefix: SharedPrefix | None = None) -> Tensor:
    """[B, T, H] of a right-padded batch `ids` [B, T], before any head; with `shared_prefix`, of rows whose
    columns hang together as it says.
    """
    positions = (
        torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        if shared_prefix is None
        else shared_prefix.positions
    )
    attention = {} if shared_prefix is None else {"attention_mask": shared_prefix.attention()}
    with autocast(model, ids):
        return (
            plain(model)
            .base_model(input_ids=ids, position_ids=positions, use_cache=False, **attention)
            .last_hidden_state
        )


def logits(model: Any, hidden: Tensor) -> Tensor:
    """Logits [n, V] of hidden states [n, H], with what the architecture does behind its projection."""
    model = plain(model)
    with autocast(model, hidden):
        out = model.get_output_embeddings()(hidden)
    config = model.config
    if getattr(config, "logit_scale", None) is not None:  # Cohere
        out = out * config.logit_scale
    if getattr(config, "logits_scaling", None) is not None:  # Granite
        out = out / config.logits_scaling
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma 2
    return out if cap is None else cap * torch.tanh(out / cap)


class TokenOutputs(NamedTuple):
    """Per-token answers of a Policy, [B, T] each; column t speaks of token t. The last two are
    there where a teacher was named.
    """

    logprobs: Tensor
    entropy: Tensor | None
    values: Tensor | None
    kl: Tensor | None = None
    teacher_logprobs: Tensor | None = None


class Policy(nn.Module):
    """A causal language model that is asked for the log-probabilities of tokens; with a value head
    it is its own critic.
    """

    def __init__(self, lm: Any) -> None:
        super().__init__()
        self.lm = lm
        self.value_head: nn.Linear | None = None

    def add_value_head(self) -> None:
        """A scalar head on the trunk, zero at first, so that every state starts at value 0."""
        weight = plain(self.lm).get_output_embeddings().weight
        self.value_head = nn.Linear(weight.shape[1], 1).to(weight.device)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)

    def _head(self, hidden: Tensor) -> Tensor:
        return logits(self.lm, hidden)

    @property
    def _vocabulary(self) -> int:
        return int(plain(self.lm).get_output_embeddings().weight.shape[0])

    @functools.cached_property
    def supports_shared_prefix(self) -> bool:
        """Whether a row may hold one prompt and several responses to it. Tried out once: an
        architecture that looks past the mask says no.
        """
        config = plain(self.lm).config
        if (
            getattr(config, "_attn_implementation", None) != "sdpa"
            or getattr(config, "sliding_window", None) is not None
        ):
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
        with torch.no_grad():
            together = self(ids, mask, shared_prefix=layout).logprobs[mask]
            alone = self(torch.tensor(rows, device=device), labels).logprobs[labels]
        tolerance = 1e-4 if getattr(plain(self.lm), "autocast_dtype", None) is None else 0.1
        return bool(torch.allclose(together, alone, atol=tolerance))

    def forward(
        self,
        ids: Tensor,
        mask: Tensor,
        temperature: float = 1.0,
        entropy: bool = False,
        shared_prefix: SharedPrefix | None = None,
        teacher: Policy | None = None,
    ) -> TokenOutputs:
        """Log-probabilities (and entropies, and values where there is a value head) of the labelled tokens.

        Args:
            ids: [B, T] right-padded.
            mask: [B, T] true at labels; token 0 has nothing in front of it and cannot be one.
            temperature: divides the logits.
            shared_prefix: given where a row holds several sequences with a common beginning (see
                `fiducial.core.shared_prefix`).
            teacher: a policy of the same vocabulary. The exact KL(this, teacher) of each token's
                state, with a gradient for this one alone, the teacher's log-probabilities and the
                entropy are given too.

        Returns:
            [B, T] each, in nats (values: in units of reward), 0 outside the mask.
        """
        if bool(mask[:, 0].any()):
            raise ValueError("token 0 cannot be a label: nothing stands in front of it")
        hidden = self._states(ids, mask, shared_prefix)
        kl = theirs = None
        if teacher is None:
            values, entropies = chosen_logprobs(
                hidden,
                ids[mask],
                self._head,
                self._vocabulary,
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
                self._vocabulary,
                temperature=temperature,
            )
        heads = (
            None
            if self.value_head is None
            else self.value_head(hidden.to(self.value_head.weight.dtype))[:, 0]
        )
        return TokenOutputs(
            *(
                None if x is None else _scatter(x, mask)
                for x in (values, entropies, heads, kl, theirs)
            )
        )  # type: ignore[arg-type]

    def _states(self, ids: Tensor, mask: Tensor, shared_prefix: SharedPrefix | None) -> Tensor:
        """[N, H] of the states from which the labelled tokens are predicted."""
        if shared_prefix is None:
            return hidden_states(self.lm, ids[:, :-1])[mask[:, 1:]]
        row, column = mask.nonzero(as_tuple=True)
        return hidden_states(self.lm, ids, shared_prefix)[row, shared_prefix.previous[row, column]]

    @contextlib.contextmanager
    def adapters_off(self) -> Iterator[None]:
        """The base under the adapters."""
        with self.lm.disable_adapter():
            yield


class Scorer(nn.Module):
    """A sequence-classification model with one label: a reward model when read at the last token, a
    process reward model at the ends of steps, a critic at
    every token."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def _score(self, hidden: Tensor) -> Tensor:
        head = plain(self.model).score  # with LoRA a trained copy of the head stands in its place
        return head(hidden)[..., 0].to(
            torch.float64 if hidden.dtype == torch.float64 else torch.float32
        )

    def forward(
        self, ids: Tensor, lengths: Tensor | None = None, after: Tensor | None = None
    ) -> Tensor:
        """Of right-padded `ids` [B, T]. With `lengths` [B]: scores [B] at each row's last real
        token. With a mask `after` [B, T]: scores [B, T], column t
        for the state after token t, 0 outside the mask. With neither: values [B, T], column t for
        the state before token t (column 0: 0).
        """
        hidden = hidden_states(self.model, ids)
        if lengths is not None:
            return self._score(hidden[torch.arange(len(ids), device=ids.device), lengths - 1])
        if after is not None:
            return _scatter(self._score(hidden[after]), after)
        values = self._score(hidden[:, :-1])
        return torch.cat([torch.zeros_like(values[:, :1]), values], dim=1)


class Reference:
    """The frozen mark. Either its own module or the policy with its adapters off; called like a
    Policy, never with a gradient.
    """

    def __init__(self, policy: Policy, own: Policy | None = None) -> None:
        self._policy, self._own = policy, own

    @torch.no_grad()
    def __call__(self, ids: Tensor, mask: Tensor, temperature: float = 1.0) -> Tensor:
        """[B, T] log-probabilities, 0 outside the mask."""
        if self._own is not None:
            return self._own(ids, mask, temperature).logprobs
        with self._policy.adapters_off():
            return self._policy(ids, mask, temperature).logprobs


def _scatter(values: Tensor, mask: Tensor) -> Tensor:
    out = torch.zeros(mask.shape, dtype=values.dtype, device=values.device)
    return out.masked_scatter(mask, values)
