"""The command train/export.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from training import train_only

from lejepa_fast.train import export
from lejepa_fast.train.checkpoint.export import export_encoder
from lejepa_fast.train.config import Config


def test_convert_writes_the_encoder_that_the_trainer_exports(
    tiny: Callable[..., Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = tiny(max_steps=2)
    trainer = train_only(cfg)
    export_encoder(trainer.model.encoder, cfg, 2, tmp_path)
    out = tmp_path / "converted" / "mine.safetensors"
    assert export.main(["--checkpoint", str(cfg.out), "--out", str(out)]) == 0
    assert out.read_bytes() == (tmp_path / "encoder.safetensors").read_bytes()
    assert out.with_suffix(".json").read_text() == (tmp_path / "encoder.json").read_text()
    capsys.readouterr()
    assert export.main(["--checkpoint", str(cfg.out), "--out", str(tmp_path / "mine.pt")]) == 2
    assert "out: expected a file name that ends in .safetensors" in capsys.readouterr().err
    assert export.main(["--checkpoint", str(tmp_path)]) == 2
    assert "holds no checkpoint" in capsys.readouterr().err
