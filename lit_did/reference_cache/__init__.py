"""A reference's answers on disk: fingerprint (what they belong to), storage (files), precompute (a run)."""
