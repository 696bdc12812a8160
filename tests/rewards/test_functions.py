"""Users' reward functions: what they may be, what they are given, what they may return, and how
their errors are told.
"""

import asyncio
import json
import textwrap
from decimal import Decimal
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import fiducial as fd
from fiducial.data.row_types import Message, PromptRow
from fiducial.errors import InputError, RunError
from fiducial.rewards.calling import load_function
from fiducial.rewards.function import FunctionReward, score_together
from fiducial.rewards.judge import Judge
from fiducial.rewards.load import Rewards, load_reward, load_rewards, weighted_sum
from fiducial.rewards.types import Responses, Scored
from fiducial.rollout.trajectory import Trajectory
from fiducial.settings import RunSettings
from fiducial.train.processes import Processes
from fiducial.use.best_of import BestOf, best_rows
from fiducial.use.collect import judged
from fiducial.use.evaluate import _judged, compare
from fiducial.use.label_steps import LabelSteps, label_steps
from fiducial.use.settings import Collect
from support import write_jsonl


def batch(columns, completions=None, prompts=None):
    """Responses to rows with these columns; the tokens of response i are 10, 11, ... and an end."""
    n = len(columns)
    tokens = [[10 + k for k in range(i + 1)] + [2] for i in range(n)]
    trajectory = Trajectory.build(
        [[7, 8]] * n, tokens, [[0.0] * len(t) for t in tokens], [True] * n, range(n), [0] * n, 1.0
    )
    return Responses(
        prompts or ["p"] * n,
        completions or ["c"] * n,
        columns,
        trajectory,
        SimpleNamespace(fingerprint="f"),  # type: ignore[arg-type]
        [f"rows.jsonl:{i + 1}" for i in range(n)],
    )


def reward(function, name="r.py:f", **keywords):
    return FunctionReward(name, function, Processes(), **keywords)


@pytest.fixture
def file(tmp_path):
    """file("code"): the name of a file with this code."""

    def write(code, name="r.py"):
        (tmp_path / name).write_text(textwrap.dedent(code))
        return f"{tmp_path}/{name}"

    return write


# What they may return
# ------------------------------------------------------------

DTYPES = (np.float16, np.float32, np.float64, np.int8, np.int64, np.uint8)


class Series:
    """As a pandas or polars column: not a list, with `tolist`."""

    shape = (3,)

    def tolist(self):
        return [1.0, 0.0, 2.0]

    def __iter__(self):
        raise AssertionError("read by tolist")


@pytest.mark.parametrize(
    "out",
    [
        *([dtype(x) for x in (1, 0, 2)] for dtype in DTYPES),
        *(np.array([1, 0, 2], dtype=dtype) for dtype in DTYPES),
        [np.bool_(True), False, np.array([2.0])],
        (1, 0.0, 2),
        [torch.tensor(1.0), torch.tensor(0), torch.tensor([2.0])],
        [torch.tensor(x, dtype=torch.bfloat16) for x in (1, 0, 2)],
        torch.tensor([1.0, 0.0, 2.0], requires_grad=True),
        torch.tensor([[1.0], [0.0], [2.0]], dtype=torch.bfloat16),
        np.array([[1.0], [0.0], [2.0]]),
        np.array([1.0, False, Fraction(2)], dtype=object),
        [Fraction(1), Decimal("0.0"), 2],
        iter([1.0, 0.0, 2.0]),
        {"a": 1.0, "b": 0.0, "c": 2.0}.values(),
        Series(),
    ],
    ids=lambda out: (
        f"{type(out).__name__} of {type(next(iter(out), 0)).__name__}"
        if isinstance(out, (list, tuple))
        else type(out).__name__
    ),
)
def test_numbers_of_every_make_are_taken(out):
    scored = reward(lambda prompts, completions: out).score(batch([{}] * 3))
    assert scored.scores == [1.0, 0.0, 2.0]
    assert all(type(s) is float for s in scored.scores)


