"""Every tolerance of the tests, each with its reason."""

ORTHOGONAL = 1e-5
"""Rotating there and back: two float64 products rounded to float32 once each."""

ATTENTION = 2e-5
"""Tiled against dense attention on the same decoded vectors: float32 sums in another order."""

CODING_GAIN = 1.25
"""Measured error over the error that the codebooks predict: the data is normal, the sample finite, and seven-bit
scales cost a few per cent."""

WRONG_ROTATION = 4.0
"""How much worse a wrong rotation must be before the test counts it as seen; measured: more than ten times."""

KERNEL_FLOAT = 5e-6
"""Kernels that multiply in float32 against the float64 reference on the same bytes, norm of the difference over norm: some
hundred products per score, softmax weights good to 2e-7, sums over a thousand positions. Measured: 1e-6."""

KERNEL_BF16 = 1.5e-2
"""Kernels that multiply in bf16 (8 bits of mantissa), likewise: a query and a weight are rounded to 2^-9 of themselves. The
sample's largest scores are about 6, so that they move by 0.01 and with them the outputs. Measured: 5e-3."""

KERNEL_INT8 = 4e-2
"""Kernels that multiply bytes, likewise: a query is rounded to 1/127 of its largest channel, levels to 1/127 of the largest
level, and the weights of a tile to 1/254 of the largest. Measured: 2e-2, up to 3e-2 for odd shapes."""
