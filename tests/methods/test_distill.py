"""On-policy distillation: its KL by enumeration, its gradients on a world where every response is
known, its page end to end.
"""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import fiducial as fd
import world
from fiducial import lab, losses
from fiducial.core import intervals, kl
from fiducial.core.logprobs import compared
from fiducial.errors import InputError
from fiducial.lab.worlds import exact, policies
from fiducial.lab.worlds.files import write_rows, write_world
from fiducial.metrics import known
from fiducial.models.load import load_policy, load_teacher
from fiducial.models.trunk import plain
from fiducial.report.answer import answer
from fiducial.report.folder import read_run
from fiducial.settings import LoraSettings, OptimizerSettings, RowSettings, RunSettings
from fiducial.train.renderer import load_renderer
from support import make_tokenizer

GENTLE = OptimizerSettings(eps=1e-3, schedule="constant", max_grad_norm=1e9)
RNG = np.random.default_rng(5)


def slow_kl(z, q, temperature=1.0):
    """[...] by a loop over the vocabulary."""
    out = np.zeros(z.shape[:-1])
    for place in np.ndindex(out.shape):
        p, r = world.softmax(z[place] / temperature), world.softmax(q[place] / temperature)
        out[place] = sum(a * math.log(a / b) for a, b in zip(p, r, strict=True) if a > 0)
    return out


# The KL of two distributions
# ------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_exact_kl_is_the_sum_over_the_vocabulary(temperature):
    z, q = RNG.normal(size=(2, 3, 5)), RNG.normal(size=(2, 3, 5))
    found = kl.exact(torch.tensor(z), torch.tensor(q), temperature=temperature)
    assert found.numpy() == pytest.approx(slow_kl(z, q, temperature), abs=1e-12)
    half = kl.exact(torch.tensor([0.0, 0.0]), torch.tensor([math.log(3.0), 0.0]))
    assert float(half) == pytest.approx(
        0.5 * math.log(4 / 3), abs=1e-6
    )  # 1/2 log(1/2 / 3/4) + 1/2 log(1/2 / 1/4)


def test_what_the_student_cannot_say_costs_nothing_and_what_the_teacher_cannot_is_infinite():
    z = torch.tensor([0.3, -0.2, -math.inf], requires_grad=True)
    found = kl.exact(z, torch.tensor([0.1, 0.4, 2.0]))
    found.backward()
    assert torch.isfinite(found) and torch.isfinite(z.grad).all() and z.grad[2] == 0
    assert kl.exact(torch.zeros(3), torch.tensor([0.0, 0.0, -math.inf])) == math.inf


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_in_chunks_it_is_what_it_is_at_once_gradients_too(dtype):
    torch.manual_seed(0)
    n, v = 23, 7
    mine, theirs = nn.Linear(6, v, dtype=dtype), nn.Linear(4, v, dtype=dtype).requires_grad_(False)
    hidden, other = (
        torch.randn(n, 6, dtype=dtype, requires_grad=True),
        torch.randn(n, 4, dtype=dtype),
    )
    labels, weights = torch.randint(0, v, (n,)), torch.randn(2, n, dtype=dtype)
    found = []
    for chunk_bytes in (2**20, v * 8 * 5, 1):  # all, five and one at a time
        out = compared(
            hidden, other, labels, mine, theirs, v, temperature=0.8, chunk_bytes=chunk_bytes
        )
        assert out.kl.dtype == dtype and not (
            out.other_logprobs.requires_grad or out.entropy.requires_grad
        )
        gradients = torch.autograd.grad(
            (weights[0] * out.kl + weights[1] * out.logprobs).sum(), [hidden, *mine.parameters()]
        )
        found.append([x.detach() for x in (*out, *gradients)])
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for cut in found[1:]:
        assert all(torch.allclose(a, b, atol=tolerance) for a, b in zip(found[0], cut, strict=True))
    z, q = (x.detach().double().numpy() for x in (mine(hidden), theirs(other)))
    assert found[0][0].numpy() == pytest.approx(slow_kl(z, q, 0.8), abs=10 * tolerance)
    p, r = world.softmax(z / 0.8), world.softmax(q / 0.8)
    assert found[0][1].numpy() == pytest.approx(np.log(p[range(n), labels]), abs=10 * tolerance)
    assert found[0][2].numpy() == pytest.approx(np.log(r[range(n), labels]), abs=10 * tolerance)
    assert found[0][3].numpy() == pytest.approx(-(p * np.log(p)).sum(-1), abs=10 * tolerance)
    out = compared(hidden[:0], other[:0], labels[:0], mine, theirs, v)
    assert out.kl.shape == (0,) and out.kl.sum().backward() is None