@pytest.mark.parametrize(
    ("out", "said"),
    [
        ([1.0, "1", 2.0], "returned '1' for response 1 (rows.jsonl:2): a finite number"),
        ([10**400, 1, 2], "a finite number is expected"),
        ([1, 10**5000, 2], "an integer of 16,610 bits for response 1 (rows.jsonl:2): a finite"),
        ([1, float("nan"), 2], "returned nan for response 1 (rows.jsonl:2)"),
        ([np.float16("inf"), 1, 2], "inf) for response 0 (rows.jsonl:1)"),
        ([1j, 1, 2], "returned 1j for response 0"),
        ([np.complex64(1j), 1, 2], "for response 0"),
        ([[1.0], [2.0], [3.0]], "returned [1.0] for response 0"),
        ([torch.tensor([1.0, 2.0]), 1, 2], "for response 0"),
        ([Decimal("sNaN"), 1, 2], "for response 0"),
        (torch.zeros(3, 2), "returned a Tensor of shape [3, 2] where a list of 3 numbers"),
        (torch.tensor(1.0), "returned a Tensor of shape [] where a list of 3 numbers"),
        (np.float64(1.0), "returned a float64 of shape [] where a list of 3 numbers"),
        (np.zeros((1, 3)), "returned a ndarray of shape [1, 3]"),
        (1.0, "returned a float where a list of 3 numbers is expected"),
        (None, "returned a NoneType where"),
        ("123", "returned a str where"),
        ({0: 1, 1: 2, 2: 3}, "returned a dict where"),
        ({1, 2, 3}, "returned a set where"),
        (np.zeros(2), "returned 2 numbers for 3 responses"),
    ],
)
def test_what_is_no_number_per_response_is_told(out, said):
    with pytest.raises(RunError) as caught:
        reward(lambda prompts, completions: out).score(batch([{}] * 3))
    assert "r.py:f" in str(caught.value) and said in str(caught.value)
    assert len(str(caught.value)) < 300


# None: the reward does not apply
# ------------------------------------------------------------


def test_the_weights_of_those_that_judge_count_for_all_by_hand():
    assert weighted_sum([1.0, 3.0], [0.5, 2.0]) == (6.5, 1.0)
    assert weighted_sum([None, 3.0], [0.5, 2.0]) == (7.5, 1.25)
    assert weighted_sum([1.0, None, 2.0], [1.0, 1.0, 2.0]) == (pytest.approx(20 / 3), 4 / 3)
    assert weighted_sum([None, 3.0], [-1.0, 1.0]) == (6.0, 2.0)  # not 0 / 0
    assert weighted_sum([None, None], [1.0, 2.0]) == (None, 1.0)
    assert weighted_sum([None, 5.0], [1.0, 0.0]) == (None, 1.0)  # what has no weight judges nothing
    assert weighted_sum([5.0, 5.0], [0.0, 0.0]) == (0.0, 1.0)


def several(*functions, weights=None):
    parts = [reward(f, f"r.py:{f.__name__}") for f in functions]
    return Rewards(parts, weights or [1.0] * len(parts), [])


def math_only(prompts, completions, kind):
    return [4.0 if k == "math" else None for k in kind]


def code_only(prompts, completions, kind):
    return np.array([2.0 if k == "code" else None for k in kind], dtype=object)


def always(prompts, completions):
    return [1.0] * len(completions)


KINDS = [{"kind": k} for k in ("math", "code", "math", "prose")]


def test_a_reward_that_does_not_apply_leaves_its_weight_to_the_rest_and_is_counted():
    scored = several(math_only, code_only, always, weights=[1.0, 2.0, 1.0]).score(batch(KINDS))
    assert scored.scores == [pytest.approx(10.0), pytest.approx(20 / 3), pytest.approx(10.0), 4.0]
    assert scored.parts["r.py:math_only"] == [4.0, None, 4.0, None]
    assert scored.metrics() == {
        "reward/math_only": 4.0,
        "reward/math_only/not_judged": 0.5,
        "reward/code_only": 2.0,
        "reward/code_only/not_judged": 0.75,
        "reward/always": 1.0,
    }
    both = Scored.join([scored, scored.take([3])])
    assert both.metrics()["reward/math_only/not_judged"] == pytest.approx(3 / 5)


def test_a_response_that_no_reward_judges_is_told_by_its_row():
    scored = several(math_only, code_only).score(batch(KINDS))
    assert scored.scores[3] is None
    with pytest.raises(
        RunError, match=r"^rows.jsonl:4: no reward judges .*math_only, r.py:code_on"
    ):
        scored.floats([f"rows.jsonl:{i + 1}" for i in range(4)])
    assert scored.take([0, 1]).floats() == [8.0, 4.0]


