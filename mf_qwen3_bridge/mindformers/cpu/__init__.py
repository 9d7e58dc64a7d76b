"""Stand-ins for the operators that only Ascend has, so that the networks run on a CPU."""
