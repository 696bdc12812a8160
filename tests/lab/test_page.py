"""The lab's page: every section's numbers on it, sentences no stronger than the seeds, what cannot
be is an alarm, nothing fetched. No browser.
"""

import base64
import hashlib
import json
import math
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from fiducial.lab.page.alarms import lab_alarms
from fiducial.lab.page.answer import lab_answer
from fiducial.lab.page.figures_methods import (
    frontier_figures,
    gap_figures,
    heat_figure,
    sparse_figures,
)
from fiducial.lab.page.figures_study import best_of_n_figure, proxy_figures
from fiducial.lab.page.formulas import FORMULAS, identities
from fiducial.lab.page.mathml import formula, mathml
from fiducial.lab.page.page import write_lab_page
from fiducial.lab.page.reading import middle, samples_needed
from fiducial.lab.page.text import share, side
from fiducial.lab.runs.results import LabResults

HOSTILE = "</script><img src=x onerror=alert(1)>\u2028<!--<b> {{ 7*7 }}"
EVIL = "<svg/onload=alert(2)>"
SECTIONS = (
    "worlds",
    "methods",
    "frontier",
    "setting",
    "derivation",
    "recovered",
    "missing",
    "labels",
    "kl",
    "estimators",
    "best_of_n",
    "overoptimisation",
    "sensitivity",
)

# one prompt, at most three tokens of `a` and the full stop: four responses, whose every number is a
# line of arithmetic
BETA = 0.5
RESPONSES = {".": 0.2, "a.": 0.7, "aa.": 1.6, "aaa": -0.4}
REF = {".": 0.3, "a.": 0.7 * 0.4, "aa.": 0.7 * 0.6 * 0.5, "aaa": 0.7 * 0.6 * 0.5}


def optimum(beta: float) -> tuple[dict[str, float], float]:
    z = sum(REF[y] * math.exp(r / beta) for y, r in RESPONSES.items())
    return {y: REF[y] * math.exp(r / beta) / z for y, r in RESPONSES.items()}, z


def point(p: dict[str, float]) -> tuple[float, float]:
    """KL and mean reward of a policy."""
    return sum(q * math.log(q / REF[y]) for y, q in p.items()), sum(
        q * RESPONSES[y] for y, q in p.items()
    )


def setting_data() -> dict[str, Any]:
    best, z = optimum(BETA)
    kl, reward = point(best)
    steps, states = [], ["", "a", "aa"]
    below = [[".", "a.", "aa.", "aaa"], ["a.", "aa.", "aaa"], ["aa.", "aaa"], ["aa."]]
    for t, state in enumerate(states):
        chosen, here, there = ".a"[t < 2], below[t], below[t + 1]
        pi, ref = (sum(p[y] for y in there) / sum(p[y] for y in here) for p in (best, REF))
        value, q = (
            BETA
            * math.log(
                sum(REF[y] * math.exp(RESPONSES[y] / BETA) for y in ys) / sum(REF[y] for y in ys)
            )
            for ys in (here, there)
        )
        steps.append(
            {
                "state": "x" + state,
                "action": chosen,
                "pi": pi,
                "ref": ref,
                "log_ratio": math.log(pi / ref),
                "reward": 1.6 * (t == 2),
                "value": value,
                "q": q,
            }
        )
    return {
        "prompt": "x",
        "response": "aa.",
        "probability": REF["aa."],
        "reward": 1.6,
        "steps": steps,
        "sum_log_ratio": math.log(best["aa."] / REF["aa."]),
        "expected_reward": reward,
        "kl": kl,
        "beta": BETA,
        "objective": reward - BETA * kl,
        "beta_log_z": BETA * math.log(z),
        "z": [z],
        "probabilities_sum": sum(best.values()),
    }


START = point(REF)[1]


def run_data(
    seed: int, end: float, samples: int, kl: float = 0.6, reward: float = 0.9, points: int = 12
) -> dict[str, Any]:
    """A run that closes the gap geometrically, straight towards where it ends."""
    path = []
    for i in range(points + 1):
        done = 1 - (1 - i / points) ** 2
        path.append(
            {
                "step": 40 * i,
                "samples": samples * i // points,
                "kl": kl * done,
                "reward": START + (reward - START) * done,
                "relative_gap": end ** (i / points) if end > 0 else end,
                "total_variation": 0.4,
            }
        )
    return {
        "seed": seed,
        "relative_gap": end,
        "gap": 0.2 * end,
        "total_variation": abs(end) ** 0.5 / 2,
        "kl": kl,
        "reward": reward,
        "samples": samples,
        "pairs": 0 if samples else 96_000,
        "seconds": 31.25 + seed,
        "path": path,
    }


def method_data(
    name: str, policy: str, world: str, ends: list[float], cause: str | None = None
) -> dict[str, Any]:
    kl, reward = point(optimum(BETA)[0])
    setting = (
        "learning rate 0.003, 480 iterations of 256 responses, 2 epochs"
        if name == "PPO"
        else "learning rate 0.01, 480 steps of 200 pairs"
    )
    runs = [
        run_data(
            i,
            end,
            122_880 if name == "PPO" else 0,
            kl * (1 - abs(end) ** 0.5 * 0.3),
            reward - 0.6 * abs(end) ** 0.5,
        )
        for i, end in enumerate(ends)
    ]
    return {
        "method": name.lower(),
        "name": name,
        "policy": policy,
        "world": world,
        "setting": setting,
        "runs": runs,
        "cause": cause,
    }


