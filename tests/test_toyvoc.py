"""ToyVOC: frozen, deterministic, truthful about what is visible, and as correlated as its knob says."""
import hashlib
import json
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from wsss_lib.data.toyvoc import (
    CONTEXT_ID,
    CONTEXTS,
    OBJECTS,
    PART_GROUPS,
    PART_ID,
    QUADRUPEDS,
    SIZE,
    build_toyvoc,
    draw_sample,
    statistics,
)
from wsss_lib.data.toyvoc.animals import quadruped
from wsss_lib.data.toyvoc.parts import SUPERSAMPLING, Pen
from wsss_lib.data.toyvoc.scenes import MIN_PIXELS, borders, choose_classes
from wsss_lib.data.voc import VOC, VOC_CLASSES

FROZEN = "4fb8079535cd6e5b8dbcda83556ee6b1185548c01746352cd7ab53d5f94d8567"


def _digest(samples) -> str:
    h = hashlib.sha256()
    for s in samples:
        for array in (s.image, s.mask, s.instances, s.parts, s.contexts):
            h.update(np.ascontiguousarray(array).tobytes())
        h.update(json.dumps([[o.name, *o.box] for o in s.objects]).encode())
    return h.hexdigest()


@pytest.fixture(scope="module")
def scenes():
    return [draw_sample(11, "train", i) for i in range(300)]


def test_the_generator_is_frozen():
    """50 samples, by content. Results of different versions compare only while this hash stands: never edit it."""
    samples = [draw_sample(2012, split, i) for split, n in (("train", 20), ("val", 15), ("single", 15)) for i in range(n)]
    assert _digest(samples) == FROZEN


def test_a_sample_depends_on_its_arguments_only():
    again = [draw_sample(4, "val", i) for i in (3, 1, 2)]
    assert _digest([draw_sample(4, "val", i) for i in (3, 1, 2)]) == _digest(again)
    different = {_digest([draw_sample(*a)]) for a in ((4, "val", 1), (5, "val", 1), (4, "train", 1), (4, "val", 2), (4, "single", 1))}
    assert len(different) == 5


def test_labels_are_exactly_the_classes_in_the_mask(scenes):
    lost = 0
    for s in scenes:
        in_mask = set(np.unique(s.mask)) - {0, 255}
        assert in_mask == {VOC_CLASSES.index(o.name) + 1 for o in s.objects} == set(np.flatnonzero(s.labels) + 1)
        lost += len(s.hidden)
    assert lost > 5, "some objects must be hidden by others, or the rule is not exercised"


def test_truths_agree_pixel_by_pixel(scenes):
    for s in scenes:
        for k, found in enumerate(s.objects, 1):
            inside = s.instances == k
            assert inside.sum() >= MIN_PIXELS
            assert set(np.unique(s.mask[inside])) == {VOC_CLASSES.index(found.name) + 1}
            ys, xs = np.nonzero(inside)
            assert found.box == (xs.min(), ys.min(), xs.max(), ys.max())
        assert s.instances[s.instances < 255].max() == len(s.objects)
        labelled = (s.mask > 0) & (s.mask < 255)
        assert (s.parts[labelled] > 0).all() and (s.parts[~labelled] == 0).all()
        assert set(np.unique(s.contexts[s.mask == 0])) <= set(CONTEXT_ID.values())
        assert (s.contexts[s.mask != 0] == 0).all()
        assert s.image.shape == (SIZE, SIZE, 3) and s.image.dtype == s.mask.dtype == np.uint8


def test_a_border_lies_outside_the_nearer_object():
    order = np.zeros((7, 9), int)
    order[2:5, 2:5] = 1
    order[3:6, 4:8] = 2
    edge = borders(order)
    assert not edge[order == 2].any(), "the nearest object keeps every pixel"
    assert edge[3, 3] and edge[4, 3] and edge[2, 4] and edge[1, 2] and edge[6, 5]
    assert not edge[2, 2] and not edge[0, 0]


def test_thin_objects_survive_their_border():
    bicycles = [s for s in (draw_sample(3, "single", i) for i in range(400)) if s.objects[0].name == "bicycle"]
    assert len(bicycles) > 8
    for s in bicycles:
        assert (s.mask == 2).sum() > .35 * (s.mask == 255).sum()
        assert (s.parts == PART_ID["frame"]).any() and (s.parts == PART_ID["wheel"]).any()