def test_no_more_than_a_chunk_of_logits_is_made_at_a_time():
    seen = []

    class Head(nn.Linear):
        def forward(self, x):
            seen.append(len(x))
            return super().forward(x)

    hidden = torch.randn(40, 6, requires_grad=True)
    compared(
        hidden,
        torch.randn(40, 6),
        torch.zeros(40, dtype=torch.long),
        Head(6, 9),
        Head(6, 9),
        9,
        chunk_bytes=9 * 4 * 2 * 8,
    ).kl.sum().backward()
    assert (
        max(seen) == 8 and sum(seen) == 2 * 2 * 40
    )  # each head forward, and once more in the backward pass


def test_the_loss_descends_its_kl_by_finite_differences():
    z, q = RNG.normal(size=(2, 4, 3)), RNG.normal(size=(2, 4, 3))
    mask = torch.tensor([[0, 1, 1, 0], [0, 0, 1, 1]], dtype=torch.bool)
    real = mask.numpy()
    logits = torch.tensor(z, requires_grad=True)
    loss, metrics = losses.reverse_kl(logits, torch.tensor(q), mask, 0.7)
    assert (
        loss.item()
        == pytest.approx(slow_kl(z, q, 0.7)[real].mean(), abs=1e-12)
        == metrics["kl_teacher"].item()
    )
    expected = world.difference(lambda x: slow_kl(x, q, 0.7)[real].mean(), z)
    assert torch.autograd.grad(loss, logits)[0].numpy() == pytest.approx(expected, abs=1e-8)
    total, _ = losses.reverse_kl_sum(logits, torch.tensor(q), mask, 0.7)
    assert total.item() == pytest.approx(4 * loss.item())


def test_what_stands_on_padding_does_not_matter_and_shapes_are_held():
    torch.manual_seed(1)
    mask = torch.tensor([[0, 1, 1, 0, 0], [0, 0, 1, 1, 1]], dtype=torch.bool)
    clean = {"logits": torch.randn(2, 5, 4), "teacher_logits": torch.randn(2, 5, 4)}
    flat = {
        "state_kl": torch.rand(2, 5),
        "logprobs": -torch.rand(2, 5),
        "teacher_logprobs": -torch.rand(2, 5),
    }
    uses = [
        (losses.reverse_kl, {}, clean),
        (
            losses.reverse_kl_states,
            {"discount": 0.5},
            {k: flat[k] for k in ("state_kl", "logprobs")},
        ),
        (
            losses.reverse_kl_sampled,
            {"discount": 0.5},
            {k: flat[k] for k in ("logprobs", "teacher_logprobs")},
        ),
    ]
    for function, keywords, inputs in uses:
        found = []
        for rubbish in (0.0, math.nan, math.inf):
            some = {
                k: x.clone()
                .masked_fill(~(mask[..., None] if x.dim() == 3 else mask), rubbish)
                .requires_grad_()
                for k, x in inputs.items()
            }
            loss, metrics = function(**some, mask=mask, **keywords)
            loss.backward()
            learned = next(iter(some.values())).grad
            assert (learned[~mask] == 0).all() and learned[mask].abs().sum() > 0
            assert not any(
                k.startswith("teacher") and x.grad is not None for k, x in some.items()
            )  # the teacher is a fixed mark
            found.append([loss.detach(), learned, metrics["kl_teacher"]])
        summed, sums = getattr(losses, f"{function.__name__}_sum")(**some, mask=mask, **keywords)
        assert loss.item() == pytest.approx(summed.item() / 5)  # tokens
        assert float(metrics["kl_teacher"]) == pytest.approx(float(sums["kl_teacher"]) / 5)
        assert all(
            torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True)
        ), function
        with pytest.raises(ValueError, match="the mask selects nothing"):
            function(**inputs, mask=torch.zeros_like(mask), **keywords)
        with pytest.raises(ValueError, match="expected equal shapes"):
            function(
                **{k: x[:1] if k == list(inputs)[-1] else x for k, x in inputs.items()},
                mask=mask,
                **keywords,
            )


