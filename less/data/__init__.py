"""Data in, tokens out: rows, the conversations in them, which of their tokens carry loss, batches.

records        rows of a file, kept as they are; `write_selected` puts them back with columns added
conversations  the chat that a row holds, in any of the usual layouts
rendering      its tokens, and which of them are supervised
batching       rows to tensors
targets        the examples of the wanted capability, in subtasks
"""

from less.data.batching import Batch, BatchBudget, collate, plan_batches
from less.data.conversations import REASONS, Conversation, RowProblem, conversation_of
from less.data.records import Record, Source, open_source
from less.data.rendering import RenderConfig, Rendered, Renderer
from less.data.targets import SkippedRow, TargetSet, load_targets
from less.data.writing import write_lines, write_selected

__all__ = [
    "REASONS",
    "Batch",
    "BatchBudget",
    "Conversation",
    "Record",
    "RenderConfig",
    "Rendered",
    "Renderer",
    "RowProblem",
    "SkippedRow",
    "Source",
    "TargetSet",
    "collate",
    "conversation_of",
    "load_targets",
    "open_source",
    "plan_batches",
    "write_lines",
    "write_selected",
]
