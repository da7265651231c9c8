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
