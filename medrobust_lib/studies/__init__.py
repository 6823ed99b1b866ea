"""Studies: a grid of models, data sets and steps in one file; how it is run, resumed, summed up and compared."""
