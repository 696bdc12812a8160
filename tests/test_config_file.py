"""Settings that are nonsense are refused in one sentence, whether a flag or a file gives them."""

import pytest

from fiducial import verbs
from fiducial.config_file import dump_yaml
from fiducial.errors import InputError
from fiducial.parse import parse

GIVEN = {
    "sft": "--model m --data rows",
    "dpo": "--model m --data rows",
    "ppo": "--model m --data rows --reward length",
    "grpo": "--model m --data rows --reward length",
}
FLAGS = [
    ("ppo", "--seed -1", "--seed: input should be greater than or equal to 0, not -1"),
    ("ppo", "--seed 18446744073709551616", "--seed: input should be less than 9223372036854775808"),
    ("sft", "--optimizer.betas 1 1", "--optimizer.betas: input should be less than 1, not 1"),
    ("sft", "--optimizer.betas 0.9 -1", "--optimizer.betas: input should be greater than or equal"),
    ("sft", "--optimizer.betas nan nan", "--optimizer.betas: input should be a finite number"),
    ("sft", "--run.timeout-minutes inf", "--run.timeout-minutes: input should be a finite number"),
    ("sft", "--run.timeout-minutes 1e9", "--run.timeout-minutes: input should be less than or"),
    ("sft", "--learning-rate inf", "--learning-rate: input should be a finite number, not inf"),
    ("ppo", "--beta inf", "--beta: input should be a finite number, not inf"),
    ("ppo", "--reward-weights nan", "--reward-weights: input should be a finite number, not nan"),
    ("ppo", "--ptx.coefficient inf", "--ptx.coefficient: input should be a finite number"),
    ("sft", "--optimizer.weight-decay inf", "--optimizer.weight-decay: input should be a finite"),
    ("ppo", "--temperature inf", "--temperature: input should be a finite number, not inf"),
    ("sft", "--optimizer.eps inf", "--optimizer.eps: input should be a finite number, not inf"),
    ("sft", "--lora.alpha 0", "--lora.alpha: input should be greater than 0, not 0"),
    ("sft", "--lora.target-modules q_proj", "--lora.target-modules without --lora.r"),
    ("sft", "--steps 3 --epochs 2", "--steps 3 and --epochs 2: give one of them"),
    ("dpo", "--steps 3 --epochs 2", "--steps 3 and --epochs 2: give one of them"),
    ("grpo", "--minibatches 1000 --batch-size 8", "--minibatches 1000 of a --batch-size of 8"),
    ("ppo", "--minibatches 1000 --batch-size 4", "--minibatches 1000 of a --batch-size of 4"),
    ("sft", f"--learning-rate {'x' * 5000}", r"not x{80}\.\.\. \(5,000 characters\)$"),
]
FILES = [
    ("steps: true", "steps: input should be a number, not True"),
    (
        "run: {tokens: true}",
        "--run.tokens: input should be a whole number above 0, or auto",
    ),
    (
        "run: {tokens: most}",
        "--run.tokens: input should be a whole number above 0, or auto",
    ),
    ("run: {memory_gb: true}", "--run.memory-gb: input should be a number, not True"),
    ("steps: 1:00", "steps: expected a number, not the text '1:00'"),
    ("seed: 2020-99-99", "seed: expected a number, not the text '2020-99-99'"),
    ('steps: "2"', "steps: expected a number, not the text '2'"),
    ('optimizer:\n  eps: "2"', "optimizer.eps: expected a number, not the text '2'"),
    ("steps: 2\nseed: 1\nsteps: 3", r"run.yaml:3: not YAML: steps is given twice"),
    ("run:\n  tokens: 2\n  tokens: 3", r"run.yaml:3: not YAML: tokens is given twice"),
    ("run:", "run is a section: write its settings below it"),
    ("run: x", "run is a section: write its settings below it"),
    ("run: [1]", "run is a section: write its settings below it"),
    ("method: ppo", "these are the settings of ppo, and this command is sft"),
    ("model: &a m\ndata: *a", r"run.yaml:2: not YAML: the alias \*a: write the value out"),
    ("learning_rate: .inf", "--learning-rate: input should be a finite number"),
    ("steps: " + "[" * 5000, "nested too deeply"),
    ("{" * 3, "run.yaml:1: not YAML"),
    ("? [a, b]\n: 1", "run.yaml:1: not YAML"),
    ("steps: 2\n\x00", "not YAML"),
]


@pytest.mark.parametrize(
    ("verb", "words", "said"), FLAGS, ids=[f"{v} {w[:40]}" for v, w, _ in FLAGS]
)
def test_a_flag_s_nonsense_is_refused(verb, words, said):
    cls = verbs.resolve(verbs.verbs()[verb].settings)
    with pytest.raises(InputError, match=said) as refused:
        parse(cls, [*GIVEN[verb].split(), *words.split()], command=verb)
    assert len(str(refused.value)) < 400 and "\n" not in str(refused.value)


@pytest.mark.parametrize(("text", "said"), FILES, ids=[t[:30] for t, _ in FILES])
def test_a_file_s_nonsense_is_refused(tmp_path, text, said):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    cls = verbs.resolve(verbs.verbs()["sft"].settings)
    with pytest.raises(InputError, match=said) as refused:
        parse(cls, [*GIVEN["sft"].split(), "--config", str(file)], command="sft")
    assert str(file) in str(refused.value)
    assert len(str(refused.value)) < 400 and "\n" not in str(refused.value)


def test_an_alias_bomb_costs_nothing(tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 10)}]" for k in range(1, 12)]
    file = tmp_path / "run.yaml"
    file.write_text("\n".join(lines))
    cls = verbs.resolve(verbs.verbs()["sft"].settings)
    with pytest.raises(InputError, match=r"run.yaml:2: not YAML: the alias \*a0"):
        parse(cls, [*GIVEN["sft"].split(), "--config", str(file)], command="sft")


@pytest.mark.parametrize("verb", ["sft", "dpo", "reward", "ppo", "reinforce", "grpo", "distill"])
def test_what_a_run_writes_is_read_back(tmp_path, verb):
    words = [
        "--model",
        "m",
        "--data",
        "rows",
        "--learning-rate",
        "1e-5",
        "--seed",
        "3",
        "--out",
        "1:00",
        "--lora.r",
        "2",
    ]
    words += ["--reward", "length"] if verb in ("ppo", "reinforce", "grpo") else []
    words += ["--teacher", "yes"] if verb == "distill" else []
    cls = verbs.resolve(verbs.verbs()[verb].settings)
    settings = parse(cls, words, command=verb)
    file = tmp_path / "run.yaml"
    file.write_text(dump_yaml(settings, verb))
    assert parse(cls, ["--config", str(file)], command=verb) == settings
