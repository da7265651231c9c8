"""The spectral codec: rotation, bit allocation, layout and attention in the rotated domain.

This package imports torch and nothing else, so that it can be read, tested and ported
(to a kernel, to another engine) on its own. What flows through it, in order:

``rotation`` -> ``allocation`` -> ``codebook`` -> ``layout`` -> ``packing`` -> ``quantizer`` -> ``attention``
"""
