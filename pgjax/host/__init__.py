"""The side of a run that prints, writes files and reads clocks: runner, store, checkpoints, devices, loggers."""