def test_later_states_are_paid_for_as_far_as_the_discount_says():
    """By hand: KL 1, 2, 4 in three states; at one half the first token pays 2/2 + 4/4 = 2, the
    second 4/2 = 2, the last nothing.
    """
    logprobs = torch.zeros(1, 5, requires_grad=True)
    mask = torch.tensor([[0, 1, 1, 0, 1]], dtype=torch.bool)  # a gap is stepped over
    state_kl = torch.tensor([[9.0, 1.0, 2.0, 9.0, 4.0]])
    loss, metrics = losses.reverse_kl_states_sum(state_kl, logprobs, mask, discount=0.5)
    assert (
        torch.autograd.grad(loss, logprobs)[0].tolist() == [[0, 2, 2, 0, 0]]
        and metrics["kl_teacher"] == 7
    )
    # of the sampled tokens: log-ratios -0.5, 1, 2 to the teacher; each pays its own too
    teacher = torch.tensor([[0.0, 0.5, -1.0, 7.0, -2.0]])
    loss, metrics = losses.reverse_kl_sampled_sum(logprobs, teacher, mask, discount=0.5)
    assert (
        torch.autograd.grad(loss, logprobs)[0].tolist() == [[0, 0.5, 2, 0, 2]]
        and metrics["kl_teacher"] == 2.5
    )


# Its gradient, where every response is known
# ------------------------------------------------------------


@pytest.fixture(scope="module")
def two():
    rng = np.random.default_rng(3)
    return rng.normal(size=(7, 3)), rng.normal(size=(7, 3))


def expected_gradient(student, teacher, loss_of, temperature=1.0):
    """[7, 3]: the gradient of the loss of each response, by the package, weighted with the
    response's probability in NumPy.
    """
    policy, mark = world.tabular(student), world.tabular(teacher)
    every = world.all_responses(temperature=temperature)
    out = policy(every.ids, every.mask, temperature, teacher=mark)
    likely = world.distribution(student / temperature)
    total = sum(
        float(likely[i])
        * loss_of(
            out.kl[i : i + 1],
            out.logprobs[i : i + 1],
            out.teacher_logprobs[i : i + 1],
            every.mask[i : i + 1],
        )
        for i in range(15)
    )
    assert mark.lm.logits.grad is None
    return torch.autograd.grad(total, policy.lm.logits)[0].numpy()


def states(discount):
    return lambda k, lp, t, mask: losses.reverse_kl_states_sum(k, lp, mask, discount=discount)[0]


