"""The page of an audit: one HTML file that needs nothing else. `pictures` draws what it shows."""

from lit_did.audit.page.rendering import render

__all__ = ["render"]
