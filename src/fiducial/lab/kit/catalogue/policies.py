"""Mistakes in policy losses (KL penalty, rewards and returns, groups, ratios) and in critics."""

from __future__ import annotations

from .fault import Fault

_K1_IN_REWARD = "Put k1 into the reward, or use k2 of the whole response as a loss."
_REWARD_K1 = "Put k1 into the reward."
_KEEP_SIGN = "Keep the sign of each log-ratio: only its mean is never negative."
_MINIMUM = "Use min(ratio * A, clip(ratio) * A)."
_BOUNDS = "Use clamp(ratio, 1 - clip, 1 + clip_high)."
_GEOMETRIC = "Use exp of the mean of the token log-ratios."
_CAP = "Use min(ratio, cap), detached, times A log pi."
_LAMBDA_RETURN = "The target is the old value plus the advantage: the lambda-return."
_VALUE_CLIP = "Use max((V - R)^2, (clip(V, V_old - eps, V_old + eps) - R)^2)."
_TRADE_OFF = "Nothing, if this is intended: it accepts bias in exchange for less variance."

FAULTS = (
    # -- KL
    Fault(
        "KL penalty missing",
        "The KL penalty does not affect the expected gradient: it is left out, it is detached "
        "where it should act, or k1 is used as a loss.",
        "Subtract beta * (logprobs - ref_logprobs), detached, from each token's reward.",
        "open-instruct#535, NeMo-RL#2506",
    ),
    Fault(
        "KL penalty has the wrong sign",
        "The policy is rewarded for moving away from the reference.",
        "Subtract beta * (logprobs - ref_logprobs) from the reward.",
    ),
    Fault(
        "wrong beta",
        "The KL penalty has the right direction but the wrong strength.",
        "Look for a beta that is applied twice, a mean in place of a sum, or a reward that was "
        "scaled while the penalty was not.",
    ),
    Fault(
        "k1 as a loss",
        "As a loss, k1 (the sampled log-ratio) has an expected gradient of zero.",
        _K1_IN_REWARD,
        "open-instruct#535",
    ),
    Fault(
        "k3 as a loss",
        "As a loss, k3 has the gradient of the forward KL(ref, pi). It is a good estimate only of "
        "the value of the KL.",
        _K1_IN_REWARD,
        "Tang and Munos 2025, arXiv 2506.09477",
    ),
    Fault(
        "per-token k3 as a loss",
        "As a loss, k3 has the gradient of the forward KL(ref, pi). Summed over tokens, it also "
        "ignores how earlier tokens change the states of later ones.",
        _K1_IN_REWARD,
        "GRPO, arXiv 2402.03300, on purpose; NeMo-RL#2506",
    ),
    Fault(
        "k3 of the inverse ratio as a loss",
        "k3 uses pi / ref in place of ref / pi.",
        "Use k3 = exp(ref - logp) - 1 - (ref - logp).",
    ),
    Fault(
        "KL not credited to earlier tokens",
        "Each token is charged for its own log-ratio only. A prefix is not charged for leading to "
        "states in which the policy is far from the reference.",
        "Include the penalties of all later tokens in a token's return, or use k2 of the whole "
        "response.",
        "Tang and Munos 2025, arXiv 2506.09477",
    ),
    Fault(
        "k2 in the reward",
        "k2 is a biased estimate of the KL, so the reward is biased too.",
        _REWARD_K1,
    ),
    Fault(
        "k3 in the reward",
        "As a part of the reward, k3 has the gradient of KL(pi, ref) - KL(ref, pi).",
        _REWARD_K1,
    ),
    Fault(
        "KL clipped at zero",
        "Negative log-ratios are set to 0, so the expected penalty is not the KL.",
        _KEEP_SIGN,
    ),
    Fault(
        "|log-ratio| in the reward",
        "The absolute value of the log-ratio is not an estimate of the KL.",
        _KEEP_SIGN,
    ),
    Fault(
        "KL divided by the length",
        "A response is charged the mean of its tokens' log-ratios in place of their sum.",
        "Sum over the tokens of a response.",
    ),
    Fault(
        "reverse instead of forward KL",
        "The gradient is that of KL(pi, ref).",
        "Use k3 of the whole response as a loss: it has the gradient of KL(ref, pi).",
    ),
    Fault(
        "entropy bonus",
        "The policy is also rewarded for its entropy, so the optimum is a different one.",
        "Set the bonus to 0 for this objective; a bonus is a choice.",
    ),
    Fault(
        "advantage not detached",
        "The KL penalty inside the advantage is differentiated too.",
        "Detach the advantage.",
    ),
    # -- rewards and returns
    Fault(
        "reward missing",
        "Rewards do not affect the expected gradient.",
        "Look for a reward that is added where the mask is false.",
    ),
    Fault(
        "reward lost on padded rows",
        "Only rows without padding keep their reward: it is placed after the last token, where the "
        "mask is false.",
        "Put the reward at the last token of each row, column lengths - 1.",
        "trl#3750",
    ),
    Fault(
        "reward position ignores the prompt",
        "The reward is placed at the response's length, counted from the start of the row.",
        "Put it at column lengths - 1, where lengths includes the prompt.",
    ),
    Fault(
        "reward lost at EOS",
        "Only truncated responses keep their reward.",
        "The reward is placed at EOS, so the mask must include EOS.",
    ),
    Fault(
        "reward lost on truncated responses",
        "Responses without EOS lose their reward.",
        "Put it at the last token, whether it is EOS or not.",
    ),
    Fault(
        "first EOS of the row",
        "The first EOS of the row is taken as the end of the response, but it may be in the "
        "prompt.",
        "Search for EOS after the prompt only.",
        "trl#6805, transformers#35352",
    ),
    Fault(
        "reward at every token",
        "The reward is added at every token, so a long response receives it many times.",
        "Add it once, at the last token.",
    ),
    Fault(
        "return without the token's own reward",
        "The reward-to-go starts one token late.",
        "Include the reward of token t in the return of token t.",
    ),
    Fault(
        "no reward-to-go",
        "Rewards do not reach earlier tokens: they are not summed, or summed in the wrong "
        "direction.",
        "Sum the rewards from each token to the end.",
    ),
    Fault(
        "discount",
        "gamma is below 1, or lambda is below 1 without a critic: early tokens are credited with "
        "only a part of the reward.",
        "Use gamma = 1 for text, and lambda below 1 only with a critic.",
    ),
    Fault(
        "lambda with an inexact critic",
        "With lambda below 1, the return is replaced in part by the critic's values, which are "
        "wrong.",
        f"{_TRADE_OFF} lambda = 1 has no bias.",
    ),
    Fault(
        "bootstrap past the end",
        "A value is read after the last token, where there is no state.",
        "Use 0 as the value after the end.",
    ),
    Fault(
        "value read one token late",
        "Each token is compared with the value of the state after it, which depends on the token.",
        "Column t of the values is the state before token t.",
    ),
    # -- groups
    Fault(
        "group mean includes the response itself",
        "The group's mean includes the reward of the response that it is compared with: advantages "
        "are (G - 1) / G of what they should be.",
        "Use the mean of the other responses, or multiply by G / (G - 1).",
        "GRPO with the penalty as a loss",
    ),
    Fault(
        "divided by the group's standard deviation",
        "Groups whose rewards hardly differ count as much as all other groups.",
        "Leave out the division (Dr. GRPO, arXiv 2503.20783), or accept the bias.",
        "GRPO, arXiv 2402.03300, on purpose",
    ),
    Fault(
        "baseline is the group's best",
        "A response is compared with the best of its group, which may be itself: the baseline "
        "depends on the response.",
        "Compare with the mean of the other responses.",
    ),
    Fault(
        "negative advantages left out",
        "Only responses above the group's mean have a gradient: the policy does not learn what to "
        "avoid.",
        "Keep the sign of the advantage.",
        "rejection-sampling fine-tuning, on purpose",
    ),
    Fault(
        "groups mixed",
        "Groups in a different order give a different gradient: responses are compared with those "
        "of other groups.",
        "Form groups by their ids, or view as [groups, G] where the rows of a group are adjacent "
        "(repeat_interleave, not repeat).",
    ),
    # -- off policy
    Fault(
        "not clipped",
        "The gradient continues where the clip should stop it.",
        _MINIMUM,
    ),
    Fault(
        "clipped without the minimum",
        "The clip acts on both sides, whatever the sign of the advantage: a policy that moved in "
        "the wrong direction is not brought back.",
        _MINIMUM,
    ),
    Fault(
        "maximum instead of minimum",
        "The larger of the two terms is used, so the bound is optimistic in place of pessimistic.",
        "Use the minimum of the terms to be maximized, or the maximum of their negatives.",
    ),
    Fault(
        "ratio always one",
        "The ratio is 1 whatever policy sampled the responses, so a clip never acts: the ratio is "
        "built from logprobs - logprobs.detach(), or old_logprobs were computed with the current "
        "policy.",
        "Keep the log-probabilities of the policy that sampled, and use exp(logprobs - "
        "old_logprobs).",
    ),
    Fault(
        "clip bounds swapped",
        "The two bounds of an asymmetric clip are swapped.",
        _BOUNDS,
    ),
    Fault(
        "wrong clip range",
        "The clip or the cap acts at another ratio than the check was asked for.",
        "Use clamp(ratio, 1 - clip, 1 + clip_high) with the values that you mean, and pass the "
        "same values to the check.",
    ),
    Fault(
        "clip_high ignored",
        "The lower bound of an asymmetric clip is used as the upper bound too.",
        _BOUNDS,
    ),
    Fault(
        "token ratio instead of sequence ratio",
        "Each token is weighted by its own ratio in place of the ratio of the whole response.",
        "Use exp of the sum of the log-ratios for the exact gradient, or of their mean for GSPO.",
        "truncated importance sampling by tokens, on purpose",
    ),
    Fault(
        "prefix ratio instead of sequence ratio",
        "Each token is weighted by the ratio up to that token, but a reward at the end also "
        "depends on the tokens that follow.",
        "Use the product over the whole response.",
    ),
    Fault(
        "geometric mean instead of the product",
        "The ratio of a response is the geometric mean of its token ratios.",
        "Use exp of the sum of the token log-ratios.",
        "GSPO, on purpose",
    ),
    Fault(
        "product instead of the geometric mean",
        "The ratio of a response is the product of its token ratios.",
        _GEOMETRIC,
    ),
    Fault(
        "arithmetic instead of geometric mean",
        "The ratio of a response is the arithmetic mean of its token ratios.",
        _GEOMETRIC,
    ),
    Fault(
        "mean over all tokens",
        "The mean is over all tokens, so long responses count more; each response should count "
        "once.",
        "Divide the sum of each response by its length, then average over responses.",
    ),
    Fault(
        "ratio not detached",
        "The ratio that multiplies log pi is differentiated too.",
        "Detach the ratio.",
    ),
    Fault(
        "gradient dropped beyond the cap",
        "Tokens whose ratio is beyond the cap lose their gradient, as in PPO; only their weight "
        "should be capped.",
        _CAP,
    ),
    Fault("not capped", "The weight has no upper bound.", _CAP),
    Fault(
        "weights truncated",
        "Large ratios are truncated at a cap: responses that the policy has come to prefer count "
        "less than they should.",
        _TRADE_OFF,
        "truncated importance sampling, on purpose",
    ),
    Fault(
        "weights masked",
        "Tokens or responses whose ratio is outside the bounds have no gradient.",
        _TRADE_OFF,
        "masked importance sampling, IcePop, on purpose",
    ),
    Fault(
        "ratio inverted",
        "The ratio is old over new.",
        "Use ratio = exp(logprobs - old_logprobs).",
    ),
    # -- critics
    Fault(
        "KL penalty missing from the target",
        "The critic's returns contain the reward but not the KL penalty.",
        "Fit the critic to everything the policy is rewarded and charged for.",
    ),
    Fault(
        "advantage as the target",
        "The critic is fitted to the advantage.",
        "Its target is the advantage plus the old value.",
    ),
    Fault(
        "target is the old value",
        "The critic is fitted to its own old values, so it never learns from the rewards.",
        _LAMBDA_RETURN,
    ),
    Fault(
        "advantage scaled in the target",
        "The target is the old value plus a multiple of the advantage. With a small multiple the "
        "critic hardly learns from the rewards, with a negative one it moves away from them.",
        _LAMBDA_RETURN,
    ),
    Fault(
        "whitened advantage in the target",
        "The target is the old value plus the whitened advantage, whose mean and scale are those "
        "of the batch.",
        "Add the advantage to the old value before it is whitened.",
    ),
    Fault(
        "whitened target",
        "The target is shifted or scaled: it has other units than the rewards that the advantages "
        "are computed from.",
        "Fit the critic to the returns as they are. Only advantages are whitened.",
    ),
    Fault(
        "target is not a return",
        "Where the old values are wrong, the target is not a lambda-return of the rewards: the "
        "loss is right only for a critic that is right already.",
        _LAMBDA_RETURN,
    ),
    Fault(
        "minimum in the value clip",
        "The smaller of the two squared errors is used: a value that has left the clip range in "
        "the wrong direction has no gradient and never comes back.",
        _VALUE_CLIP,
    ),
    Fault(
        "value clip without the maximum",
        "Only the error of the clipped value is used: a value outside the clip range has no "
        "gradient, whatever its direction.",
        _VALUE_CLIP,
    ),
    Fault(
        "does not learn",
        "The gradient is right where it was examined, but a short training with this loss does not "
        "approach the optimum.",
        "Look for terms that act only far from the optimum: clips, masks, and targets that follow "
        "the model.",
    ),
)
