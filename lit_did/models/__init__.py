"""Language models of transformers, policy and reference: loading, reading batches, measuring without side effects."""
