"""The judge: what its labels cost, and what its drafts gain and lose."""
