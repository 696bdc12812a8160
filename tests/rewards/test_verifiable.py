"""Rewards that anyone can verify: cases worked by hand, hostile ones, real solutions with their
labels, and the way from a row's column to a run.
"""

import json
import math
import random
import subprocess
import sys
from fractions import Fraction

import pytest

import fiducial as fd
from fiducial.data.row_types import PromptRow
from fiducial.errors import InputError, RunError
from fiducial.rewards.function import FunctionReward
from fiducial.rewards.load import load_reward, load_rewards
from fiducial.rewards.types import Responses
from fiducial.rewards.verifiable import (
    VERIFIABLE,
    ColumnFault,
    exact_match,
    final_number,
    format,
    length,
    numeric_answer,
)
from fiducial.settings import OptimizerSettings, RunSettings
from fiducial.train.processes import Processes
from fiducial.use.collect import Collect, collect
from fiducial.use.generate import Generate, generate
from support import ROOT, write_jsonl

SHARED = ROOT.parent / "shared" / "data" / "gsm8k"


# ---- the final number ----


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("A: 26", 26),
        ("So 16 - 3 = 13 are left.\nShe makes 13 * 2 = $<<13*2=26>>26\nA: 26", 26),
        ("9 * 2 = 18\n#### 18", 18),
        ("#### 1,450,000", 1_450_000),
        (r"Thus the result is \boxed{7}.", 7),
        (r"\boxed{\frac{3}{4}}", Fraction(3, 4)),
        (r"\boxed{\dfrac{-3}{4}} is it, not 5", Fraction(-3, 4)),
        (r"$-\tfrac{ 1 }{ 2 }$", Fraction(-1, 2)),
        (r"\boxed{\boxed{5}}", 5),
        (r"\boxed{\text{about } 12{,}500\%} of 9", 12_500),
        (r"\boxed{x = \frac{1}{2}} and 3", Fraction(1, 2)),
        ("The answer is 18 eggs of the 24.", 18),
        ("the ANSWER IS: $18.50.", Fraction(37, 2)),
        ("**Answer:** 18, from 2 hens", 18),
        ("<think>7 or 8?</think><answer>\n 42\n</answer> 9", 42),
        ("A: 5\nQ: what next?\nA: 6\n", 6),
        ("A:\n\n 7 eggs of 9", 7),
        ("The answer is 9 * 2 = $18.", 18),
        ("A: 5 + 13 = 17 + 1 = 18", 18),
        ("The answer is 18 because 16 - 7 = 9", 18),
        ("A: 18\nI hope the answer is helpful", 18),
        ("A: none of 7 works\nso we say 8", 7),
        ("no marker: 12 and then 3.50 in all.", Fraction(7, 2)),
        ("FAQ: 3 then 4", 4),
        ("A: -5", -5),
        ("A: \u22125", -5),
        ("A: -$5", -5),
        ("A: $-5", -5),
        ("A: +5", 5),
        ("x = -5.", -5),
        ("16-3", 3),
        ("(16)-3", 3),
        ("range--3", 3),
        ("A: .5", Fraction(1, 2)),
        ("A: 5.", 5),
        ("A: $.50", Fraction(1, 2)),
        ("A: 0.10", Fraction(1, 10)),
        ("A: 3/4", Fraction(3, 4)),
        ("A: 3 / 4", Fraction(3, 4)),
        ("A: 1 3/4", Fraction(7, 4)),
        (r"A: -1\frac{1}{2}", Fraction(-3, 2)),
        ("A: 1.5/2", Fraction(3, 4)),
        ("A: 1.5e-3", Fraction(3, 2000)),
        ("A: 2E3", 2000),
        (r"A: 2.5 \times 10^{3}", 2500),
        ("A: 2.5 \u00d7 10^-1", Fraction(1, 4)),
        ("A: 50%", 50),
        ("A: 12 %", 12),
        ("A: 7.5kg", Fraction(15, 2)),
        ("A: 1,2345", 1),
        ("1,234,56", 56),
        ("1,23", 23),
        ("A: \u0661\u0668", 18),
        ("A: \uff11\uff18", 18),
        ("A: 10\u00b2", 10),
        ("共有18个", 18),
        ("CO2", None),
        ("", None),
        ("A:", None),
        (r"\boxed{", None),
        (r"\boxed{}", None),
        ("A: x1", None),
        ("eighteen", None),
        ("1/0", None),
        ("A: 1/0", None),
        (r"18 \frac{1}{0}", None),
        ("A: 5/.0", None),
        ("1e999999999", None),
        ("18, no, 1e-999999999", None),
        ("A: 1e" + "9" * 9999, None),
        ("9" * 100_000, None),
        ("0." + "3" * 100_000, None),
        ("A: 1e1000", 10**1000),
        ("A: 1e1001", None),
        ("A: inf", None),
        ("nan", None),
        ("A: 5_000", 5),
    ],
)
def test_the_final_number_by_hand(text, number):
    assert final_number(text) == number


