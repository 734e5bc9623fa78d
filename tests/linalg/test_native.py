"""The choice of a path, with and without the compiled module."""

from __future__ import annotations

import importlib.util
import sys

import pytest

from elastiq.core import ElastiqError
from elastiq.linalg import native


def test_without_the_compiled_module(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.delenv("ELASTIQ_PATH", raising=False)
    monkeypatch.setitem(sys.modules, "elastiq.linalg._native", None)
    spec = importlib.util.spec_from_file_location("elastiq.linalg.bare", native.__file__)
    assert spec is not None and spec.loader is not None
    bare = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bare)
    assert bare.module is None and bare.paths() == ("torch",) and bare.current() == "torch"
    (record,) = caplog.records
    assert "compiled loops are absent; plain torch runs instead" in record.message
    with pytest.raises(ElastiqError, match="path 'amx' does not run here; choose one of torch"):
        bare.use("amx")


def test_the_environment_chooses_until_use_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ELASTIQ_PATH", "torch")
    native.use(None)
    assert native.current() == "torch"
    for path in native.paths():
        native.use(path)
        assert native.current() == path
    monkeypatch.setenv("ELASTIQ_PATH", "mmx")
    native.use(None)
    with pytest.raises(ElastiqError, match="ELASTIQ_PATH='mmx' does not run here"):
        native.current()
    monkeypatch.delenv("ELASTIQ_PATH")
    native.use(None)
    assert native.current() == native.paths()[0]