def sampled(discount):
    return lambda k, lp, t, mask: losses.reverse_kl_sampled_sum(lp, t, mask, discount=discount)[0]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_a_policy_that_is_shown_a_teacher_gives_the_kl_of_each_state(two, temperature):
    policy, mark = (world.tabular(x) for x in two)
    every = world.all_responses(temperature=temperature)
    out = policy(every.ids, every.mask, temperature, teacher=mark)
    plain_one, other = (
        policy(every.ids, every.mask, temperature, entropy=True),
        mark(every.ids, every.mask, temperature),
    )
    assert torch.allclose(out.logprobs, plain_one.logprobs) and torch.allclose(
        out.entropy, plain_one.entropy
    )
    assert (
        torch.allclose(out.teacher_logprobs, other.logprobs)
        and not out.teacher_logprobs.requires_grad
    )
    by_state = slow_kl(two[0], two[1], temperature)
    for i, y in enumerate(world.RESPONSES):
        expected = [0.0, *(by_state[world.PREFIXES.index(y[:t])] for t in range(len(y)))]
        assert out.kl[i].tolist() == pytest.approx(
            expected + [0.0] * (out.kl.shape[1] - len(expected)), abs=1e-12
        )
    p, q = (world.distribution(x / temperature) for x in two)
    assert float((torch.tensor(p) * out.kl.detach().sum(1)).sum()) == pytest.approx(
        world.kl(p, q), abs=1e-12
    )  # the KL of whole responses


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("estimator", [states, sampled])
def test_at_discount_one_it_is_the_gradient_of_the_kl_of_the_responses(two, estimator, temperature):
    student, teacher = two
    mark = world.distribution(teacher / temperature)
    true = world.difference(lambda x: world.kl(world.distribution(x / temperature), mark), student)
    assert expected_gradient(student, teacher, estimator(1.0), temperature) == pytest.approx(
        true, abs=1e-8
    )


def visits(table):
    """[7] how likely each state is come to."""
    pi = world.distribution(table)
    return np.array(
        [
            sum(
                p
                for p, y in zip(pi, world.RESPONSES, strict=True)
                if y[: len(s)] == s and len(y) > len(s)
            )
            for s in world.PREFIXES
        ]
    )


@pytest.mark.parametrize("estimator", [states, sampled])
def test_at_discount_zero_it_is_the_gradient_of_each_state_with_the_way_there_as_it_is(
    two, estimator
):
    student, teacher = two
    way = visits(student)
    each = world.difference(lambda x: float(way @ slow_kl(x, teacher)), student)
    found = expected_gradient(student, teacher, estimator(0.0))
    assert found == pytest.approx(each, abs=1e-8)
    true = world.difference(
        lambda x: world.kl(world.distribution(x), world.distribution(teacher)), student
    )
    assert np.linalg.norm(found - true) > 0.05 * np.linalg.norm(
        true
    )  # another gradient than that of the responses,
    assert (
        np.abs(expected_gradient(teacher, teacher, estimator(0.0))).max() < 1e-12
    )  # with the same zero


def test_between_the_two_both_estimators_have_one_expectation(two):
    assert expected_gradient(*two, states(0.4)) == pytest.approx(
        expected_gradient(*two, sampled(0.4)), abs=1e-12
    )


def test_the_exact_estimator_has_less_variance(two):
    """Of one response: E|g|^2 - |Eg|^2, by enumeration."""
    student, teacher = two
    policy, mark, every = world.tabular(student), world.tabular(teacher), world.all_responses()
    likely = world.distribution(student)
    for discount in (0.0, 1.0):
        spread = []
        for estimator in (states, sampled):
            out = policy(every.ids, every.mask, teacher=mark)
            rows = [
                estimator(discount)(
                    *(
                        x[i : i + 1]
                        for x in (out.kl, out.logprobs, out.teacher_logprobs, every.mask)
                    )
                )
                for i in range(15)
            ]
            gradients = np.array(
                [
                    torch.autograd.grad(r, policy.lm.logits, retain_graph=True)[0].numpy()
                    for r in rows
                ]
            )
            mean = np.tensordot(likely, gradients, 1)
            spread.append(likely @ (gradients**2).sum((1, 2)) - (mean**2).sum())
        assert spread[0] < 0.7 * spread[1]


def test_how_far_off_discount_zero_is_in_the_mild_world_is_as_the_docstring_says():
    row = next(r for r in lab.kl_table().estimators if r.name == "exact KL per token")
    assert round(row.relative_error_loss, 2) == 0.19 and round(row.cosine_loss, 3) == 0.984
    assert "19% off" in losses.distill.__doc__ and "cosine 0.984" in losses.distill.__doc__


# The page
# ------------------------------------------------------------


