"""ACR's two alignment terms by loops in float64, and the queries and keys of a golden ViT-B.

`GoldenViT` makes its weights from their names: nothing of the network is stored.
"""

import torch
import torch.nn.functional as F

from .naive_attention import attention_map, formula_weight


def consistency(q1, k1, q2, k2, permutation, prefix=1):
    """q, k (L, B, H, N, d); patch i of view 1 lies at patch permutation[i] of view 2 -> (class, patch) terms."""
    blocks, batch, _heads, tokens, d = q1.shape
    patches = tokens - prefix
    class_total = patch_total = 0.0
    for block in range(blocks):
        for b in range(batch):
            one = mean_attention(q1[block, b], k1[block, b], d**-0.5)
            two = mean_attention(q2[block, b], k2[block, b], d**-0.5)
            for j in range(patches):
                to = prefix + int(permutation[j])
                class_total += abs(one[0, prefix + j] - two[0, to])
                for i in range(patches):
                    patch_total += abs(one[prefix + i, prefix + j] - two[prefix + int(permutation[i]), to])
    count = blocks * batch * patches
    return class_total / count, patch_total / (count * patches)


def mean_attention(q, k, scale):
    """q, k (H, N, d) -> the mean over the heads, (N, N)."""
    return sum(attention_map(q[h], k[h], scale) for h in range(len(q))) / len(q)


def written_out(q1, k1, q2, k2, permutation, prefix=1):
    """The same two terms as `consistency`, by matrices, for autograd: the gradients' reference."""
    one, two = ((q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1).mean(2) for q, k in ((q1, k1), (q2, k2)))
    aligned = two[..., prefix + permutation]  # (L, B, N, N) -> (L, B, N, M)
    class_term = (one[:, :, 0, prefix:] - aligned[:, :, 0]).abs().mean()
    return class_term, (one[:, :, prefix:, prefix:] - aligned[:, :, prefix + permutation]).abs().mean()


class GoldenViT:
    """ViT-B/16 of the golden vectors, as far as the last block's queries and keys; float64."""

    def __init__(self, dim=768, depth=12, heads=12, patch=16, grid=24):
        self.dim, self.depth, self.heads, self.patch, self.grid = dim, depth, heads, patch, grid
        self.weights = {}

    def weight(self, name, *shape):
        if name not in self.weights:
            self.weights[name] = torch.from_numpy(formula_weight(f"pretrained.model.{name}", shape))
        return self.weights[name]

    def linear(self, x, name, width):
        return F.linear(x, self.weight(f"{name}.weight", width, x.shape[-1]), self.weight(f"{name}.bias", width))

    def norm(self, x, name):
        affine = self.weight(f"{name}.weight", self.dim), self.weight(f"{name}.bias", self.dim)
        return F.layer_norm(x, (self.dim,), *affine, 1e-6)

    def embed(self, images):
        """(B, 3, H, W) -> (B, N, dim): positions of 24 x 24 patches resized to the picture's, bilinear."""
        kernel = self.weight("patch_embed.proj.weight", self.dim, 3, self.patch, self.patch)
        patches = F.conv2d(images, kernel, self.weight("patch_embed.proj.bias", self.dim), stride=self.patch)
        positions = self.weight("pos_embed", 1, 1 + self.grid**2, self.dim)
        class_token = (self.weight("cls_token", 1, 1, self.dim) + positions[:, :1]).expand(len(images), -1, -1)
        # (1, grid*grid, dim) -> (1, dim, grid, grid)
        positions = positions[:, 1:].transpose(1, 2).unflatten(2, (self.grid, self.grid))
        positions = F.interpolate(positions, patches.shape[2:], mode="bilinear", align_corners=False)
        patches = (patches + positions).flatten(2).transpose(1, 2)  # (B, dim, h, w) -> (B, h*w, dim)
        return torch.cat([class_token, patches], dim=1)

    def queries_and_keys(self, images):
        """-> two lists of `depth` tensors (B, H, N, d)."""
        x, queries, keys = self.embed(images), [], []
        for block in (f"blocks.{layer}" for layer in range(self.depth)):
            qkv = self.linear(self.norm(x, f"{block}.norm1"), f"{block}.attn.qkv", 3 * self.dim)
            # (B, N, 3*dim) -> (3, B, H, N, d)
            q, k, v = qkv.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            queries.append(q)
            keys.append(k)
            if len(keys) == self.depth:
                return queries, keys
            out = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1) @ v
            out = out.transpose(1, 2).flatten(2)  # (B, H, N, d) -> (B, N, dim)
            x = x + self.linear(out, f"{block}.attn.proj", self.dim)
            hidden = F.gelu(self.linear(self.norm(x, f"{block}.norm2"), f"{block}.mlp.fc1", 4 * self.dim))
            x = x + self.linear(hidden, f"{block}.mlp.fc2", self.dim)
