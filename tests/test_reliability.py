"""What a long run meets: kill -9, a full or read-only disk, a file that vanishes, the wrong checkpoint."""

import dataclasses
import errno
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from tiny_training import CONFIG, batch_at, loss, network, run, same_files

from wsss_lib.data.batches import Batches
from wsss_lib.data.toyvoc import build_toyvoc
from wsss_lib.data.transforms import TrainTransform
from wsss_lib.data.voc import VOC
from wsss_lib.paths import REPOSITORY
from wsss_lib.training import checkpoints, engine
from wsss_lib.training.checkpoints import load_checkpoint
from wsss_lib.training.engine import train
from wsss_lib.training.fit import fit
from wsss_lib.training.recipes import override
from wsss_lib.training.toy_recipes import TOY_RECIPES

KILLS = int(os.environ.get("WSSS_KILLS", "3"))


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return build_toyvoc(tmp_path_factory.mktemp("toyvoc"), 8, 0, 0, processes=1, progress=False)


# ---- kill -9


def test_killed_at_random_moments_ends_like_the_uninterrupted_run(tree, tmp_path):
    """The command, its process killed KILLS times (3; WSSS_KILLS=20 for the long test) at moments drawn anew each
    time, between the first step and the end of a run; then to its end. Same machine, same bits."""
    arguments = [sys.executable, "-m", "wsss_lib", "train", "--recipe", "toyvoc/weaktr", "--root", str(tree), "--set",
                 "steps=24", "batch_size=2", "crop_size=48", "warmup=2", "save_every=1", "log_every=1", "--out"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def start(name):
        return subprocess.Popen([*arguments, str(tmp_path / name)], cwd=REPOSITORY, env=environment,
                                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    whole = start("whole")
    assert whole.wait(timeout=240) == 0
    kills, log = 0, tmp_path / "cut" / "log.jsonl"
    while kills < KILLS:
        cut, rows = start("cut"), len(log.read_text().splitlines()) if log.exists() else 0
        deadline = time.monotonic() + 120
        while cut.poll() is None and time.monotonic() < deadline:  # until this process has made a step
            if log.exists() and len(log.read_text().splitlines()) > rows:
                break
            time.sleep(0.002)
        time.sleep(random.uniform(0, 0.15))
        if cut.poll() is None:
            cut.send_signal(signal.SIGKILL)
            kills += 1
        elif (tmp_path / "cut" / "model.json").exists():  # it came to its end first: begin anew
            for file in (tmp_path / "cut").iterdir():
                file.unlink()
        cut.communicate()
    last = start("cut")
    _, error = last.communicate(timeout=240)
    assert last.returncode == 0, error[-2000:]
    assert same_files(tmp_path / "whole", tmp_path / "cut")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


# ---- disks


def test_a_full_disk(tmp_path):
    """/dev/full answers every write with ENOSPC: the file that the third checkpoint is written into leads there."""
    if not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    run(tmp_path / "whole")
    save, saves = checkpoints.save_checkpoint, []

    def filling(path, *args):
        saves.append(path)
        if len(saves) == 3:
            os.symlink("/dev/full", path.with_name(f".{path.name}.tmp"))
        save(path, *args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError, match="No space left.*/checkpoint.safetensors"):
        patch.setattr(engine.checkpoints, "save_checkpoint", filling)
        run(tmp_path / "full")
    assert load_checkpoint(tmp_path / "full" / "checkpoint.safetensors", network())["step"] == 8
    assert sorted(os.listdir(tmp_path / "full")) == ["checkpoint.safetensors", "log.jsonl"]
    run(tmp_path / "full")
    assert same_files(tmp_path / "whole", tmp_path / "full")


@pytest.mark.parametrize("code", [errno.EROFS, errno.EIO, errno.EACCES])
def test_a_disk_that_refuses(tmp_path, code):
    """Renaming is where the new file would take the old one's place."""
    run(tmp_path / "whole")
    replace = os.replace

    def refusing(source, target):
        if str(target).endswith("checkpoint.safetensors") and os.path.exists(target):
            raise OSError(code, os.strerror(code), str(target))
        replace(source, target)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError, match="checkpoint.safetensors") as caught:
        patch.setattr(checkpoints.os, "replace", refusing)
        run(tmp_path / "refused")
    assert caught.value.errno == code
    assert load_checkpoint(tmp_path / "refused" / "checkpoint.safetensors", network())["step"] == 4
    run(tmp_path / "refused")
    assert same_files(tmp_path / "whole", tmp_path / "refused")


def test_a_disk_that_fills_while_interrupted(tmp_path):
    """Ctrl-C, and the save that follows fails: the failure is told, and what was saved before stays."""
    calls = []

    def interrupting(model, batch, step):
        if step == 6:
            raise KeyboardInterrupt
        return loss(model, batch, step)

    def failing(*args):
        calls.append(1)
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "checkpoint.safetensors")
        return save(*args)

    save = checkpoints.save_checkpoint
    with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError, match="No space left") as caught:
        patch.setattr(engine.checkpoints, "save_checkpoint", failing)
        run(tmp_path, loss=interrupting)
    assert isinstance(caught.value.__context__, KeyboardInterrupt)
    assert load_checkpoint(tmp_path / "checkpoint.safetensors", network())["step"] == 4


