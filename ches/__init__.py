"""CHES: which preference pairs will make DPO push probability off the answer it should prefer (Razin et al. 2025).

Nothing is implemented yet; the name is reserved, so that the layout `cli → ches → less → datastore` holds.
"""

__all__: list[str] = []
