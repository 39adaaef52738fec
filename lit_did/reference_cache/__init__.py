"""A reference's last hidden states on disk: fingerprint (what they belong to), storage (files), precompute (a run)."""