def lab_data() -> dict[str, Any]:
    """Everything, plausible and partly exact; tests change what they need."""
    betas = [BETA * 40 ** (1 - 2 * i / 40) for i in range(41)]
    curve = [point(optimum(b)[0]) for b in betas]
    kl, reward = point(optimum(BETA)[0])
    keys = ("objective", "partition", "optimal_policy", "reward", "cancels")

    def proxy(key: str, title: str, fall: float) -> dict[str, Any]:
        d = [i / 10 for i in range(28)]
        gold = [x * (1.6 - fall * x) for x in d]
        top = max(range(28), key=lambda i: gold[i])
        return {
            "key": key,
            "title": title,
            "words": f"The words of {key}.",
            "curve": {"kl": [x * x for x in d], "proxy": [1.9 * x for x in d], "gold": gold},
            "peak": {"root_kl": d[top], "gold": gold[top]},
            "last": {"root_kl": d[-1], "gold": gold[-1]},
            "turns_over": top < 27,
            "fit": {"alpha": 1.61, "beta": fall, "rmse": 0.0123},
        }

    def estimator(
        name: str, mean: float, gradient: str, loss: float | None, error: float | None
    ) -> dict[str, Any]:
        return {
            "name": name,
            "mean": mean,
            "bias": mean - 0.413,
            "std": 0.871,
            "loss_gradient": gradient,
            "cosine_loss": loss,
            "relative_error_loss": error,
            "cosine_reward": 0.993,
            "relative_error_reward": 0.117,
        }

    def sensitivity(name: str, policy: str, gaps: list[list[float | None]]) -> dict[str, Any]:
        return {
            "method": name.lower(),
            "name": name,
            "policy": policy,
            "world": "mild",
            "learning_rates": [0.0003, 0.001, 0.003, 0.01],
            "betas": [0.1, 0.5, 1.0],
            "relative_gap": gaps,
            "setting": "150 iterations of 256 responses",
        }

    return {
        "form": "full",
        "seed": 0,
        "command": "fiducial lab",
        "machine": "x86_64, 2 threads",
        "versions": {"python": "3.12.3", "fiducial": "0.1.0"},
        "timings": {"training": 412.0, "the exact parts": 31.5},
        "worlds": [
            {
                "key": "mild",
                "words": "Short responses, a smooth reward.",
                "prompts": 2,
                "responses": 15,
                "vocabulary": 3,
                "horizon": 3,
                "beta": BETA,
                "kl_optimum": kl,
                "objective_reference": START,
                "objective_optimum": reward - BETA * kl,
            },
            {
                "key": "peaked",
                "words": "One response in a hundred pays.",
                "prompts": 4,
                "responses": 1365,
                "vocabulary": 4,
                "horizon": 5,
                "beta": 0.1,
                "kl_optimum": 4.318,
                "objective_reference": 0.0102,
                "objective_optimum": 0.4567,
            },
        ],
        "methods": [
            method_data("PPO", "table", "mild", [0.031, 0.012, 0.021]),
            method_data("DPO", "table", "mild", [0.0041, 0.0048, 0.0055]),
            method_data("PPO", "transformer", "mild", [0.043, 0.026, 0.034]),
            method_data("DPO", "transformer", "mild", [0.021, 0.049, 0.038]),
            method_data(
                "PPO",
                "table",
                "peaked",
                [0.352],
                "It sampled a paying response in 3 of its 480 batches.",
            ),
            method_data("DPO", "table", "peaked", [0.087]),
        ],
        "frontier": {
            "world": "mild",
            "beta": betas,
            "kl": [k for k, _ in curve],
            "reward": [r for _, r in curve],
            "optimum": {"kl": kl, "reward": reward, "beta": BETA},
            "best_of_n": [
                {"n": n, "kl": 0.55 * (math.log(n) - (n - 1) / n), "reward": 1.05 - 0.6 / n}
                for n in (2, 4, 8, 16)
            ],
            "slope_error": 3.1e-9,
            "variance_error": 4.2e-8,
        },
        "setting": setting_data(),
        "derivation": [
            {
                "key": key,
                "title": f"Title of {key}",
                "words": f"Words of {key}.",
                "left_name": f"left of {key}",
                "right_name": f"right of {key}",
                "difference": 2.2e-16 * (i + 1),
                "rows": [
                    ["reference", 0.1234567 + i, 0.1234567 + i],
                    ["optimum", 0.7654321, 0.7654321],
                ],
            }
            for i, key in enumerate(keys)
        ],
        "recovered": {
            "loss": 0.612345,
            "entropy": 0.612345,
            "largest_logprob_error": 3.4e-8,
            "gradient_at_optimum": 1.5e-17,
        },
        "missing": {
            "world": "mild",
            "prompt": "a",
            "never_compared": "aa.",
            "optimum_probability": 0.437,
            "starts": [
                {
                    "start": "from the reference",
                    "loss": 0.5987,
                    "total_variation": 0.211,
                    "probability": 0.191,
                },
                {
                    "start": "from a random policy",
                    "loss": 0.5987,
                    "total_variation": 0.338,
                    "probability": 0.763,
                },
            ],
            "complete": {"loss": 0.6123, "total_variation": 1.2e-8},
        },
        "labels": [
            {
                "name": "Bradley-Terry, true labels",
                "bayes_accuracy": 0.6871,
                "entropy": 0.6123,
                "total_variation": 1.3e-8,
                "relative_gap": 2e-15,
                "words": "The optimum.",
            },
            {
                "name": "one label in ten flipped",
                "bayes_accuracy": 0.6497,
                "entropy": 0.6371,
                "total_variation": 0.0873,
                "relative_gap": 0.0612,
                "words": "Too near.",
                "loss": 0.64,
            },
        ],
        "kl": {
            "value": {"kl": 0.413, "forward": 0.527},
            "estimators": [
                estimator("k1", 0.413, "0", None, 1.0),
                estimator("k2", 0.449, "KL(pi||ref)", 1.0, 0.0),
                estimator("k3", 0.413, "KL(ref||pi)", 0.962, 0.312),
                estimator("k2, summed over tokens", 0.431, "none of the two", 0.987, 0.136),
                estimator("exact KL per token", 0.413, "KL(pi||ref)", 1.0, 0.0),
            ],
            "schulman": [
                {"shift": 0.1, "k1": 20.0, "k2": 1.42, "k3": 1.41, "bias_k2": 0.002},
                {"shift": 1.0, "k1": 2.0, "k2": 1.73, "k3": 1.71, "bias_k2": 0.25},
            ],
            "per_position": [0.201, 0.147, 0.065],
        },
        "estimators": [
            {
                "name": "PPO's surrogate, exact critic, lambda 1",
                "estimates": "grad J",
                "cosine": 1.0,
                "relative_bias": 3e-16,
                "scale": 1.0,
                "variance": 37.3,
                "exact": True,
                "words": "the score function with a baseline",
            },
            {
                "name": "GRPO, divided by the deviation",
                "estimates": "grad J",
                "cosine": 0.985,
                "relative_bias": 0.174,
                "scale": 0.919,
                "variance": 21.9,
                "exact": False,
                "words": "easy and hard prompts weigh alike",
            },
            {
                "name": "DPO on pairs",
                "estimates": "grad of DPO's loss",
                "cosine": 1.0,
                "relative_bias": 0.0,
                "scale": 1.0,
                "variance": 8.41,
                "exact": True,
                "words": "",
            },
        ],
        "best_of_n": {
            "world": "mild",
            "rows": [
                {
                    "n": n,
                    "kl": 0.55 * (math.log(n) - (n - 1) / n),
                    "bound": math.log(n) - (n - 1) / n,
                    "reward": 1.05 - 0.6 / n,
                    "win_rate": 0.97 * n / (n + 1),
                    "win_bound": n / (n + 1),
                }
                for n in (2, 4, 8, 16, 64)
            ],
            "ideal": [
                {"n": 4, "kl": 0.6002, "bound": 0.6363},
                {"n": 64, "kl": 3.171, "bound": 3.1745},
            ],
        },
        "overoptimisation": [
            proxy("gaussian", "Gaussian error", 0.1),
            proxy("heavy", "Heavy tails", 0.45),
            proxy("exploit", "An exploit", 0.6),
            proxy("world_exploit", "A world with an exploit", 0.5),
        ],
        "sensitivity": [
            sensitivity(
                "PPO",
                "table",
                [
                    [0.912, 0.633, 0.287, 0.402],
                    [0.71, 0.322, 0.0214, 0.0551],
                    [0.52, 0.131, 0.0093, None],
                ],
            ),
            sensitivity(
                "DPO",
                "table",
                [
                    [0.631, 0.212, 0.0581, 0.0712],
                    [0.402, 0.0612, 0.0049, 0.00061],
                    [0.301, 0.0323, 0.0021, 1.342],
                ],
            ),
        ],
    }


