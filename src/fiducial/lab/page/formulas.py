"""The formulas of the lab's page, and the identities that are shown with both sides as numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..study.results import DecisionProcess, Frontier, Num, Recovered

FORMULAS = {
    "objective": r"J(\pi) = \E[r(x,y)] - \beta \KL(\pi\parallel\pi_\ref) \break = \beta "
    r"\E[\log Z(x)] - \beta \KL(\pi\parallel\pi^*)",
    "partition": r"Z(x) = \sum_y \pi_\ref(y|x) e^{r(x,y)/\beta} \break = e^{V(s_0)/\beta}, "
    r"\quad V(s) = \beta \log\sum_a \pi_\ref(a|s) e^{Q(s,a)/\beta}",
    "optimal_policy": r"\pi^*(y|x) = \frac{1}{Z(x)} \pi_\ref(y|x) e^{r(x,y)/\beta}",
    "reward": r"r(x,y) = \beta \log\frac{\pi^*(y|x)}{\pi_\ref(y|x)} + \beta \log Z(x)",
    "cancels": r"P(y\succ y'|x) = \sigma(r(x,y) - r(x,y')) "
    r"\break = \sigma\left( \beta \log\frac{\pi^*(y|x)}{\pi_\ref(y|x)} - \beta "
    r"\log\frac{\pi^*(y'|x)}{\pi_\ref(y'|x)} \right)",
    "loss": r"L(\pi) = -\E[\log\sigma(\beta h)], \quad h = "
    r"\log\frac{\pi(y_w|x)}{\pi_\ref(y_w|x)} - \log\frac{\pi(y_l|x)}{\pi_\ref(y_l|x)}",
    "loss_gradient": r"\nabla L(\pi) = -\beta \E[\sigma(-\beta h) \break (\nabla\log\pi(y_w|x) "
    r"- \nabla\log\pi(y_l|x))]",
    "chain": r"\pi_\ref(y|x) = \prod_t \pi_\ref(y_t|s_t), \quad s_t = (x, y_{<t})",
    "log_ratio": r"\log\frac{\pi^*(y|x)}{\pi_\ref(y|x)} = \sum_t "
    r"\log\frac{\pi^*(y_t|s_t)}{\pi_\ref(y_t|s_t)}",
    "optimum_objective": r"J(\pi^*) = \E[r(x,y)] - \beta \KL(\pi^*\parallel\pi_\ref)",
    "optimum_partition": r"J(\pi^*) = \E[\beta \log Z(x)]",
    "soft_value": r"V(s_0) = \beta \log Z(x), \quad Z(x) = \sum_y \pi_\ref(y|x) e^{r(x,y)/\beta}",
    "sums": r"\sum_y \pi^*(y|x) = 1",
    "advantage": r"\beta \log\frac{\pi^*(a|s)}{\pi_\ref(a|s)} = Q(s,a) - V(s)",
    "arm": r"\nabla J(\pi) = \E[(r(x,y) - \beta \log\frac{\pi(y|x)}{\pi_\ref(y|x)}) "
    r"\nabla\log\pi(y|x)] "
    r"\break = \E[\sum_t (Q(s_t,a_t) - V(s_t)) \nabla\log\pi(a_t|s_t)]",
    "steps": r"\sum_t (V(s_{t+1}) - V(s_t)) = r(x,y) - \beta \log Z(x)",
    "paid": r"V(s) = \beta \log\sum_a \pi_\ref(a|s) e^{(r(s,a) + V(s'))/\beta}, \quad V(s_0) = "
    r"\beta \log Z(x), \quad r(x,y) = \sum_t r(s_t,a_t)",
    "slope": r"\frac{\d \E[r]}{\d \KL} = \beta",
    "variance": r"\frac{\d \E[r]}{\d (1/\beta)} = \Var(r)",
    "k": r"k_1 = -\log\rho, \quad k_2 = \frac{1}{2} (\log\rho)^2, \quad k_3 = \rho - 1 - "
    r"\log\rho, \quad \rho = \pi_\ref / \pi, \quad y\sim\pi",
    "best_of_n": r"\KL(\pi_n\parallel\pi_\ref) \le \log n - \frac{n-1}{n}, \quad P(\text{win}) "
    r"\le \frac{n}{n+1}",
    "fit": r"\E[r] \approx d (\alpha - \beta d) \text{ or } d (\alpha - \beta \log d), \quad d "
    r"= \sqrt{\KL}",
}

SPARSE = {
    "arm": "The response is one arm of a bandit (REINFORCE, RLOO): the expected gradient is that "
    "of the decision process. Shown: the lengths of both gradients at a policy half-way to the "
    "optimum, and the largest difference of their entries.",
    "steps": "Each step has a reward (a process reward). A perfect process reward is the change in "
    "V; over the response above these add up to its reward minus the value of the prompt.",
    "paid": "If every step has a reward of its own, the same recursion holds. Shown: random "
    "rewards, for the same prompt.",
}
"""The answers to a reward that comes only at the end."""


@dataclass(frozen=True)
class Identity:
    """A formula and its two sides as numbers. `formula`: a key of FORMULAS. `left` and `right` are
    None if only the difference is known.
    """

    formula: str
    words: str
    difference: Num
    left: Num = None
    right: Num = None


def identities(s: DecisionProcess) -> list[Identity]:
    """Every formula of the decision process with both sides, from the numbers of one response."""
    ref, pi = math.prod(d.ref for d in s.steps), math.prod(d.pi for d in s.steps)
    steps = sum(d.log_ratio for d in s.steps)
    value = s.steps[0].value if s.steps else s.beta_log_z
    z = (
        min(s.z, key=lambda one: abs(s.beta * math.log(one) - value))
        if s.z
        else math.exp(value / s.beta)
    )  # the one of this prompt
    mean = sum(s.beta * math.log(one) for one in s.z) / len(s.z) if s.z else s.beta_log_z
    optimum, reward = (
        s.probability * math.exp(s.reward / s.beta) / z,
        s.beta * s.sum_log_ratio + s.beta * math.log(z),
    )
    objective = s.expected_reward - s.beta * s.kl
    worst = max(s.steps, key=lambda d: abs(s.beta * d.log_ratio - (d.q - d.value)), default=None)
    out = [
        Identity(
            "chain",
            "The probability of a response is the product of its tokens' probabilities.",
            abs(s.probability - ref),
            s.probability,
            ref,
        ),
        Identity(
            "log_ratio",
            "The log-ratios of the tokens add up to the log-ratio of the response.",
            abs(s.sum_log_ratio - steps),
            s.sum_log_ratio,
            steps,
        ),
        Identity(
            "optimum_objective",
            "The objective is the mean reward minus β times the KL.",
            abs(s.objective - objective),
            s.objective,
            objective,
        ),
        Identity(
            "optimum_partition",
            "At the optimum it is the mean of β log Z over prompts.",
            abs(s.objective - mean),
            s.objective,
            mean,
        ),
        Identity(
            "soft_value",
            "The soft value of the first state is β log Z of the prompt.",
            abs(value - s.beta * math.log(z)),
            value,
            s.beta * math.log(z),
        ),
        Identity(
            "optimal_policy",
            "The optimum reweights the reference.",
            abs(pi - optimum),
            pi,
            optimum,
        ),
        Identity(
            "sums",
            "The optimum is a distribution.",
            abs(s.probabilities_sum - 1),
            s.probabilities_sum,
            1.0,
        ),
        Identity(
            "reward",
            "Solved for the reward: the optimum gives the reward.",
            abs(s.reward - reward),
            s.reward,
            reward,
        ),
    ]
    if worst is not None:
        left, right = s.beta * worst.log_ratio, worst.q - worst.value
        words = (
            "For each token, β times the log-ratio is the soft advantage. Shown: the token with "
            "the largest difference."
        )
        out.append(Identity("advantage", words, abs(left - right), left, right))
    return out


def recovered_identities(r: Recovered) -> list[Identity]:
    """What minimizing DPO's loss recovers, as identities."""
    difference = None if r.loss is None or r.entropy is None else abs(r.loss - r.entropy)
    found = [
        Identity(
            "loss",
            "At its minimum the loss equals the entropy of the labels (right): nothing is left to "
            "learn.",
            difference,
            r.loss,
            r.entropy,
        ),
        Identity(
            "loss_gradient",
            "At the optimum the gradient is 0. Left: its largest entry.",
            r.gradient_at_optimum,
            r.gradient_at_optimum,
            0.0,
        ),
    ]
    return [i for i in found if i.difference is not None]


def slope_identities(f: Frontier) -> list[Identity]:
    """What the slope of the frontier must be; only the difference is known."""
    found = [
        Identity(
            "slope",
            "The slope of the frontier is β. Shown: the largest relative difference along it.",
            f.slope_error,
        ),
        Identity(
            "variance",
            "Its reward rises with 1/β by the variance of the reward. Shown: the largest relative "
            "difference.",
            f.variance_error,
        ),
    ]
    return [i for i in found if i.difference is not None]
