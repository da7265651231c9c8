"""The native kernels: the codec's arithmetic in C++, one library per instruction set, beside the torch reference."""
