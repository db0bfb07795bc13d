"""The command: exit codes and one-line errors, signals, and torchrun with two processes on gloo."""

import errno
import os
import re
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from training import CPU, SCRIPT, arguments_of, forkserver, rows_of, train_only, wait_until

import lejepa_fast.train.runtime.world as ranks
from lejepa_fast.data.sources import folder, outages
from lejepa_fast.data.sources.decoding import read_file
from lejepa_fast.errors import UsageError
from lejepa_fast.train import pretrain
from lejepa_fast.train.checkpoint.storage import read_checkpoint
from lejepa_fast.train.engine.trainer import Trainer
from lejepa_fast.train.runtime.files import write_atomically
from lejepa_fast.train.runtime.signals import Interrupted

# ---- usage errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "{tmp}/no\nwhere"], "no\\nwhere does not exist"),
        (["--batch-size", "64"], "has 32 images, fewer than one batch of 64"),
        (["--eval.backbone", "resnat18"], "--eval.backbone: no model is called 'resnat18'"),
        (["--eval.backbone", "test_resnet:untrained", "--data.channels", "0"], "data.channels: expected"),
        (["--device", "cuda"], "use --device cpu"),
        (["--resume", "{tmp}/nowhere"], "checkpoint {tmp}/nowhere does not exist"),
        (["--loss.t-max", "-1"], "loss: t_max"),
        (["--loss.impl", "triton"], "expected on a GPU for impl='triton'"),
        (["--data.backend", "dali"], "backend 'dali': DALI is not installed: pip install nvidia-dali-cuda1"),
    ],
)
def test_usage_errors_are_one_line_and_exit_with_2(arguments, message, tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)  # it is not installed
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    cfg = tiny()
    given = [argument.format(tmp=tmp_path) for argument in arguments]
    assert pretrain.main(arguments_of(cfg, tmp_path / "configs", *given)) == 2
    printed = capsys.readouterr().err
    (error,) = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert message.format(tmp=tmp_path) in error
    assert printed.rstrip().endswith(error)  # nothing of it runs on to a second line
    assert "Traceback" not in printed
    assert not cfg.out.exists()


def test_all_sizes_that_do_not_fit_small_images_are_one_message_with_options_that_work(tiny, tmp_path):
    """The default sizes and a patch of 14 on images of 64 px; a thumbnail among them changes nothing."""
    for index in range(40):
        side = 9 if index == 20 else 64
        Image.new("RGB", (side + 6, side), (index, 99, 0)).save(tmp_path / f"{index:02}.png")
    data = {"path": str(tmp_path), "max_bad_fraction": 0.06}
    cfg = tiny(
        data=data, model={"kwargs": '{"patch_size": 14}'}, crops={"global_size": 224, "local_size": 98}
    )
    with pytest.raises(UsageError) as caught:
        Trainer(cfg, CPU)
    message = str(caught.value)
    assert "00.png is 70 x 64 px" in message
    assert "crops.global_size is 224 and crops.local_size is 98; use --crops.global-size 56" in message
    options = re.findall(r"--crops\.\S+ \d+", message)
    assert len(options) == 3
    for way in (options[:2], options[2:]):
        found = {name: int(value) for name, value in (option[8:].replace("-", "_").split() for option in way)}
        assert Trainer(replace(cfg, crops=replace(cfg.crops, **found)), CPU).total_steps
    patches = replace(cfg, crops=replace(cfg.crops, global_size=64, local_size=32))
    with pytest.raises(
        UsageError, match=r"cannot take 64.*; for both crops: --crops.global-size 56 --crops.local-size 28$"
    ):
        Trainer(patches, CPU)


@pytest.fixture
def damaged(tmp_path):
    """33 images without labels, one of which is cut short."""
    folder = tmp_path / "data" / "train"
    folder.mkdir(parents=True)
    for index in range(33):
        Image.new("RGB", (40, 40), (index * 5, 99, 200 - index)).save(folder / f"{index}.jpg")
    file = folder / "30.jpg"
    file.write_bytes(file.read_bytes()[:150])
    return tmp_path / "data"


