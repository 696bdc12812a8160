"""The pass over the pairs with which DPO begins: stopped and gone on with, the run is the same."""

import json
import signal

import pytest

import fiducial as fd
from fiducial.methods import dpo as page
from fiducial.settings import RunSettings
from fiducial.train import reference_cache


@pytest.fixture
def go(models, data, tmp_path, monkeypatch):
    def run(out, **changes):
        monkeypatch.setenv("FIDUCIAL_CACHE", str(tmp_path / f"cache of {out}"))
        values = {"model": models["llama"], "data": data["pairs"], "out": str(tmp_path / out)}
        values |= {"steps": 2, "batch_size": 4, "run": RunSettings(samples=0)}
        return page.dpo(fd.DPO(**(values | changes)))

    return run


def losses(run):
    rows = map(json.loads, (run.path / "metrics.jsonl").read_text().splitlines())
    return [(row["loss"], row["logps/chosen"]) for row in rows if "loss" in row]


def test_a_pass_that_a_signal_stopped_is_gone_on_with(go, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(page, "tokens_in_a_minute", lambda policy: 60)
    asked, inner = [], page.pair_logprobs
    monkeypatch.setattr(page, "pair_logprobs", lambda *a: asked.append(len(a[1])) or inner(*a))
    read, cached = [], reference_cache.cached
    monkeypatch.setattr(page, "cached", lambda *a: read.append(a[1]) or cached(*a))

    def pass_of(out, **changes):
        asked.clear()
        run = go(out, **changes)
        return run, sum(asked)

    whole, all_pairs = pass_of("whole")
    parts = read[-1]
    total = parts[-1].stop
    assert len(parts) >= 3

    def signalled(key, rows, compute, processes, title):
        def until(part):
            if part.start == parts[1].stop:
                signal.raise_signal(signal.SIGTERM)
            return compute(part)

        return cached(key, rows, until, processes, title)

    with monkeypatch.context() as patch:
        patch.setattr(page, "cached", signalled)
        with pytest.raises(KeyboardInterrupt):
            pass_of("b")
    said = capsys.readouterr().err
    assert f"reference: those of {parts[1].stop} of {total} pairs are kept" in said
    assert f"go on with: fiducial dpo --out {tmp_path / 'b'} --resume" in said
    assert sum(asked) == parts[1].stop + 1  # and one pair is read by the check before
    again, rest = pass_of("b", resume=True)
    assert rest == all_pairs - parts[1].stop
    assert losses(again) == losses(whole) and len(losses(whole)) == 2