@pytest.fixture(scope="module")
def go(models, make, data, tmp_path_factory):
    """go("gpt2", steps=3, ...): a short run in a folder of its own; the teacher is a deeper model
    of the same make.
    """
    teachers = {
        kind: make(kind, **({"n_layer": 3} if kind == "gpt2" else {"num_hidden_layers": 3}))
        for kind in models
    }

    def run(kind, **changes):
        common = {
            "model": models[kind],
            "teacher": teachers[kind],
            "data": data["prompts"],
            "out": str(tmp_path_factory.mktemp("distill") / "run"),
        }
        common |= {
            "steps": 2,
            "learning_rate": 1e-3,
            "batch_size": 4,
            "max_new_tokens": 6,
            "eval_samples": 6,
            "run": RunSettings(eval_every=1, samples=2),
        }
        return fd.distill(fd.Distill(**(common | changes)))

    return run


def lines(run):
    found = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if "num_tokens" in line]


def weights(run):
    return torch.cat([p.detach().flatten() for p in run.model.parameters()])


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("gpt2", {}),
        ("qwen3", {}),
        ("llama", {"lora": LoraSettings(r=2)}),
        ("llama", {"estimator": "sampled"}),
        ("gpt2", {"temperature": 0.7, "discount": 0.5}),
    ],
)
def test_a_student_comes_nearer_to_its_teacher(go, kind, changes):
    run = go(kind, steps=25, batch_size=16, learning_rate=5e-3, **changes)
    first, last = lines(run)[0], lines(run)[-1]
    assert last["kl_teacher"] < 0.7 * first["kl_teacher"]
    for line in (first, last):
        assert line["sampler_gap"] < 1e-4
        assert line["objective/kl_teacher"] == pytest.approx(
            line["kl_teacher"] * line["completions/mean_length"], rel=1e-4
        )
        if (
            "estimator" in changes
        ):  # k1 is the difference of the two losses; the exact KL is its expectation
            assert line["kl_teacher"] == pytest.approx(
                line["nll/teacher"] - line["nll/student"], abs=1e-4
            )
        assert all(known(name) for name in set(line) - {"step", "seconds"})
    assert run.metrics["eval/kl_teacher"] == run.evaluation["eval/kl_teacher"]["value"] > 0
    found = run.evaluation["eval/nll/teacher"]
    assert found["low"] < found["value"] < found["high"] and found["n"] == 6
    assert (run.path / "model" / "model.safetensors").is_file() or "lora" in changes


@pytest.mark.parametrize(
    "changes", [{}, {"discount": 0.5}, {"estimator": "sampled", "discount": 1.0}]
)
def test_how_a_batch_is_cut_changes_nothing(go, models, changes):
    start = torch.cat(
        [
            p.flatten()
            for p in load_policy(models["gpt2"], LoraSettings(), RunSettings()).parameters()
        ]
    )
    whole, cut = (
        go(
            "gpt2",
            steps=3,
            batch_size=5,
            learning_rate=1e-2,
            optimizer=GENTLE,
            run=RunSettings(tokens=tokens, samples=1, eval_every=1),
            **changes,
        )
        for tokens in (10**6, 1)
    )
    for a, b in zip(lines(whole), lines(cut), strict=True):
        for name in set(a) - {"seconds", "tokens_per_second"}:
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-4), name
    assert (weights(whole) - weights(cut)).norm() < 1e-4 * (weights(whole) - start).norm()


def test_the_seed_is_the_run_and_prompts_held_out_are_not_trained_on(go, data, monkeypatch):
    from fiducial.methods import distill as page

    seen, keys, sample = [], [], page.sample_all

    def watched(sampler, prompts, params, streams, processes):
        seen.append(prompts)
        keys.append((streams.seed, streams.step))
        return sample(sampler, prompts, params, streams, processes)

    monkeypatch.setattr(page, "sample_all", watched)
    one, other, third = go("llama"), go("llama"), go("llama", seed=1)
    assert torch.equal(weights(one), weights(other)) and not torch.equal(
        weights(one), weights(third)
    )
    trained, asked = ({tuple(p) for call in seen[k:4:2] for p in call} for k in (0, 1))
    assert not trained & asked and len(asked) == 1
    assert keys[:4] == [
        (0, 0),
        (1, 0),
        (0, 1),
        (1, 0),
    ]  # fresh samples every step; those of an evaluation are no step's, and the same every time
    one = go("llama", rows=RowSettings(held_out=0))
    assert one.evaluation == {} and "eval/kl_teacher" not in one.metrics


