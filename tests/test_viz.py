"""What the pictures show: sizes, colours, names and numbers."""

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from wsss_lib import viz
from wsss_lib.data.voc import VOC_CLASSES, voc_palette


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


@pytest.fixture
def image():
    return np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)


def texts(ax):
    return [text.get_text() for text in ax.texts]


def test_denormalize_undoes_normalisation():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (2, 5, 4, 3), generator=generator, dtype=torch.uint8)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    images = (pixels / 255 - torch.tensor(mean)) / torch.tensor(std)
    back = viz.denormalize(images.permute(0, 3, 1, 2), mean, std)
    assert back.dtype == np.uint8
    np.testing.assert_array_equal(back, pixels.numpy())
    assert viz.denormalize(torch.full((1, 3, 1, 1), 99.0), mean, std).tolist() == [[[[255, 255, 255]]]]
    with pytest.raises(ValueError, match=r"images: found shape \(3, 4, 4\)"):
        viz.denormalize(torch.zeros(3, 4, 4), mean, std)


def test_masks_wear_the_colours_of_voc():
    colors = viz.color_mask(torch.tensor([[0, 1, 15], [20, 255, 0]]))
    assert colors.shape == (2, 3, 3) and colors.dtype == np.uint8
    assert colors[0].tolist() == [[0, 0, 0], [128, 0, 0], [192, 128, 128]]
    assert colors[1].tolist() == [[0, 64, 128], [224, 224, 192], [0, 0, 0]]
    for bad in (np.zeros((2, 2)), np.zeros((1, 2, 2), int), np.full((2, 2), 300), np.full((2, 2), -1)):
        with pytest.raises(ValueError, match="mask: found"):
            viz.color_mask(bad)


def test_a_map_leaves_the_picture_alone_where_it_is_zero(image):
    np.testing.assert_array_equal(viz.overlay_map(image, torch.zeros(3, 4)), image)
    half = np.zeros((12, 16), np.float32)
    half[:, 8:] = 1
    over = viz.overlay_map(image, half, alpha=1.0)
    assert over.shape == image.shape and over.dtype == np.uint8
    np.testing.assert_array_equal(over[:, :8], image[:, :8])
    hottest = np.round(np.array(matplotlib.colormaps[viz.HEAT](1.0)[:3]) * 255)
    assert (over[:, 8:] == hottest).all()  # alpha 1: nothing of the picture is left
    assert not (viz.overlay_map(image, half)[:, 8:] == hottest).all()  # by default it shines through


def test_heat_rises_in_brightness_with_the_map(image):
    grey = np.full((1, 101, 3), 90, np.uint8)
    over = viz.overlay_map(grey, torch.linspace(0.5, 1, 101)[None])
    brightness = over[0].astype(float) @ [0.299, 0.587, 0.114]
    assert (np.diff(brightness) > -1).all() and brightness[-1] > brightness[0] + 50


def test_maps_are_resized_bilinearly(image):
    small = torch.tensor([[0.0, 1.0]])
    full = torch.nn.functional.interpolate(small[None, None], (12, 16), mode="bilinear")[0, 0]
    np.testing.assert_array_equal(viz.overlay_map(image, small), viz.overlay_map(image, full))


def test_bad_maps_are_refused(image):
    for bad in (torch.full((2, 2), 1.5), torch.full((2, 2), -0.1), torch.full((2, 2), float("nan"))):
        with pytest.raises(ValueError, match=r"map: found .*normalised"):
            viz.overlay_map(image, bad)
    with pytest.raises(ValueError, match=r"map: found \(1, 2, 2\)"):
        viz.overlay_map(image, torch.zeros(1, 2, 2))
    for bad in (image / 255, image.transpose(2, 0, 1), image[..., 0]):
        with pytest.raises(ValueError, match="image: found"):
            viz.overlay_map(bad, torch.zeros(2, 2))


def test_overlay_mask(image):
    mask = np.zeros((12, 16), np.uint8)
    mask[:4], mask[4:6] = 15, 255
    over = viz.overlay_mask(image, mask, alpha=0.5)
    np.testing.assert_array_equal(over[6:], image[6:])
    assert (over[4:6] == 255).all()
    np.testing.assert_allclose(over[:4], (image[:4] + voc_palette()[15].astype(float)) / 2, atol=0.51)
    with pytest.raises(ValueError, match=r"mask: found shape \(11, 16\)"):
        viz.overlay_mask(image, mask[1:])