def test_what_is_right_is_right_exactly_and_no_float_is_between():
    cases = [
        ("A: 0.1", "1/10", 1),
        ("A: 0.3333333333333333", "1/3", 0),
        ("A: 10000000000000001", 10**16, 0),
        ("A: 0.30", 0.3, 1),
        ("A: 3e-1", 0.1 + 0.2, 0),
        ("A: 26.000", "26", 1),
        ("A: -0", 0, 1),
        ("A: 1e1000", "10e999", 1),
        ("A: 18", "... 9 * 2 = 18\n#### 18", 1),
        ("A: 72", "72 cm^2", 1),
    ]
    assert numeric_answer(
        [""] * len(cases), [c for c, _, _ in cases], answer=[a for _, a, _ in cases]
    ) == [r for _, _, r in cases]


def test_a_written_fraction_is_read_back_whatever_its_form():
    rng = random.Random(0)
    for _ in range(500):
        whole, cents = rng.randrange(-(10 ** rng.randrange(1, 12)), 10**7), rng.randrange(100)
        value = Fraction(whole) + Fraction(cents, 100) * (1 if whole >= 0 else -1)
        forms = [
            f"{whole:,}.{cents:02}",
            f"{whole}.{cents:02}",
            f"{value.numerator}/{value.denominator}",
            f"{int(f'{whole}{cents:02}')}e-2",
            rf"\boxed{{\frac{{{value.numerator}}}{{{value.denominator}}}}}",
        ]
        if whole == 0:
            continue
        marker = rng.choice(["A: ", "so 17 and 3\n#### ", "the answer is $", "Answer: ", ""])
        assert {
            final_number(marker + f + rng.choice(["", ".", " eggs", "\nA:", "%"])) for f in forms
        } == {value}


ADVERSARIES = [
    "A:",
    "1,",
    ",111",
    "=",
    " ",
    "\\boxed{",
    "{",
    "9",
    "1 ",
    "1/",
    "1 1/",
    "<think>",
    "</think><answer>",
    "<",
    " </think>\n",
    "1 +",
    "$",
    "-",
    ".5",
    "1e",
    ".1,111",
    "1 x 10^{",
    "answer",
    "answer is",
    "*",
    "#",
    "\\frac{1",
    "\n",
    "answer ",
]
FRAMES = ("{}", "A: x{}", "<think>{}")


