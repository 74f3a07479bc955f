"""Run the Triton form of the exact DenseCRF through the interpreter: `python triton_dense_crf.py in out`.

Both are safetensors files: name.unary, name.image -> name. The caller sets TRITON_INTERPRET=1.
"""

import sys

from safetensors.torch import load_file, save_file

from wsss_lib.kernels.dense_crf import dense_crf

given, out = load_file(sys.argv[1]), {}
for name in sorted({key.split(".")[0] for key in given}):
    unary, image = given[f"{name}.unary"], given[f"{name}.image"]
    out[name] = dense_crf(unary, image, (3, 3), (20, 60, 4), 2, "exact", "triton").contiguous()
save_file(out, sys.argv[2])
