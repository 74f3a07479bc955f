"""The README and data/results/README.md say what the ledgers say; commands and files that they name exist."""
import json
import re
from pathlib import Path

import pytest
from PIL import Image

from wsss_lib import models
from wsss_lib.__main__ import main
from wsss_lib.data.splits import DATASETS, TRAIN_SPLITS
from wsss_lib.data.toyvoc import draw_sample
from wsss_lib.leaderboard import ENTRIES, MASKS
from wsss_lib.leaderboard_table import read_rows, table
from wsss_lib.localization import METHODS
from wsss_lib.training.objectives import OBJECTIVES
from wsss_lib.training.recipes import find_recipe

ROOT = Path(__file__).resolve().parent.parent
FIRST = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = (ROOT / "data" / "results" / "README.md").read_text(encoding="utf-8")


def _ledger(name: str) -> dict:
    return json.loads((ROOT / "data" / "results" / name).read_text(encoding="utf-8"))


NAMES = {"cam": "CAM", "cam+par": "CAM, PAR", "getam": "GETAM", "getam+par": "GETAM, PAR"}


def test_quoted_scores_are_the_measured_ones():
    """Each row of the results table, rebuilt from data/results."""
    one, many = _ledger("toyvit_one_view.json"), _ledger("toyvit_multiscale.json")
    rows = [(one, key, "1") for key in NAMES] + [(many, key, "1, 1.5, flip") for key in ("cam", "cam+par")]
    for ledger, key, views in rows:
        r = ledger[key]
        head, body = (100 * r["coverage"][k] for k in ("head", "body"))
        row = (f"| {NAMES[key]} | {views} | {100 * r['best']['miou']:.1f} at {r['best']['background']:.2f} | "
               f"{100 * r['fixed']['miou']:.1f} | {head:.0f} / {body:.0f} | "
               f"{100 * r['background_called_foreground']:.0f} |")
        assert row in RESULTS, row
    assert f"The classifier's mAP is {one['cam']['mean_average_precision']:.3f}." in RESULTS


def test_the_pretraining_study_is_quoted_as_measured():
    for r in _ledger("pretraining.json")["rows"]:
        cam, par, getam = r["cam"]["best"]["miou"], r["cam+par"]["best"]["miou"], r.get("getam")
        row = (f"| {r['name']} | {r['seed']} | {r['images'] // 1000}k | {r['mean_average_precision']:.3f} | "
               f"{100 * cam:.1f} | {100 * par:.1f} | ")
        if getam:
            row += f"{100 * getam['best']['miou']:.1f} | {getam['coverage']['head'] / getam['coverage']['body']:.2f} |"
        assert row in RESULTS, row


MAPS = ("cam", "grad_cam_last_block", "getam_cam_grad", "getam", "getam_all_blocks", "getam_grad",
        "getam_grad_s")


def test_the_ablation_of_getam_is_quoted_as_measured():
    rows = _ledger("getam_ablation.json")["rows"]
    best: dict[tuple[str, str], list[float]] = {}
    for start in ("toyvit_plain", "toyvit"):
        chosen = [r for r in rows if r["name"] == f"classified, from {start}"]
        assert sorted(r["seed"] for r in chosen) == [0, 1, 2]
        for refine, label in (("", ""), ("+pamr", ", PAMR")):
            cells = []
            for maps in MAPS:
                miou = [100 * r[maps + refine]["best"]["miou"] for r in chosen]
                best[start, maps + refine] = miou
                cells.append(f"{sum(miou) / 3:.1f} ({min(miou):.1f} to {max(miou):.1f})")
            assert f"| {start}{label} | {' | '.join(cells)} |" in RESULTS, cells
    # What the text says of the order, beyond the spread of the seeds.
    plain, mosaics = ({maps: best[start, maps] for maps in MAPS} for start in ("toyvit_plain", "toyvit"))
    assert min(plain["getam"]) > max(plain["grad_cam_last_block"]) and min(plain["getam"]) > max(plain["cam"])
    assert min(plain["getam_cam_grad"]) > max(plain["getam"])
    assert min(mosaics["cam"]) > max(mosaics["getam_all_blocks"]) and min(mosaics["cam"]) > max(mosaics["getam"])


def _cell(values: list[float]) -> str:
    return f"{sum(values) / len(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def _three_seeds(ledger: str, name: str, column: str, kind: str = "best") -> list[float]:
    """mIoU % of the three seeds of a row, at the best or the fixed threshold, or without one."""
    rows = [r for r in _ledger(ledger)["rows"] if r["name"] == name]
    assert sorted(r["seed"] for r in rows) == [0, 1, 2], name
    return [100 * r[column].get("miou", r[column].get(kind, {}).get("miou")) for r in rows]