def test_no_text_makes_it_hang():
    """Texts of 20 kB, read in a child process that the kernel stops after 60 s of CPU time.

    CPU time and not wall time, so that a busy machine does not fail the test. The import is not
    counted. The timeout in wall time only guards against a child that waits without computing.
    """
    code = (
        "import resource, time\n"
        "from fiducial.rewards.verifiable import final_number, format\n"
        "limit = int(time.process_time()) + 60\n"
        "resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))\n"
        f"for text in {ADVERSARIES!r}:\n"
        f"    for frame in {FRAMES!r}:\n"
        "        hostile = frame.replace('{}', text * (20_000 // len(text)))\n"
        "        final_number(hostile), format([''], [hostile])\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=3600)


# ---- the other three ----


def test_exact_match_folds_white_space_and_nothing_else():
    right = [
        ("yes", "yes"),
        (" yes\n", "yes"),
        ("a  b\tc\n\nd", "a b c d"),
        ("18", 18),
        ("0.5", 0.5),
        ("", ""),
        ("x", "\u00a0x "),
    ]
    wrong = [
        ("Yes", "yes"),
        ("yes.", "yes"),
        ("18.0", 18),
        ("e\u0301", "\u00e9"),
        ("ab", "a b"),
        ("", "x"),
    ]
    for cases, reward in ((right, 1.0), (wrong, 0.0)):
        assert exact_match(
            [""] * len(cases), [c for c, _ in cases], answer=[a for _, a in cases]
        ) == [reward] * len(cases)


@pytest.mark.parametrize(
    ("text", "pattern", "reward"),
    [
        ("<think>a\nb</think><answer>5</answer>", None, 1),
        (" <think></think>\n\n<answer>5 < 6</answer>\n", None, 1),
        ("<think>a</think>", None, 0),
        ("<answer>5</answer><think>a</think>", None, 0),
        ("x<think>a</think><answer>5</answer>", None, 0),
        ("<think>a</think><answer>5</answer>x", None, 0),
        ("<think>a</think>x<answer>5</answer>", None, 0),
        ("<think>a<think>b</think><answer>5</answer>", None, 0),
        ("<think>a</think><answer>4</answer><answer>5</answer>", None, 0),
        ("<think>a <answer>4</answer></think><answer>5</answer>", None, 0),
        ("", None, 0),
        ("yes", "yes|no", 1),
        ("yes no", "yes|no", 0),
        ("a\nb", "a.b", 1),
        ("A", "a", 0),
        ("", "", 1),
    ],
)
def test_format_matches_the_whole_text(text, pattern, reward):
    assert format([""], [text], pattern=[pattern]) == [reward]
    if pattern is None:
        assert format([""], [text]) == [reward]


def test_length_counts_words_and_either_end_may_be_open():
    texts = ["", "one", "one  two\nthree", "a b c d"]
    assert length(texts, texts, min_words=[1] * 4, max_words=[3] * 4) == [0, 1, 1, 0]
    assert length(texts, texts, min_words=[3] * 4) == [0, 0, 1, 1]
    assert length(texts, texts, max_words=[0] * 4) == [1, 0, 0, 0]
    assert length(texts, texts, min_words=[None, 1, 3, 4], max_words=[0, None, 3, 4]) == [
        1,
        1,
        1,
        1,
    ]


def test_messages_are_read_as_text_is():
    def said(*texts):
        return [{"role": "assistant", "content": t} for t in texts]

    assert numeric_answer(
        [[]] * 4, [said("A: 5"), said("A: 5", "A: 6"), said(None), []], answer=["5"] * 4
    ) == [1, 0, 0, 0]
    assert exact_match([[]], [said("yes ")], answer=["yes"]) == [1]
    assert length([[]], [said("a b")], max_words=[2]) == [1]
    assert format([[]], [said("ab")], pattern=["a."]) == [1]


@pytest.mark.parametrize(
    ("name", "columns", "row", "said"),
    [
        ("numeric_answer", {}, 0, "numeric_answer needs the column 'answer'"),
        ("numeric_answer", {"answer": ["1", None]}, 1, "numeric_answer needs the column 'answer'"),
        ("numeric_answer", {"answer": ["1", "blue"]}, 1, "'blue', which is not a number"),
        ("numeric_answer", {"answer": ["1/0", "1"]}, 0, "'1/0', which is not a number"),
        ("numeric_answer", {"answer": [True, "1"]}, 0, "True, which is not a number"),
        ("numeric_answer", {"answer": [math.nan, "1"]}, 0, "is not a number"),
        ("exact_match", {}, 0, "exact_match needs the column 'answer'"),
        ("exact_match", {"answer": ["a", ["b"]]}, 1, r"\['b'\] where text belongs"),
        ("format", {"pattern": ["a", "("]}, 1, "is not a regular expression"),
        ("format", {"pattern": [3, "a"]}, 0, "is not a regular expression"),
        ("length", {}, 0, "neither"),
        ("length", {"min_words": [1, None], "max_words": [2, None]}, 1, "neither"),
        ("length", {"min_words": [1, 2.5]}, 1, "'min_words' holds 2.5"),
        ("length", {"max_words": [True, 1]}, 0, "'max_words' holds True"),
        ("length", {"min_words": [1, 5], "max_words": [2, 4]}, 1, "at least 5 and at most 4"),
    ],
)
def test_a_column_that_cannot_be_used_is_named_with_its_row(name, columns, row, said):
    with pytest.raises(ColumnFault, match=said) as fault:
        VERIFIABLE[name](prompts=["", ""], completions=["", ""], **columns)
    assert fault.value.row == row


# ---- on real solutions ----


@pytest.mark.skipif(not SHARED.is_dir(), reason="the GSM8K files are not on this machine")
@pytest.mark.parametrize(
    "marker",
    [
        r"A: {}",
        r"#### {}",
        r"The answer is ${}.",
        r"So \boxed{{{}}} dollars",
        "</think><answer>{}</answer>",
        "So {} in all.",
    ],
)
def test_every_real_solution_is_judged_as_its_label_says(marker):
    def rows(name):
        return [
            json.loads(line) for line in (SHARED / name).read_text(encoding="utf-8").splitlines()
        ]

    answers = {r["prompt"]: r["answer"] for r in rows("questions.jsonl")}
    solutions = rows("labelled.jsonl")
    texts = []
    for r in solutions:
        working, has, result = r["completion"].rpartition("A: ")
        texts.append(working + marker.format(result) if has else r["completion"])
    found = numeric_answer([], texts, answer=[answers[r["prompt"]] for r in solutions])
    assert len(found) == 3600 and [bool(x) for x in found] == [r["label"] for r in solutions]


# ---- by name, on rows ----


def test_a_name_is_loaded_and_a_near_miss_lists_what_there_is(tmp_path, monkeypatch):
    processes = Processes()
    for name, function in VERIFIABLE.items():
        reward = load_reward(name, RunSettings(), processes)
        assert isinstance(reward, FunctionReward) and reward.function is function
    meant = {
        "numeric_anwser": "numeric_answer",
        "numeric-answer": "numeric_answer",
        "Exact_Match": "exact_match",
        "formats": "format",
        "lenght": "length",
    }
    for wrong, right in meant.items():
        with pytest.raises(
            InputError,
            match=rf"--score: there is no .* did you mean {right}\? .*folder.*file.py:function, "
            r"or one of exact_match, numeric_answer, format, length",
        ):
            load_reward(wrong, RunSettings(), processes, "--score")
    with pytest.raises(InputError, match="numeric_answer"):
        load_rewards((), None, RunSettings(), processes)
    for nameless in (":length", ".length:f"):
        with pytest.raises(InputError, match=rf"^--score: {nameless} names neither a file"):
            load_reward(nameless, RunSettings(), processes, "--score")
    (tmp_path / "length").mkdir()  # a folder is a folder, whatever it is called
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="length"):
        load_reward("length", RunSettings(), processes)


