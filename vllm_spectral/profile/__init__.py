"""The profile: everything that calibration learned about one model, in one verified safetensors file."""