WEAKTR = {
    "weaktr_coarse": "coarse map", "weaktr_class_attention": "class attention x coarse",
    "weaktr_random": "fine: random weights", "weaktr_mean": "fine: mean of all heads",
    "weaktr": "fine: adaptive fusion (WeakTr)", "weaktr_class_attention+crf": "class attention x coarse, CRF",
    "weaktr+crf": "fine: adaptive fusion, CRF",
}


def test_getam_end_to_end_is_quoted_as_measured():
    name, best = "GETAM end to end", {}
    for column, label in {"getam": "GETAM's maps", "getam+pamr": "GETAM's maps, PAMR"}.items():
        best[column], fixed = (_three_seeds("getam.json", name, column, kind) for kind in ("best", "fixed"))
        assert f"| {label} | {_cell(best[column])} | {_cell(fixed)} |" in RESULTS
    masks = _three_seeds("getam.json", name, "segmentation")
    assert f"| masks of its own decoder | no threshold | {_cell(masks)} |" in RESULTS
    assert abs(sum(masks) - sum(best["getam"])) / 3 < 1.5, "as good as the maps at their best threshold"


def test_weaktr_is_quoted_as_measured():
    best = {column: _three_seeds("weaktr.json", "WeakTr", column) for column in WEAKTR}
    for column, label in WEAKTR.items():
        fixed = _three_seeds("weaktr.json", "WeakTr", column, "fixed")
        assert f"| {label} | {_cell(best[column])} | {_cell(fixed)} |" in RESULTS, column
    for name in ("Segmenter, clipped", "Segmenter, not clipped"):
        assert f"| {name} | no threshold | {_cell(_three_seeds('weaktr.json', name, 'segmentation'))} |" in RESULTS
    # What the text says of every seed: one network's maps, one pseudo label's two Segmenters.
    names = ("weaktr_class_attention", "weaktr_coarse", "weaktr")
    for attended, coarse, fine in zip(*(best[name] for name in names), strict=True):
        assert attended > coarse > fine
    assert abs(sum(best["weaktr"]) - sum(best["weaktr_mean"])) / 3 < 1
    plain, clipped = ({r["seed"]: r["segmentation"]["miou"] for r in _ledger("weaktr.json")["rows"] if r["name"] == name}
                      for name in ("Segmenter, not clipped", "Segmenter, clipped"))
    assert all(plain[seed] > clipped[seed] for seed in (0, 1, 2))
    early, = (r["segmentation"]["miou"] for r in _ledger("weaktr.json")["rows"] if r["name"].endswith("below 1.2"))
    assert f"started at the published 1.2 it ended at {100 * early:.1f}" in RESULTS


def test_afa_is_quoted_as_measured():
    columns = ("afa_cam", "afa_cam+par", "affinity", "affinity+par", "segmentation")
    for name in ("AFA, toymit", "AFA's heads on toyvit"):
        scores = {column: _three_seeds("afa.json", name, column) for column in columns}
        assert f"| {name} | {' | '.join(map(_cell, scores.values()))} |" in RESULTS
        means = {column: sum(values) / 3 for column, values in scores.items()}
        assert means["afa_cam+par"] > means["afa_cam"] > means["affinity"]


def test_acr_is_quoted_as_measured():
    names, columns = ("no consistency", "region", "affinity", "both"), ("acr_gradient", "acr", "cam")
    scores = {name: {column: _three_seeds("acr.json", name, column) for column in columns} for name in names}
    for name in names:
        rows = [r for r in _ledger("acr.json")["rows"] if r["name"] == name]
        covered = [sum(100 * r["acr_gradient"]["coverage"][part] for r in rows) / 3 for part in ("head", "body")]
        precision = sum(r["mean_average_precision"] for r in rows) / 3
        row = [*map(_cell, scores[name].values()), "{:.0f} / {:.0f}".format(*covered), f"{precision:.3f}"]
        assert f"| {name} | {' | '.join(row)} |" in RESULTS, name
    without = scores["no consistency"]
    for name in names[1:]:  # what the text says of every seed
        for gradient, spread, spread_before in zip(scores[name]["acr_gradient"], scores[name]["acr"], without["acr"]):
            assert gradient > spread > spread_before + 10, name
    gains = [a - b for a, b in zip(scores["region"]["acr_gradient"], without["acr_gradient"])]
    assert all(1.9 < gain < 4 for gain in gains)