def test_rewards_of_one_name_have_metrics_of_their_own():
    parts = {"a/r.py:f": [1.0], "b/r.py:f": [2.0], "runs/x/model": [3.0], "runs/y/model/": [4.0]}
    assert Scored([0.0], parts).metrics() == {
        "reward/a/r.py/f": 1.0,
        "reward/b/r.py/f": 2.0,
        "reward/runs/x/model": 3.0,
        "reward/runs/y/model": 4.0,
    }


def test_a_sum_beyond_all_numbers_is_told():
    def large(prompts, completions):
        return [1e308] * len(completions)

    with pytest.raises(RunError, match=r"^rows.jsonl:1: the weighted sum of the rewards is inf"):
        several(large, always, weights=[10.0, 1.0]).score(batch([{}]))


def test_the_best_of_n_passes_over_what_is_not_judged():
    assert best_rows([None, -3.0, None, 1.0, None, 2.0], 3) == [1, 5]
    best = BestOf(2, "r.py:math_only", reward(math_only), 1.0)
    responses = batch([KINDS[1], KINDS[0], KINDS[0], KINDS[0]])
    chosen, kept = best.keep([0, 0, 1, 1], responses)
    assert chosen == [0, 1] and kept.where == ["rows.jsonl:2", "rows.jsonl:3"]
    assert best.drawn == [4.0] * 3 and best.drawn_prompts == [0, 1, 1]
    assert best.means()["drawn_score"]["n"] == 3 and best.means()["kept_score"]["n"] == 2
    with pytest.raises(RunError, match=r"^rows.jsonl:3: r.py:math_only judges none of the 2"):
        best.keep([0, 0, 1, 1], batch([KINDS[0], KINDS[0], KINDS[1], KINDS[1]]))


def test_eval_counts_what_is_judged():
    judge = Judge("j", scorer=reward(math_only))
    mine, theirs = batch(KINDS), batch([KINDS[0], KINDS[0], KINDS[1], KINDS[0]])
    assert compare(judge, mine, theirs) == [0.5, None, None, None]
    assert _judged([1.0, None, 0.5], [7, 8, 9], "j") == ([1.0, 0.5], [7, 9])
    with pytest.raises(RunError, match="the judge j judges none of the responses"):
        _judged([None], [7], "j")

    def some(prompts, first, second):
        return [None if a == "?" or b == "?" else len(a) > len(b) for a, b in zip(first, second)]  # noqa: B905

    mine, theirs = batch([{}] * 3, ["long", "?", "long"]), batch([{}] * 3, ["x", "y", "z"])
    assert compare(Judge("j", compare=some), mine, theirs) == [1.0, None, 1.0]


@pytest.mark.parametrize("pairs", ["all", "extremes"])
def test_collect_leaves_out_pairs_that_are_not_judged(pairs):
    def by_length(prompts, completions):
        return [None if c == "?" else float(len(c)) for c in completions]

    def longer(prompts, first, second):
        return [None if "?" in (a, b) else len(a) > len(b) for a, b in zip(first, second)]  # noqa: B905

    settings = Collect(model="m", prompts="p", judge="j", out="o", pairs=pairs)
    judges = [Judge("j", scorer=reward(by_length)), Judge("j", compare=longer)]
    for judge in judges if pairs == "all" else judges[:1]:
        counts = {"ties": 0, "duplicates": 0, "not_judged": 0}
        responses = batch([{}] * 6, ["?", "aa", "b", "? ", "?", "?"])
        responses.completions[3] = "?"
        responses.completions[4] = "ccc"
        rows = judged(responses, [0, 0, 0, 1, 1, 1], judge, settings, counts)
        assert [(r["chosen"], r["rejected"]) for r in rows] == [("aa", "b")]
        if pairs == "all":  # ?-aa, ?-b, ?-ccc, ccc-?; the two ? of the second prompt are equal
            assert counts == {"ties": 0, "duplicates": 1, "not_judged": 4}


