"""What is known to go wrong in losses: the name of each mistake, what it is, what to do, and who
has met it. `faults` has their gradients.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """A known mistake: what it is, what to do, and who has met it (project#number of an issue or a
    change; a paper).
    """

    name: str
    words: str
    remedy: str
    seen: str = ""


_SHIFT = "shift the mask as the labels are shifted: column t of both speaks of token t"
_WHOLE = "sum over tokens and divide once, by the tokens of the whole batch or by a constant"
_IN_REWARD = "put k1 into the reward, or use k2 of the whole response as a loss"
_LAST = "read it at column lengths - 1, the prompt included"
_MASK = "select with the mask of the policy's own tokens"

CATALOGUE: dict[str, Fault] = {
    fault.name: fault
    for fault in (
        # -- which tokens count, and how much
        Fault(
            "mean of means",
            "every response weighs the same whatever its length, so a token of a short one counts "
            "for more",
            _WHOLE,
            "the 1/|o| of GRPO",
        ),
        Fault(
            "mean of micro-batch means",
            "every micro-batch weighs the same however many tokens it has",
            _WHOLE,
            "torchtune#1875, open-instruct#1161",
        ),
        Fault(
            "mean of groups' means",
            "every prompt or group weighs the same however many tokens its responses have",
            _WHOLE,
        ),
        Fault(
            "EOS not a label",
            "the EOS that ends a response is masked out, as happens where labels are found by "
            "comparing ids with a pad token that is EOS",
            "take the mask that was made together with the tokens; never derive it from pad ids",
            "transformers#23530, trl#976",
        ),
        Fault(
            "mask one early",
            "the mask is a token early: it leaves out every response's last token and takes in the "
            "prompt's",
            _SHIFT,
            "ms-swift#8427",
        ),
        Fault(
            "mask one late",
            "the mask is a token late: it leaves out every response's first token and takes in one "
            "of the padding",
            _SHIFT,
            "ms-swift#8427",
        ),
        Fault(
            "last token left out",
            "the last token of every response is left out",
            "the mask includes the token that ends a response, EOS or not",
        ),
        Fault(
            "first token left out",
            "the first token of every response is left out",
            "it is predicted at the prompt's last position: begin there",
            "trl#3681",
        ),
        Fault(
            "cut responses left out",
            "responses without EOS are left out",
            "keep them, or say that the objective is another",
            "DAPO's filter, on purpose",
        ),
        Fault("trains on the prompt", "tokens of the prompt have a gradient", _MASK),
        Fault(
            "trains on padding", "padding has a gradient or a log-probability that counts", _MASK
        ),
        Fault(
            "labels not shifted",
            "a token is looked up in the logits of its own position, which predict the next one",
            "logits[:, :-1] predict ids[:, 1:]",
        ),
        Fault(
            "labels shifted twice",
            "a token is looked up two positions in front of it: shifted by hand, and once more "
            "inside",
            "shift once: logits[:, :-1] predict ids[:, 1:]",
            "transformers#46898",
        ),
        Fault(
            "temperature missing",
            "log-probabilities are those of softmax(logits), while tokens were sampled from "
            "softmax(logits / temperature)",
            "divide the logits by the sampling temperature, in the policy, the old policy and the "
            "reference",
            "trl#3029",
        ),
        Fault(
            "log-softmax missing",
            "logits are used as if they were log-probabilities",
            "take log_softmax before looking tokens up",
        ),
        Fault(
            "sign turned",
            "the loss goes up where it should go down",
            "a loss is the negative of what is to grow",
        ),
        # -- KL
        Fault(
            "KL missing",
            "the KL penalty has no effect on the expected gradient: left out, detached where it "
            "should act, or k1 used as a loss",
            "take beta * (logprobs - ref_logprobs), detached, from each token's reward",
            "open-instruct#535, NeMo-RL#2506",
        ),
        Fault(
            "KL sign turned",
            "the policy is paid for leaving the reference",
            "the reward loses beta * (logprobs - ref_logprobs)",
        ),
        Fault(
            "wrong beta",
            "the KL penalty has the right direction and another strength",
            "look for a beta applied twice, a mean where a sum belongs, a reward that was scaled "
            "where the penalty was not",
        ),
        Fault(
            "k1 as a loss",
            "the sampled log-ratio, differentiated as a loss, has an expected gradient of zero",
            _IN_REWARD,
            "open-instruct#535",
        ),
        Fault(
            "k3 as a loss",
            "k3 is a good value, but differentiated it has the gradient of the forward KL(ref, pi)",
            _IN_REWARD,
            "Tang and Munos 2025, arXiv 2506.09477",
        ),
        Fault(
            "k3 of each token as a loss",
            "differentiated, k3 has the gradient of the forward KL(ref, pi), and of each token's "
            "alone, the states taken as given",
            _IN_REWARD,
            "GRPO, arXiv 2402.03300, on purpose; NeMo-RL#2506",
        ),
        Fault(
            "k3 of the inverse ratio as a loss",
            "k3 with pi / ref where ref / pi belongs",
            "k3 = exp(ref - logp) - 1 - (ref - logp)",
        ),
        Fault(
            "KL of each token alone",
            "a token pays for its own log-ratio only, and nothing for a prefix behind which the "
            "policy is far from the reference",
            "let a token's return hold the penalties of all later tokens, or use k2 of the whole "
            "response",
            "Tang and Munos 2025, arXiv 2506.09477",
        ),
        Fault(
            "k2 in the reward",
            "as a value k2 is biased, and so is the reward with it",
            "put k1 into the reward",
        ),
        Fault(
            "k3 in the reward",
            "k3 in the reward has the gradient of KL(pi, ref) - KL(ref, pi)",
            "put k1 into the reward",
        ),
        Fault(
            "KL cut off at zero",
            "negative log-ratios are set to 0, so the expected penalty is not the KL",
            "keep the sign: only the mean is never negative",
        ),
        Fault(
            "|log-ratio| in the reward",
            "the absolute log-ratio is no estimate of the KL",
            "keep the sign: only the mean is never negative",
        ),
        Fault(
            "KL divided by the length",
            "a response pays the mean over its tokens instead of their sum",
            "sum over the tokens of a response",
        ),
        Fault(
            "reverse instead of forward KL",
            "the gradient is that of KL(pi, ref)",
            "k3 of the whole response, as a loss, has that of KL(ref, pi)",
        ),
        Fault(
            "entropy bonus",
            "the policy is paid for its entropy too, so the optimum is another",
            "0 for the objective as it stands; a bonus is a choice",
        ),
        Fault(
            "advantage carries a gradient",
            "the penalty inside the advantage is differentiated as well",
            "detach the advantage",
        ),
        # -- reward and return
        Fault(
            "reward missing",
            "rewards have no effect on the expected gradient",
            "look for a reward that is added where the mask is false",
        ),
        Fault(
            "reward lost on padded rows",
            "only rows without padding keep their reward: it stands behind the last token, where "
            "the mask is false",
            "put it at each row's last token: column lengths - 1",
            "trl#3750",
        ),
        Fault(
            "reward placed without the prompt",
            "the reward stands at the response's length counted from the start of the row",
            "put it at column lengths - 1, the prompt included",
        ),
        Fault(
            "reward lost at EOS",
            "only cut responses keep their reward",
            "the reward stands at EOS, so the mask must include it",
        ),
        Fault(
            "reward lost where cut",
            "responses without EOS lose their reward",
            "put it at the last token, EOS or not",
        ),
        Fault(
            "first EOS of the row",
            "the end is taken to be the first EOS of the row, which may stand inside the prompt",
            "look for EOS behind the prompt only",
            "trl#6805, transformers#35352",
        ),
        Fault(
            "reward at every token",
            "the reward is added at each token: a long response is paid many times",
            "add it once, at the last token",
        ),
        Fault(
            "return without the token's own reward",
            "the reward-to-go begins a token late",
            "the return of token t holds the reward of token t",
        ),
        Fault(
            "each token paid alone",
            "no reward reaches earlier tokens: it is not summed, or summed forwards",
            "sum rewards from each token to the end",
        ),
        Fault(
            "discount",
            "gamma below 1, or lambda below 1 without a critic: early tokens are credited with a "
            "part of the reward",
            "gamma = 1 for text; with lambda below 1 use a critic",
        ),
        Fault(
            "lambda with an inexact critic",
            "the return is cut short by a critic that is wrong: bias in exchange for less variance",
            "nothing, if that is meant; lambda = 1 has no bias",
        ),
        Fault(
            "bootstraps past the end",
            "a value is read behind the last token, where there is no state",
            "the value behind the end is 0",
        ),
        Fault(
            "value read one token late",
            "a token meets the value of the state behind it, which depends on the token",
            "column t is the state before token t",
        ),
        # -- groups
        Fault(
            "group mean includes itself",
            "the mean of the group holds the response's own reward: advantages are (G - 1) / G of "
            "what they should be",
            "take the mean of the others, or multiply by G / (G - 1)",
            "GRPO with the penalty as a loss",
        ),
        Fault(
            "divided by the group's deviation",
            "groups whose rewards hardly differ count as much as all others",
            "leave the division out (Dr. GRPO, arXiv 2503.20783), or know that it is a bias",
            "GRPO, arXiv 2402.03300, on purpose",
        ),
        Fault(
            "baseline is the group's best",
            "a response is compared with the best of its group, which may be itself: the baseline "
            "depends on it",
            "compare with the mean of the others",
        ),
        Fault(
            "negative advantages left out",
            "only responses above the group's mean have a gradient: the policy is never told what "
            "to avoid",
            "keep the sign of the advantage",
            "rejection-sampling fine-tuning, on purpose",
        ),
        # -- off policy
        Fault(
            "not clipped",
            "the gradient goes on where the clip should cut it",
            "min(ratio * A, clip(ratio) * A)",
        ),
        Fault(
            "clipped without the minimum",
            "the clip cuts on both sides whichever way the advantage points: a policy that went "
            "astray is not brought back",
            "min(ratio * A, clip(ratio) * A)",
        ),
        Fault(
            "maximum instead of minimum",
            "the larger branch is taken: what should be pessimistic is optimistic",
            "the minimum of what should grow, or the maximum of the negatives",
        ),
        Fault(
            "ratio always one",
            "the policy that sampled has no effect",
            "old_logprobs are those of the policy that sampled, not of this one detached",
        ),
        Fault(
            "clip range turned round",
            "the two bounds of an asymmetric clip are exchanged",
            "clamp(ratio, 1 - clip, 1 + clip_high)",
        ),
        Fault(
            "one bound for both sides",
            "the upper bound of an asymmetric clip is the lower one's",
            "clamp(ratio, 1 - clip, 1 + clip_high)",
        ),
        Fault(
            "ratio of each token alone",
            "every token is weighed by its own ratio where that of the whole response is meant",
            "exp of the sum of the log-ratios for the exact gradient, of their mean for GSPO",
            "truncated importance sampling by tokens, on purpose",
        ),
        Fault(
            "ratio up to the token",
            "a token is weighed by the ratio of what came before it: the reward at the end depends "
            "on what comes after, too",
            "the product over the whole response",
        ),
        Fault(
            "geometric mean instead of the product",
            "the ratio of a response is a mean over its tokens",
            "exp of the sum of the log-ratios",
            "GSPO, on purpose",
        ),
        Fault(
            "product instead of the geometric mean",
            "the ratio of a response is the product of its tokens'",
            "exp of the mean of the log-ratios",
        ),
        Fault(
            "arithmetic instead of geometric mean",
            "the ratio of a response is the mean of its tokens' ratios",
            "exp of the mean of the log-ratios",
        ),
        Fault(
            "mean over tokens",
            "long responses count for more: the mean is over all tokens where every response is "
            "meant to count once",
            "divide each response's sum by its length, then by their number",
        ),
        Fault(
            "weight carries a gradient",
            "the ratio in front of log pi is differentiated as well",
            "detach it",
        ),
        Fault(
            "gradient cut where the weight should be capped",
            "tokens beyond the cap lose their gradient, as in PPO",
            "min(ratio, cap), detached, times A log pi",
        ),
        Fault("not capped", "the weight has no bound", "min(ratio, cap), detached, times A log pi"),
        Fault(
            "weights cut",
            "large ratios are cut at a cap: what the policy has come to like weighs less than it "
            "should",
            "nothing, if that is meant: bias in exchange for less variance",
            "truncated importance sampling, on purpose",
        ),
        Fault(
            "weights dropped",
            "what has a ratio beyond a bound has no gradient",
            "nothing, if that is meant: bias in exchange for less variance",
            "masked importance sampling, IcePop, on purpose",
        ),
        Fault(
            "ratio inverted", "the ratio is old over new", "ratio = exp(logprobs - old_logprobs)"
        ),
        # -- preferences
        Fault(
            "chosen and rejected exchanged",
            "what was rejected is preferred",
            "-logsigmoid(chosen - rejected)",
        ),
        Fault(
            "reference missing", "the reference has no effect", "the margin is of log(pi / pi_ref)"
        ),
        Fault(
            "reference turned round",
            "the reference's log-ratio has the wrong sign",
            "h = (policy_chosen - ref_chosen) - (policy_rejected - ref_rejected)",
        ),
        Fault(
            "reference is the policy",
            "the margin is always 0: the reference is the policy that is trained",
            "freeze a copy before training",
        ),
        Fault(
            "beta missing",
            "the margin is not multiplied by beta inside the sigmoid",
            "-logsigmoid(beta * h)",
        ),
        Fault("beta twice", "the margin is multiplied by beta twice", "-logsigmoid(beta * h)"),
        Fault(
            "divided by the length",
            "log-ratios are means over a response's tokens",
            "sum over tokens; a mean is another method (length-normalised DPO, SimPO)",
        ),
        Fault("no logarithm", "the loss is -sigmoid of the margin", "-logsigmoid"),
        Fault("hinge", "the loss is max(0, 1 - margin), as in SLiC", "-logsigmoid(beta * h)"),
        Fault(
            "squared margin",
            "the loss is (h - 1 / (2 beta))^2, which is IPO",
            "-logsigmoid(beta * h)",
        ),
        Fault(
            "label smoothing",
            "labels are taken to be wrong now and then, so the minimum is elsewhere",
            "0 for the plain loss; conservative DPO is a choice",
        ),
        # -- reward models
        Fault(
            "score read one token early",
            "the score is read at the token before the last: EOS is never seen",
            _LAST,
        ),
        Fault(
            "EOS taken for padding",
            "the last token that is not padding is looked for, but EOS is the pad token: what has "
            "ended is read one token early",
            _LAST,
            "transformers#35352",
        ),
        Fault("score read at the first padding", "the score is read behind the last token", _LAST),
        Fault(
            "score read in the last column",
            "the score is read in the last column, which is padding for all but the longest rows",
            _LAST,
        ),
        Fault(
            "score read without the prompt",
            "the score is read at the response's length counted from the start of the row",
            _LAST,
        ),
        Fault("score is a mean over tokens", "the score is the mean over the response", _LAST),
        Fault("score is a sum over tokens", "the score is the sum over the response", _LAST),
        Fault(
            "centred scores",
            "scores are pulled to mean 0",
            "nothing, if that is meant: the differences of scores are a little too small",
        ),
        # -- critics
        Fault(
            "penalty missing from the target",
            "returns hold the reward but not the KL penalty",
            "the critic expects what the policy is paid, penalty included",
        ),
        Fault(
            "advantage as the target",
            "the critic is fitted to the advantage",
            "its target is the advantage plus the old value",
        ),
        # -- found by trying it out
        Fault(
            "no gradient",
            "the loss does not depend on what is learned",
            "look for a detach, a no_grad, an argmax",
        ),
        Fault(
            "zero in expectation",
            "single rows have a gradient, but their mean has none",
            "look for a term whose gradient is a score: E[grad log pi] = 0",
        ),
        Fault(
            "not finite",
            "the loss or its gradient is not finite",
            "look for 0 / 0 (a group of equal rewards), log 0, a mask that multiplies",
        ),
        Fault(
            "random",
            "the same batch gives another gradient the second time",
            "switch dropout off; draw no random numbers inside a loss",
        ),
        Fault(
            "padding counts",
            "more padding changes the gradient",
            "sums, counts and whitening's statistics are over true positions of the mask",
            "SkyRL#1305",
        ),
        Fault(
            "depends on the order of rows",
            "the same rows in another order give another gradient",
            "look for micro-batches that weigh the same whatever they hold, and for statistics of "
            "a part of the batch",
        ),
        Fault(
            "groups mixed",
            "groups in another order give another gradient: responses are compared with those of "
            "other groups",
            "form groups by their ids, or view as [groups, G] where a group's rows stand together "
            "(repeat_interleave, not repeat)",
        ),
        Fault(
            "copies count",
            "a batch with every row twice has a gradient of another direction",
            "look for statistics that depend on the size of the batch",
        ),
        Fault(
            "reads the prompt's tokens",
            "other tokens in the prompt change the gradient",
            "look for a search for EOS over the whole row, and for groups formed by the prompt's "
            "tokens",
            "trl#6805, NeMo-RL#3882",
        ),
        Fault(
            "rounding",
            "the gradient is right to a few digits only",
            "look for float16 or bfloat16: log-softmax wants float32",
        ),
        Fault("unknown", "biased, and no known mistake has this gradient", ""),
    )
}
"""Every name that a verdict can carry, but for "correct"."""