def test_grid_places_pictures_and_titles(image):
    wide = np.zeros((4, 40, 3), np.uint8)
    rows = [[image, None, wide], [image / 255]]
    figure = viz.show_grid(rows, ["a", "b", "c"], ["first", "second"], width=9)
    assert len(figure.axes) == 6 and figure.get_size_inches()[0] == 9
    shown = [bool(ax.images) for ax in figure.axes]
    assert shown == [True, False, True, True, False, False]
    np.testing.assert_array_equal(figure.axes[2].images[0].get_array(), wide)
    assert [ax.get_title() for ax in figure.axes] == ["a", "b", "c", "", "", ""]
    assert [figure.axes[i].get_ylabel() for i in (0, 3)] == ["first", "second"]
    assert all(len(ax.get_xticks()) == len(ax.get_yticks()) == 0 for ax in figure.axes)
    cells = viz.show_grid([[image, image], [image]], [["a", "b"], ["c"]])
    assert [ax.get_title() for ax in cells.axes] == ["a", "b", "c", ""]


def test_bad_grids_are_refused(image):
    for rows, titles, row_titles, message in (
        ([], None, None, "found no picture"),
        ([[]], None, None, "found no picture"),
        ([[image]], ["a", "b"], None, "found 2, expected one for each of 1"),
        ([[image]], [["a"], ["b"]], None, "expected 1"),
        ([[image]], None, ["a", "b"], "expected 1"),
    ):
        with pytest.raises(ValueError, match=message):
            viz.show_grid(rows, titles, row_titles)


def show_maps_data():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, 24, 32, 3), dtype=np.uint8)
    masks = torch.zeros(2, 24, 32, dtype=torch.long)
    masks[0, 4:12, 4:12], masks[0, 14:20, 20:30], masks[1, 5:15, 10:20] = 8, 12, 15
    labels = torch.zeros(2, 20)
    labels[0, 7] = labels[0, 11] = labels[1, 14] = 1
    return images, masks, torch.rand(2, 20, 6, 8), labels


def test_show_maps_names_what_it_shows():
    images, masks, maps, labels = show_maps_data()
    figure = viz.show_maps(images, masks, maps, labels, predictions=masks * 0)
    assert [ax.get_title() for ax in figure.axes] == [
        "picture", "truth", "map: cat", "map: dog", "prediction",
        "picture", "truth", "map: person", "", "prediction",
    ]  # fmt: skip
    assert sorted(texts(figure.axes[1])) == ["cat", "dog"] and texts(figure.axes[6]) == ["person"]
    assert texts(figure.axes[4]) == []  # nothing is predicted
    dog, truth = (figure.axes[i].images[0].get_array() for i in (3, 6))
    np.testing.assert_array_equal(dog, viz.overlay_map(images[0], maps[0, 11]))
    np.testing.assert_array_equal(truth, viz.overlay_mask(images[1], masks[1]))


def test_show_maps_without_masks_and_with_few_classes():
    images, masks, maps, labels = show_maps_data()
    figure = viz.show_maps([images[0], images[1][:20]], None, list(maps), labels, max_classes=1)
    titles = [ax.get_title() for ax in figure.axes]
    assert titles == ["picture (+1 more)", "map: cat", "picture", "map: person"]
    with pytest.raises(ValueError, match=r"found \[2, 2, 2, 1\]"):
        viz.show_maps(images, masks[:1], maps, labels)


def test_names_stand_on_their_regions():
    mask = np.zeros((60, 80), np.int64)
    mask[5:25, 10:30], mask[40:55, 40:75], mask[0:2, 78:80], mask[30:32] = 8, 3, 12, 255
    ax = viz.show_grid([[viz.color_mask(mask)]]).axes[0]
    viz.name_regions(ax, mask)
    places = {text.get_text(): map(int, text.get_position()) for text in ax.texts}
    at = {name: mask[y, x] for name, (x, y) in places.items()}
    assert set(at) == {"cat", "bird", "dog"} and (at["cat"], at["bird"]) == (8, 3)
    with pytest.raises(ValueError, match="class id: found 30"):
        viz.name_regions(ax, mask * 0 + 30)