@pytest.mark.parametrize(
    ("changes", "steps"),
    [({}, 60), ({"estimator": "sampled"}, 120), ({"discount": 1.0, "temperature": 0.5}, 120)],
)
def test_on_a_world_of_fifteen_responses_it_reaches_its_teacher(tmp_path, changes, steps):
    mild, model = policies.mild()
    folder = write_world(mild, model, tmp_path / "world", copies=1)
    other = mild.with_(
        reference=exact.log_softmax(
            mild.reference + np.random.default_rng(1).normal(size=mild.reference.shape)
        )
    )
    policies.save(policies.table(other), folder / "teacher")
    run = fd.distill(
        fd.Distill(
            model=str(folder / "table"),
            teacher=str(folder / "teacher"),
            data=str(folder / "prompts.jsonl"),
            out=str(tmp_path / "run"),
            steps=steps,
            batch_size=128,
            learning_rate=0.1,
            max_new_tokens=mild.horizon,
            run=RunSettings(samples=1, checkpoint_every=0),
            **changes,
        )
    )
    temperature = changes.get("temperature", 1.0)
    found = exact.logprobs(
        mild.tree, policies.logits(run.model.lm, mild.prompts, mild.tree) / temperature
    )
    target, start = (exact.logprobs(mild.tree, w.reference / temperature) for w in (other, mild))
    assert exact.total_variation(start, target) > 0.25
    assert exact.total_variation(found, target) < 0.02
    assert exact.kl(found, target) < 2e-3


# The teacher
# ------------------------------------------------------------


def open_teacher(student, teacher, **rows):
    renderer = load_renderer(student, RowSettings(**rows))
    policy = load_policy(student, LoraSettings(), RunSettings(), renderer.tokenizer)
    return load_teacher(teacher, policy, renderer.tokenizer, renderer.max_length, RunSettings())


