"""What gradient selection has to beat, behind the same `select`.

    rds          cosine of position-weighted mean hidden states (`less.embeddings`)          one forward pass
    bm25         words that rows and targets share (`bm25`)                                  no model
    length       supervised tokens, most first (`orders`)                                    no model
    perplexity   loss of the base model on the row's reply, highest first (`orders`)         one forward pass
    random       (`orders`)                                                                  no model

Each fills the same score matrix, rows × subtasks; `length`, `perplexity` and `random` do not look at the targets.
"""