def test_steps_are_labeled_by_the_completions_that_are_judged(models, tmp_path, file):
    name = file("""
        calls = 0

        def judge(prompts, completions):  # of the whole responses all; of completions every other
            global calls
            calls += 1
            return [float(i % 4 == 0) if calls == 1 or i % 2 == 0 else None
                    for i in range(len(completions))]
    """)
    settings = LabelSteps(
        model=models["llama"],
        prompts=write_jsonl(tmp_path / "p.jsonl", [{"prompt": "the cat"}]),
        judge=f"{name}:judge",
        out=str(tmp_path / "o.jsonl"),
        samples=2,
        completions=4,
        separator="e",
        max_new_tokens=24,
        seed=3,
    )
    counts = label_steps(settings)
    rows = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    inner = [r for row in rows for r in row["rates"][:-1]]
    assert inner and set(inner) == {0.5}  # of each four, two are judged, of which one is right
    assert counts["not_judged"] == 0
    name = file("def none(prompts, completions):\n    return [None] * len(completions)\n", "n.py")
    with pytest.raises(InputError, match="judges no response"):
        label_steps(settings.model_copy(update={"judge": f"{name}:none", "out": f"{name}.jsonl"}))


# What they may be
# ------------------------------------------------------------

CALLABLES = """
import functools

def plain(prompts, completions, answer):
    return [float(a) for a in answer]

def _weighted(weight, prompts, completions, answer):
    return [weight * a for a in answer]

part = functools.partial(_weighted, 1.0)
keyword = functools.partial(_weighted, weight=1.0)

class Judge:
    def __call__(self, prompts, completions, answer, **rest):
        return [float(a) for a in answer]

    def score(self, prompts, completions, answer):
        return [float(a) for a in answer]

    async def later(self, prompts, completions, answer):
        return [float(a) for a in answer]

instance = Judge()
method = instance.score
later = instance.later

def timed(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs)
    return wrapper

@timed
def decorated(prompts, completions, answer):
    return [float(a) for a in answer]

@timed
async def decorated_later(prompts, completions, answer):
    return [float(a) for a in answer]

everything = lambda **columns: [float(a) for a in columns["answer"]]

def completions_alone(completions):
    return [1.0, 2.0]
"""
MODULE = (
    CALLABLES
    + """
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, prompts, completions, answer):
        return self.weight * torch.tensor(answer)

net = Net()
"""
)
NAMES = [
    *("plain", "part", "keyword", "instance", "instance.score", "method", "later", "decorated"),
    *("decorated_later", "net", "everything", "completions_alone"),
]


@pytest.mark.parametrize("name", NAMES)
def test_every_kind_of_callable_is_a_reward(file, name):
    # torch takes a second to import, so only the file that needs it has it
    code = file(MODULE if name == "net" else CALLABLES)
    rewards = load_rewards((f"{code}:{name}",), None, RunSettings(), Processes())
    columns = [{"answer": 1.0, "other": "x"}, {"answer": 2.0}]
    rewards.check_rows([PromptRow("p", c, "f:1") for c in columns])
    assert rewards.score(batch(columns)).scores == [1.0, 2.0]


class Scorer:
    def __init__(self, scale=1.0):
        pass

    def score(self, prompts, completions):
        return completions


class Model(torch.nn.Module):
    def forward(self, input_ids=None, **keywords):
        return input_ids


def positional(prompts, completions, /):
    return completions


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (Scorer, "is a class: make an object of it"),
        (Model(), "is a model that reads token ids: save it with its tokenizer"),
        (Scorer.score, "needs self, which is neither a column of rows.jsonl nor one of"),
        (positional, "takes prompts, completions by position only"),
        (max, "what r.py:f takes cannot be read"),
        (lambda prompts, text: 0, "needs text, which is neither a column of rows.jsonl nor one of"),
        (lambda prompts: 0, "r.py:f takes no completions"),
        (lambda completions, environments: 0, "needs environments, which is neither"),
        (lambda completions, trainer_state: 0, "needs trainer_state, which is given in training o"),
        (lambda completions, log_metric: 0, "needs log_metric, which is given in training only"),
    ],
)
def test_what_cannot_be_called_is_refused_before_any_sampling(function, said):
    rows = [PromptRow("p", {"answer": 1}, "rows.jsonl:1")]
    with pytest.raises(InputError) as caught:
        reward(function, flag="--score").check_rows(rows)
    assert str(caught.value).startswith("--score: ") and said in str(caught.value)