def test_furniture_stands_on_the_ground_or_on_a_table():
    """The lowest row of a chair, sofa or table lies on floor, grass, road, track or bank: below it is never wall or sky."""
    floating = ("sky", "wall", "building", "tree", "water")
    checked = 0
    for i in range(600):
        s = draw_sample(21, "single", i, bias=.5)
        found = s.objects[0]
        if found.name in ("chair", "sofa", "diningtable") and found.box[3] < SIZE - 3:
            x0, _, x1, y1 = found.box
            below = s.contexts[y1 + 2, x0:x1 + 1]
            assert not np.isin(below, [CONTEXT_ID[c] for c in floating]).any(), (i, found.name, s.context)
            checked += 1
    assert checked > 20


def test_a_television_shows_a_picture_and_a_chair_is_open():
    screens, backs = [], []
    for i in range(500):
        s = draw_sample(31, "single", i)
        if s.objects[0].name == "tvmonitor":
            pixels = s.image[s.parts == PART_ID["screen"]].astype(float)
            screens.append(pixels.std(0).max())
        if s.objects[0].name == "chair":
            ys, xs = np.nonzero(s.parts == PART_ID["back"])
            backs.append(len(ys) / ((np.ptp(ys) + 1) * (np.ptp(xs) + 1)))
    assert len(screens) > 10 and len(backs) > 10
    assert min(screens) > 10, "a screen of one colour"
    assert max(backs) < .8, "a back without gaps"


