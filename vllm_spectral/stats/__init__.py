"""What is counted: second moments, fidelity, bytes. Plain tensors and numbers in, plain numbers out."""
