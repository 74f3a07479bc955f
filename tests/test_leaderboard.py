"""The comparison of all methods: every row trained, scored, kept, and put into one table."""

import json
import sys

import matplotlib.pyplot as plt
import numpy as np
import pytest

from wsss_lib.__main__ import main
from wsss_lib.data.splits import open_split
from wsss_lib.data.toyvoc import build_toyvoc
from wsss_lib.leaderboard import ENTRIES, MASKS, run
from wsss_lib.leaderboard_table import lines, read_rows, read_strips, result_picture, table, title
from wsss_lib.pipeline import label_options
from wsss_lib.reports import MAPS
from wsss_lib.training.fit import load_trained
from wsss_lib.training.recipes import find_recipe, override

SHORT = ["steps=2", "batch_size=2", "warmup=0", "crop_size=48"]


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return build_toyvoc(tmp_path_factory.mktemp("toyvoc"), 4, 2, 0, processes=1, progress=False)


def test_entries_name_what_exists():
    for name, entry in ENTRIES.items():
        recipe = override(find_recipe(entry.recipe), entry.settings)
        assert set(entry.maps) <= {*MAPS, MASKS}, name
        if entry.retrained:
            assert label_options(recipe)["background"] and MASKS not in entry.maps
        assert len({title(name, maps) for maps in (*entry.maps, MASKS)}) == len({*entry.maps, MASKS})
    wanted = {"cam", "grad_cam_last_block", "attention", "rollout", "getam", "weaktr", "weaktr_mean", "weaktr_coarse",
              "afa_cam", "affinity", "acr"}
    assert wanted <= {maps for entry in ENTRIES.values() for maps in entry.maps}


@pytest.mark.parametrize("network, settings", [
    ("classifier", []), ("getam", ["loss.classify_until=1"]), ("weaktr", []), ("acr", []),
    ("afa", ["loss.classify_until=1"]),
])
def test_every_kind_of_row(network, settings, tree, tmp_path):
    """Two steps on four pictures: the path, not the figures."""
    options = {"seeds": [3], "networks": [network], "limit": 2}
    if ENTRIES[network].retrained:  # its second step takes the same settings
        settings = []
    rows = run(tree, tmp_path / "runs", tmp_path / "out", settings=[*SHORT, *settings], **options)
    entry = ENTRIES[network]
    names = [*entry.maps, *([MASKS] if entry.retrained else [])]
    assert [row["maps"] for row in rows] == names and {row["seed"] for row in rows} == {3}
    files = [f"{network}.{maps}.3.{kind}" for maps in names for kind in ("json", "png")]
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == sorted(files)
    truth = open_split("toyvoc", tree, "val", ("mask",))[0].mask
    for row in rows:
        masks = row["maps"] == MASKS
        strips = read_strips(tmp_path / "out" / f"{network}.{row['maps']}.3.png")
        assert [[m.shape for m in line] for line in strips] == [[(112, 112)] * 2] * (1 if masks else 2)
        if not masks:
            assert set(np.unique(strips[0][0])) <= {0, *truth.unique().tolist()}, "of the first picture"
        assert ("pseudo_labels" in row) == (masks and entry.retrained)
        if "pseudo_labels" in row:
            assert row["pseudo_labels"]["pictures"] == 4 and 0 < row["pseudo_labels"]["miou"] < 1
        assert row["seconds_per_picture"] > 0 and row["bytes_per_picture"] > 1e5
        assert set(row["scores"]) == ({"raw", "crf"} if row["maps"] == MASKS else {"raw", "par", "crf"})
        if row["maps"] != MASKS:
            assert row["scores"]["raw"]["fixed"]["background"] == 0.4 and row["scores"]["raw"]["pictures"] == 2
    text = lines(table(rows))
    assert len(text) == 1 + len(names) and all(title(network, m) in line for m, line in zip(names, text[1:]))
    assert [r["maps"] for r in read_rows(tmp_path / "out")] == names
    if network == "classifier":
        figure = result_picture(tmp_path / "out", (0, 1), seed=3)
        assert len(figure.axes) == 10 and figure.axes[4].get_title() == "truth"
        plt.close(figure)