def test_unreadable_images_are_listed_and_too_many_exit_with_1(damaged, tiny, tmp_path, capsys):
    cfg = tiny(data={"path": str(damaged)}, epochs=2, eval={"every": 1})
    train_only(cfg)
    (line,) = (cfg.out / "bad_images.txt").read_text().splitlines()
    assert line.split("\t")[0].endswith("30.jpg")
    assert [row["loader_backend"] for row in rows_of(cfg, "run")] == ["torchvision"]
    (row,) = rows_of(cfg, "eval")  # without labels
    assert (row["knn"], row["linear"]) == (None, None)
    assert row["embedding_std"] > 0

    strict = tiny(data={"path": str(damaged), "max_bad_fraction": 0.0}, out=tmp_path / "strict")
    assert pretrain.main(arguments_of(strict, tmp_path / "configs")) == 1
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "30.jpg" in error


def test_data_that_stay_away_from_a_worker_exit_with_1(tiny, tmp_path, monkeypatch, capsys):
    def stale(path):
        if threading.current_thread() is threading.main_thread():
            return read_file(path)
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), path)

    monkeypatch.setattr(outages, "RETRY_DELAYS", (0.01,))
    monkeypatch.setattr(folder, "read_file", stale)
    cfg = tiny(data={"workers": 1})
    assert pretrain.main(arguments_of(cfg, tmp_path / "configs")) == 1
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert re.search(r"cannot read image .*\.png: Stale file handle, still after 0\.0 s; check", error)
    assert not (cfg.out / "bad_images.txt").exists()
    assert not list(cfg.out.glob("checkpoints/step-*"))


def test_a_refused_export_exits_with_1(tiny, tmp_path, monkeypatch, capsys):
    """The disk fills up when the training is done: one line, and the checkpoint is there to go on from."""
    cfg = tiny(max_steps=1)

    def on_a_full_disk(*arguments, **options):
        with monkeypatch.context() as patch:
            full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            patch.setattr("lejepa_fast.train.runtime.files.os.fsync", Mock(side_effect=full))
            write_atomically(*arguments, **options)

    monkeypatch.setattr("lejepa_fast.train.checkpoint.trained_model.write_atomically", on_a_full_disk)
    assert pretrain.main(arguments_of(cfg, tmp_path / "configs")) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: cannot write {cfg.out}/encoder.safetensors: No space left on device; ")
    assert (cfg.out / "checkpoints" / "step-00000001").exists()
    assert not (cfg.out / "encoder.safetensors").exists()


@pytest.mark.parametrize("error", [Interrupted("interrupted, saved", signal.SIGINT), KeyboardInterrupt()])
def test_ctrl_c_exits_with_130(error, tiny, tmp_path, monkeypatch, capsys):
    """Also the second one, which does not wait for a save."""
    monkeypatch.setattr(pretrain, "pretrain", Mock(side_effect=error))
    assert pretrain.main(arguments_of(tiny(), tmp_path)) == 130
    assert capsys.readouterr().err.splitlines()[-1].startswith("interrupted")


# ---- signals -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_signals_end_the_command_with_the_state_saved(tiny, tmp_path):
    """SIGTERM: exit code 0; Ctrl-C: 130; each saves. `test_resume_is_exact` compares with a straight run."""
    cfg = tiny(epochs=400, data={"workers": 1})
    command = [sys.executable, str(SCRIPT), *arguments_of(cfg, tmp_path / "configs")]
    step = 0
    for signum, code in ((signal.SIGTERM, 0), (signal.SIGINT, 130)):
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        try:
            wait_until(
                lambda least=step + 3: len(rows_of(cfg)) >= least, alive=lambda p=process: p.poll() is None
            )
            process.send_signal(signum)
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
        assert process.returncode == code, errors
        assert f"stopped by {signum.name} after step" in errors.splitlines()[-1]
        assert "Traceback" not in errors
        saved = sorted((cfg.out / "checkpoints").iterdir())[-1]
        step = read_checkpoint(saved)["step"]
        assert step == rows_of(cfg)[-1]["step"]
        assert f"after step {step} " in errors


