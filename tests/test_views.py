"""Aligned views: pixels against coordinates worked by hand, patches against pixels, on grids of any shape."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from reference import naive_acr as naive

from wsss_lib.data.views import VIEWS, permutation, transform

GRIDS = [(1, 1), (1, 4), (3, 1), (2, 3), (4, 4), (5, 3)]
TURNED = ("rot90", "rot270", "transpose")  # width and height swap


def test_views_worked_by_hand():
    picture = torch.tensor([[1, 2, 3], [4, 5, 6]])
    expected = {
        "hflip": [[3, 2, 1], [6, 5, 4]],
        "vflip": [[4, 5, 6], [1, 2, 3]],
        "rot90": [[3, 6], [2, 5], [1, 4]],
        "rot180": [[6, 5, 4], [3, 2, 1]],
        "rot270": [[4, 1], [5, 2], [6, 3]],
        "transpose": [[1, 4], [2, 5], [3, 6]],
    }
    assert set(expected) == set(VIEWS)
    for view, pixels in expected.items():
        assert transform(picture, view).tolist() == pixels
        batch = transform(picture.expand(2, 3, 2, 3), view)
        assert batch.shape[:2] == (2, 3) and (batch == torch.tensor(pixels)).all()
    assert permutation("rot90", (2, 3)).tolist() == [4, 2, 0, 5, 3, 1]  # 1 is at 4, 2 at 2, 3 at 0, ...


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("view", VIEWS)
def test_patches_of_the_view_put_back_are_the_picture(view, grid):
    """As tokens and as pixels: patch i of the picture, turned, is patch permutation[i] of the view."""
    order = permutation(view, grid)
    assert order.dtype == torch.long and order.tolist() == naive.permutation(view, grid)
    tokens = torch.rand(2, 4, *grid)  # (B, D, h, w)
    seen = transform(tokens, view).flatten(2)  # (B, D, h*w)
    assert torch.equal(seen[..., order].unflatten(2, grid), tokens)
    picture, size = torch.rand(1, 3, 4 * grid[0], 4 * grid[1]), (4, 4)
    # (1, 3*4*4, h*w) -> (3, 4, 4, h*w) -> (h*w, 3, 4, 4)
    patches, of_view = (F.unfold(x, 4, stride=4)[0].unflatten(0, (3, *size)).movedim(-1, 0)
                        for x in (picture, transform(picture, view)))
    assert torch.equal(of_view[order], transform(patches, view))


@pytest.mark.parametrize("view", VIEWS)
def test_every_token_has_one_place(view):
    for grid in itertools.product(range(1, 6), repeat=2):
        assert permutation(view, grid).sort().values.tolist() == list(range(grid[0] * grid[1]))
        other = grid[::-1] if view in TURNED else grid
        assert transform(torch.zeros(grid), view).shape == other
    back = {"rot90": "rot270", "rot270": "rot90"}.get(view, view)
    there, again = permutation(view, (2, 3)), permutation(back, (3, 2) if view in TURNED else (2, 3))
    assert again[there].tolist() == list(range(6))


def test_unknown_view():
    for call in (lambda: transform(torch.zeros(2, 2), "rot45"), lambda: permutation("rot45", (2, 2))):
        with pytest.raises(ValueError, match="view: found 'rot45', expected one of hflip, vflip, rot90"):
            call()
