"""Are the weights right? Comparison, statistics, the reference forward pass, errors per layer."""
