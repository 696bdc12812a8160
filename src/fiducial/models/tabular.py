"""A softmax table as a Hugging Face model: one row of logits (or one value) for each prefix of a
small tree, nothing shared between prefixes.

It is what textbooks call the tabular case: any distribution over the tree's sequences can be
reached, so whatever distance to an optimum remains is the method's and not the model's. Being an
ordinary `PreTrainedModel` it is trained, sampled from, saved and loaded by the code that serves all
others.
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
    """The tree: prompts, and behind each at most `horizon` tokens of a vocabulary in which
    `eos_token_id` ends a response.

    Args:
        prompts: token ids of each prompt; none may be the beginning of another.

    The row of a prefix is `prompt * states_behind(...) + state`, the states of a prompt by length,
    then in the order of their tokens.
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
        self.vocab_size, self.prompts, self.horizon = (
            vocab_size,
            [list(p) for p in prompts],
            horizon,
        )
        self.num_hidden_layers = 1
        self.max_position_embeddings = max(len(p) for p in self.prompts) + horizon
        keywords.setdefault("tie_word_embeddings", False)
        super().__init__(eos_token_id=eos_token_id, **keywords)
        self.hidden_size = len(self.prompts) * states_behind(vocab_size, horizon)


def states_behind(vocab_size: int, horizon: int) -> int:
    """Prefixes of a prompt's responses in which a token is chosen: 1 + (V - 1) + ... + (V - 1)^(T - 1)."""
    return sum((vocab_size - 1) ** k for k in range(horizon))


class _Vocabulary(nn.Module):
    """Stands where others keep their embeddings and tells device, type and vocabulary. A buffer:
    loading a folder makes every parameter a trained one.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(size, 1))
        self.weight: Tensor


class _Tree(PreTrainedModel):  # type: ignore[misc]
    """Which row of the table a prefix stands in, one-hot. Prefixes outside the tree get zeros:
    logits 0, value 0.
    """

    config_class = TabularConfig
    base_model_prefix = "model"
    _supports_cache_class = True

    def __init__(self, config: TabularConfig) -> None:
        super().__init__(config)
        self.embed_tokens = _Vocabulary(config.vocab_size)
        self.post_init()
        self._following: Tensor | None = None

    def following(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """[nodes, V] the node behind each node and token (node 0: the empty text; the last:
        outside), and [nodes] its row or -1.
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
        """Hidden states [B, T, rows]. The walk begins anew wherever a position is 0, so padding on
        the left changes nothing.
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
        """Nothing to do: a token that is new to the vocabulary, a pad token for one, leads out of
        the tree, and no row of the table changes.
        """
        return self.model.embed_tokens

    def forward(self, input_ids: Tensor, **keywords: Any) -> SequenceClassifierOutputWithPast:
        """Logits [B, 1] at the last token that is not padding on the right, as transformers'
        classifiers read them.
        """
        scores = self.score(self.model(input_ids, **keywords).last_hidden_state)
        real = input_ids != (
            self.config.pad_token_id if self.config.pad_token_id is not None else -1
        )
        last = (real * torch.arange(1, input_ids.shape[1] + 1, device=input_ids.device)).argmax(1)
        return SequenceClassifierOutputWithPast(
            logits=scores[torch.arange(len(scores), device=scores.device), last]
        )


def _tree(config: TabularConfig) -> tuple[Tensor, Tensor]:
    words: dict[tuple[int, ...], int] = {(): 0}
    row: dict[tuple[int, ...], int] = {}
    letters = [v for v in range(config.vocab_size) if v != config.eos_token_id]
    states = states_behind(config.vocab_size, config.horizon)
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
