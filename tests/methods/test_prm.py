"""Process reward models: the loss by hand, where steps end in text and in tokens, which steps are
taught, and that a tiny world is learned.
"""

import json
import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

import fiducial as fd
from fiducial.cli import main
from fiducial.data.row_types import LabeledRow, StepsRow
from fiducial.data.steps import Steps, split, step_ends
from fiducial.errors import InputError
from fiducial.losses import process_reward, process_reward_sum
from fiducial.methods import prm as page
from fiducial.methods.prm import PRM, prm, solver, tensors, up_to_first_wrong
from fiducial.models.load import load_scorer
from fiducial.report.answer import answer
from fiducial.report.folder import read_run
from fiducial.settings import LoraSettings, OptimizerSettings, RowSettings, RunSettings
from fiducial.train.renderer import load_renderer
from support import ARCHITECTURES, write_jsonl
from world import difference

each = pytest.mark.parametrize("kind", ARCHITECTURES)
GENTLE = OptimizerSettings(eps=1e-3, schedule="constant", max_grad_norm=1e9)

# The loss
# ------------------------------------------------------------


def test_the_loss_and_its_metrics_by_hand():
    """sigma(log 3) = 3/4 and sigma(-log 9) = 1/10: losses are -log of 3/4, 1/4, 9/10 and 1/2."""
    scores = torch.tensor(
        [[math.log(3), 7.0, math.log(3)], [-math.log(9), 0.0, 7.0]], dtype=torch.float64
    )
    labels = torch.tensor([[True, False, False], [False, True, False]])
    mask = torch.tensor([[True, False, True], [True, True, False]])
    loss, metrics = process_reward(scores, labels, mask)
    assert float(loss) == pytest.approx(
        -(math.log(3 / 4) + math.log(1 / 4) + math.log(9 / 10) + math.log(1 / 2)) / 4, abs=1e-12
    )
    assert float(metrics["steps/accuracy"]) == pytest.approx(2.5 / 4)  # a score of 0 is half right
    assert float(metrics["steps/right"]) == pytest.approx(2 / 4)
    assert float(metrics["steps/probability"]) == pytest.approx(
        (3 / 4 + 3 / 4 + 1 / 10 + 1 / 2) / 4
    )
    total, sums = process_reward_sum(scores, labels, mask)
    assert float(total) == pytest.approx(4 * float(loss)) and float(sums["steps/right"]) == 2


def test_the_gradient_of_the_loss_is_that_of_finite_differences():
    rng = np.random.default_rng(0)
    x, labels, mask = (
        rng.normal(size=(3, 5)) * 3,
        torch.tensor(rng.random((3, 5)) < 0.5),
        torch.tensor(rng.random((3, 5)) < 0.6),
    )
    scores = torch.tensor(x, requires_grad=True)
    process_reward(scores, labels, mask)[0].backward()
    slow = difference(lambda s: float(process_reward(torch.tensor(s), labels, mask)[0]), x)
    assert np.abs(scores.grad.numpy() - slow).max() < 1e-8
    sigma = 1 / (1 + np.exp(-x))  # and it is (sigma - label) / count
    assert np.allclose(
        scores.grad.numpy(), np.where(mask, sigma - labels.numpy(), 0) / int(mask.sum()), atol=1e-12
    )


def test_what_stands_outside_the_mask_never_matters():
    scores = torch.tensor([[0.5, math.nan, -2.0, math.inf]], requires_grad=True)
    mask, labels = (
        torch.tensor([[True, False, True, False]]),
        torch.tensor([[True, True, False, False]]),
    )
    loss, metrics = process_reward(scores, labels, mask)
    loss.backward()
    clean, _ = process_reward(
        torch.tensor([[0.5, -2.0]]),
        torch.tensor([[True, False]]),
        torch.ones(1, 2, dtype=torch.bool),
    )
    assert float(loss.detach()) == pytest.approx(float(clean)) and all(
        math.isfinite(v) for v in metrics.values()
    )
    assert scores.grad[0, 1] == scores.grad[0, 3] == 0
    assert math.isfinite(
        float(process_reward(torch.tensor([[-1e4]]), labels[:, :1], mask[:, :1])[0])
    )  # no overflow far out


