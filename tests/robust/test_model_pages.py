"""The pages on models: every form in the table has a test, every command runs."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from robust_cli import run
from tests.robust import test_checkpoint, test_given, test_loading

ROOT = Path(__file__).parents[2]
FORMATS = (ROOT / "docs" / "formats.md").read_text()
PAGE = (ROOT / "docs" / "your-own-model.md").read_text()
TESTED_BY: dict[str, Any] = {
    "robust checkpoint": test_checkpoint.test_round_trip,
    "State dict": test_checkpoint.test_bare_state_dict_loads,
    "State dict in a wrapper": test_loading.test_every_form_gives_the_same_logits,
    "Lightning checkpoint": test_loading.test_every_form_gives_the_same_logits,
    "Prefixed keys": test_loading.test_every_form_gives_the_same_logits,
    "Extra keys": test_loading.test_every_form_gives_the_same_logits,
    "Normalization layer": test_loading.test_normalization_layer_is_used,
    "MadryLab's robustness": test_loading.test_normalization_layer_is_used,
    "Half precision": test_loading.test_half_precision_is_reported,
    "safetensors": test_loading.test_safetensors,
    "robust safetensors": test_loading.test_exported_safetensors_need_no_guesses,
    "Network of timm or torchvision": test_loading.test_network_from_a_library,
    "Hugging Face folder": test_given.test_timms_hub_folder,
    "robust Hugging Face folder": test_given.test_our_own_hub_folder,
    "Python": test_given.test_model_from_user_code,
    "TorchScript": test_given.test_torchscript,
    "torch.export": test_given.test_torch_export,
    "ONNX (extra `runtime`)": test_given.test_onnx,
    "Service": test_given.test_remote_service,
}


def test_every_form_in_the_table_has_a_test() -> None:
    table = FORMATS.split("| form | given as | what is read |\n|---|---|---|\n")[1].split("\n\n")[0]
    assert [row.split("|")[1].strip() for row in table.splitlines()] == list(TESTED_BY)


def test_your_own_model_page_commands_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    blocks = re.findall(r"(<!-- not run: [^>]+ -->\n)?```(python|sh)\n(.*?)```", PAGE, re.DOTALL)
    for why, language, text in blocks:
        if why:
            continue
        if language == "python":
            exec(text, scope)
            continue
        for line in text.strip().splitlines():
            assert run(shlex.split(line)[1:]) == 0, (line, capsys.readouterr().err)
    assert {"report.json", "attacked", "my-model"} <= {item.name for item in tmp_path.iterdir()}
    assert sum(bool(why) for why, _, _ in blocks) == 2
