"""From scores to the rows that are kept: pure functions over arrays.

    walk down an order of the candidates, take each row unless a rule forbids it, stop when the budget is full

choosing    `choose`: the walk that a config asks for; `Choice`, with why each row was taken
config      `SelectConfig`: the settings, in Python, TOML and words of a command line
candidates  the rows: scores, labels, tokens, digests, features; scores with negative targets
budget      how much: rows or tokens
orders      whose turn it is: by score, columns of scores, values of a column, pairs of values
diversity   orders that prefer what is unlike the rows taken: MMR, facility location
rules       what forbids a row: negative targets, exact and near-duplicates, caps
plans       a config as orders, rules and quotas
walk        the walk itself
similarity  how like a row is to those taken, in blocks
reference   `choose_ref`, the slow twin of it all

Scores come from `less.influence`, rows are written by `less.ranking`.
"""

from less.selection.budget import num_to_select, select_tokens
from less.selection.candidates import Candidates, Labels
from less.selection.choosing import Choice, choose
from less.selection.config import Amount, SelectConfig
from less.selection.orders import ranks, select_round_robin, select_top
from less.selection.rules import AWAY

__all__ = [
    "AWAY",
    "Amount",
    "Candidates",
    "Choice",
    "Labels",
    "SelectConfig",
    "choose",
    "num_to_select",
    "ranks",
    "select_round_robin",
    "select_tokens",
    "select_top",
]
