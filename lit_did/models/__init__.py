"""Language models of transformers, policy and reference: loading, running, measuring without side effects."""