def test_rows_that_are_there_are_kept_and_weights_are_checked(tree, tmp_path):
    options = {"seeds": [0], "networks": ["acr_region"], "limit": 1, "settings": SHORT}
    run(tree, tmp_path / "runs", tmp_path / "out", **options)
    file = tmp_path / "out" / "acr_region.acr.0.json"
    row = json.loads(file.read_text())
    file.write_text(json.dumps({**row, "seconds_per_picture": 7}))
    rows = run(tree, tmp_path / "runs", tmp_path / "out", **options)
    assert rows[1]["seconds_per_picture"] == 7
    file.unlink()
    weights = tmp_path / "runs" / "acr_region_0" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    again = run(tree, tmp_path / "runs", tmp_path / "out", **options)
    assert again[1]["scores"]["raw"]["best"] == row["scores"]["raw"]["best"], "the network is not trained anew"
    assert weights.stat().st_mtime_ns == before
    assert load_trained(weights)[1]["recipe"]["loss"] == {"region_weight": 100.0, "affinity_weight": 0.0}
    file.unlink()
    with pytest.raises(ValueError, match="model.safetensors: lr: found 0.0003, expected 0.1"):
        run(tree, tmp_path / "runs", tmp_path / "out", **{**options, "settings": [*SHORT, "lr=0.1"]})
    with pytest.raises(ValueError, match="model.safetensors: batch_size: found 2, expected 4"):
        run(tree, tmp_path / "runs", tmp_path / "out", **{**options, "settings": [*SHORT, "batch_size=4"]})


def test_the_table_is_mean_and_range_over_seeds():
    def row(seed, miou):
        scores = {"best": {"miou": miou}, "fixed": {"miou": miou / 2}, "coverage": {"head": 0.5, "body": None},
                  "background_called_foreground": 0.25}
        return {"network": "acr", "maps": "acr", "seed": seed, "seconds_per_picture": 0.1, "bytes_per_picture": 2e6,
                "scores": {kind: scores for kind in ("raw", "par", "crf")}}

    found, = table([row(0, 0.2), row(2, 0.6), row(1, 0.4)])
    assert found["seeds"] == [0, 1, 2] and found["scores"]["raw best"] == pytest.approx((40, 20, 60))
    assert found["scores"]["crf fixed"] == pytest.approx((20, 10, 30)) and found["scores"]["head"] == (50, 50, 50)
    assert "body" not in found["scores"] and found["scores"]["megabytes"] == (2, 2, 2)
    masks = {"network": "acr", "maps": MASKS, "seed": 0, "seconds_per_picture": 0.1, "bytes_per_picture": 1,
             "scores": {"raw": {"miou": 0.3}, "crf": {"miou": 0.4}}}
    both = lines(table([row(0, 0.2), masks]))
    assert "20.0 (10.0)" in both[1] and "30.0" in both[2] and "40.0" in both[2]


def test_the_command(tree, tmp_path, monkeypatch, capsys):
    arguments = ["--root", tree, "--runs", tmp_path / "runs", "--out", tmp_path / "out", "--seeds", 1, "--networks",
                 "acr_affinity", "--limit", 1, "--set", *SHORT]
    monkeypatch.setattr("sys.argv", ["wsss_lib", "leaderboard", *map(str, arguments)])
    main()
    assert "ACR, affinity: gradient maps" in capsys.readouterr().out
    drawn = []
    monkeypatch.setattr("wsss_lib.leaderboard_table.result_picture", lambda *at, **of: drawn.append((at, of)) or plt.figure())
    monkeypatch.setattr("sys.argv", [*sys.argv, "--picture", str(tmp_path / "picture.png")])
    main()
    plt.close("all")
    assert drawn == [((str(tmp_path / "out"),), {"seed": 1})] and (tmp_path / "picture.png").stat().st_size > 0
    monkeypatch.setattr("sys.argv", ["wsss_lib", "leaderboard", "--networks", "resnet", "--root", str(tree)])
    with pytest.raises(SystemExit, match="networks: found resnet, expected some of classifier, getam"):
        main()
