"""`nf4_linear` on CUDA: decode in one launch, multiply with cuBLAS.

The low-rank product is written first and the base product is added to it by the
GEMM itself (beta = 1), so y is written once more than a plain linear writes it
and never read apart. The decoded weight is a temporary of the caching
allocator: it is as large as one layer, whatever the model.
"""

from functools import partial

from qlora_kit.ops.nf4_dequantize import cuda as nf4_dequantize
from qlora_kit.ops.nf4_linear import reference

serves = nf4_dequantize.serves
forward = partial(reference.forward, decode=nf4_dequantize.dequantize)
backward = partial(reference.backward, decode=nf4_dequantize.dequantize)