def typed(data: dict[str, Any]) -> LabResults:
    """The dataclasses of what the tests write down as dictionaries."""
    return TypeAdapter(LabResults).validate_python(data)


def lab(**change: Any) -> LabResults:
    return typed({**lab_data(), **change})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


def html_of(folder: Path, data: dict[str, Any]) -> str:
    return write_lab_page(folder, typed(data)).read_text(encoding="utf-8")


def text_of(html: str) -> str:
    """What a reader sees, tags gone."""
    body = html.split("<main>")[1].split("</main>")[0]
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", body)).replace("\u00a0", " ")


def page_data(html: str) -> dict[str, Any]:
    block = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)
    assert block is not None
    return json.loads(block.group(1))  # type: ignore[no-any-return]


# ---- the page


def test_every_sections_numbers_are_on_the_page(folder: Path) -> None:
    html = html_of(folder, lab_data())
    text = text_of(html)
    wanted = [
        "On the mild world DPO with a table leaves 0.48% of the gap to the optimum (3 seeds: 0.41% "
        "to 0.55%), PPO 2.1% (3 seeds: 1.2% to 3.1%)",
        "It sampled a paying response in 3 of its 480 batches.",  # the cause, as an alarm
        "learning rate 0.003, 480 iterations of 256 responses, 2 epochs",
        "3.1%, 1.2%, 2.1%",
        "optimum 0.741",
        "122,880",
        "96,000 pairs",
        "32.2 s",
        "3e\u221216; 37.3",
        "4e\u22128",  # the estimator behind PPO; the variance identity
        "0.934",
        "1.27879",
        "6.82919",  # pi*, the log-ratio, Z
        "Title of cancels",
        "Words of reward.",
        "left of partition",
        "0.123457",
        "1e\u221215",
        "0.612345",
        "3e\u22128",
        "0.599",
        "0.338",
        "0.763",
        "optimum 0.437",
        "0.687",
        "one label in ten flipped",
        "0.0873",
        "6.1%",
        "0.413",
        "0.527",
        "\u2207KL(ref\u2016\u03c0)",
        "neither",
        "0.962",
        "0.312",
        "0.117",
        "20.0",
        "1.73",
        "0.250",
        "GRPO, divided by the deviation",
        "0.985",
        "0.174",
        "0.919",
        "21.9",
        "not exact",
        "0.350",
        "0.636",
        "0.776",
        "0.600",
        "3.17",
        "Gaussian error",
        "The words of exploit.",
        "1.61; 0.600",
        "0.0123",
        "134%",
        "0.061%",
        "150 iterations of 256 responses",
        "One response in a hundred pays.",
        "1,365",
        "4.32",
        "fiducial lab",
        "x86_64, 2 threads",
        "python 3.12.3, fiducial 0.1.0",
        "7 min 24 s",
        "6 min 52 s",
    ]
    assert [one for one in wanted if one not in text] == []
    assert "not computed" not in text and "None" not in text and "nan" not in text.lower().split()
    assert set(re.findall(r'data-figure="(\w+)"', html)) == set(
        page_data(html)["figures"]
    )  # every picture has a place and every place a picture
    assert {
        "frontier",
        "gap0",
        "gap1",
        "gap2",
        "positions",
        "best_of_n",
        "proxy0",
        "proxy3",
        "heat0",
        "heat1",
    } <= set(page_data(html)["figures"])