def test_the_cost_of_acrs_loss_is_quoted_as_measured():
    written, plain = (r for r in _ledger("bench_acr_cpu.json")["cases"] if r["threads"] == 1)
    time, memory = plain["baseline_seconds"], plain["baseline_peak_bytes"]  # of a step without the terms
    more = [100 * (x - 1) for x in (plain["seconds"] / time, plain["peak_bytes"] / memory,
                                    written["baseline_seconds"] / time, written["baseline_peak_bytes"] / memory)]
    assert "{:.0f}% longer with both terms than without, and {:.0f}% more memory".format(*more[:2]) in RESULTS
    assert "takes {:.0f}% longer and {:.0f}% more memory".format(*more[2:]) in RESULTS


SHOWN = {  # a row of the first page's table: the maps, and whose masks
    "CAM": ("classifier", "cam", "classifier"), "GETAM": ("getam", "getam", "getam"), "WeakTr": ("weaktr", "weaktr", None),
    "WeakTr, class attention alone": ("weaktr", "weaktr_class_attention", "weaktr"),
    "AFA with PAR": ("afa_toymit", "afa_cam", "afa_toymit"), "AFA's random walk": ("afa_toymit", "affinity", None),
    "ACR": ("acr", "acr", None), "ACR's gradient maps": ("acr", "acr_gradient", "acr"),
}


def test_the_comparison_is_quoted_as_measured():
    rows = read_rows(ROOT / "data" / "results" / "leaderboard")
    board = {(e["network"], e["maps"]): e for e in table(rows)}
    assert set(board) == {(n, m) for n, e in ENTRIES.items() for m in (*e.maps, *([MASKS] if e.retrained else []))}
    assert f"All {len(board)} rows" in FIRST and all(e["seeds"] == [0, 1, 2] for e in board.values())
    for name, (network, maps, segmenter) in SHOWN.items():
        cells = {k: v[0] for k, v in board[network, maps]["scores"].items()}
        row = " | ".join(f"{cells[f'{kind} best']:.1f} ({cells[f'{kind} fixed']:.1f})" for kind in ("raw", "par"))
        masks = {k: v[0] for k, v in board[segmenter, MASKS]["scores"].items()} if segmenter else {}
        row += f" | {masks['masks']:.1f}, with CRF {masks['masks crf']:.1f} |" if masks else " |  |"
        assert re.search(rf"^\| {re.escape(name)} \|.*{re.escape(row)}", FIRST, re.MULTILINE), (name, row)
    of_maps = [e["scores"] for e in board.values() if "par best" in e["scores"]]
    gains = [scores["par best"][0] - scores["raw best"][0] for scores in of_maps]
    assert f"gains with every kind of map, {min(gains):.0f} to {max(gains):.0f} points" in FIRST
    labels = board["classifier", MASKS]["scores"]["pseudo labels"][0]
    assert f"the best labels ({labels:.1f} on the 6000 training pictures)" in FIRST
    assert labels == max(e["scores"].get("pseudo labels", (0,))[0] for e in board.values())
    for kind in ("masks", "masks crf"):
        best = max((e["scores"][kind][0], key) for key, e in board.items() if kind in e["scores"])
        assert best[1] == ("classifier", MASKS), "a Segmenter on them the best masks"


@pytest.mark.parametrize("name, maps", [("cam", "cam"), ("acr", "acr_gradient")])
def test_a_recipes_threshold_is_the_best_of_200_training_pictures(name, maps):
    r = _ledger(f"label_threshold_{name}.json")[f"{maps}+par"]
    labels = find_recipe(f"toyvoc/{name}").labels
    assert (r["split"], r["pictures"]) == ("train", 200) and labels["maps"] == maps and labels["refine"] == "par"
    assert labels["background"] == round(20 * r["best"]["background"]) / 20, "to the next .05"


def test_the_saliency_is_quoted_as_measured():
    f = {name: r["f"]["f"] for name, r in _ledger("saliency.json")["methods"].items()}
    assert (f"{f['contrast']:.2f} on ToyVOC at the threshold 0.5, against {f['centre_prior']:.2f} for a blob in the "
            f"middle and {f['all_foreground']:.2f} for everything") in RESULTS


def test_the_kernels_ratios_are_quoted_as_measured():
    rows = [r for r in _ledger("bench_cpu.json")["cases"] if r["threads"] == 1]
    assert len({r["kernel"] for r in rows}) == 7
    for r in rows:
        row = (f"| `{r['kernel']}` | {r['case']} | {r['speed_ratio']:.1f}x | {r['user_speed_ratio']:.1f}x | "
               f"{r['memory_ratio']:.0f}x | {r['times_floor']:.1f} |")
        assert row in RESULTS, row
    par = next(r for r in rows if (r["kernel"], r["case"]) == ("refine_cam", "par, 512x512, 21 classes"))
    assert (f"{par['speed_ratio']:.0f} times faster than with 48 copies of the picture, and takes "
            f"1/{par['memory_ratio']:.0f} of the memory") in FIRST