# ---- files


@pytest.mark.parametrize("keep", [0, 7, 100, 0.5, 0.999])
def test_a_truncated_checkpoint(tmp_path, keep):
    run(tmp_path)
    file = tmp_path / "checkpoint.safetensors"
    whole = file.read_bytes()
    short = whole[: keep if isinstance(keep, int) else int(keep * len(whole))]
    file.write_bytes(short)
    with pytest.raises(ValueError, match="checkpoint.safetensors: not a checkpoint, or a damaged one"):
        run(tmp_path)
    assert file.read_bytes() == short, "nothing is written over it"


def test_a_picture_vanishes(tree, tmp_path):
    """The error names the file; the checkpoint stays; with the file back the run ends as if nothing had been."""
    data = VOC(build_toyvoc(tmp_path / "tree", 8, 0, 0, processes=1, progress=False), "train")
    transform = TrainTransform(6, (1.0, 1.0), color_jitter=None, mean=(0.5,) * 3, std=(0.5,) * 3)
    batches = Batches(data, transform, 2)

    def labelled(step):
        batch = batches(step)
        return {**batch, "label": batch["labels"][:, 0].long()}

    train(network(), labelled, loss, CONFIG, tmp_path / "whole", progress=False)
    file = next((data.root / "JPEGImages").glob(f"{labelled(6)['name'][0]}.*"))

    def vanishing(step):
        if step == 6 and file.exists():
            file.rename(file.with_name("hidden"))
        return labelled(step)

    for workers in (0, 1):
        out = tmp_path / f"cut {workers}"
        with pytest.raises(FileNotFoundError, match=f"{file.name}: no such file"):
            train(network(), vanishing, loss, dataclasses.replace(CONFIG, workers=workers), out, progress=False)
        assert load_checkpoint(out / "checkpoint.safetensors", network())["step"] == 4
        file.with_name("hidden").rename(file)
        train(network(), labelled, loss, CONFIG, out, progress=False)
        assert same_files(tmp_path / "whole", out)


def test_a_checkpoint_of_another_recipe_or_network(tree, tmp_path):
    short = ["steps=1", "batch_size=2", "crop_size=48", "warmup=0"]
    fit(override(TOY_RECIPES["weaktr"], short), tree, tmp_path, progress=False)
    before = (tmp_path / "checkpoint.safetensors").read_bytes()
    for recipe, message in [
        (override(TOY_RECIPES["acr"], short), "found .*, expected"),
        (override(TOY_RECIPES["weaktr"], [*short, "network.reduction=4"]), "recipe.network: found .*2.*, expected .*4"),
        (override(TOY_RECIPES["weaktr"], [*short, "batch_size=4"]), "recipe.batch_size: found 2, expected 4"),
    ]:
        with pytest.raises(ValueError, match=f"checkpoint.safetensors: .*{message}"):
            fit(recipe, tree, tmp_path, progress=False)
        assert (tmp_path / "checkpoint.safetensors").read_bytes() == before
    other = network()
    other[-1] = torch.nn.Linear(8 * 16, 3)
    run(tmp_path / "tiny")
    with pytest.raises(ValueError, match=r"tensor model.5.bias: found \(2,\) torch.float32, expected \(3,\)"):
        run(tmp_path / "tiny", model=other)


def test_every_load_is_safe():
    """No file of the library opens a pickle: torch.load only with weights_only=True."""
    for file in (REPOSITORY / "wsss_lib").rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        assert text.count("torch.load(") == text.count("weights_only=True"), file
        assert "import pickle" not in text, file


def test_the_log_is_json_lines(tmp_path):
    _, history = run(tmp_path)
    assert [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()] == history
    assert batch_at(0)["image"].shape[0] * CONFIG.steps == history[-1]["pictures"]