def test_a_loss_without_a_step_and_shapes_that_would_broadcast_are_refused():
    with pytest.raises(ValueError, match="no step end"):
        process_reward(torch.zeros(1, 2), torch.zeros(1, 2), torch.zeros(1, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="equal shapes"):
        process_reward(torch.zeros(2), torch.zeros(2, 1), torch.ones(2, dtype=torch.bool))


# Where steps end
# ------------------------------------------------------------


@pytest.mark.parametrize(
    ("pieces", "separator", "ends"),
    [
        (["a", "\n", "b", "\n", "c"], "\n", [1, 3, 4]),
        (["a", "\n", "b", ""], "\n", [1, 3]),  # EOS, which has no text, ends the last step
        (
            ["a", "\n", "b", "\n", ""],
            "\n",
            [1, 4],
        ),  # and the line feed before it ends none of its own
        (["a", "\n", "b", "\n", " ", "\n"], "\n", [1, 5]),
        (["a", "\n", "\n", "b"], "\n", [1, 3]),  # an empty line is no step
        (["a", "\n\n", "b"], "\n", [1, 2]),  # nor is it one in a single token
        (["\n", "a", "\n", "b"], "\n", [2, 3]),
        (["a", "\nb", "\n", "c"], "\n", [1, 2, 3]),  # a token that ends a step and begins the next
        (["a", "\nb\n", "c"], "\n", [1, 2]),  # one that ends two can end but one
        (["a", "\nb"], "\n", [1]),
        (["a", "\n", "\n", "\n", "b"], "\n\n", [2, 4]),  # a separator across tokens
        (["x. ", "y", ".", " z"], ". ", [0, 3]),
        (["a", "b", ""], "", [0, 1, 2]),  # every token
        (["", "\n", " "], "\n", [2]),  # nothing said is one step
        (["a"], "\n", [0]),
    ],
)
def test_step_ends_by_hand(pieces, separator, ends):
    assert step_ends(pieces, separator) == ends


def test_nothing_has_no_steps():
    with pytest.raises(ValueError, match="an empty solution has no steps"):
        step_ends([], "\n")


@pytest.mark.parametrize("separator", ["\n", "\n\n", ". "])
def test_a_text_cut_into_steps_and_joined_is_the_same_and_no_step_is_blank(separator):
    rng = random.Random(0)
    seen = set()
    for _ in range(2000):
        text = "".join(
            rng.choice(["a", "b", " ", ".", "\n", ". ", "\n\n"]) for _ in range(rng.randint(1, 12))
        )
        steps = split(text, separator)
        seen.add(len(steps))
        assert separator.join(steps) == text
        assert all(s.strip() for s in steps) or len(steps) == 1
        assert all(
            split(s + separator + "z", separator) == [s, "z"] for s in steps[:-1]
        )  # no step holds two
    assert seen >= {1, 2, 3, 4}


@each
@pytest.mark.parametrize(
    "text", ["the cat\nis on\nthe mat.", "a\n\nb\n", "the\nin", " on the\n\n\ncat\n\n", "no line"]
)
@pytest.mark.parametrize("ended", [True, False])
def test_the_tokens_of_a_text_show_the_steps_of_the_text(models, kind, text, ended):
    renderer = load_renderer(models[kind], RowSettings())
    ids = [
        *renderer.tokenizer(text, add_special_tokens=False).input_ids,
        *([renderer.eos] if ended else []),
    ]
    ends, steps = Steps(renderer, "\n").ends(ids), split(text, "\n")
    assert len(ends) == len(steps) and ends[-1] == len(ids) - 1
    for k, end in enumerate(ends):
        so_far = "\n".join(steps[: k + 1])
        assert renderer.decode(ids[: end + 1]) == so_far + ("\n" if k + 1 < len(steps) else "")


@each
def test_every_token_is_a_step_without_a_separator(models, kind):
    renderer = load_renderer(models[kind], RowSettings())
    ids = renderer.completion("a", "the cat\nin", "x").ids
    assert Steps(renderer, "").ends(ids) == list(range(len(ids)))


def test_a_separator_that_is_a_special_token_is_found(models):
    renderer = load_renderer(models["qwen3"], RowSettings())
    mark = renderer.tokenizer.convert_tokens_to_ids("<|im_start|>")
    cat, the = (renderer.tokenizer(x).input_ids for x in ("cat", "the"))
    assert Steps(renderer, "<|im_start|>").ends([*cat, mark, *the, renderer.eos]) == [1, 3]
    assert Steps(renderer, "\n").ends([*cat, mark, *the, renderer.eos]) == [3]


def test_a_separator_that_begins_with_a_space_is_found_where_decoders_strip_it(models):
    """A SentencePiece decoder drops the space with which a text begins, so a token must not be
    decoded alone.
    """
    renderer = load_renderer(models["llama"], RowSettings())
    decode = renderer.tokenizer.decode
    renderer.tokenizer.decode = lambda *a, **k: decode(*a, **k).removeprefix(" ")
    ids = renderer.tokenizer("cat in a", add_special_tokens=False).input_ids
    assert Steps(renderer, " ").ends(ids) == [1, 3, 4]


# Rows
# ------------------------------------------------------------


def test_labels_end_with_the_first_wrong_step():
    assert up_to_first_wrong([True, True]) == [True, True]
    assert up_to_first_wrong([True, False, True, False]) == [True, False]
    assert up_to_first_wrong([False, True]) == [False]


@each
def test_a_row_of_steps_is_one_text_and_its_labels_stand_on_step_ends(models, kind):
    renderer = load_renderer(models[kind], RowSettings())
    row = StepsRow("who", ("the cat", "is in", "on"), (True, False, True), "f:1")
    s = solver(renderer, "\n")(row)
    assert s.rendered.ids == renderer.completion("who", "the cat\nis in\non", "f:1").ids
    assert [renderer.decode([s.rendered.ids[t]]) for t in s.ends[:2]] == ["\n", "\n"] and s.ends[
        2
    ] == len(s) - 1
    assert s.labels == [True, False] and s.right is False
    other = solver(renderer, "\n")(StepsRow("a", ("a",), (True,), "f:2"))
    _, labels, mask = tensors([s, other])
    assert mask.nonzero().tolist() == [[0, s.ends[0]], [0, s.ends[1]], [1, len(other) - 1]]
    assert labels[mask].tolist() == [True, False, True]


def test_a_row_with_an_outcome_is_taught_at_every_step_behind_a_wrong_one_too(models):
    renderer = load_renderer(models["llama"], RowSettings())
    s = solver(renderer, "\n")(LabeledRow("who", "the cat\nis in\non", False, "f:1"))
    assert s.labels == [False, False, False] and len(s.ends) == 3 and not s.right


def test_a_chat_is_cut_in_its_answer_alone(models):
    from fiducial.data.row_types import Message

    renderer = load_renderer(models["qwen3"], RowSettings())
    s = solver(renderer, "\n")(
        StepsRow((Message("user", "who\nis in"),), ("cat", "on"), (True, True), "f:1")
    )
    text = [renderer.tokenizer.decode([i]) for i in s.rendered.ids]
    assert [text[t] for t in s.ends] == ["\n", "<|im_end|>"] and s.ends[0] > text.index(
        "<|im_end|>"
    )


def test_rows_whose_steps_are_not_found_or_are_cut_off(models):
    renderer = load_renderer(models["llama"], RowSettings())
    for steps, separator in ((("a\nb", "on"), "\n"), (("a", "on"), "")):
        with pytest.raises(
            InputError, match=r"rows.jsonl:7: the row has 2 steps and the tokens of its text show"
        ):
            solver(renderer, separator)(StepsRow("who", steps, (True, True), "rows.jsonl:7"))
    row = StepsRow("a", ("the cat", "on the mat", "xyz"), (True, True, False), "f:1")
    whole = solver(renderer, "\n")(row)
    cut = solver(replace(renderer, max_length=whole.ends[1] + 2), "\n")(
        row
    )  # the wrong step begins and does not end
    assert (
        cut.rendered.truncated
        and cut.ends == whole.ends[:2]
        and cut.labels == [True, True]
        and not cut.right
    )
    with pytest.raises(InputError, match="f:1: no step ends within"):
        solver(replace(renderer, max_length=whole.ends[0]), "\n")(row)


def test_a_bad_file_is_refused_in_one_sentence(models, tmp_path, capsys):
    data = write_jsonl(
        tmp_path / "rows.jsonl", [{"prompt": "a", "completions": ["on", "a\nb"], "labels": [1, 0]}]
    )
    assert (
        main(["prm", "--model", models["llama"], "--data", data, "--out", str(tmp_path / "run")])
        == 2
    )
    said = capsys.readouterr().err.strip()
    assert (
        "rows.jsonl:1: the row has 2 steps" in said
        and len(said.splitlines()) == 1
        and not (tmp_path / "run").exists()
    )


# Training
# ------------------------------------------------------------


def world(folder, rows=240, seed=0, steps=True):
    """Steps of letters: one that holds a z is wrong."""
    rng = random.Random(seed)
    lines = []
    for i in range(rows):
        solution = [
            "".join(rng.choice("abcde") for _ in range(rng.randint(2, 4)))
            for _ in range(rng.randint(1, 4))
        ]
        labels = [True] * len(solution)
        for k in range(len(solution)):
            if rng.random() < 0.3:
                solution[k] = solution[k][:1] + "z" + solution[k][1:]
                labels[k] = False
        prompt = "".join(rng.choice("klm") for _ in range(6)) + str(i % 3).translate(
            str.maketrans("012", "abc")
        )
        row = (
            {"completions": solution, "labels": labels}
            if steps
            else {"completion": "\n".join(solution), "label": all(labels)}
        )
        lines.append({"prompt": prompt, **row})
    return write_jsonl(folder / f"world-{steps}-{seed}.jsonl", lines)


@pytest.fixture(scope="module")
def go(models, tmp_path_factory):
    def run(kind, **changes):
        folder = tmp_path_factory.mktemp("prm")
        common = {
            "model": models.get(kind, kind),
            "out": str(folder / "run"),
            "steps": 3,
            "batch_size": 6,
            "learning_rate": 1e-3,
        }
        common |= {"run": RunSettings(eval_every=1)}
        if "data" not in changes:
            changes["data"] = world(folder, rows=40)
        return prm(PRM(**(common | changes)))

    return run


def weights(run):
    return load_file(run.path / "model" / "model.safetensors")


def lines(run):
    return [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]


@each
def test_it_learns_which_steps_are_wrong(go, tmp_path, kind):
    run = go(
        kind,
        data=world(tmp_path),
        steps=60,
        batch_size=24,
        learning_rate=3e-3,
        rows=RowSettings(held_out=0.2),
        run=RunSettings(eval_every=0),
    )
    shown = run.evaluation["accuracy on held-out steps"]
    assert (
        shown["value"] > 0.9 and shown["low"] > run.evaluation["calling all steps right"]["value"]
    )
    assert (
        run.evaluation["accuracy on held-out solutions, by min"]["low"]
        > run.evaluation["calling all solutions wrong"]["high"]
    )
    assert run.metrics["eval/loss"] < 0.3
    fresh = "ab\nazb\nab"  # the second step is wrong, and what comes behind it was never taught
    renderer = load_renderer(str(run.path / "model"), RowSettings())
    s = solver(renderer, "\n")(LabeledRow("klmklma", fresh, False, "x"))
    ids, _, mask = tensors([s])
    first, second, _ = run.model(ids, after=mask)[mask].sigmoid().tolist()
    assert first > 0.7 and second < 0.3


def test_from_outcomes_alone_it_learns_the_chance_that_it_ends_right(go, tmp_path):
    """Solutions are 'a' or 'z', then 'b' or 'c'; right with chance 3/4, 1/4 after a, z, and
    certainly by the end.
    """
    rng, rows = random.Random(0), []
    for i in range(600):
        first = "az"[i % 2]
        right = rng.random() < (0.75 if first == "a" else 0.25)
        rows.append(
            {
                "prompt": "k" + "lmn"[i % 3],
                "completion": f"{first}\n{'b' if right else 'c'}",
                "label": right,
            }
        )
    run = go(
        "gpt2",
        data=write_jsonl(tmp_path / "o.jsonl", rows),
        steps=150,
        batch_size=60,
        learning_rate=2e-3,
        rows=RowSettings(held_out=0.0),
    )
    renderer = load_renderer(str(run.path / "model"), RowSettings())
    for text, expected in (
        ("a\nb", (0.75, 1)),
        ("z\nb", (0.25, 1)),
        ("a\nc", (0.75, 0)),
        ("z\nc", (0.25, 0)),
    ):
        ids, _, mask = tensors([solver(renderer, "\n")(LabeledRow("kl", text, True, "x"))])
        assert run.model(ids, after=mask)[mask].sigmoid().tolist() == pytest.approx(
            expected, abs=0.12
        ), text


@pytest.mark.parametrize(("kind", "rank"), [("llama", 0), ("gpt2", 0), ("qwen3", 0), ("llama", 4)])
@torch.no_grad()
def test_the_saved_model_is_an_ordinary_one_and_scores_the_same(go, models, kind, rank):
    with torch.enable_grad():
        run = go(kind, lora=LoraSettings(r=rank), learning_rate=1e-2, separator="\n")
    folder = run.path / "model"
    config = json.loads((folder / "config.json").read_text())
    assert (
        config["process_reward"] == {"separator": "\n", "aggregate": "last"}
        and config["pad_token_id"] != config["eos_token_id"]
    )
    ids = torch.tensor([[5, 9, 14, 22, 7, 31, 12]])
    after = torch.tensor([[False, True, False, True, False, False, True]])
    again = load_scorer(str(folder), LoraSettings(), RunSettings(), head="saved")
    assert torch.allclose(again(ids, after=after), run.model(ids, after=after), atol=1e-5)
    plain = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    # transformers reads the state after the last token: of each beginning, what stands at its end
    for t in (1, 3, 6):
        assert float(plain(input_ids=ids[:, : t + 1]).logits) == pytest.approx(
            float(again(ids, after=after)[0, t]), abs=1e-5
        )
    start = load_scorer(models[kind], LoraSettings(), RunSettings(), head="normal")
    assert (start(ids, after=after) - again(ids, after=after)).abs().max() > 1e-3


@torch.no_grad()
@each
def test_scores_after_tokens_know_nothing_of_padding_and_are_the_values_one_later(models, kind):
    scorer = load_scorer(models[kind], LoraSettings(), RunSettings(), head="normal")
    ids = torch.tensor([[5, 9, 14, 22, 7], [8, 6, 0, 0, 0]])
    after = torch.tensor([[True, True, False, True, False], [False, True, False, False, False]])
    scores = scorer(ids, after=after)
    assert torch.allclose(
        scores[0, :-1][after[0, :-1]], scorer(ids)[0, 1:][after[0, :-1]], atol=1e-5
    )  # after t is before t + 1
    assert (scores[~after] == 0).all()
    assert torch.allclose(scorer(ids[1:, :2], after=after[1:, :2])[0, 1], scores[1, 1], atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_how_a_batch_is_cut_changes_nothing(go, tmp_path, kind):
    data = world(tmp_path, rows=40)
    a, b, c = (
        go(
            kind,
            data=data,
            steps=3,
            optimizer=GENTLE,
            learning_rate=1e-2,
            run=RunSettings(tokens=t, eval_every=1),
        )
        for t in (8192, 40, 1)
    )
    for other in (b, c):
        for name, value in weights(a).items():
            assert torch.allclose(value, weights(other)[name], atol=1e-5), name
        for one, two in zip(lines(a), lines(other), strict=True):
            for key in one.keys() - {"seconds", "tokens_per_second"}:
                assert one[key] == pytest.approx(two[key], rel=1e-4, abs=1e-5), key


def test_the_first_loss_is_the_slow_one_over_all_labelled_steps(go, models, tmp_path):
    """One forward pass a step end of one solution at a time, and one mean over all of them: a long
    solution counts for more.
    """
    data = world(tmp_path, rows=40)
    run = go("llama", data=data, steps=1, batch_size=40, rows=RowSettings(held_out=0.0))
    renderer = load_renderer(models["llama"], RowSettings())
    scorer = load_scorer(models["llama"], LoraSettings(), RunSettings(), head="normal")
    terms = []
    with torch.no_grad(), open(data) as file:
        for line in file:
            row = json.loads(line)
            for k, label in enumerate(row["labels"]):
                last = k + 1 == len(row["labels"])
                text = "\n".join(row["completions"][: k + 1]) + ("" if last else "\n")
                ids = (
                    renderer.prompt(row["prompt"], "")
                    + renderer.tokenizer(text, add_special_tokens=False).input_ids
                    + [renderer.eos] * last
                )
                score = float(scorer(torch.tensor([ids]), torch.tensor([len(ids)])))
                terms.append(math.log1p(math.exp(-score if label else score)))
                if not label:
                    break
    assert lines(run)[0]["loss"] == pytest.approx(sum(terms) / len(terms), abs=1e-5)


def test_evaluation_counts_what_a_slow_recount_counts(go, tmp_path):
    run = go("gpt2", data=world(tmp_path), steps=8, rows=RowSettings(held_out=0.3))
    settings = PRM(
        model=str(run.path / "model"),
        data=world(tmp_path),
        out=str(run.path),
        rows=RowSettings(held_out=0.3),
    )
    held = page.prepare(settings, run.processes).held_out.items
    right, whole = [], {"last": [], "min": [], "product": []}
    for s in held:
        ids, _, mask = tensors([s], every=True)
        with torch.no_grad():
            chances = run.model(ids, after=mask)[mask].double().sigmoid().tolist()
        right += [(p > 0.5) == x for p, x in zip(chances, s.labels, strict=False)]
        for how, total in (
            ("last", chances[-1]),
            ("min", min(chances)),
            ("product", math.prod(chances)),
        ):
            whole[how].append((total > 0.5) == s.right)
    assert run.evaluation["accuracy on held-out steps"]["value"] == pytest.approx(
        sum(right) / len(right)
    )
    assert run.metrics["eval/steps/accuracy"] == pytest.approx(sum(right) / len(right))
    assert run.evaluation["accuracy on held-out steps"]["n"] == len(right)
    for how, values in whole.items():
        assert run.evaluation[f"accuracy on held-out solutions, by {how}"][
            "value"
        ] == pytest.approx(sum(values) / len(values))


def test_the_page_says_what_is_right_of_held_out_steps_and_what_calling_all_alike_would_be(
    go, tmp_path
):
    sentences = answer(
        read_run(
            go(
                "gpt2",
                data=world(tmp_path),
                steps=60,
                batch_size=24,
                learning_rate=3e-3,
                rows=RowSettings(held_out=0.2),
            ).path
        )
    )
    assert (
        len(sentences) == 1
        and "of held-out steps" in sentences[0]
        and sentences[0].endswith("it knows more than that.")
    )
    assert (
        "not shown to know more"
        in answer(
            read_run(go("gpt2", data=world(tmp_path), steps=1, rows=RowSettings(held_out=0.2)).path)
        )[0]
    )
    assert (
        "held-out steps were not measured"
        in answer(read_run(go("gpt2", rows=RowSettings(held_out=0.0)).path))[0]
    )


def test_a_reward_model_from_a_process_reward_model_is_none(go, data, tmp_path):
    first = go("llama")
    run = fd.reward(
        fd.RewardModel(
            model=str(first.path / "model"), data=data["pairs"], out=str(tmp_path / "run"), steps=1
        )
    )
    assert "process_reward" not in json.loads((run.path / "model" / "config.json").read_text())