def _quadruped(kind: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    canvas, ids = Image.new("RGB", (SIZE * SUPERSAMPLING,) * 2), Image.new("I", (SIZE * SUPERSAMPLING,) * 2, 0)
    quadruped(Pen(canvas, ids, 1, np.random.default_rng(seed), 56, 100, 70), kind)
    return np.asarray(canvas), np.asarray(ids) & 255


def test_quadrupeds_share_everything_but_the_head_group():
    head = (*PART_GROUPS["head"], PART_ID["neck"])
    same = 0
    for seed in range(20):
        drawn = {kind: _quadruped(kind, seed) for kind in QUADRUPEDS}
        covered = np.any([np.isin(parts, head) for _, parts in drawn.values()], axis=0)
        for kind in ("cow", "dog", "horse"):
            for a, b in zip(drawn["cat"], drawn[kind]):
                np.testing.assert_array_equal(a[~covered], b[~covered])
        same += (drawn["cat"][1][~covered] == drawn["sheep"][1][~covered]).all()
        assert len({d[1].tobytes() for d in drawn.values()}) == 5, "heads must differ"
    assert 1 <= same < 20, "a sheep is woolly most of the time, not always"


def test_context_follows_the_bias_knob():
    """Share of first objects shown in one of their own contexts = bias + (1 - bias) * chance, and no link at bias 0."""
    rng = np.random.default_rng(0)
    previous = -1.
    for bias in (0., .3, .6, .9, 1.):
        draws = [choose_classes(rng, True, bias) for _ in range(4000)]
        own = np.mean([context in OBJECTS[names[0]].contexts for context, names in draws])
        chance = np.mean([len(set(OBJECTS[names[0]].contexts)) / len(CONTEXTS) for _, names in draws])
        assert own == pytest.approx(bias + (1 - bias) * chance, abs=.03)     # 4 standard errors of 4000 draws
        boats = [context == "water" for context, names in draws if names[0] == "boat"]
        lift = np.mean(boats) - np.mean([context == "water" for context, _ in draws])
        assert lift > previous - .05
        previous = lift
        if bias == 0:
            assert abs(lift) < .1
        if bias == 1:
            assert np.mean(boats) == 1 and own == 1


def test_companions_follow_the_bias_knob():
    rng = np.random.default_rng(1)
    share = {}
    for bias in (0., 1.):
        rest = [(context, n) for context, names in (choose_classes(rng, False, bias) for _ in range(3000)) for n in names[1:]]
        indoor = [n for context, n in rest if context == "indoor"]
        share[bias] = np.mean([n in ("sofa", "chair", "tvmonitor", "bottle") for n in indoor])
    assert share[1.] > .3 > share[0.] + .05


@pytest.mark.parametrize("arguments, word", [((0, "test", 0), "split"), ((-1, "train", 0), "seed"), ((0, "train", -2), "index")])
def test_unknown_samples_are_refused(arguments, word):
    with pytest.raises(ValueError, match=word):
        draw_sample(*arguments)


def test_bias_outside_its_range_is_refused():
    with pytest.raises(ValueError, match="bias: found 1.5"):
        draw_sample(0, "train", 0, bias=1.5)


# ---------------------------------------------------------------------- on disk
def _tree(root) -> dict[str, bytes]:
    return {str(f.relative_to(root)): f.read_bytes() for f in root.rglob("*") if f.is_file()}


def test_trees_are_identical_whatever_the_process_count_and_resume(tmp_path):
    a = build_toyvoc(tmp_path / "a", 40, 20, 10, seed=8, processes=1, progress=False)
    b = build_toyvoc(tmp_path / "b", 40, 20, 10, seed=8, processes=2, progress=False)
    assert _tree(a) == _tree(b)
    assert len(_tree(a)) == 70 * 6 + 3 + 1
    (b / "Annotations" / "toy_val_000003.xml").unlink()         # an interrupted sample: its annotation comes last
    (b / "JPEGImages" / "toy_val_000003.jpg").write_bytes(b"half a pict")
    build_toyvoc(b, 40, 20, 10, seed=8, progress=False)
    assert _tree(a) == _tree(b)
    small = build_toyvoc(tmp_path / "c", 10, 5, 0, seed=8, progress=False)
    build_toyvoc(small, 40, 20, 10, seed=8, progress=False)     # a larger build extends a smaller one
    assert _tree(a) == _tree(small)


def test_two_seeds_are_never_mixed(tmp_path):
    build_toyvoc(tmp_path / "a", 2, 1, 0, seed=1, progress=False)
    with pytest.raises(ValueError, match="toyvoc.json: seed: found 1, expected 2"):
        build_toyvoc(tmp_path / "a", 2, 1, 0, seed=2, progress=False)
    with pytest.raises(ValueError, match="bias: found 0.9, expected 0.1"):
        build_toyvoc(tmp_path / "a", 2, 1, 0, seed=1, bias=.1, progress=False)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds files but no toyvoc.json"):
        build_toyvoc(tmp_path / "other", 2, 1, 0, progress=False)
    with pytest.raises(ValueError, match="expected 0 or more"):
        build_toyvoc(tmp_path / "b", -2, 1, 0, progress=False)


def test_the_reader_gives_back_what_was_drawn(tmp_path):
    root = build_toyvoc(tmp_path / "a", 6, 0, 0, seed=5, progress=False)
    data = VOC(root, "train", truth=("mask", "instances", "parts", "contexts"))
    for i in range(6):
        drawn, read = draw_sample(5, "train", i), data[i]
        for field in ("mask", "instances", "parts", "contexts"):
            np.testing.assert_array_equal(np.asarray(getattr(read, field)), getattr(drawn, field))
        np.testing.assert_array_equal(read.labels.numpy(), drawn.labels)
        error = np.abs(read.image.permute(1, 2, 0).numpy().astype(float) - drawn.image).mean()
        assert error < 6, "JPEG changes grey values by a few units"
        top = ElementTree.parse(root / "Annotations" / f"{read.name}.xml")
        assert top.findtext("context") == drawn.context


def test_statistics_count_what_is_on_disk(tmp_path):
    root = build_toyvoc(tmp_path / "a", 30, 0, 0, seed=5, progress=False)
    drawn, found = [draw_sample(5, "train", i) for i in range(30)], statistics(root, "train")
    assert found["pictures"] == 30
    assert found["objects_per_picture"] == pytest.approx(np.mean([len(s.objects) for s in drawn]), abs=1e-3)
    assert found["pictures_per_class"]["person"] == sum(s.labels[14] for s in drawn)
    objects = [o for s in drawn for o in s.objects]
    assert found["occluded_share"] == pytest.approx(np.mean([o.occluded >= .15 for o in objects]), abs=1e-3)
