"""The drafter seam and the drafter families, one file each."""