# ---- ranks -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_usage_errors_under_torchrun(tiny, tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    result = subprocess.run(
        [*launcher, str(SCRIPT), *arguments_of(tiny(), tmp_path / "configs", "--batch-size", "7")],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode != 0
    message = "error (rank 0): data.batch_size: 7 images cannot be split evenly over 2 processes"
    assert message in result.stderr
    assert result.stderr.count("error (rank ") == 1  # both ranks have the same one


def one_rank(rank, port, log, arguments, without_room):
    """The command as one of two ranks that torchrun starts; `log` gets what it prints."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for stream in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    torch.set_num_threads(1)
    if without_room:
        Trainer.whole_model = gathered_without_room
    sys.exit(pretrain.main(arguments))


def run_two_ranks(cfg, folder, *, without_room=False):
    """Exit codes and output. Nobody ends a rank when the other one has failed, as torchrun would."""
    server = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    log, arguments = folder / "log.txt", arguments_of(cfg, folder / "configs")
    options = str(server.port), str(log), arguments, without_room
    processes = [forkserver().Process(target=one_rank, args=(rank, *options)) for rank in range(2)]
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(300)
        return [process.exitcode for process in processes], log.read_text()
    finally:
        for process in processes:
            process.kill()


@pytest.mark.slow
def test_an_error_on_one_rank_is_one_line_on_each(damaged, tiny, tmp_path):
    """One image cannot be read: one rank says which, the other one that it was not its fault."""
    cfg = tiny(data={"path": str(damaged), "max_bad_fraction": 0.0}, max_steps=8)
    codes, printed = run_two_ranks(cfg, tmp_path)
    assert codes == [1, 1]
    assert "Traceback" not in printed
    errors = re.findall(r"error \(rank \d\): (.*)", printed)
    assert any("30.jpg" in error for error in errors)
    assert all("30.jpg" in error or error.startswith("another rank failed") for error in errors)


def gathered_without_room(trainer, whole_model=Trainer.whole_model):
    """Rank 1 has no room for a gathered tensor, in the middle of gathering the whole model."""
    if trainer.world.rank == 1:
        full_tensor, left = DTensor.full_tensor, iter(range(2))

        def without_room(tensor):
            if next(left, None) is None:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return full_tensor(tensor)

        DTensor.full_tensor = without_room
        dist.destroy_process_group = threading.Event().wait  # as NCCL: until the others come
    return whole_model(trainer)


@pytest.mark.slow
def test_a_rank_that_fails_in_a_collective_ends_the_others(tiny, tmp_path):
    """With one line on each: what failed, and on the others that it was not their fault."""
    cfg = tiny(max_steps=1, parallel={"strategy": "fsdp"})
    codes, printed = run_two_ranks(cfg, tmp_path, without_room=True)
    assert codes == [1, 1]
    errors = dict(re.findall(r"error \(rank (\d)\): (.*)", printed))
    assert errors["1"].startswith("out of memory; what helps: ")
    assert errors["0"].startswith("another rank failed")
    assert "Traceback" not in printed


def test_a_defect_among_ranks_is_printed_before_the_process_ends(monkeypatch, capsys):
    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    monkeypatch.setattr(ranks, "setup_world", lambda device: 1 / 0)
    try:
        with pytest.raises(ZeroDivisionError):
            pretrain.main(["--device", "cpu"])
        assert not dist.is_initialized()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    assert ended == [1]
    assert "ZeroDivisionError: division by zero" in capsys.readouterr().err
