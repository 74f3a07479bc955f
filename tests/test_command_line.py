"""The command line: what it writes is reproducible, and bad input is one line, not a traceback."""
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from wsss_lib.__main__ import main
from wsss_lib.data.toyvoc import build_toyvoc
from wsss_lib.paths import REPOSITORY
from wsss_lib.reports import MAPS

# Maps of a plain classifier; those of WeakTr and AFA need their networks.
PLAIN = {name: maps for name, maps in MAPS.items() if maps["method"] not in ("weaktr", "affinity")}
COUNTS = ("--train", "3", "--val", "2", "--single", "2", "--processes", "1")


def shell(*args: object) -> subprocess.CompletedProcess:
    """`python -m wsss_lib ...` as a user runs it."""
    command = [sys.executable, "-m", "wsss_lib", *map(str, args)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True,
                          timeout=120)


@pytest.fixture
def run(monkeypatch):
    """The same within this process."""
    def call(*args: object) -> None:
        monkeypatch.setattr(sys, "argv", ["wsss_lib", *map(str, args)])
        main()
    return call


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    return build_toyvoc(tmp_path_factory.mktemp("toyvoc"), 4, 3, 4, processes=1, progress=False)


def digests(root: Path) -> dict[str, str]:
    """Relative name -> hash of each file."""
    return {str(f.relative_to(root)): hashlib.sha256(f.read_bytes()).hexdigest()
            for f in sorted(root.rglob("*")) if f.is_file()}


def error_of(call, *args: object) -> str:
    """The message with which the command exits."""
    with pytest.raises(SystemExit) as caught:
        call(*args)
    assert isinstance(caught.value.code, str), "a text is printed to stderr, with exit status 1"
    assert "\n" not in caught.value.code
    return caught.value.code


def test_toyvoc_draws_the_same_bytes_twice_and_refuses_to_mix_seeds(tmp_path):
    roots = tmp_path / "a", tmp_path / "b"
    for root in roots:
        done = shell("toyvoc", "--root", root, "--seed", 5, *COUNTS)
        assert done.returncode == 0, done.stderr
        printed = json.loads(done.stdout)
        counts = {split: found["pictures"] for split, found in printed["splits"].items()}
        assert counts == {"train": 3, "val": 2, "single": 2}
    files = digests(roots[0])
    assert len(files) == 7 * 6 + 4    # picture, annotation, 4 masks; 3 lists, the manifest
    assert files == digests(roots[1])

    refused = shell("toyvoc", "--root", roots[0], "--seed", 6, *COUNTS)
    assert refused.returncode == 1 and refused.stdout == ""
    lines = refused.stderr.strip().splitlines()
    assert len(lines) == 1 and "Traceback" not in refused.stderr
    for part in ("wsss_lib toyvoc", str(roots[0] / "toyvoc.json"), "seed", "found 5", "expected 6"):
        assert part in lines[0]
    assert digests(roots[0]) == files


def test_help_lists_the_commands(run, capsys):
    with pytest.raises(SystemExit) as caught:
        run("--help")
    assert caught.value.code == 0
    said = capsys.readouterr().out
    for command in ("toyvoc", "pretrain", "train", "localize", "evaluate", "predict"):
        assert f"\n    {command} " in said


@pytest.mark.parametrize("args", [(), ("no_such",), ("toyvoc",), ("evaluate", "--background", "much")])
def test_a_wrong_command_line_prints_usage(run, capsys, args):
    with pytest.raises(SystemExit) as caught:
        run(*args)
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("usage: python -m wsss_lib")


def test_pretrained_weights_can_be_evaluated(run, tree, tmp_path, capsys):
    out = tmp_path / "run"
    run("pretrain", "--root", tree, "--out", out, "--steps", 3, "--batch", 4, "--singles-until", .5,
        "--seed", 2)
    record = json.loads((out / "toyvit.json").read_text())
    assert (record["seed"], record["steps"], record["init"]) == (2, 3, None)
    assert record["recipe"]["batch"] == 4 and record["pictures"] == 3 * (2 + 4 * 2)
    assert (record["images"], record["stem_norm"], record["backbone"]) == (3 * 4, "batch", "toyvit")
    assert record["command"].startswith("python -m wsss_lib pretrain --root")
    weights = load_file(out / "toyvit.safetensors")
    assert all(w.isfinite().all() for w in weights.values())
    capsys.readouterr()

    results = tmp_path / "results" / "cam.json"
    run("evaluate", "--checkpoint", out / "toyvit.safetensors", "--root", tree, "--background", .3, "--flip",
        "--methods", *PLAIN, "--results", results)
    found = json.loads(results.read_text(), parse_constant=pytest.fail)
    assert {"cam", "getam", "acr"} <= PLAIN.keys()
    for name, maps in PLAIN.items():
        entry = found[name]
        assert (entry["method"], entry["split"], entry["pictures"]) == (maps["method"], "val", 3)
        assert entry["fixed"]["background"] == .3
        assert 0 < entry["fixed"]["miou"] <= entry["best"]["miou"] <= 1
        expected = {"scales": [1.0], "flip": True, "power": 1.0, "refine": None, "limit": None}
        assert entry["options"] == {**expected, **{k: v for k, v in maps.items() if k != "method"}}
    assert found["torch"] == torch.__version__
    printed = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in printed] == list(PLAIN)
    assert all("(oracle)" in line and ", val, 3 pictures" in line for line in printed)