def test_a_teacher_of_another_vocabulary_is_refused_before_anything_starts(
    models, make, go, data, tmp_path
):
    out = tmp_path / "run"
    with pytest.raises(
        InputError,
        match=r"--teacher: .* has another vocabulary: .*tokens differ, the first is '<unk>' with "
        r"id 0 \(teacher: absent\)",
    ):
        go("llama", teacher=models["gpt2"], out=str(out))
    assert not out.exists()
    swapped = Path(make("gpt2"))
    content = json.loads((swapped / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (swapped / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(
        InputError,
        match=r"2 of the student's \d+ tokens differ, the first is 'a' with id 1 \(teacher: 2\)",
    ):
        open_teacher(models["gpt2"], str(swapped))
    with pytest.raises(InputError, match="there is no folder"):
        go("llama", teacher="/no/such/teacher")


def test_a_student_with_more_logits_than_its_teacher_is_refused(models, make):
    with pytest.raises(
        InputError,
        match=r"has 56 logits and the student 64, .* model.resize_token_embeddings\(56\)",
    ):
        open_teacher(models["gpt2"], make("gpt2", vocab_size=56))


@pytest.mark.parametrize(
    "kind", ["llama", "qwen3"]
)  # a head of its own, and one tied to the embeddings
@torch.no_grad()
def test_rows_that_only_the_teacher_has_are_taken_away_and_the_rest_normalised(models, make, kind):
    name = make(kind, vocab_size=80)
    teacher, whole = (
        open_teacher(models[kind], name),
        load_policy(name, LoraSettings(), RunSettings()),
    )
    ids = torch.tensor([[5, 9, 14, 22, 7]])
    kept, full = (plain(p.lm)(input_ids=ids).logits for p in (teacher, whole))
    assert kept.shape[-1] == 64 and not any(p.requires_grad for p in teacher.parameters())
    assert torch.allclose(kept.log_softmax(-1), full[..., :64].log_softmax(-1), atol=1e-5)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[:, 0] = False
    assert teacher(ids, mask).logprobs.sum() > whole(ids, mask).logprobs.sum()


def test_a_teacher_may_know_more_tokens_and_lack_the_students_padding(models, make, tmp_path):
    wider, student = make("llama", vocab_size=80), make("llama")
    tokenizer = make_tokenizer("llama")
    tokenizer.add_tokens(["<tool>"])
    tokenizer.save_pretrained(wider)
    tokenizer = make_tokenizer("llama")
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    tokenizer.save_pretrained(student)
    assert plain(open_teacher(student, wider).lm).get_output_embeddings().weight.shape[0] == 64


def test_a_teacher_with_too_small_a_context_is_refused(models, make):
    small = make("gpt2", n_positions=64)
    with pytest.raises(
        InputError,
        match=r"has a context of 64 tokens and the student may use 128: give --rows.max-length 64",
    ):
        open_teacher(models["gpt2"], small)
    assert open_teacher(models["gpt2"], small, max_length=64)


# The numbers and what is said of them
# ------------------------------------------------------------


def test_a_ratio_has_the_interval_of_its_rows():
    sums, counts = [1.0, 4.0, 2.0, 6.0], [2, 4, 1, 5]
    found = intervals.ratio(sums, counts)
    assert found["value"] == pytest.approx(13 / 12) and found["n"] == 4
    off = [s - 13 / 12 * c for s, c in zip(sums, counts, strict=True)]
    half = intervals.Z * math.sqrt(4 / 3 * sum(x * x for x in off)) / 12
    assert (found["low"], found["high"]) == pytest.approx((13 / 12 - half, 13 / 12 + half))
    equal = intervals.ratio([2.0, 3.0, 7.0], [1, 1, 1], ["a", "a", "b"])
    assert equal == pytest.approx(intervals.mean([2.0, 3.0, 7.0], ["a", "a", "b"]))
    # by simulation: rows drawn again and again, the ratio is inside its interval about as often as
    # it says
    rng, inside = np.random.default_rng(0), 0
    for _ in range(400):
        n = rng.integers(1, 30, size=60)
        one = intervals.ratio((0.4 * n + rng.normal(size=60) * np.sqrt(n)).tolist(), n.tolist())
        inside += one["low"] < 0.4 < one["high"]
    assert 0.92 < inside / 400 < 0.98
    assert math.isnan(intervals.ratio([], [])["value"])


def test_the_page_says_how_far_the_student_is_from_its_teacher(go):
    run = go("gpt2", steps=8, batch_size=8, eval_samples=12, learning_rate=3e-3)
    folder = read_run(run.path)
    assert folder.kind == "distillation"
    first, second = answer(folder)
    assert (
        first.startswith(
            "On fresh samples to held-out prompts (n\u00a0=\u00a012) the teacher's loss is"
        )
        and "nats per token" in first
    )
    assert second.startswith("KL to the teacher") and second.endswith(
        "on the student's own samples."
    )
    page = (run.path / "report.html").read_text()
    assert "Loss of the student and of the teacher on the student" in page
    assert "the registry has no description of it" not in page
    bare = answer(read_run(go("gpt2", rows=RowSettings(held_out=0)).path))
    assert bare[-1] == "Samples on held-out prompts were not measured."


def test_prompts_may_come_with_anything_else(go, tmp_path):
    write_rows(
        tmp_path / "rows.jsonl",
        iter(
            [
                {"prompt": "the cat", "completion": " sat", "answer": "4"},
                {"prompt": "a", "completion": " e"},
            ]
        ),
    )
    assert go("gpt2", data=str(tmp_path / "rows.jsonl")).step == 2
