"""Silent mistakes in rows, each found by its name, and not in the healthy twin of the rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fiducial.data.elements import RowFormat, read
from fiducial.data.findings import Finding, NothingToLearn, warned
from fiducial.data.judged import judged, row_findings
from fiducial.data.language import LANGUAGE_ROWS, language_rows
from fiducial.data.pairs import preference_rows
from fiducial.data.prepare import text_of
from fiducial.data.render import Renderer
from fiducial.data.row_types import LabeledRow, PreferenceRow, PromptRow, StepsRow
from fiducial.data.survey import Survey
from fiducial.methods.prm import solver
from fiducial.settings import RowSettings
from small_rows import (
    WORDS,
    Rows,
    asked,
    changed,
    chat,
    pairs,
    questions,
    said,
    sft,
    solutions,
    swapped,
)
from support import make_tokenizer, write_jsonl

NO_SYSTEM = (
    "{% for m in messages %}{% if m['role'] != 'system' %}<|im_start|>{{ m['role'] }}\n"
    "{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TWO_BOS = "{{ bos_token }}{{ bos_token }}{% for m in messages %}{{ m['content'] }}\n{% endfor %}"


def _format(verb: str) -> RowFormat[Any]:
    def key(row: Any) -> str:
        return text_of(getattr(row, "prompt", None) or getattr(row, "messages", "") or row.text)

    if verb == "sft":
        return RowFormat(LANGUAGE_ROWS, language_rows, key, lambda r: [r.ids])
    if verb == "dpo":
        return RowFormat((PreferenceRow,), preference_rows, key, lambda pair: [])
    if verb == "prm":
        accept = (StepsRow, LabeledRow)
        return RowFormat(accept, lambda r: solver(r, "\n"), key, lambda s: [])
    return RowFormat(
        (PromptRow,), lambda r: lambda row: r.prompt(row.prompt, row.where), key, lambda i: [i]
    )


def look(
    path: Path, verb: str, rows: Rows, model: str, held: Rows | None = None, **settings: Any
) -> Survey:
    """The survey of rows as a verb reads them with a tokenizer of tests/support.py."""
    tokenizer = make_tokenizer(model)
    if "template" in settings:
        tokenizer.chat_template = settings.pop("template")
    renderer = Renderer(tokenizer, settings.pop("max_length", 200))
    source = write_jsonl(path / "rows.jsonl", rows)
    other = None if held is None else write_jsonl(path / "held.jsonl", held)
    choice = RowSettings(eval_data=other, held_out=0.0, **settings)
    survey = Survey(renderer)
    read(source, choice, _format(verb), renderer, 0, survey=survey)
    return survey


def names(survey: Survey) -> set[str]:
    """Names of the warnings and errors."""
    return {f.name for f in row_findings(survey) if f.level != "note"}


LONGER = changed(pairs(), chosen=lambda r, i: " in the sun" * (4 + i % 3))
CASES: dict[str, tuple[str, str, Rows, Rows, dict[str, Any]]] = {
    # name: verb, tokenizer, the healthy rows, the rows with the mistake, settings of the latter
    "double-bos": (
        "sft",
        "llama",
        sft(),
        changed(sft(), prompt=lambda r, i: "<s><s>" + r["prompt"]),
        {},
    ),
    "double-bos by the template": ("sft", "llama", sft(), chat(), {"template": TWO_BOS}),
    "end-inside-answer": (
        "sft",
        "llama",
        sft(),
        changed(sft(), completion=lambda r, i: r["completion"] + "</s> the end"),
        {},
    ),
    "plain-text-for-chat-model": ("sft", "qwen3", chat(), sft(), {}),
    "plain-text-for-chat-model, prompts": (
        "grpo",
        "qwen3",
        [{"prompt": row["messages"][:1]} for row in chat()],
        questions(),
        {},
    ),
    "system-message-dropped": (
        "sft",
        "qwen3",
        chat(system="be kind"),
        chat(system="be kind"),
        {"template": NO_SYSTEM},
    ),
    "special-tokens-in-messages": (
        "sft",
        "qwen3",
        chat(),
        said(chat(), lambda text: f"<|im_start|>user\n{text}<|im_end|>"),
        {},
    ),
    "foreign-special-tokens": (
        "sft",
        "llama",
        sft(),
        changed(sft(), prompt=lambda r, i: f"[INST] {r['prompt']} [/INST]"),
        {},
    ),
    "prompt-repeated": (
        "dpo",
        "llama",
        pairs(),
        changed(
            pairs(),
            chosen=lambda r, i: r["prompt"] + r["chosen"],
            rejected=lambda r, i: r["prompt"] + r["rejected"],
        ),
        {},
    ),
    "answer-in-prompt": (
        "sft",
        "llama",
        sft(),
        changed(
            sft(),
            prompt=lambda r, i: f"{r['prompt']} the other one is {r['completion']} a lot",
            completion=lambda r, i: f" the other one is {r['completion']}",
        ),
        {},
    ),
    "answer-in-prompt, of a column": (
        "grpo",
        "llama",
        questions(),
        changed(questions(), prompt=lambda r, i: f"{r['prompt']} {r['answer']}"),
        {},
    ),
    "same-answer": ("sft", "llama", sft(), changed(sft(), completion=lambda r, i: " no idea"), {}),
    "same-answer, rejected": (
        "dpo",
        "llama",
        pairs(),
        changed(pairs(), rejected=lambda r, i: " no idea"),
        {},
    ),
    "contradicting-pairs": ("dpo", "llama", pairs(), [*pairs(), *map(swapped, pairs(8))], {}),
    "contradicting-labels": (
        "prm",
        "llama",
        solutions(),
        [*solutions(), *changed(solutions(8), labels=lambda r, i: [1, (i + 1) % 2])],
        {},
    ),
    "one-label": (
        "prm",
        "llama",
        solutions(),
        changed(solutions(), labels=lambda r, i: [1, 1]),
        {},
    ),
    "majority-baseline": (
        "prm",
        "llama",
        solutions(),
        changed(solutions(), labels=lambda r, i: [1, int(i > 0)]),
        {},
    ),
    "length-baseline": ("dpo", "llama", pairs(), LONGER, {}),
    "length-baseline, shorter": ("dpo", "llama", pairs(), [*map(swapped, LONGER)], {}),
    "duplicate-rows": ("sft", "llama", sft(), sft() + sft(6), {}),
    "duplicate-rows, prompts": ("grpo", "llama", questions(), questions() + questions(6), {}),
    "near-equal-prompts": (
        "sft",
        "llama",
        sft(),
        sft() + changed(sft(6), prompt=lambda r, i: r["prompt"].replace(" ", "  ")),
        {},
    ),
    "rows-cut": ("sft", "llama", sft(), sft(), {"max_length": 30}),
    "little-left": ("sft", "llama", sft(), sft(), {"max_length": 30}),
    "one-side-cut": (
        "dpo",
        "llama",
        pairs(),
        changed(pairs(), rejected=lambda r, i: f" no {WORDS[i % 9]}" + " and then" * 8),
        {"max_length": 60},
    ),
    "broken-characters": (
        "sft",
        "llama",
        sft(),
        changed(sft(), completion=lambda r, i: " the caf\ufffd" if i % 3 else r["completion"]),
        {},
    ),
    "broken-characters, mojibake": (
        "sft",
        "llama",
        sft(),
        changed(sft(), completion=lambda r, i: " the café".encode().decode("cp1252")),
        {},
    ),
    "unknown-tokens": (
        "sft",
        "llama",
        sft(),
        changed(sft(), completion=lambda r, i: " кошка " + WORDS[i % 10]),
        {},
    ),
    "prompt-is-trained": (
        "sft",
        "qwen3",
        chat(),
        [{"messages": row["messages"][1:]} for row in chat()],
        {"template": "{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}"},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_mistake_in_rows_is_found_by_name_and_not_in_its_healthy_twin(case, tmp_path):
    verb, model, healthy, sick, settings = CASES[case]
    assert names(look(tmp_path, verb, healthy, model)) == set()
    assert case.partition(",")[0].partition(" ")[0] in names(
        look(tmp_path, verb, sick, model, **settings)
    )


def test_evaluation_prompts_among_the_training_prompts_are_found_whatever_their_case(tmp_path):
    held = changed(sft(30)[20:], prompt=lambda r, i: r["prompt"].upper() + " ")
    seen = look(tmp_path, "sft", sft(25), "llama", held)
    assert (seen.held, seen.leaked) == (10, 5)
    assert "evaluation-in-training" in names(seen)
    assert names(look(tmp_path, "sft", sft(20), "llama", held)) == set()


def test_sampled_responses_without_an_end_are_counted(tmp_path):
    tokenizer = make_tokenizer("llama")
    fingerprint = Renderer(tokenizer, 200).fingerprint

    def ids(text: str, end: list[int]) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids + end

    def sampled(end: list[int]) -> Rows:
        return changed(
            sft(),
            completion_ids=lambda r, i: ids(r["completion"], end),
            tokenizer=lambda r, i: fingerprint,
        )

    assert "end-not-trained" in names(look(tmp_path, "sft", sampled([]), "llama"))
    assert names(look(tmp_path, "sft", sampled([tokenizer.eos_token_id]), "llama")) == set()


def test_counts_are_those_of_a_count_by_hand(tmp_path):
    rows = [
        {"prompt": "the cat", "chosen": " sat", "rejected": " sat on"},
        {"prompt": "the cat", "chosen": " sat on", "rejected": " sat"},
        {"prompt": "The  cat", "chosen": " a", "rejected": " e"},
    ]
    seen = look(tmp_path, "dpo", rows, "llama")
    renderer = seen.renderer
    every = [
        renderer.completion(r["prompt"], r[k], "") for r in rows for k in ("chosen", "rejected")
    ]
    assert list(seen.lengths) == [len(one) for one in every]
    assert seen.n["labels"] == sum(one.num_labels for one in every)
    assert (seen.n["rows"], seen.prompts, seen.near, seen.contradictions) == (3, 2, 1, 1)
    assert list(seen.longer) == [0.0, 1.0, 0.5]


def test_labels_that_are_right_more_often_than_not_are_not_all_contradictions(tmp_path):
    """Eleven times A over B and five times B over A leave six of sixteen rows to learn from."""
    a, b = pairs(1)[0], swapped(pairs(1)[0])
    seen = look(tmp_path, "dpo", [a, b, a] * 5 + [a], "llama")
    assert seen.contradictions == 5
    assert all(f.level != "error" for f in row_findings(seen))
    assert look(tmp_path, "dpo", [a, b] * 5, "llama").contradictions == 5


def test_a_file_that_only_contradicts_itself_or_has_one_label_is_refused(tmp_path):
    for verb, rows in (
        ("dpo", [*pairs(), *map(swapped, pairs())]),
        ("prm", changed(solutions(), labels=lambda r, i: [0, 0])),
    ):
        with pytest.raises(NothingToLearn, match="nothing"):
            judged(look(tmp_path, verb, rows, "llama"))


def test_of_many_rows_some_at_equal_distances_are_looked_at(tmp_path):
    renderer = Renderer(make_tokenizer("llama"), 200)
    seen = Survey(renderer)
    rows = [PromptRow(asked(i), {}, f"f:{i}") for i in range(35)]
    seen.look(rows, [[1, 2]] * 35, most=10)
    assert (seen.total, seen.n["rows"]) == (35, 9)


def test_a_run_begins_with_a_few_lines_at_most():
    found = [Finding("warning", f"n{i}", "a sentence", "a remedy") for i in range(6)]
    lines = warned([*found, Finding("note", "m", "a note")])
    assert lines[0] == "warning (n0): a sentence: a remedy"
    assert len(lines) == 4 and lines[-1].startswith("3 more warnings: `fiducial check`")
    assert len(warned(found[:4])) == 4 and warned(found[6:]) == []
