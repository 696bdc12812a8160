"""The registry of metrics: every entry says what it is, and it holds exactly what runs write."""

import json
from pathlib import Path

import pytest

from fiducial import verbs
from fiducial.cli import main
from fiducial.metric import GROUPS
from fiducial.metrics import METRICS, entry, known, lookup
from support import BAD, GOOD, PROMPTS, write_jsonl

COLUMNS = {"step", "seconds"}
"""What stands in a row of metrics.jsonl beside the metrics."""
REWARD = """
def score(completions, **columns):
    return [c.count("e") + len(c) / 10 for c in completions]

def length(completions, **columns):
    return [None if i == 0 else float(len(c)) for i, c in enumerate(completions)]
"""
COMMON = "--steps 1 --learning-rate 1e-2 --batch-size 4 --run.samples 1 --run.checkpoint-every 0"
OFFLINE = f"{COMMON} --rows.held-out 0.3"
SAMPLED = f"{COMMON} --data {{data}}/prompts.jsonl --max-new-tokens 4"
ONLINE = f"{SAMPLED} --reward {{data}}/reward.py:score"
RUNS: dict[str, tuple[str, str]] = {
    "sft": ("sft", f"{OFFLINE} --data {{data}}/completions.jsonl --max-new-tokens 4"),
    "reward": ("reward", f"{OFFLINE} --data {{data}}/pairs.jsonl"),
    "prm": ("prm", f"{OFFLINE} --data {{data}}/steps.jsonl"),
    "ppo": (
        "ppo",
        f"{ONLINE} {{data}}/reward.py:length --ptx.data {{data}}/texts.jsonl "
        "--score.normalise first",
    ),
    "reinforce": (
        "reinforce",
        f"{ONLINE} {{out}}/reward/model --group-size 2 --long.correction tis",
    ),
    "grpo": ("grpo", f"{ONLINE} --group-size 2"),
    "gspo": ("grpo", f"{ONLINE} --group-size 2 --variant gspo"),
    "cispo": ("grpo", f"{ONLINE} --group-size 2 --variant cispo"),
    "dpo": ("dpo", f"{OFFLINE} --data {{data}}/pairs.jsonl --max-new-tokens 4"),
    "distill": ("distill", f"{SAMPLED} --teacher {{teacher}} --eval-samples 2"),
}
"""By a name: the verb and its flags. All eight methods, with what makes them write all they can."""


@pytest.fixture(scope="module")
def written(
    models: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, set[str]]:
    """The names of the metrics of every run."""
    data, out = tmp_path_factory.mktemp("rows"), tmp_path_factory.mktemp("runs")
    (data / "reward.py").write_text(REWARD)
    triples = list(zip(PROMPTS, GOOD, BAD, strict=True))
    write_jsonl(data / "texts.jsonl", ({"text": p + g} for p, g, _ in triples))
    write_jsonl(data / "prompts.jsonl", ({"prompt": p} for p in PROMPTS))
    write_jsonl(data / "completions.jsonl", ({"prompt": p, "completion": g} for p, g, _ in triples))
    write_jsonl(
        data / "pairs.jsonl", ({"prompt": p, "chosen": g, "rejected": b} for p, g, b in triples)
    )
    steps = ({"prompt": p, "completions": [g, b], "labels": [True, False]} for p, g, b in triples)
    write_jsonl(data / "steps.jsonl", steps)
    found: dict[str, set[str]] = {}
    for name, (verb, flags) in RUNS.items():
        arguments = flags.format(data=data, teacher=models["gpt2"], out=out).split()
        folder = out / name
        assert main([verb, *arguments, "--model", models["gpt2"], "--out", str(folder)]) == 0, name
        found[name] = names(folder)
    return found


def names(run: Path) -> set[str]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {name for row in rows for name in row} - COLUMNS


IN_NEED = {"skipped_updates"}
"""What no healthy run writes; tests/train/test_survival.py has a run that does."""


def test_every_method_is_run() -> None:
    assert {verb for verb, _ in RUNS.values()} == {method.name for method in verbs.METHODS}


def test_what_runs_write_is_in_the_registry(written: dict[str, set[str]]) -> None:
    unknown = {run: [n for n in found if not known(n)] for run, found in written.items()}
    assert {run: found for run, found in unknown.items() if found} == {}


def test_what_is_in_the_registry_some_run_writes(written: dict[str, set[str]]) -> None:
    everything = {entry(name) for found in written.values() for name in found}
    assert set(METRICS) - everything == IN_NEED


def test_every_method_writes_the_metrics_that_decide_it(written: dict[str, set[str]]) -> None:
    missing = {m.name: set(m.decides) - written[m.name] for m in verbs.METHODS}
    assert {name: found for name, found in missing.items() if found} == {}


def test_every_metric_says_what_it_is_and_what_to_do() -> None:
    for name, metric in METRICS.items():
        assert metric.title and metric.group in GROUPS and metric.sentence.endswith("."), name
        assert len(metric.sentence) > 60 and "  " not in metric.sentence, name
        assert metric.healthy is None or metric.healthy != (None, None), name
    assert METRICS["ratio/first"].healthy == (0.999, 1.001)


def test_lookup_knows_held_out_and_unknown_names() -> None:
    assert lookup("eval/rewards/accuracies").title == "Preference accuracy, held out"
    assert lookup("eval/accuracy").healthy == METRICS["accuracy"].healthy
    assert lookup("my/own").title == "my/own" and lookup("my/own").healthy is None
    assert not known("my/own")


def test_each_of_several_rewards_has_the_name_that_its_user_gave() -> None:
    assert lookup("reward/gold").title == "Reward: gold" and known("reward/gold")
    assert lookup("reward/gold").sentence == METRICS["reward/<name>"].sentence