def test_shipped_weights_have_a_row_in_the_study():
    rows = [r["training"] for name in ("pretraining.json", "weaktr.json") for r in _ledger(name)["rows"]]
    for record in (ROOT / "data" / "checkpoints").glob("*.json"):
        assert json.loads(record.read_text()) in rows, record.name


def test_the_scores_in_the_notebook_are_the_measured_ones():
    """The closing table of 01_cam_basics quotes the same ledgers."""
    notebook = json.loads((ROOT / "notebooks" / "01_cam_basics.ipynb").read_text(encoding="utf-8"))
    text = "".join(next(cell for cell in notebook["cells"] if cell["id"] == "reports")["source"])
    for name, maps in (("toyvit_one_view", "CAM, one view"), ("toyvit_multiscale", "CAM, scales 1, 1.5 and flip")):
        r = _ledger(f"{name}.json")["cam"]
        best, fixed = r["best"], r["fixed"]
        assert f"| {maps} | {100 * best['miou']:.1f} | {best['background']:.2f}, chosen on the truth |" in text
        assert f"| {maps} | {100 * fixed['miou']:.1f} | {fixed['background']:.2f}, fixed |" in text


def test_quoted_facts_about_the_drawn_data_are_the_measured_ones():
    r = _ledger("toyvoc.json")
    train = r["splits"]["train"]
    for text in (f"{train['objects_per_picture']:.1f} objects a picture", f"{100 * train['occluded_share']:.0f}% of them occluded",
                 f"{r['milliseconds_per_scene']:.1f} ms a scene", f"{r['tree_bytes'] / 1e6:.1f} MB"):
        assert text in FIRST, text


def test_the_first_command_names_a_notebook_that_exists_and_links_lead_somewhere():
    notebook = re.search(r"papermill (\S+\.ipynb) runs/", FIRST)[1]
    assert (ROOT / notebook).is_file()
    for folder, text in ((ROOT, FIRST), (ROOT / "data" / "results", RESULTS)):
        for link in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (folder / link).exists(), link


def _run_block(word: str, changes: dict[str, str] | None = None) -> dict:
    """The README's Python block that holds the word, as a newcomer would paste it, or a little shorter."""
    code, = (block for block in re.findall(r"```python\n(.*?)```", FIRST, re.DOTALL) if word in block)
    for old, new in (changes or {}).items():
        assert code.count(old) == 1, old
        code = code.replace(old, new)
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    return names


def test_the_example_runs():
    names = _run_block("pseudo_labels")
    assert names["maps"].shape == (1, 20, 21, 21) and names["masks"].shape == (1, 112, 112)


def test_a_map_of_your_own(capsys):
    """Minimum of two maps, scored beside CAM."""
    try:
        names = _run_block("agreed", {"progress=False": "progress=False, limit=6"})
    finally:
        METHODS.pop("agreed", None)
    text = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in text] == ["cam", "agreed"] and 0.2 < names["found"]["best"]["miou"] < 1


def test_a_loss_of_your_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        names = _run_block("smoothed", {"steps=20": "steps=2"})
        record = json.loads(Path("runs/smoothed/model.json").read_text())
    finally:
        OBJECTIVES.pop("smoothed", None), models.METHODS.pop("smoothed", None)
    assert names["recipe"].method == record["recipe"]["method"] == "smoothed"


def test_pictures_and_words_of_your_own(tmp_path, monkeypatch, capsys):
    """The README's tree of pets is learned from, and `predict` knows their names."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for i, name in enumerate(("felix", "nibbles", "tom")):
        Image.fromarray(draw_sample(0, "train", i).image).resize((130, 150)).save(f"photos/{name}.png")
    short = '"data=pets", "steps=2", "batch_size=2", "warmup=0", "loss.classify_until=1"'
    try:
        names = _run_block("Pets", {'"data=pets"': short})
    finally:
        DATASETS.pop("pets", None), TRAIN_SPLITS.pop("pets", None)
    assert names["model"].num_classes == 2
    monkeypatch.setattr("sys.argv", ["wsss_lib", "predict", "--checkpoint", "runs/pets/model.safetensors", "--images",
                                     "photos", "--out", "masks"])
    main()
    assert re.search("3 pictures; found (background only|cat|hamster)", capsys.readouterr().out)
    assert len(list(Path("masks").glob("*.png"))) == 3
