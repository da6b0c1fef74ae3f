"""Where data comes from and how it becomes batches: sources, tokenizers, corpora, pipelines."""