def responses(rows: list[PromptRow], texts: list[str]) -> Responses:
    return Responses(
        [r.prompt for r in rows],
        texts,
        [r.columns for r in rows],
        None,
        None,
        [r.where for r in rows],
    )  # type: ignore[arg-type]


def test_a_fault_names_file_and_line_before_the_work_and_during_it():
    rows = [
        PromptRow("a", {"answer": "1"}, "f.jsonl:1"),
        PromptRow("b", {"anwser": "2", "completions": ["x"]}, "f.jsonl:2"),
    ]
    reward = load_rewards(("numeric_answer", "exact_match"), None, RunSettings(), Processes())
    with pytest.raises(InputError, match=r"^f.jsonl:2: numeric_answer needs the column 'answer'"):
        reward.check_rows(rows)
    with pytest.raises(RunError, match=r"^f.jsonl:2: numeric_answer needs the column 'answer'"):
        reward.score(responses(rows, ["1", "2"]))
    reward.check_rows(rows[:1])
    assert reward.score(responses(rows[:1], ["A: 1"])).parts == {
        "numeric_answer": [1.0],
        "exact_match": [0.0],
    }


def test_a_users_function_is_not_called_ahead_of_the_work(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def f(prompts, completions, **columns):\n    raise ValueError('called')\n"
    )
    load_rewards((f"{tmp_path}/mine.py:f",), None, RunSettings(), Processes()).check_rows(
        [PromptRow("a", {}, "f:1")]
    )