def test_a_study_gets_a_row_for_each_training(run, tree, tmp_path):
    study, out = tmp_path / "study.json", tmp_path / "cnn"
    run("pretrain", "--root", tree, "--out", out, "--steps", 1, "--batch", 2, "--backbone", "toycnn",
        "--mosaics", 0, "--stem-norm", "group")
    score = ("evaluate", "--root", tree, "--backbone", "toycnn", "--checkpoint", out / "toycnn.safetensors",
             "--limit", 2, "--study", study)
    run(*score, "--name", "CNN", "--refine", "none", "par")
    run(*score, "--name", "again")
    run(*score, "--name", "CNN", "--refine", "pamr")
    first, second = json.loads(study.read_text())["rows"]
    assert (first["name"], second["name"]) == ("CNN", "again")  # the second CNN joined the first
    assert {"cam", "cam+par", "cam+pamr"} <= first.keys() and first["pictures"] == 2 and first["images"] == 2
    run(*score, "--name", "CNN", "--limit", 1)
    assert json.loads(study.read_text())["rows"][1] == second
    first = json.loads(study.read_text())["rows"][0]  # other pictures: nothing of the earlier scores stays
    assert "cam" in first and "cam+par" not in first and first["pictures"] == 1
    assert first["training"]["recipe"]["mosaics"] == 0 and first["training"]["backbone"] == "toycnn"
    assert first["cam"]["fixed"]["miou"] <= first["cam"]["best"]["miou"]
    assert "found name None" in error_of(run, *score)
    study.write_text("[]")
    assert "found no study" in error_of(run, *score, "--name", "CNN") and study.read_text() == "[]"


def test_weaktr_from_labels_to_a_retrained_segmenter(run, tree, tmp_path, capsys):
    """The four commands of WeakTr's two stages; an interrupted `localize` goes on where it stopped."""
    study, masks = tmp_path / "study.json", tmp_path / "masks"
    short = "--root", tree, "--seed", 4, "--set", "steps=1", "batch_size=2", "warmup=0"
    run("train", "--recipe", "toyvoc/weaktr", "--out", tmp_path / "first", *short)
    weights = tmp_path / "first" / "model.safetensors"
    maps = [name for name in MAPS if name.startswith("weaktr")]
    run("evaluate", "--checkpoint", weights, "--root", tree, "--methods", *maps, "--refine", "none", "crf",
        "--study", study, "--name", "one step")
    row, = json.loads(study.read_text())["rows"]
    assert {name + refine for name in maps for refine in ("", "+crf")} <= row.keys()
    assert row["seed"] == 4 and row["training"]["recipe"]["method"] == "weaktr"

    write = "localize", "--checkpoint", weights, "--root", tree, "--method", "weaktr_coarse", "--out", masks
    run(*write, "--refine", "crf")
    files = {f.name: f.read_bytes() for f in masks.iterdir()}
    assert len(files) == 4 and all(name.endswith(".png") for name in files)
    lost = sorted(files)[1]
    (masks / lost).unlink()
    capsys.readouterr()
    run(*write, "--refine", "crf")
    assert "1 pseudo labels" in capsys.readouterr().out
    assert {f.name: f.read_bytes() for f in masks.iterdir()} == files

    retrain = "train", "--recipe", "toyvoc/segmenter", *short
    run(*retrain, "--out", tmp_path / "second", "--masks", masks)
    run("evaluate", "--checkpoint", tmp_path / "second" / "model.safetensors", "--root", tree, "--methods",
        "segmentation", "--study", study, "--name", "retrained")
    retrained = json.loads(study.read_text())["rows"][1]
    assert 0 <= retrained["segmentation"]["miou"] <= 1 and retrained["mean_average_precision"] is None
    assert "labels none" in capsys.readouterr().out
    assert "masks: found none" in error_of(run, *retrain, "--out", tmp_path / "third")

    predict = "predict", "--images", tree / "JPEGImages", "--out", tmp_path / "mine", "--checkpoint"
    run(*predict, tmp_path / "second" / "model.safetensors")
    assert "11 pictures; found" in capsys.readouterr().out and len(list((tmp_path / "mine").iterdir())) == 22
    assert "model: found WeakTr" in error_of(run, *predict, weights)


