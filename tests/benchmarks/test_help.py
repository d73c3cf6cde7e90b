"""Every benchmark can be imported and describes itself; of some no more is cheap to run."""

from importlib import import_module

import pytest

NAMES = (
    *("ablation", "audit", "autoattack", "corruptions", "evaluation", "inference", "playground"),
    *("priority", "replicas", "serving.__main__", "training"),
)


@pytest.mark.parametrize("name", NAMES)
def test_help(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = import_module(f"benchmarks.{name}")
    monkeypatch.setattr("sys.argv", [name, "--help"])
    with pytest.raises(SystemExit) as ended:
        module.main()
    assert ended.value.code == 0
    assert "usage: " in capsys.readouterr().out.lower()
