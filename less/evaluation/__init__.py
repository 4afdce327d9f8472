"""The experiment that tells: train on what each method selects, and measure the target.

plan        the rows that each method selects, at each budget: one trial for each distinct set of rows and seed
trial       one trial: a fresh adapter trained on some rows; then losses and answers on held-out rows
summary     means over seeds, differences from random, intervals, the quantile test
experiment  `evaluate`: all of it, resumable
"""
