"""Two processes with half of each batch train as one process with all of it."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from wsss_lib.data.batches import Batches
from wsss_lib.data.toyvoc import build_toyvoc
from wsss_lib.paths import REPOSITORY
from wsss_lib.reports import localize_split
from wsss_lib.training import distributed

SCRIPT = Path(__file__).with_name("distributed_run.py")


def start(method: str, out: Path, rank: int | None = None, port: int = 0) -> subprocess.Popen:
    return process([str(SCRIPT), method, str(out)], rank, port)


def process(arguments: list[str], rank: int | None, port: int) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if rank is not None:
        environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost",
                        "MASTER_PORT": str(port)}
    return subprocess.Popen([sys.executable, *arguments], env=environment, cwd=REPOSITORY, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


@pytest.mark.parametrize("method", ["weaktr", "acr", "afa", "getam", "segmenter", "accumulated"])
def test_two_processes_are_one(method, tmp_path):
    """float64: gradients are summed in another order, nothing else differs."""
    one, two, port = tmp_path / "one.safetensors", tmp_path / "two.safetensors", free_port()
    runs = [start(method, one), start(method, two, 0, port), start(method, tmp_path / "none", 1, port)]
    for run in runs:
        output, _ = run.communicate(timeout=240)
        assert run.returncode == 0, output[-2000:]
    one, two = load_file(one), load_file(two)
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
    assert not (tmp_path / "none").exists(), "only the first process writes"


def test_the_command_runs_on_two_processes(tmp_path):
    """What torchrun starts: both end well, one writes, and each step counts the pictures of both."""
    port = free_port()
    arguments = ["-m", "wsss_lib", "train", "--recipe", "toyvoc/segmenter", "--root", "data/toyvoc", "--masks",
                 "data/toyvoc/SegmentationClass", "--out", str(tmp_path), "--set", "steps=2", "batch_size=4"]
    for run in [process(arguments, rank, port) for rank in (0, 1)]:
        output, _ = run.communicate(timeout=240)
        assert run.returncode == 0, output[-2000:]
    record = json.loads((tmp_path / "model.json").read_text())
    assert (record["processes"], record["images"]) == (2, 8)


def test_one_process_needs_no_group():
    assert (distributed.world_size(), distributed.rank()) == (1, 0)
    sums, counts = torch.tensor([6.0, 0.0]), torch.tensor([3, 0])
    assert distributed.per_count(sums, counts, least=1).tolist() == [2.0, 0.0]
    assert distributed.per_count(sums, counts, more=1).tolist() == [1.5, 0.0]
    assert distributed.per_count(sums, counts).isnan().tolist() == [False, True]
    with distributed.processes("cpu") as device:
        assert device == "cpu"


def test_processes_share_a_batch_picture_by_picture():
    data = list(range(10))

    def transform(item: int) -> dict:
        return {"image": torch.rand(3, 2, 2), "item": torch.tensor(item)}

    for step in (0, 3):
        whole = Batches(data, transform, 4, seed=3)(step)
        parts = [Batches(data, transform, 4, 3, rank, 2)(step) for rank in (0, 1)]
        for name, value in whole.items():
            assert torch.equal(torch.cat([part[name] for part in parts]), value)
    with pytest.raises(ValueError, match="batch_size: found 4, expected a multiple of the 3 processes"):
        Batches(data, transform, 4, 3, 0, 3)


def on_two(arguments: list[str]) -> None:
    port = free_port()
    for run in [process(["-m", "wsss_lib", *arguments], rank, port) for rank in (0, 1)]:
        output, _ = run.communicate(timeout=240)
        assert run.returncode == 0, output[-2000:]


def test_two_processes_score_each_picture_once(tmp_path):
    """Seven pictures, so one process has one more; counts are whole numbers, so scores are equal to the last digit."""
    arguments = ["evaluate", "--methods", "cam", "getam", "--refine", "none", "crf", "--limit", "7", "--results"]
    on_two([*arguments, str(tmp_path / "two.json")])
    run = process(["-m", "wsss_lib", *arguments, str(tmp_path / "one.json")], None, 0)
    assert run.wait(timeout=240) == 0
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("one.json", "two.json"))
    assert {"cam", "cam+crf", "getam", "getam+crf"} < one.keys()
    for name in ("cam", "cam+crf", "getam", "getam+crf"):
        del one[name]["seconds"], two[name]["seconds"]  # all else is counted
        assert one[name]["pictures"] == 7 and two[name] == one[name], name


def test_two_processes_share_the_pseudo_labels(tmp_path):
    arguments = ["localize", "--limit", "5", "--method", "cam", "--refine", "par", "--split", "val", "--out"]
    on_two([*arguments, str(tmp_path / "two")])
    run = process(["-m", "wsss_lib", *arguments, str(tmp_path / "one")], None, 0)
    output, _ = run.communicate(timeout=240)
    assert run.returncode == 0 and "5 pseudo labels" in output
    masks = [{f.name: f.read_bytes() for f in (tmp_path / name).iterdir()} for name in ("one", "two")]
    assert masks[0] == masks[1] and len(masks[0]) == 5
    with pytest.raises(ValueError, match="val: found fewer pictures than the 1 processes"):
        localize_split(torch.nn.Linear(1, 1), Nothing())


class Nothing:
    split = "val"

    def __len__(self) -> int:
        return 0


def test_two_processes_take_both_steps(tmp_path):
    """Classification, pseudo labels and retraining by one command, each shared by two."""
    settings = ["--set", "steps=1", "batch_size=2", "warmup=0", "crop_size=48"]
    tree = build_toyvoc(tmp_path / "tree", 5, 1, 0, processes=1, progress=False)
    script = tmp_path / "short.py"  # the command, but for a second step of one training step
    script.write_text(
        "from wsss_lib import pipeline\nfrom wsss_lib.__main__ import main\n"
        "from wsss_lib.training.recipes import override\n"
        f"full = pipeline.second_recipe\npipeline.second_recipe = lambda r: override(full(r), {settings[1:]})\nmain()\n")
    arguments = [str(script), "train", "--recipe", "toyvoc/acr", "--root", str(tree), "--out", str(tmp_path / "out"),
                 "--retrain", *settings]
    port = free_port()
    for run in [process(arguments, rank, port) for rank in (0, 1)]:
        output, _ = run.communicate(timeout=240)
        assert run.returncode == 0, output[-2000:]
    assert len(list((tmp_path / "out/labels").glob("*.png"))) == 5
    assert json.loads((tmp_path / "out/segmenter/model.json").read_text())["processes"] == 2


def test_parts_of_a_batch_stay_apart_until_the_last():
    """Without a group there is nothing to keep apart; with one, DistributedDataParallel's own switch is used."""
    with distributed.apart(torch.nn.Linear(1, 1)):
        pass
    assert list(distributed.share(5)) == [0, 1, 2, 3, 4] and distributed.total_counts(3) == 3
    rows = torch.arange(6.0).view(3, 2)
    assert distributed.gather(rows) is rows
