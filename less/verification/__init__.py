"""What a store's numbers are worth, on this store and this model.

audit          `verify`: a sample, recomputed; statistics; the certificate
sampling       which rows, against which targets
recompute      the slow reference beside the fast path and beside what the store holds
certificate    the findings in numbers, in words, and against bounds
contamination  rows of the pool that near-duplicate a target
checksums      every file, with a bar
"""