def test_class_names():
    names = [viz.class_name(i) for i in (0, 1, 20, 255)]
    assert names == ["background", "aeroplane", "tvmonitor", "ignored"]
    for bad in (21, -1):
        with pytest.raises(ValueError, match="class id"):
            viz.class_name(bad)


def test_palette_legend():
    ax = viz.palette_legend([0, 1, 15, 20, 3, 4, 5, 255]).axes[0]
    names = ["background", "aeroplane", "person", "tvmonitor", "bird", "boat", "bottle", "ignored"]
    assert texts(ax) == names
    assert len(ax.patches) == 8
    np.testing.assert_allclose(ax.patches[2].get_facecolor()[:3], np.array([192, 128, 128]) / 255)


def test_threshold_curve_marks_the_best_and_the_fixed_point():
    thresholds = np.linspace(0, 1, 11)
    miou = 0.6 - (thresholds - 0.3) ** 2
    figure = viz.threshold_curve(thresholds, miou, fixed=0.5, label="CAM")
    ax = figure.axes[0]
    assert texts(ax) == ["60.0"]
    assert viz.threshold_curve(thresholds, torch.from_numpy(miou / 2), ax=ax, label="other") is figure
    legend = [text.get_text() for text in ax.get_legend().get_texts()]
    assert legend[0] == "CAM: best 60.0 at 0.30 (oracle), 56.0 at fixed 0.50"
    assert legend[1:] == ["other: best 30.0 at 0.30 (oracle)"]
    curves = [line for line in ax.lines if len(line.get_xdata()) == 11]
    assert [line.get_color() for line in curves] == list(viz.LINE_COLORS[:2])
    assert curves[0].get_marker() != curves[1].get_marker()
    assert ax.get_ylim()[0] == 0 and ax.get_ylim()[1] > 60
    with pytest.raises(ValueError, match=r"\(11,\).*\(10,\)"):
        viz.threshold_curve(thresholds, miou[1:])


def test_bars_write_their_numbers():
    ax = viz.bars({"head": 0.81, "body": 0.4, "tail": float("nan")}, title="Coverage").axes[0]
    assert texts(ax) == ["81.0", "40.0", "no pixel"]
    np.testing.assert_allclose([bar.get_width() for bar in ax.patches], [81, 40, 0])
    assert [label.get_text() for label in ax.get_yticklabels()] == ["head", "body", "tail"]
    assert ax.get_ylim()[0] > ax.get_ylim()[1]  # the first on top
    with pytest.raises(ValueError, match="found none"):
        viz.bars({})
    assert texts(viz.bars({"tail": float("nan")}).axes[0]) == ["no pixel"]


def test_heat_table_leaves_nan_blank():
    matrix = np.array([[0.25, np.nan], [0.0, 1.0], [np.nan, np.nan]])
    ax = viz.heat_table(matrix, VOC_CLASSES[:3], ["water", "sky"]).axes[0]
    numbers = {text.get_position(): text.get_text() for text in ax.texts}
    assert numbers == {(0, 0): "25", (0, 1): "0", (1, 1): "100"}
    assert [label.get_text() for label in ax.get_xticklabels()] == ["water", "sky"]
    with pytest.raises(ValueError, match=r"found shape \(3, 2\), expected \(2, 3\)"):
        viz.heat_table(matrix, ["a", "b"], ["c", "d", "e"])


def test_every_figure_can_be_drawn(image, tmp_path):
    images, masks, maps, labels = show_maps_data()
    figures = [
        viz.show_maps(images, masks, maps, labels, masks),
        viz.threshold_curve([0, 0.5, 1], [0.1, 0.2, 0.1], 0.4),
        viz.heat_table(np.full((2, 2), np.nan), ["a", "b"], ["c", "d"]),
    ]
    for i, figure in enumerate(figures):
        figure.savefig(tmp_path / f"{i}.png")
        assert plt.imread(tmp_path / f"{i}.png").std() > 0.01