def test_afa_is_trained_and_scored(run, tree, tmp_path):
    results = tmp_path / "afa.json"
    run("train", "--recipe", "toyvoc/afa", "--root", tree, "--out", tmp_path, "--set", "steps=1", "batch_size=2",
        "backbone=toyvit", "loss.classify_until=0", "loss.propagate_from=0")
    run("evaluate", "--checkpoint", tmp_path / "model.safetensors", "--root", tree, "--limit", 2, "--results", results,
        "--methods", "afa_cam", "affinity", "segmentation", "--refine", "none", "par")
    found = json.loads(results.read_text())
    assert {"afa_cam", "afa_cam+par", "affinity", "affinity+par", "segmentation"} <= found.keys()
    assert found["affinity"]["options"]["radius"] == 3  # the recipe's


def test_saliency_is_scored_beside_its_baselines(run, tree, tmp_path, capsys):
    results = tmp_path / "saliency.json"
    run("saliency", "--root", tree, "--limit", 2, "--results", results)
    found = json.loads(results.read_text())
    f = {name: r["f"]["f"] for name, r in found["methods"].items()}
    assert found["pictures"] == 2 and f["contrast"] > max(f["centre_prior"], f["all_foreground"]) > 0
    assert [line.split(",")[0] for line in capsys.readouterr().out.splitlines()] == list(f)
    assert "no_such_folder" in error_of(run, "saliency", "--root", tree, "--folder", tmp_path / "no_such_folder")


def test_a_finished_pretraining_is_not_run_again_but_refused_without_resume(run, tree, tmp_path):
    args = "pretrain", "--root", tree, "--out", tmp_path, "--steps", 1, "--batch", 2
    run(*args)
    weights = (tmp_path / "toyvit.safetensors").read_bytes()
    run(*args)
    assert (tmp_path / "toyvit.safetensors").read_bytes() == weights
    assert str(tmp_path / "checkpoint.safetensors") in error_of(run, *args, "--no-resume")


@pytest.mark.parametrize("args, parts", [
    (("evaluate", "--split", "tset"), ("wsss_lib evaluate", "split", "tset", "val")),
    (("evaluate", "--checkpoint", "no_such.safetensors"), ("wsss_lib evaluate", "no_such.safetensors")),
    (("evaluate", "--methods", "cma"), ("method", "cma", "cam")),
    (("pretrain", "--steps", "0"), ("wsss_lib pretrain", "steps", "found 0")),
    (("pretrain", "--steps", "1", "--init", "no_such.safetensors"), ("no_such.safetensors",)),
    (("toyvoc", "--train", "-1"), ("wsss_lib toyvoc", "train", "found -1")),
    (("evaluate", "--device", "abacus"), ("device", "abacus")),
    (("pretrain", "--steps", "1", "--batch", "0"), ("batch", "found 0")),
    (("pretrain", "--steps", "1", "--singles-until", "1.5"), ("singles_until", "found 1.5")),
    (("pretrain", "--steps", "1", "--device", "abacus"), ("device", "abacus")),
    (("train", "--recipe", "toyvoc/cma"), ("wsss_lib train", "recipe", "toyvoc/cma", "toyvoc/weaktr")),
    (("train", "--recipe", "toyvoc/acr", "--set", "lr"), ("set", "found 'lr'", "key=value")),
    (("train", "--recipe", "toyvoc/acr", "--published"), ("published", "no paper has ToyVOC")),
    (("localize", "--method", "cma"), ("wsss_lib localize", "cma", "weaktr")),
    (("localize", "--method", "weaktr"), ("wsss_lib localize", "CamViT", "expected a WeakTr")),
])
def test_bad_input_is_one_line(run, tree, tmp_path, args, parts):
    command, *rest = args
    if command in ("evaluate", "localize") and "--checkpoint" not in rest:
        rest += ["--checkpoint", _weights(tmp_path)]
    where = {"evaluate": ["--root", tree], "pretrain": ["--root", tree, "--out", tmp_path / "out"],
             "toyvoc": ["--root", tmp_path / "tree"]}
    where["train"] = where["localize"] = where["pretrain"]
    where = where[command]
    said = error_of(run, command, *where, *rest)
    assert all(part in said for part in parts), said


def _weights(folder: Path) -> Path:
    from wsss_lib import create_model
    from wsss_lib.training.checkpoints import save_weights

    save_weights(folder / "toyvit.safetensors", create_model("cam", "toyvit", pretrained=False))
    return folder / "toyvit.safetensors"
