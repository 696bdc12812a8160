"""Mistakes in the losses of pairs: preference losses and reward models."""

from __future__ import annotations

from .fault import Fault

_LAST = "Read the score at column lengths - 1, where lengths includes the prompt."
_DPO = "Use -logsigmoid(beta * h)."

FAULTS = (
    # -- preferences
    Fault(
        "chosen and rejected swapped",
        "The rejected response is preferred.",
        "Use -logsigmoid(chosen - rejected).",
    ),
    Fault(
        "reference missing",
        "The reference has no effect.",
        "The margin compares log(pi / pi_ref) of the two responses.",
    ),
    Fault(
        "reference has the wrong sign",
        "The reference's log-ratio has the wrong sign.",
        "Use h = (policy_chosen - ref_chosen) - (policy_rejected - ref_rejected).",
    ),
    Fault(
        "reference is the policy",
        "The margin is always 0, because the reference is the policy that is trained.",
        "Freeze a copy before training.",
    ),
    Fault("beta missing", "The margin is not multiplied by beta inside the sigmoid.", _DPO),
    Fault("beta applied twice", "The margin is multiplied by beta twice.", _DPO),
    Fault(
        "divided by the length",
        "Log-ratios are means over the tokens of a response.",
        "Sum over tokens. A mean is a different method (length-normalized DPO, SimPO).",
    ),
    Fault(
        "no logarithm",
        "The loss is -sigmoid of the margin.",
        "Use -logsigmoid.",
    ),
    Fault("hinge loss", "The loss is max(0, 1 - margin), as in SLiC.", _DPO),
    Fault("squared loss", "The loss is (h - 1 / (2 beta))^2, which is IPO.", _DPO),
    Fault(
        "label smoothing",
        "Some labels are assumed to be wrong, so the minimum is a different one.",
        "Set label smoothing to 0 for the plain loss. Conservative DPO is a choice.",
    ),
    # -- reward models
    Fault(
        "score read one token early",
        "The score is read at the token before the last, so EOS is never seen.",
        _LAST,
    ),
    Fault(
        "EOS mistaken for padding",
        "The score is read at the last token that is not padding, but EOS is the pad token: "
        "finished responses are read one token early.",
        _LAST,
        "transformers#35352",
    ),
    Fault(
        "score read at the first padding",
        "The score is read one column after the last token.",
        _LAST,
    ),
    Fault(
        "score read in the last column",
        "The score is read in the last column, which is padding for all but the longest rows.",
        _LAST,
    ),
    Fault(
        "score position ignores the prompt",
        "The score is read at the response's length, counted from the start of the row.",
        _LAST,
    ),
    Fault("score is a mean over tokens", "The score is the mean over the response.", _LAST),
    Fault("score is a sum over tokens", "The score is the sum over the response.", _LAST),
    Fault(
        "centered scores",
        "Scores are pulled toward a mean of 0.",
        "Nothing, if this is intended: the differences between scores become slightly too small.",
    ),
)
