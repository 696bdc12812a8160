"""A softmax table as a Hugging Face model: each prefix of a small tree has a row of logits (or a
value) of its own, and prefixes share nothing.

This is the tabular case of the textbooks. The model can represent every distribution over the
sequences of the tree, so any distance from an optimum is due to the method and not to the model. It
is an ordinary `PreTrainedModel`, so the same code trains, samples, saves and loads it as any other
model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DynamicCache,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
)


class TabularConfig(PretrainedConfig):  # type: ignore[misc]
    """The tree: prompts, and responses of at most `horizon` tokens, which `eos_token_id` ends.

    The row of a prefix in the table is `prompt * states_per_prompt(...) + state`. The states of a
    prompt are ordered by length and then by their tokens.

    Args:
        prompts: token ids of each prompt; none may be the beginning of another.
    """

    model_type = "fiducial_tabular"

    def __init__(
        self,
        vocab_size: int = 3,
        prompts: Sequence[Sequence[int]] = ((1,), (2,)),
        horizon: int = 3,
        eos_token_id: int = 0,
        **keywords: Any,
    ) -> None:
        self.vocab_size, self.horizon = vocab_size, horizon
        self.prompts = [list(p) for p in prompts]
        self.num_hidden_layers = 1
        self.max_position_embeddings = max(len(p) for p in self.prompts) + horizon
        keywords.setdefault("tie_word_embeddings", False)
        super().__init__(eos_token_id=eos_token_id, **keywords)
        self.hidden_size = len(self.prompts) * states_per_prompt(vocab_size, horizon)


def states_per_prompt(vocab_size: int, horizon: int) -> int:
    """Number of prefixes of a prompt's responses after which a token is chosen.

    It is 1 + (V - 1) + ... + (V - 1)^(T - 1).
    """
    return sum((vocab_size - 1) ** k for k in range(horizon))


class _Vocabulary(nn.Module):
    """Takes the place of the embeddings, and has their device, dtype and vocabulary size.

    Its weight is a buffer, because a parameter would be trained.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(size, 1))
        self.weight: Tensor


