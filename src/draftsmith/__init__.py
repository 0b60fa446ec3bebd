"""draftsmith: train draft heads for speculative decoding, prove them lossless, export them."""

__version__ = "0.1.0"