def test_in_training_a_function_may_need_what_only_training_has():
    def function(completions, trainer_state, log_metric, log_extra):
        raise AssertionError

    reward(function, training=True).check_rows([PromptRow("p", {}, "f:1")])


def test_optional_keywords_of_training_stay_away_outside_of_it():
    def function(completions, trainer_state=None, log_metric=None, log_extra=None, **columns):
        assert (trainer_state, log_metric, log_extra) == (None, None, None)
        assert set(columns) == {"prompts", "prompt_ids", "completion_ids", "kind"}
        return [1.0] * len(completions)

    assert reward(function).score(batch(KINDS)).scores == [1.0] * 4


def test_the_command_refuses_a_missing_parameter_in_one_line(models, tmp_path, file, capsys):
    from fiducial.cli import main

    name = file("def f(prompts, completions, target):\n    return [1.0] * len(target)\n")
    prompts = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "the", "answer": "1"}])
    out = tmp_path / "run"
    words = ["grpo", "--model", models["llama"], "--data", prompts, "--reward", f"{name}:f"]
    assert main([*words, "--steps", "1", "--batch-size", "8", "--out", str(out)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert f"--reward: {name}:f needs target, which is neither a column of {prompts} nor" in line
    assert not out.exists()


def test_a_column_that_only_some_rows_have_is_given_in_every_batch():
    seen = []

    def function(completions, answer, hint="none"):
        seen.append((answer, hint))
        return [1.0] * len(completions)

    part = reward(function)
    rows = [PromptRow("p", c, "f:1") for c in ({"answer": 1}, {"hint": "x"}, {})]
    part.check_rows(rows)
    part.score(batch([{"answer": 1}]))
    part.score(batch([{}, {}]))
    assert seen == [([1], [None]), ([None, None], [None, None])]


def test_keywords_are_given_as_trl_gives_them():
    def function(prompts, completions, prompt_ids, completion_ids):
        assert prompts == ["p", [{"role": "user", "content": "q"}]]
        assert completions == ["one", [{"role": "assistant", "content": "two"}]]
        assert prompt_ids == [[7, 8]] * 2 and completion_ids == [[10, 2], [10, 11, 2]]
        return [1.0, 2.0]

    responses = batch([{}, {}], ["one", "two"], ["p", (Message("user", "q"),)])
    assert reward(function).score(responses).scores == [1.0, 2.0]


# Asynchronous functions
# ------------------------------------------------------------


def test_asynchronous_functions_run_at_the_same_time_also_where_a_loop_runs_already():
    met = []

    def make(value):
        async def function(prompts, completions):
            met.append(value)
            for _ in range(500):  # each waits for the other to have begun
                if len(met) == 2:
                    return [value] * len(completions)
                await asyncio.sleep(0.01)
            raise TimeoutError("alone")

        return function

    rewards = several(make(1.0), always, make(10.0))
    assert rewards.score(batch([{}])).scores == [12.0]
    met.clear()

    async def notebook():
        return rewards.score(batch([{}])).scores

    assert asyncio.run(notebook()) == [12.0]


def test_one_loop_serves_all_calls():
    loops = []

    async def function(prompts, completions):
        loops.append(asyncio.get_running_loop())
        return [1.0]

    for _ in range(2):
        reward(function).score(batch([{}]))
    assert loops[0] is loops[1]


def test_where_one_raises_the_others_come_to_their_end():
    ended = []

    async def slow(prompts, completions):
        await asyncio.sleep(0.02)
        ended.append(1)
        return [1.0]

    async def broken(prompts, completions):
        raise KeyError("price")

    def also_broken(prompts, completions):
        raise ValueError("no")

    async def leaves(prompts, completions):
        raise SystemExit(3)

    for bad, said in (
        (broken, "KeyError: 'price'"),
        (also_broken, "no"),
        (leaves, "SystemExit: 3"),
    ):
        with pytest.raises(RunError, match=f"the reward function r.py:f raised .*{said}"):
            score_together([reward(slow), reward(bad)], batch([{}]))
    assert ended == [1, 1, 1]


def test_a_judge_may_compare_asynchronously(file):
    name = file("""
        import numpy as np

        async def longer(prompts, first, second):
            return np.array([len(a) > len(b) for a, b in zip(first, second)])

        def odd(prompts, first, second):
            return [2] * len(first)

        def more(prompts, first, second, answer):
            return [True] * len(first)
    """)
    judge = Judge.open(f"{name}:longer", RunSettings(), Processes())
    assert judge.prefers_first(["p", "p"], ["aa", "b"], ["b", "aa"]) == [True, False]
    judge = Judge.open(f"{name}:odd", RunSettings(), Processes())
    with pytest.raises(RunError, match=r"returned 2\.0: it must return one true or false for each"):
        judge.prefers_first(["p"], ["a"], ["b"])
    with pytest.raises(InputError, match="compares two responses and needs answer, which is none"):
        Judge.open(f"{name}:more", RunSettings(), Processes())


# Their own errors
# ------------------------------------------------------------

BROKEN = """
import functools

def fails(completions):
    raise ValueError("the table is away")

class Judge:
    def __call__(self, prompts, completions, **k):
        return fails(completions)
    def score(self, prompts, completions):
        return fails(completions)
obj = Judge()
method = obj.score
part = functools.partial(lambda w, prompts, completions: fails(completions), 2)

def passing(f):
    @functools.wraps(f)
    def wrapper(**k):
        return f(**k)
    return wrapper

wrapped = passing(functools.partial(passing(lambda prompts, completions: fails(completions))))

async def later(prompts, completions):
    return fails(completions)

def one_by_one(prompts, completions):
    for c in completions:
        yield fails(c)
"""
BROKEN_MODULE = """
import torch

class Net(torch.nn.Module):
    def forward(self, prompts, completions):
        return fails(completions)
net = Net()
"""


@pytest.mark.parametrize("name", ["obj", "method", "part", "wrapped", "net", "later", "one_by_one"])
def test_the_users_own_error_is_told_with_its_file_and_line(file, name):
    code = file(BROKEN + (BROKEN_MODULE if name == "net" else ""))
    part = load_reward(f"{code}:{name}", RunSettings(), Processes())
    said = rf"r.py:{name} raised ValueError: the table is away \(r.py:5\)$"
    with pytest.raises(RunError, match=said):
        part.score(batch([{}]))


def test_an_error_of_many_lines_is_told_in_one(file):
    def fails(completions):
        raise ValueError("one\n  two\n" + "x" * 5000)

    with pytest.raises(RunError, match="raised ValueError: one two xxx") as caught:
        reward(fails).score(batch([{}]))
    assert len(str(caught.value)) < 700 and "\n" not in str(caught.value)


# Finding them
# ------------------------------------------------------------


def test_a_file_is_read_as_an_import_would_read_it(file):
    file("def value():\n    return 3.0\n", "beside_it.py")
    name = file("""
        from __future__ import annotations
        import dataclasses
        from typing import ClassVar

        @dataclasses.dataclass
        class Kept:
            kind: ClassVar[str] = "a"
            x: float = 1.0

        def f(completions):
            from beside_it import value  # found when the function runs, too
            return [value() + Kept().x] * len(completions)
    """)
    function = load_function(f"{name}:f", "--reward")
    assert function(["c"]) == [4.0]


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("raise SystemExit('no key')", r"r.py cannot be run: SystemExit: no key \(r.py:1\)"),
        ("x = 1\nimport nothing_here", r"ModuleNotFoundError: No module .* \(r.py:2\)"),
        ("def f(:", "cannot be run: SyntaxError"),
        ("import sys\nsys.path.pop(0)\ng = 1", "has no function f"),
        ("class f:\n    pass\n", "r.py:f is a class"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused(file, code, said):
    with pytest.raises(InputError, match=said):
        load_reward(f"{file(code)}:f", RunSettings(), Processes())


@pytest.mark.parametrize(
    "name", [":", ".x:f", "os:system", "math:prod", "builtins:print", "os:", "a:b"]
)
def test_names_that_are_no_reward_are_refused(name):
    with pytest.raises(InputError, match=r"^--reward: "):
        part = load_reward(name, RunSettings(), Processes())
        part.check_rows([PromptRow("p", {}, "f:1")])


# In a run
# ------------------------------------------------------------

LOGGING = """
import numpy as np

def score(prompts, completions, completion_ids, trainer_state, log_metric, log_extra):
    log_metric("seen/step", trainer_state.global_step)
    log_metric("seen/max_steps", np.int64(trainer_state.max_steps))
    log_metric("seen/epoch", trainer_state.epoch)
    log_extra("shout", [c.upper() for c in completions])
    log_extra("length", [np.int64(len(c)) for c in completion_ids])
    return [len(c) / 10 for c in completions]

def half(completions, log_metric, **columns):
    log_metric("halves", 1)
    log_metric("halves", 2)
    return [1.0 if i % 2 else None for i, _ in enumerate(completions)]

def taken(completions, log_metric):
    log_metric("kl", 1.0)

def column(completions, log_extra):
    log_extra("score", completions)

def few(completions, log_extra):
    log_extra("words", completions[:1])

def unknown(completions, trainer_state):
    return [trainer_state.num_train_epochs] * len(completions)
"""


@pytest.mark.parametrize("method", ["ppo", "reinforce", "grpo"])
def test_a_run_gives_its_state_and_keeps_what_is_logged(models, data, tmp_path, file, method):
    name, cls = file(LOGGING), {"ppo": fd.PPO, "reinforce": fd.Reinforce, "grpo": fd.GRPO}[method]
    group = {} if method == "ppo" else {"group_size": 2}
    settings = cls(
        model=models["llama"],
        data=data["prompts"],  # ten prompts
        reward=(f"{name}:score", f"{name}:half"),
        reward_weights=(2.0, 1.0),
        out=str(tmp_path / "run"),
        steps=2,
        batch_size=4,
        max_new_tokens=4,
        run=RunSettings(samples=3),
        **group,
    )
    getattr(fd, method)(settings)
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    drawn = 4 if method == "ppo" else 2
    for step, line in enumerate(x for x in lines if "num_tokens" in x):
        assert (line["seen/step"], line["seen/max_steps"]) == (step, 2)
        assert line["seen/epoch"] == pytest.approx(step * drawn / 10)
        assert line["halves"] == 1.5 and line["reward/half/not_judged"] == 0.5
        # of four responses, two count with the length alone, thrice instead of twice
        assert line["reward"] > 2 * line["reward/score"]
    samples = [json.loads(x) for x in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 6
    for sample in samples:
        assert sample["shout"] == sample["completion"].upper()
        assert sample["length"] == sample["tokens"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("taken", "log_metric: 'kl' is a metric of the run itself"),
        ("column", "log_extra: 'score' is a column of samples.jsonl itself"),
        ("few", "log_extra: column words has 1 values for 2 responses"),
    ],
)
def test_what_cannot_be_logged_is_told(file, name, said):
    part = load_rewards((f"{file(LOGGING)}:{name}",), None, RunSettings(), Processes())
    with pytest.raises(RunError, match=said):
        part.score(batch([{}, {}]))


def test_two_rewards_do_not_write_one_column():
    def one(completions, log_extra):
        log_extra("words", completions)
        return [1.0] * len(completions)

    parts = [reward(one, f"r.py:{n}", training=True) for n in "ab"]
    with pytest.raises(RunError, match="two rewards log the column words"):
        Rewards(parts, [1.0, 1.0], []).score(batch([{}]))


def test_columns_go_with_their_responses():
    one = Scored([1.0, 2.0], {}, columns={"a": [1, 2]}, logged={"m": [1.0]})
    two = Scored([3.0], {}, columns={"b": [3]}, logged={"m": [4.0], "k": [2.0]})
    both = Scored.join([one, two]).take([2, 0])
    assert both.columns == {"a": [None, 1], "b": [3, None]}
    assert both.metrics() == {"m": 2.5, "k": 2.0}


def test_state_has_no_more_than_it_says(file):
    part = load_rewards((f"{file(LOGGING)}:unknown",), None, RunSettings(), Processes())
    from fiducial.rewards.types import TrainerState

    responses = batch([{}])
    responses = Responses(*(getattr(responses, f) for f in FIELDS), TrainerState(1, 2, 0.5))
    with pytest.raises(RunError, match=r"max_steps and epoch here, and no num_train_epochs \(r.py"):
        part.score(responses)


FIELDS = ("prompts", "completions", "columns", "trajectory", "renderer", "where")