class _Tree(PreTrainedModel):  # type: ignore[misc]
    """The row of the table that belongs to each prefix, one-hot.

    Prefixes outside the tree are all zeros, so their logits and values are 0.
    """

    config_class = TabularConfig
    base_model_prefix = "model"

    def __init__(self, config: TabularConfig) -> None:
        super().__init__(config)
        self.embed_tokens = _Vocabulary(config.vocab_size)
        self.post_init()
        self._following: Tensor | None = None

    def following(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The tree as two tables.

        Returns:
            [nodes, V] the node after each node and token (node 0 is the empty text, the last node
            is outside the tree), and [nodes] the row of each node, or -1.
        """
        if self._following is None or self._following[0].device != device:
            self._following = tuple(x.to(device) for x in _tree(self.config))  # type: ignore[assignment]
        return self._following  # type: ignore[return-value]

    def get_input_embeddings(self) -> _Vocabulary:
        return self.embed_tokens

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool = False,
        **_: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states [B, T, rows].

        The walk begins again wherever a position is 0, so padding on the left changes nothing.
        """
        following, row = self.following(input_ids.device)
        batch, length = input_ids.shape
        before = past_key_values.get_seq_length() if past_key_values is not None else 0
        if position_ids is None:
            position_ids = torch.arange(before, before + length, device=input_ids.device).expand(
                batch, length
            )
        node = torch.zeros(batch, dtype=torch.long, device=input_ids.device)
        if before:
            node = past_key_values.layers[0].keys[:, 0, -1, 0].long()
        nodes = []
        for t in range(length):
            node = following[torch.where(position_ids[:, t] == 0, 0, node), input_ids[:, t]]
            nodes.append(node)
        walked = torch.stack(nodes, 1)
        if use_cache:
            past_key_values = (
                DynamicCache(config=self.config) if past_key_values is None else past_key_values
            )
            kept = walked[:, None, :, None].double()
            past_key_values.update(kept, kept, 0)
        rows = row[walked]
        width = self.config.hidden_size
        hidden = torch.zeros(
            (batch, length, width), dtype=self.embed_tokens.weight.dtype, device=input_ids.device
        )
        hidden.scatter_(2, rows.clamp(min=0)[..., None], (rows >= 0).to(hidden.dtype)[..., None])
        return BaseModelOutputWithPast(last_hidden_state=hidden, past_key_values=past_key_values)


class TabularLM(PreTrainedModel):  # type: ignore[misc]
    """The policy: `lm_head.weight` [V, rows] is the table of logits."""

    config_class = TabularConfig
    base_model_prefix = "model"

    def __init__(self, config: TabularConfig) -> None:
        super().__init__(config)
        self.model = _Tree(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def forward(self, input_ids: Tensor, **keywords: Any) -> CausalLMOutputWithPast:
        out = self.model(input_ids, **keywords)
        return CausalLMOutputWithPast(
            logits=self.lm_head(out.last_hidden_state), past_key_values=out.past_key_values
        )


class TabularForSequenceClassification(PreTrainedModel):  # type: ignore[misc]
    """The critic, or a process reward model: `score.weight` [1, rows] is the table of values."""

    config_class = TabularConfig
    base_model_prefix = "model"

    def __init__(self, config: TabularConfig) -> None:
        super().__init__(config)
        self.model = _Tree(config)
        self.score = nn.Linear(config.hidden_size, 1, bias=False)
        self.post_init()

    def resize_token_embeddings(self, *_: Any, **__: Any) -> _Vocabulary:
        """Does nothing, because a new token, such as a pad token, leads out of the tree.

        The rows of the table stay as they are.
        """
        return self.model.embed_tokens

    def forward(self, input_ids: Tensor, **keywords: Any) -> SequenceClassifierOutputWithPast:
        """Logits [B, 1] at the last token that is not padding, as in transformers' classifiers."""
        scores = self.score(self.model(input_ids, **keywords).last_hidden_state)
        pad = getattr(self.config, "pad_token_id", None)
        real = input_ids != (-1 if pad is None else pad)
        last = (real * torch.arange(1, input_ids.shape[1] + 1, device=input_ids.device)).argmax(1)
        return SequenceClassifierOutputWithPast(
            logits=scores[torch.arange(len(scores), device=scores.device), last]
        )


def _tree(config: TabularConfig) -> tuple[Tensor, Tensor]:
    """The tables that `_Tree.following` returns."""
    words: dict[tuple[int, ...], int] = {(): 0}
    row: dict[tuple[int, ...], int] = {}
    letters = [v for v in range(config.vocab_size) if v != config.eos_token_id]
    states = states_per_prompt(config.vocab_size, config.horizon)
    for p, prompt in enumerate(map(tuple, config.prompts)):
        for k in range(1, len(prompt) + 1):
            words.setdefault(prompt[:k], len(words))
        level, number = [prompt], 0
        for _ in range(config.horizon):
            for word in level:
                words.setdefault(word, len(words))
                row[word] = p * states + number
                number += 1
            level = [(*word, letter) for word in level for letter in letters]
    outside = len(words)
    following = torch.full((outside + 1, config.vocab_size), outside, dtype=torch.long)
    rows = torch.full((outside + 1,), -1, dtype=torch.long)
    for word, node in words.items():
        if word:
            following[words[word[:-1]], word[-1]] = node
        rows[node] = row.get(word, -1)
    return following, rows


AutoConfig.register(TabularConfig.model_type, TabularConfig, exist_ok=True)
AutoModel.register(TabularConfig, _Tree, exist_ok=True)
AutoModelForCausalLM.register(TabularConfig, TabularLM, exist_ok=True)
AutoModelForSequenceClassification.register(
    TabularConfig, TabularForSequenceClassification, exist_ok=True
)
