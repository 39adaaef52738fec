"""The demo: `python -m lit_did.demo` trains a real language model with DPO and shows its DID before and after."""