def test_the_sections_stand_in_their_order(folder: Path) -> None:
    heads = re.findall(r"<h2>(.*?)</h2>", html_of(folder, lab_data()).split("</aside>")[1])
    words = [
        "methods",
        "picture",
        "decision process",
        "five steps",
        "labels",
        "KL",
        "gradient",
        "Best of n",
        "Over-optimization",
        "sensitive",
        "worlds",
        "again",
    ]
    assert len(heads) == len(words) and all(
        word in head for word, head in zip(words, heads, strict=True)
    )


def test_every_axis_has_a_name_and_a_title_says_something(folder: Path) -> None:
    for name, figure in page_data(html_of(folder, lab_data()))["figures"].items():
        assert figure["x"] and figure["y"] and len(figure["title"].split()) > 3, name
        for axis in (figure["x"], figure["y"]):
            counted = (
                "share of the gap left",
                "responses sampled",
                "step of the method",
                "learning rate",
                "token of the response",
            )
            assert "(" in axis or axis in counted, (name, axis)
        assert len({s["color"] for s in figure["series"]}) < 8, name


@pytest.mark.parametrize("section", [*SECTIONS, None])
def test_a_section_without_data_is_said_not_fatal(folder: Path, section: str | None) -> None:
    for empty in ({}, dict.fromkeys(SECTIONS)):
        data = lab_data()
        for key in [section] if section else SECTIONS:
            del data[key]
            data |= {k: v for k, v in empty.items() if k == key}
        html = html_of(folder, data)
        assert "<h1>" in html and "StrictUndefined" not in html
        if section in (
            None,
            "methods",
            "frontier",
            "setting",
            "derivation",
            "kl",
            "estimators",
            "best_of_n",
            "overoptimisation",
            "sensitivity",
            "worlds",
        ):
            assert "not computed in this run" in html
        if section is None:
            assert "Nothing was measured." in html and page_data(html)["figures"] == {}


def test_empty_lists_and_unmeasured_numbers_are_not_fatal(folder: Path) -> None:
    data = lab_data() | {
        key: [] for key in ("derivation", "labels", "overoptimisation", "sensitivity", "estimators")
    }
    data["methods"] = [method_data("PPO", "table", "mild", [])]
    data["methods"] += [method_data("DPO", "table", "elsewhere", [0.1])]
    data["methods"][1]["runs"][0].update(
        relative_gap=None, kl=None, reward=None, total_variation=None, seconds=None, path=[]
    )
    data["frontier"]["best_of_n"] = []
    data["best_of_n"] = {"world": "mild", "rows": [], "ideal": []}
    data["kl"].update(estimators=[], schulman=[], per_position=[])
    data["setting"].update(steps=[], z=[])
    text = text_of(html_of(folder, data))
    assert "no run" in text and "1 of 1 runs have no gap" in text


