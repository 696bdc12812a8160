"""The hashes of what a run or a file of rows begins with."""

import json

from fiducial.train.inputs import hashes


def test_the_base_of_an_adapter_is_part_of_it(tmp_path):
    adapter, base = tmp_path / "adapter", tmp_path / "base"
    adapter.mkdir()
    base.mkdir()
    (base / "weights").write_text("1")

    def digest():
        return hashes({"--model": str(adapter)})

    alone = digest()
    for name in ("owner/model", str(tmp_path / "none"), 5, str(adapter)):
        (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": name}))
        assert digest() != alone
    config = json.dumps({"base_model_name_or_path": str(base)})
    (adapter / "adapter_config.json").write_text(config)
    first = digest()
    (base / "weights").write_text("2")
    assert digest() != first and digest()["--model"] == first["--model"]


def test_files_functions_and_names(tmp_path):
    code = tmp_path / "judge.py"
    code.write_text("def f(): pass")
    names = {"a": str(code), "b": f"{code}:f", "c": "exact_match", "d": "owner/model", "e": None}
    found = hashes(names)
    assert found["a"] == found["b"] is not None
    assert found["c"] is found["d"] is None and "e" not in found
