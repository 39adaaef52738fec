"""The tool that finds and downloads the preference data of some tests and benchmarks."""

from __future__ import annotations

import hashlib
import io
import json

import pytest

preference_data = pytest.importorskip("tools.preference_data", reason="the tools are for clones")


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """An empty folder for the data, and a web that holds the returned dict alone."""
    web: dict[str, bytes] = {}

    def urlopen(url, timeout):
        if url not in web:
            raise OSError("no network")
        return io.BytesIO(web[url])

    monkeypatch.setenv("LIT_DID_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(preference_data.urllib.request, "urlopen", urlopen)
    return web


@pytest.mark.parametrize("name", preference_data.DATA_SETS)
def test_absent_data_is_named_with_its_source(offline, name):
    with pytest.raises(FileNotFoundError) as raised:
        preference_data.find(name)
    message = str(raised.value)
    assert name in message
    assert ("tatsu-lab/alpaca_eval" in message) != ("anthropics/hh-rlhf" in message)
    assert "python -m tools.preference_data" in message
    assert "LIT_DID_DATA" in message


def test_download(offline, monkeypatch, tmp_path):
    answers = {"instruction": " Hi? ", "dataset": "d", "generator_1": "A", "generator_2": "B"}
    rows = [answers | {"output_1": f"a{n}", "output_2": f"b{n} é", "preference": n} for n in (0, 1, 2)]
    name = preference_data.ALPACA_EVAL
    data = preference_data.DATA_SETS[name]
    offline[data.url] = json.dumps(rows).encode()
    with pytest.raises(ValueError, match="its SHA-256 checksum differs"):
        preference_data.download(name)
    assert not list(tmp_path.rglob("*.jsonl*"))
    expected = [("a1", "b1 é", "A", "B"), ("b2 é", "a2", "B", "A")]
    content = preference_data.pairs_of_annotations(offline[data.url])
    assert [
        (pair["chosen"], pair["rejected"], pair["chosen_model"], pair["rejected_model"])
        for pair in map(json.loads, content.splitlines())
    ] == expected
    assert b'{"prompt": "Hi?", ' in content
    digest = hashlib.sha256(content).hexdigest()
    monkeypatch.setitem(preference_data.DATA_SETS, name, data._replace(sha256=digest))
    assert preference_data.download(name) == preference_data.find(name) == tmp_path / "data" / name
    assert preference_data.find(name).read_bytes() == content
    del offline[data.url]
    preference_data.download(name)  # it is there
