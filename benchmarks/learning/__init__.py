"""What little text is worth: tokens per step against labelled tokens and minutes, lever by lever."""