def test_hostile_text_is_never_markup(folder: Path) -> None:
    def poisoned(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {k: poisoned(v, k) for k, v in value.items()}
        if isinstance(value, list):
            return [poisoned(v, key) for v in value]
        return (
            HOSTILE + EVIL + value
            if isinstance(value, str) and key not in ("key", "world")
            else value
        )

    data = poisoned(lab_data())
    data["versions"] = {HOSTILE: EVIL}
    data["timings"] = {HOSTILE: 1.0}
    html = html_of(folder, data)
    assert (
        "<img" not in html
        and "<svg" not in html
        and "\u2028" not in html.split('id="data">')[1]
        and "<!--" not in html
    )
    assert html.count("<script") == html.count("</script>") == 3  # plotly, the data, our own
    assert "&lt;svg/onload=alert(2)&gt;" in html and "7*7" in html and "{{ 49 }}" not in html


def test_nothing_is_fetched_and_only_our_script_runs(folder: Path) -> None:
    html = html_of(folder, lab_data())
    links = re.findall(r"""(?:src|href|action|data)\s*=\s*["']([^"']*)["']""", html)
    assert links == ["plotly.min.js"]
    assert (
        "http" not in html.replace("http-equiv", "")
        and "@import" not in html
        and "url(" not in html
        and "innerHTML" not in html
    )
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', html)
    own = re.findall(r"<script>(.*?)</script>", html, re.S)
    assert policy and len(own) == 1 and "default-src &#39;none&#39;" in policy.group(1)
    assert base64.b64encode(hashlib.sha256(own[0].encode()).digest()).decode() in policy.group(1)


def test_plotly_stands_beside_the_page(tmp_path: Path) -> None:
    page = write_lab_page(tmp_path / "new", lab())
    assert (
        page == tmp_path / "new" / "index.html"
        and (tmp_path / "new" / "plotly.min.js").stat().st_size > 1_000_000
    )


# ---- the answer and the alarms


def told(*methods: dict[str, Any]) -> str:
    return lab_answer(lab(methods=list(methods)))[0]


def test_the_answer_is_no_stronger_than_the_seeds() -> None:
    first = lab_answer(lab())[0]
    assert "every seed of DPO ends closer" in first
    assert (
        "With a transformer: PPO 3.4% (3 seeds: 2.6% to 4.3%), DPO 3.8% (3 seeds: 2.1% to 4.9%); "
        "the seeds overlap" in first
    )
    apart = told(
        method_data("PPO", "table", "mild", [0.01, 0.02]),
        method_data("DPO", "table", "mild", [0.019, 0.03]),
    )
    assert "overlap" in apart and "every seed" not in apart
    single = told(
        method_data("PPO", "table", "mild", [0.01]), method_data("DPO", "table", "mild", [0.3, 0.4])
    )
    assert (
        "one seed does not show which ends closer" in single
        and "every seed" not in single
        and "(one seed)" in single
    )
    assert (
        told(method_data("PPO", "table", "mild", [0.0123]))
        == "On the mild world PPO with a table leaves 1.2% of the gap to the optimum (one seed)."
    )


def test_the_answer_tells_theory_and_proxies_as_they_came_out() -> None:
    rest = lab_answer(lab())[1]
    assert (
        "On the peaked world the gap left ranges from 8.7% (DPO with a table; one seed) to 35% "
        "(PPO with a table; one seed)." in rest
    )
    assert (
        "The 5 steps from the objective to DPO hold to 1e\u221215." in rest
        and "gives the optimum to 3e\u22128 nats" in rest
    )
    assert (
        "policies with the same loss are up to 0.338 in total variation" in rest
        and "turns over in 3 of 4 cases" in rest
    )
    data = lab_data()
    data["missing"]["starts"][1]["loss"] = 0.7  # not one loss: nothing is shown
    data["recovered"]["largest_logprob_error"] = 0.3
    data["derivation"][2]["difference"] = 0.04
    for one in data["overoptimisation"]:
        one["turns_over"] = False
    rest = lab_answer(typed(data))[1]
    assert (
        "same loss" not in rest
        and "ends up to 0.300 nats from the optimum" in rest
        and "do not all hold: they differ by up to 4e\u22122" in rest
    )
    assert "along none of the 4 proxies" in rest


def test_a_method_that_stops_short_is_an_alarm_with_its_cause() -> None:
    (alarm,) = lab_alarms(lab())
    assert alarm.startswith(
        "PPO with a table on the peaked world leaves 35% of the gap. It sampled"
    )
    (alarm,) = lab_alarms(lab(methods=[method_data("DPO", "table", "mild", [0.5, 0.1, 0.21])]))
    assert "leaves 50% of the gap in 2 of 3 seeds. The cause was not measured." in alarm
    assert lab_alarms(lab(methods=[method_data("DPO", "table", "mild", [0.01, 0.1, 0.19])])) == []


def test_what_cannot_be_is_an_alarm() -> None:
    assert (
        "ends above the optimum (\u22121.0%)"
        in lab_alarms(lab(methods=[method_data("DPO", "table", "mild", [-0.01])]))[0]
    )
    method = method_data("DPO", "table", "mild", [0.01])
    method["runs"][0]["reward"] += 0.2
    assert "ends above the frontier" in lab_alarms(lab(methods=[method]))[0]
    data = lab_data() | {"methods": None}
    data["derivation"][1]["difference"] = 0.01
    data["best_of_n"]["rows"][0]["kl"] = 0.2
    found = lab_alarms(
        typed(data),
        [("The formula 'x'", 0.5), ("The formula 'y'", 1e-12), ("The formula 'z'", math.nan)],
    )
    assert (
        len(found) == 4
        and "'Title of partition' does not hold: its sides differ by 0.0100" in found[0]
    )
    assert (
        "'x'" in found[1]
        and "'z'" in found[2]
        and "Best of 2 has a KL of 0.200 nats, above its bound 0.193" in found[3]
    )


# ---- formulas


def test_every_formula_of_the_setting_holds_in_the_arithmetic_world() -> None:
    found = identities(lab().setting)  # type: ignore[arg-type]
    assert len(found) == 9 and {i.formula for i in found} <= set(FORMULAS)
    assert max(i.difference or 0.0 for i in found) < 1e-12


@pytest.mark.parametrize(
    ("field", "broken"),
    [
        ("probability", {"chain", "optimal_policy"}),
        ("sum_log_ratio", {"log_ratio", "reward"}),
        ("kl", {"optimum_objective"}),
        ("reward", {"optimal_policy", "reward"}),
        ("objective", {"optimum_objective", "optimum_partition"}),
        ("probabilities_sum", {"sums"}),
        ("expected_reward", {"optimum_objective"}),
        ("q", {"advantage"}),
        ("ref", {"chain"}),
    ],
)
def test_a_wrong_number_breaks_its_formulas_and_no_other(field: str, broken: set[str]) -> None:
    data = setting_data()
    place = data if field in data else data["steps"][1]
    place[field] += 0.01
    found = identities(lab(setting=data).setting)  # type: ignore[arg-type]
    assert {i.formula for i in found if (i.difference or 0.0) > 1e-6} == broken


def test_formulas_are_well_formed_and_cover_the_derivation() -> None:
    for name, tex in FORMULAS.items():
        root = ET.fromstring(f"<div>{formula(tex)}</div>")
        assert root.findall(".//math") and not root.findall(".//merror"), name
        assert "\\" not in "".join(root.itertext()) and "None" not in "".join(root.itertext()), name
    assert {"objective", "partition", "optimal_policy", "reward", "cancels"} <= set(FORMULAS)


def test_the_little_notation() -> None:
    def inner(tex: str) -> str:
        return re.sub(
            r"</?math[^>]*>|</?mrow>| (?:form|lspace|rspace|stretchy|mathvariant)=\"[^\"]*\"",
            "",
            str(mathml(tex)),
        )

    assert inner(r"\pi_\ref^*") == "<msubsup><mi>π</mi><mi>ref</mi><mo>\u2217</mo></msubsup>"
    assert (
        inner(r"\sum_y x^{2a}")
        == "<munder><mo>∑</mo><mi>y</mi></munder><msup><mi>x</mi><mn>2</mn><mi>a</mi></msup>"
    )
    assert (
        inner(r"\frac{1}{Z} < \sqrt{x}")
        == "<mfrac><mn>1</mn><mi>Z</mi></mfrac><mo>&lt;</mo><msqrt><mi>x</mi></msqrt>"
    )
    assert 'alttext="a &lt; &#34;b&#34;"' in str(mathml('a < "b"'))
    for wrong in (r"\pie", r"\frac{1", "{a", r"\sqrt x"):
        with pytest.raises(ValueError, match="formula"):
            mathml(wrong)


@pytest.mark.parametrize(
    ("x", "text"),
    [
        (0.352, "35%"),
        (0.0212, "2.1%"),
        (0.0048, "0.48%"),
        (0.00043, "0.043%"),
        (1e-9, "under 0.001%"),
        (0.0, "0%"),
        (12.5, "1,250%"),
        (-0.02, "\u22122.0%"),
        (None, "not measured"),
        (math.inf, "not finite"),
    ],
)
def test_shares_of_the_gap(x: float | None, text: str) -> None:
    assert share(x) == text


@pytest.mark.parametrize(
    ("x", "text"),
    [
        (0.1234567, "0.123457"),
        (-1.5, "\u22121.50000"),
        (0, "0"),
        (1.5e-17, "1.50e\u221217"),
        (123456.0, "123456"),
        (None, "\u2014"),
    ],
)
def test_sides_carry_six_digits(x: float | None, text: str) -> None:
    assert side(x) == text


# ---- pictures


def test_the_frontier_shows_the_median_seed_of_each_method_below_the_curve() -> None:
    data = lab()
    found = frontier_figures(data)[0]
    named = {s["name"]: s for s in found["series"]}
    assert (
        list(named)[:3] == ["frontier", "J of the optimum (slope β = 0.5)", "best of n"]
        and list(named)[-1] == "optimum"
    )
    ppo = next(m for m in data.methods or [] if m.name == "PPO")
    best = middle(ppo.runs)
    assert (
        best is not None
        and best.relative_gap == 0.021
        and named["PPO, table"]["y"][-1] == best.reward
    )
    assert (
        named["PPO, table"]["color"]
        == named["PPO, transformer"]["color"]
        != named["DPO, table"]["color"]
    )
    assert (named["PPO, table"]["dash"], named["PPO, transformer"]["dash"]) == ("solid", "dash")
    line = named["J of the optimum (slope β = 0.5)"]
    optimum_kl, optimum_reward = named["optimum"]["x"][0], named["optimum"]["y"][0]
    assert line["y"][0] + BETA * optimum_kl == pytest.approx(
        optimum_reward
    )  # the tangent goes through the optimum
    assert all(
        found["xrange"][0] < x < found["xrange"][1] for s in found["series"][2:] for x in s["x"]
    )
    assert all(
        found["range"][0] < y < found["range"][1] for s in found["series"][2:] for y in s["y"]
    )
    assert "within 3.8% of the optimum" in found["title"]


def test_gap_pictures_share_their_axis_and_show_every_seed() -> None:
    found = gap_figures(lab())
    assert [f["x"] for f in found] == [
        "responses sampled",
        "step of the method",
        "step of the method",
    ]
    assert len({tuple(f["range"]) for f in found}) == 1 and all(f["ylog"] for f in found)
    mild = found[1]["series"]
    assert len(mild) == 12 and sum(not s["faint"] for s in mild) == 4
    none_left = gap_figures(lab(methods=[method_data("DPO", "table", "mild", [0.0])]))
    assert all(
        y > 0 for f in none_left for s in f["series"] for y in s["y"]
    )  # a logarithm knows no 0


def test_heat_maps_keep_their_numbers_in_the_cells() -> None:
    ppo, dpo = (heat_figure(s) for s in lab().sensitivity or [])
    assert (
        ppo["title"]
        == "PPO with a table leaves 5% or less in 2 of 11 cells; least at learning rate 0.003, "
        "β 1 (0.93%)"
    )
    assert ppo["text"][2] == ["52%", "13%", "0.93%", ""] and ppo["z"][2][3] is None
    assert (
        dpo["z"][2][3] == 0 and dpo["z"][1][3] == -3 and dpo["text"][2][3] == "134%"
    )  # colours end at the scale's ends, numbers do not
    assert ppo["columns"] == ["0.0003", "0.001", "0.003", "0.01"] and ppo["rows"] == [
        "0.1",
        "0.5",
        "1",
    ]


def test_proxies_are_dashed_gold_is_solid_and_drawn_scores_share_axes() -> None:
    found = proxy_figures(lab().overoptimisation or [])
    assert [[s["dash"] for s in f["series"][:2]] for f in found] == [["dash", "solid"]] * 4
    assert (
        found[0]["range"] == found[1]["range"] == found[2]["range"]
        and found[0]["xrange"] == found[2]["xrange"]
    )
    assert (
        "does not turn over" in found[0]["title"]
        and "peaks at 1.07 and ends at \u22120.0540" in found[2]["title"]
    )
    data = lab_data()["overoptimisation"]
    data[1]["error"] = [0.01] * 28
    band = proxy_figures(lab(overoptimisation=data).overoptimisation or [])[1]["series"][1]
    assert band["high"][5] - band["low"][5] == pytest.approx(2 * 1.96 * 0.01)


def test_best_of_n_says_how_far_the_bound_is() -> None:
    found = best_of_n_figure(lab().best_of_n)  # type: ignore[arg-type]
    assert (
        found["title"] == "At n = 64 the exact KL is 1.75 nats and the bound is 3.17"
        and found["xlog"]
    )
    assert [t[0] for t in zip(*found["xticks"], strict=True)] == [2, 4, 8, 16, 64]


def test_the_estimator_behind_a_method_is_the_one_it_names(folder: Path) -> None:
    data = lab_data()
    for m in data["methods"]:
        m["estimator"] = "GRPO, divided by the deviation" if m["name"] == "PPO" else "no such row"
    html = html_of(folder, data)
    table = html.split("Its gradient")[1].split("</table>")[0]
    assert "0.174; 21.9" in table and "8.41" not in table and table.count("GRPO") == 3
    assert "Its gradient" not in html_of(folder, {**lab_data(), "estimators": None})
    data = lab_data()
    data["estimators"].append(
        {**data["estimators"][0], "name": "PPO's surrogate, lambda 0.95", "variance": 12.3}
    )
    table = html_of(folder, data).split("Its gradient")[1].split("</table>")[0]
    assert (
        "PPO&#39;s surrogate" not in table and "DPO on pairs" in table
    )  # of several it is not known which


def test_runs_of_another_seeds_world_stay_out_of_this_worlds_picture(folder: Path) -> None:
    method = method_data("PPO", "table", "mild", [0.01, 0.02, 0.03])
    for step in method["runs"][1]["path"]:
        step["reward"] += 5.0
    method["runs"][1]["reward"] += 5.0  # above this frontier, but that is not its frontier
    data = lab(methods=[method])
    (line,) = [s for s in frontier_figures(data)[0]["series"] if s["name"] == "PPO, table"]
    assert line["y"][-1] == method["runs"][2]["reward"] and lab_alarms(data) == []
    assert "optimum 0.741" not in html_of(folder, {**lab_data(), "methods": [method]})
    method["runs"][1]["kl_optimum"] = 0.876
    assert "optimum 0.876" in html_of(folder, {**lab_data(), "methods": [method]})


def test_a_trained_path_is_drawn_only_from_where_the_curve_begins() -> None:
    data = lab_data()["overoptimisation"]
    data[3]["path"] = {"kl": [0.0, 1.0], "proxy": [0.0, 1.7], "gold": [0.0, 1.2]}
    found = proxy_figures(lab(overoptimisation=data).overoptimisation or [])[3]
    assert [(s["name"], s["dash"]) for s in found["series"][2:4]] == [
        ("PPO, proxy", "dash"),
        ("PPO, true reward", "solid"),
    ]
    data[3]["path"]["gold"] = [2.0, 3.2]
    wrong = lab(overoptimisation=data, methods=None)
    assert len(proxy_figures(wrong.overoptimisation or [])[3]["series"]) == 3
    assert lab_alarms(wrong) == [
        "A world with an exploit: the trained policy does not begin where the curve does, so it is "
        "not drawn."
    ]


def test_a_cause_is_told_even_where_it_is_no_alarm(folder: Path) -> None:
    data = lab_data() | {
        "methods": [method_data("PPO", "table", "mild", [0.08], "It stopped early.")]
    }
    text = text_of(html_of(folder, data))
    assert "PPO, table, mild, 8.0% left: It stopped early." in text and "alarm" not in text


# ---- sequences as arms, rewards for steps, credit


def sparse_methods() -> list[dict[str, Any]]:
    """PPO and RLOO in a third world, each with rewards for steps too; and one baseline that never
    comes near.
    """
    out = []
    for key, name, ends in (
        ("ppo", "PPO", [0.01, 0.02]),
        ("rloo", "RLOO", [0.03, 0.04]),
        ("remax", "ReMax", [0.3, 0.05]),
        ("ppo_steps", "PPO, process rewards", [0.01, 0.02]),
        ("rloo_steps", "RLOO, process rewards", [0.03, 0.04]),
    ):
        one = method_data("PPO", "table", "long", ends)
        for run in one["runs"]:
            for step in run["path"]:
                step["samples"] += 2000 if key.endswith("_steps") else 0
        out.append({**one, "method": key, "name": name})
    return out


def change_data(name: str, gap: float, distance: float) -> dict[str, Any]:
    return {
        "name": name,
        "words": f"Words of {name}.",
        "relative_gap": gap,
        "total_variation": 0.123,
        "nearest": "forward KL",
        "distance": distance,
        "cut": 0.2468,
        "cut_optimum": 0.4037,
        "seed": 5,
    }


def credit_data() -> dict[str, Any]:
    methods = {
        "rloo": [0.11] * 3,
        "ppo": [0.1, 0.2, -0.3],
        "perfect": [0.0, 0.1, 0.2],
        "rloo_steps": [0.3, 0.2, 0.1],
        "remax": [5.0] * 3,
    }
    told = {"decisive": [1, 2], "probability": 0.05, "methods": methods}
    return {
        "world": "long",
        "prompt": "b",
        "step": 6,
        "samples": 1536,
        "responses": [
            {**told, "response": "abb", "right": True, "changed": [], "exact": [0.01, 0.02, 0.4]},
            {
                **told,
                "response": "aba",
                "right": False,
                "changed": [2],
                "exact": [0.01, 0.02, -0.6],
            },
        ],
        "rows": [
            {
                "key": "rloo",
                "name": "RLOO",
                "words": "The same for every token.",
                "correlation": 0.363,
                "relative_error": 2.57,
                "variance": 7.58,
            }
        ],
    }


def test_both_answers_to_sparse_reward_and_credit_are_on_the_page(folder: Path) -> None:
    parts = [change_data("one part", 0.1377, 0.01), change_data("another", 0.1128, 0.2)]
    data = lab_data() | {
        "parts": parts,
        "lengths": [change_data("masked", 0.3793, 0.2)],
        "credit": credit_data(),
    }
    data["methods"] += sparse_methods()
    html = html_of(folder, data)
    text = text_of(html)
    wanted = [
        "What GRPO's parts cost",
        "Words of one part.",
        "14%",
        "forward KL 0.0100 from it",
        "none of the known ones nearest: forward KL, 0.200 away",
        "Seed 5",
        "Both ways in practice",
        "not in every seed",
        "Which token gets the credit",
        "after 1,536 responses",
        "wrong by one token",
        "0.363",
        "2.57",
        "7.58",
        "38%",
        "0.247",
        "where 40% of the optimum's responses are truncated",
    ]
    assert [one for one in wanted if one not in text.replace("&#39;", "'")] == []
    figures = page_data(html)["figures"]
    assert {"arms0", "arms1", "credit0", "credit1"} <= set(figures) and set(
        re.findall(r'data-figure="(\w+)"', html)
    ) == set(figures)
    assert not any(
        "long world" in f["title"] for name, f in figures.items() if name.startswith("gap")
    )  # it has pictures of its own
    exact = next(s for s in figures["credit1"]["series"] if s["name"].startswith("exact"))
    assert exact["y"] == [0.01, 0.02, -0.6] and figures["credit1"]["xticks"][1] == ["a", "b*", "a*"]
    assert (
        "token 3 of aba deserves the most blame, \u22120.600" in figures["credit1"]["title"]
        and figures["credit0"]["range"] == figures["credit1"]["range"]
    )
    assert (
        max(y for s in figures["credit0"]["series"] for y in s["y"]) < 1
    )  # ReMax stands in the table alone


def test_samples_are_counted_until_the_gap_stays_small() -> None:
    found = lab(methods=sparse_methods()).methods or []
    by = {m.method: samples_needed(m) for m in found}
    # the gap goes as end^(i / 12): a tenth is reached at i = 12 log 0.1 / log end
    expected = [
        122_880 * math.ceil(12 * math.log(0.1) / math.log(end)) // 12 for end in (0.01, 0.02)
    ]
    assert (
        by["ppo"] == expected
        and by["ppo_steps"] == [n + 2000 for n in expected]
        and by["remax"] is None
    )
    back = sparse_methods()[0]
    back["runs"][0]["path"][9]["relative_gap"] = 0.5  # it came near, and left
    assert (samples_needed(lab(methods=[back]).methods[0]) or [0])[0] == 122_880 * 10 // 12  # type: ignore[index]


def test_the_answer_on_sparse_reward_orders_only_what_the_seeds_order() -> None:
    told = lab_answer(lab(methods=[*lab_data()["methods"], *sparse_methods()]))[1]
    assert (
        "PPO needs 61,440 to 81,920 sampled responses to close 90% of the gap (its seeds overlap "
        "those of others)" in told
    )
    assert (
        "RLOO 81,920 to 92,160; counting those that the process reward model was trained on: PPO, "
        "process rewards 63,440 to 83,920" in told
    )
    apart = sparse_methods()
    apart[0] = method_data("PPO", "table", "long", [0.0001, 0.0001])
    alone = [m for m in apart if m["method"] in ("ppo", "rloo_steps")]
    assert lab_answer(lab(methods=alone))[1].count("PPO") == 1
    assert "(the fewest in every seed)" in lab_answer(lab(methods=apart))[1]


def test_many_methods_are_told_by_how_many_come_close_and_who_does_not() -> None:
    many = [
        {**method_data("PPO", "table", "mild", [0.01, 0.02]), "method": k, "name": n}
        for k, n in (("rloo", "RLOO"), ("remax", "ReMax"), ("dapo", "DAPO"), ("gspo", "GSPO"))
    ]
    far = {**method_data("PPO", "table", "mild", [0.14, 0.25]), "method": "grpo", "name": "GRPO"}
    first = lab_answer(lab(methods=[*many, far]))[0]
    assert (
        "4 of 5 methods leave 2.0% of the gap or less in every seed" in first
        and "the others leave: GRPO 20% (2 seeds: 14% to 25%)" in first
    )
    titles = [f["title"] for f in frontier_figures(lab(methods=[*many, far]))]
    assert any("methods except GRPO" in t for t in titles)


def test_no_picture_has_two_methods_of_one_colour_and_every_method_has_a_picture() -> None:
    keys = (
        "dpo",
        "ppo",
        "rloo",
        "grpo",
        "reinforce_none",
        "reinforce_mean",
        "remax",
        "reinforce_pp",
        "dr_grpo",
        "dapo",
        "gspo",
        "cispo",
    )
    methods = [
        {**method_data("PPO", "table", "mild", [0.01]), "method": k, "name": k} for k in keys
    ]
    data = lab(methods=[*methods, *sparse_methods()])
    drawn = set()
    for one in [*frontier_figures(data), *gap_figures(data), *sparse_figures(data)]:
        own = {(s["name"], s["color"]) for s in one["series"] if s["name"].endswith(", table")}
        assert len({c for _, c in own}) == len({n for n, _ in own}) < 8, one["title"]
        drawn |= {n for n, _ in own}
    assert drawn >= {f"{k}, table" for k in keys}