def test_columns_that_are_called_like_the_arguments_do_no_harm():
    row = PromptRow(
        "a", {"answer": "1", "prompts": "x", "completions": ["y"], "labels": [True]}, "f:1"
    )
    reward = load_reward("numeric_answer", RunSettings(), Processes())
    assert reward.score(responses([row], ["1"])).scores == [1.0]


@pytest.mark.parametrize("run", [generate, collect])
def test_a_row_without_its_column_is_refused_before_anything_is_sampled(tmp_path, models, run):
    prompts = write_jsonl(
        tmp_path / "p.jsonl", [{"prompt": "the cat", "answer": 1}, {"prompt": "a"}]
    )
    common = {
        "model": models["llama"],
        "prompts": prompts,
        "out": str(tmp_path / "o.jsonl"),
        "max_new_tokens": 4,
    }
    settings = (
        Generate(**common, best_of=2, score="numeric_answer")
        if run is generate
        else Collect(**common, judge="numeric_answer")
    )
    with pytest.raises(InputError, match=r"p.jsonl:2: numeric_answer needs the column 'answer'"):
        run(settings)
    assert not (tmp_path / "o.jsonl").exists()


def small(**changes):
    base = {"steps": 2, "batch_size": 4, "epochs": 1, "max_new_tokens": 6, "learning_rate": 1e-3}
    return (
        base
        | {
            "optimizer": OptimizerSettings(),
            "run": RunSettings(samples=2, eval_every=0, checkpoint_every=0),
        }
        | changes
    )


def test_ppo_learns_from_a_verifiable_reward_end_to_end(tmp_path, models):
    """Two rewards by name, one of which this model can earn; what the run wrote is what the
    functions say of its samples.
    """
    rows = [
        {"prompt": p, "answer": a, "min_words": 2}
        for p, a in (("the cat", "12"), ("on the mat", 3), ("a", "1/2"), ("say", 7))
    ]
    data = write_jsonl(tmp_path / "p.jsonl", rows)
    run = fd.ppo(
        fd.PPO(
            model=models["llama"],
            data=data,
            reward=("numeric_answer", "length"),
            out=str(tmp_path / "run"),
            **small(),
        )
    )
    steps = [
        json.loads(line)
        for line in (run.path / "metrics.jsonl").read_text().splitlines()
        if "reward/length" in line
    ]
    assert len(steps) == 2
    for s in steps:
        assert s["reward/numeric_answer"] == 0  # its vocabulary has no digit
        assert s["reward"] == pytest.approx(s["reward/numeric_answer"] + s["reward/length"])
        assert s["reward/length"] in (0, 0.25, 0.5, 0.75, 1)
    samples = [json.loads(line) for line in (run.path / "samples.jsonl").read_text().splitlines()]
    shown = [(s["completion"], s["score"]) for s in samples]
    assert shown and all(score == float(len(text.split()) >= 2) for text, score in shown)


def test_ppo_refuses_rows_that_its_reward_cannot_read(tmp_path, models):
    data = write_jsonl(
        tmp_path / "p.jsonl",
        [
            *({"prompt": "the cat", "answer": "1"} for _ in range(5)),
            {"prompt": "a", "answer": "none"},
        ],
    )
    with pytest.raises(
        InputError, match=r"p.jsonl:6: numeric_answer: the column 'answer' holds 'none'"
    ):
        fd.ppo(
            fd.PPO(
                model=models["llama"],
                data=data,
                reward=("numeric_answer",),
                out=str(tmp_path / "run"),
                **small(),
            )
        )
