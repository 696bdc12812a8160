"""Mistakes that any loss on tokens can make: masks, labels, log-probabilities, means, and what the
probes find.
"""

from __future__ import annotations

from .fault import Fault

_SHIFT = "Shift the mask as the labels are shifted: column t of both is about token t."
_ONE_SUM = (
    "Sum over tokens and divide once, by the token count of the whole batch or by a constant."
)
_MASK = "Select with the mask of the tokens that the policy chose."

FAULTS = (
    # -- which tokens count, and how much
    Fault(
        "mean of response means",
        "Every response has the same weight whatever its length, so each token of a short "
        "response counts more than a token of a long one.",
        _ONE_SUM,
        "the 1/|o| of GRPO",
    ),
    Fault(
        "mean of micro-batch means",
        "Every micro-batch has the same weight, however many tokens it holds.",
        _ONE_SUM,
        "torchtune#1875, open-instruct#1161",
    ),
    Fault(
        "mean of group means",
        "Every prompt or group has the same weight, however many tokens its responses hold.",
        _ONE_SUM,
    ),
    Fault(
        "EOS masked out",
        "The EOS that ends a response is masked out. This happens where labels are found by "
        "comparing ids with a pad token that is also EOS.",
        "Use the mask that was made together with the tokens; never derive it from pad ids.",
        "transformers#23530, trl#976",
    ),
    Fault(
        "mask one token early",
        "The mask is one token early: it leaves out the last token of every response and includes "
        "the last token of the prompt.",
        _SHIFT,
        "ms-swift#8427",
    ),
    Fault(
        "mask one token late",
        "The mask is one token late: it leaves out the first token of every response and includes "
        "one token of padding.",
        _SHIFT,
        "ms-swift#8427",
    ),
    Fault(
        "last token left out",
        "The last token of every response is left out.",
        "Include the token that ends a response in the mask, whether it is EOS or not.",
    ),
    Fault(
        "first token left out",
        "The first token of every response is left out.",
        "The first token is predicted at the last position of the prompt: start there.",
        "trl#3681",
    ),
    Fault(
        "truncated responses left out",
        "Responses without EOS are left out.",
        "Keep them, or state that the objective is a different one.",
        "DAPO's filter, on purpose",
    ),
    Fault("trains on the prompt", "Tokens of the prompt have a gradient.", _MASK),
    Fault(
        "trains on padding",
        "Padding has a gradient, or its log-probabilities enter the loss.",
        _MASK,
    ),
    # -- log-probabilities
    Fault(
        "labels not shifted",
        "Each token is looked up in the logits of its own position, which predict the next token.",
        "logits[:, :-1] predict ids[:, 1:].",
    ),
    Fault(
        "labels shifted twice",
        "Each token is looked up two positions earlier: the labels are shifted by hand and once "
        "more inside the function that is called.",
        "Shift once: logits[:, :-1] predict ids[:, 1:].",
        "transformers#46898",
    ),
    Fault(
        "temperature missing",
        "The log-probabilities are those of softmax(logits), but the tokens were sampled from "
        "softmax(logits / temperature).",
        "Divide the logits of the policy, the old policy and the reference by the sampling "
        "temperature.",
        "trl#3029",
    ),
    Fault(
        "log-softmax missing",
        "Logits are used as if they were log-probabilities.",
        "Apply log_softmax before looking up the tokens.",
    ),
    Fault(
        "wrong sign",
        "The loss increases where it should decrease.",
        "The loss is the negative of what is to be maximized.",
    ),
    # -- found by experiment
    Fault(
        "no gradient",
        "The loss does not depend on what is learned.",
        "Look for a detach, a no_grad or an argmax.",
    ),
    Fault(
        "zero in expectation",
        "Single rows have a gradient, but the mean over all rows is zero.",
        "Look for a term whose gradient is a score function: E[grad log pi] = 0.",
    ),
    Fault(
        "not finite",
        "The loss or its gradient is not finite.",
        "Look for 0 / 0 (a group of equal rewards), log 0, or a mask that is multiplied with NaN.",
    ),
    Fault(
        "not deterministic",
        "The same batch gives a different gradient the second time.",
        "Switch off dropout, and draw no random numbers inside a loss.",
    ),
    Fault(
        "depends on padding",
        "More padding changes the gradient.",
        "Take sums, counts and whitening statistics over the positions where the mask is true.",
        "SkyRL#1305",
    ),
    Fault(
        "depends on the order of rows",
        "The same rows in a different order give a different gradient.",
        "Look for micro-batches that have the same weight whatever they hold, and for statistics "
        "of a part of the batch.",
    ),
    Fault(
        "depends on the size of the batch",
        "A batch that holds every row twice has a gradient of a different direction.",
        "Look for statistics that depend on the number of rows.",
    ),
    Fault(
        "depends on the prompt's tokens",
        "Different tokens in the prompt change the gradient.",
        "Look for a search for EOS over the whole row, and for groups that are formed by comparing "
        "the prompts' tokens.",
        "trl#6805, NeMo-RL#3882",
    ),
    Fault(
        "low precision",
        "The gradient is right to a few digits only.",
        "Look for float16 or bfloat16: log-softmax needs float32.",
    ),
    Fault("unknown", "The gradient is biased, and no known mistake explains it.", ""),
)
